"""A number that is not finite becomes no packed network, no file, no prediction and no passed verification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_variables
from packed_file import DESCRIBED, SETTINGS, SHAPE, packed_of, script

from bnn_jax.errors import RunError, UsageError
from bnn_jax.models.build import build_model
from bnn_jax.packed import PackedModel, freeze, load, save, to_stablehlo, verify
from bnn_jax.packed.artifact import rounded
from bnn_jax.packed.tflite.model import tflite_bytes

METADATA = {name: DESCRIBED[name] for name in ("image_shape", "mean", "std")}
KINDS = {"NaN": np.nan, "infinite": np.inf, "minus infinity": -np.inf}
PLACES = {
    "params/dense2/latent_kernel": "a latent weight",
    "batch_stats/norm2/var": "a running variance",
    "params/head/latent_kernel": "a latent weight of the last layer",
    "batch_stats/norm1/mean": "a running mean, behind a threshold",
}


@pytest.fixture(scope="module")
def model():
    return build_model(num_classes=4, **SETTINGS)


@pytest.fixture(scope="module")
def variables(model):
    return random_variables(model, SHAPE)


@pytest.fixture(scope="module")
def packed(model, variables):
    return freeze(model, variables, SHAPE)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (3, *SHAPE)).astype(np.uint8)


def broken(tree, place, value=np.nan):
    """`tree` with a value in the first number of the leaf at a place; "" is the first leaf of floating point."""

    def change(path, leaf):
        nonlocal found
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if found or not name.startswith(place) or leaf.dtype != np.float32:
            return leaf
        found = name
        return jnp.asarray(leaf).ravel().at[0].set(value).reshape(leaf.shape)

    found = ""
    tree = jax.tree_util.tree_map_with_path(change, tree)
    assert found
    return tree


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_state_is_not_frozen(place, kind, model, variables):
    told = rf"`variables` must be finite; got {place} \(1 (NaN|infinite) of \d+\); the run has diverged: take"
    with pytest.raises(ValueError, match=told):
        freeze(model, broken(variables, place, KINDS[kind]), SHAPE)


def test_a_finite_state_that_makes_a_gain_of_nan_is_not_frozen(model, variables):
    """A variance below zero, whose root the threshold behind it would hide."""
    with pytest.raises(ValueError, match="`variables` make 'norm1/gain' not finite; the run has diverged"):
        freeze(model, broken(variables, "batch_stats/norm1/var", -1.0), SHAPE)


def test_broken_packed_variables_are_not_saved(packed, tmp_path):
    path = tmp_path / "model.bnn.safetensors"
    with pytest.raises(ValueError, match=r"`variables` must be finite; got packed/.*/(gain|offset|scale|0) \(1 "):
        save(path, packed_of(broken(packed, "")))
    assert not path.exists()


def test_nan_is_not_rounded_to_float16(packed):
    with pytest.raises(UsageError, match=r"`float16` \(=True\) cannot hold nan, of packed/"):
        rounded(broken(packed, ""))


def test_an_accuracy_of_nan_is_not_saved(packed, tmp_path):
    """It would be no JSON."""
    with pytest.raises(UsageError, match=r"values are not JSON compliant.*; correct what describes"):
        save(tmp_path / "model", packed_of(packed), tested={"accuracy": float("nan")})


@pytest.fixture(scope="module")
def file(packed, tmp_path_factory):
    path = tmp_path_factory.mktemp("finite") / "model.bnn.safetensors"
    save(path, packed_of(packed))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_a_number_that_is_not_finite_is_not_loaded(kind, file, tmp_path):
    """Its hash is right: another program wrote it."""
    header, tensors = script.opened(file.read_bytes())
    start = header["numbers"]["data_offsets"][0]
    tensors = tensors[:start] + np.float32(KINDS[kind]).tobytes() + tensors[start + 4 :]
    path = tmp_path / "broken.bnn.safetensors"
    path.write_bytes(script.checksummed(header, tensors))
    with pytest.raises(RunError, match=r"broken.bnn.safetensors .* must be finite; got packed/.* \(1 .*\); copy it"):
        load(path)


@pytest.mark.parametrize("place", PLACES)
def test_a_broken_state_is_not_verified(place, model, variables, packed):
    with pytest.raises(ValueError, match=rf"`variables` must be finite; got {place}"):
        verify(model, broken(variables, place), packed, [])


def test_broken_packed_variables_are_not_verified(model, variables, packed):
    with pytest.raises(ValueError, match="`packed` must be finite; got packed/"):
        verify(model, variables, broken(packed, ""), [])


def test_logits_of_nan_differ_from_logits_of_nan(model, variables, packed, images):
    """Of the second of three images, in both networks: argmax finds the same place in both."""
    x = jnp.asarray(images, jnp.float32) / 128 - 1
    found = verify(model, variables, packed, [x.at[1, 0, 0, 0].set(jnp.nan)])
    assert not found.passed and np.isnan(found.largest_logit_difference)
    assert found.differing_predictions == 1


def test_broken_networks_are_not_exported(model, variables, packed):
    pytest.importorskip("flatbuffers", reason="the package flatbuffers is not installed")
    with pytest.raises(ValueError, match="`packed` must be finite; got packed/"):
        to_stablehlo(PackedModel(model, broken(packed, ""), METADATA))
    with pytest.raises(ValueError, match="`variables` must be finite; got batch_stats/norm2/var"):
        tflite_bytes(model, broken(variables, "batch_stats/norm2/var"), SHAPE)
    with pytest.raises(ValueError, match=r"`variables` make the constant '.*norm2.*' not finite"):
        tflite_bytes(model, broken(variables, "batch_stats/norm2/var", -1.0), SHAPE)


def test_a_network_whose_logits_are_not_finite_predicts_nothing(model, packed, images):
    """The class of NaN would be the first one, right in a tenth of ten classes."""
    good, bad = (PackedModel(model, tree, METADATA) for tree in (packed, broken(packed, "packed/head")))
    labels = np.zeros(len(images), np.int64)
    assert good.predict(images).shape == labels.shape
    for use in (bad.predict, lambda x: bad.accuracy([(x, labels)])):
        with pytest.raises(RunError, match=r"`logits` must be finite; got .*\d NaN of 12.*; the network is broken"):
            use(images)

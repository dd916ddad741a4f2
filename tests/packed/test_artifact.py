"""The file: what is in it, what comes back, what cannot be written.  What is refused: tests/packed/test_header.py."""

import hashlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_file import DESCRIBED, SETTINGS, SHAPE, TESTED, packed_of, script

from bnn_jax.data import Split, in_batches
from bnn_jax.errors import RunError, UsageError
from bnn_jax.models.build import build_model
from bnn_jax.packed import artifact, load, packed_structure, save
from bnn_jax.packed.artifact import rounded


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(0, 256, (5, *SHAPE)).astype(np.uint8)


def assert_same_bits(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_every_bit_comes_back(loaded, network):
    assert_same_bits(loaded.variables, network[1])
    assert (type(loaded.model), loaded.model.width, loaded.model.hidden_layers) == (type(network[0]), 8, 2)
    metadata = loaded.metadata
    assert {key: metadata[key] for key in DESCRIBED} == DESCRIBED
    assert metadata["model"] == SETTINGS
    assert (metadata["accounting"], metadata["tested"]) == ({"bits": 7}, TESTED)
    assert set(metadata["versions"]) == {"bnn_jax", "jax", "flax"}


def test_the_file_is_as_documented(path, network):
    """Written down again from the description of the format alone."""
    data = path.read_bytes()
    header, tensors = script.opened(data)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(network[1])]
    expected, start = b"", 0
    for name, dtype, code in (("words", "<u4", "U32"), ("thresholds", "<i4", "I32"), ("numbers", "<f4", "F32")):
        vector = np.concatenate([leaf.ravel() for leaf in leaves if leaf.dtype == np.dtype(dtype)])
        assert header[name] == {"dtype": code, "shape": [vector.size], "data_offsets": [start, start + 4 * vector.size]}
        start += 4 * vector.size
        expected += vector.astype(dtype).tobytes()
    assert tensors == expected
    assert len(data) - len(tensors) < 4096 and (len(data) - len(tensors)) % 8 == 0
    digest = header["__metadata__"]["sha256"]
    assert hashlib.sha256(data.replace(digest.encode(), b"0" * 64)).hexdigest() == digest
    assert all(isinstance(value, str) for value in header["__metadata__"].values())


def test_the_safetensors_package_reads_it(path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="the package safetensors is not installed")
    tensors = safetensors.load_file(path)
    assert list(tensors) and {name: a.dtype.name for name, a in tensors.items()} == {
        "words": "uint32",
        "thresholds": "int32",
        "numbers": "float32",
    }
    stored = b"".join(tensors[name].tobytes() for name in ("words", "thresholds", "numbers"))
    assert path.read_bytes().endswith(stored)


def test_save_returns_the_bytes_of_both_parts(tmp_path, network):
    header, tensors = save(tmp_path / "x", packed_of(network[1]))
    assert header + tensors == (tmp_path / "x").stat().st_size
    assert tensors == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(network[1]))


def test_predictions_are_those_of_the_packed_network(path, network, images):
    model, variables = network
    x = (images.astype(np.float32) - np.float32(DESCRIBED["mean"]).reshape(1, 1, 1, 2)) / np.float32(
        DESCRIBED["std"]
    ).reshape(1, 1, 1, 2)
    expected = jax.jit(lambda x: model.apply(variables, x, train=False)[0])(x)
    loaded = load(path)
    np.testing.assert_allclose(loaded.logits(images), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(loaded.predict(images), np.asarray(expected).argmax(1))
    labels = np.asarray(expected).argmax(1)
    labels[[1, 4]] = (labels[[1, 4]] + 1) % 4
    in_pairs = list(in_batches(Split(images, labels), 2))
    assert loaded.accuracy([(images, labels)]) == loaded.accuracy(in_pairs) == (3 / 5, 5)
    assert loaded._compiled._cache_size() == 2  # batches of 5 and of 2, the last of which is filled up


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (np.zeros((2, *SHAPE), np.float32), r"`images` \(=float32 of shape \(2, 6, 6, 2\)\) must be uint8 of shape"),
        (np.zeros(SHAPE, np.uint8), r"`images` \(=uint8 of shape \(6, 6, 2\)\) must be .* \(batch, 6, 6, 2\)"),
        (np.zeros((0, *SHAPE), np.uint8), r"`images` \(=uint8 of shape \(0, 6, 6, 2\)\)"),
        ([[1]], r"`images` \(=list of shape \(1, 1\)\)"),
    ],
)
def test_images_of_another_kind(loaded, wrong, text):
    with pytest.raises(ValueError, match=text):
        loaded.logits(wrong)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "labels", [np.zeros((5, 1), int), np.zeros(4, int), np.zeros(5), np.zeros((5, 4), int), np.array(0)]
)
def test_labels_of_another_kind(loaded, images, labels):
    """A column would be compared with every image: 25 for 5, an accuracy of 500 %."""
    with pytest.raises(ValueError, match=r"`batches` \(with labels .* must hold a whole number for each image, here 5"):
        loaded.accuracy([(images, labels)])


@pytest.mark.usefixtures("unchecked")
def test_labels_of_no_class_and_lists_of_labels(loaded, images):
    assert loaded.accuracy([(images, [0, 1, -1, 2, 3])])[1] == 4
    sentence = r"`batches` \(with the label 4\) must hold labels from 0 to 3, or below 0 where there is none"
    with pytest.raises(ValueError, match=sentence):
        loaded.accuracy([(images, np.array([0, 1, 4, 2, 3]))])


def test_descriptions_in_numpy_and_jax_are_written(network, tmp_path):
    own = {"mean": np.float32([100, 90]), "std": jnp.array([50.0, 60.0])}
    save(tmp_path / "net.bnn.safetensors", packed_of(network[1], **own))
    found = load(tmp_path / "net.bnn.safetensors").metadata
    assert (tuple(found["mean"]), tuple(found["std"])) == ((100.0, 90.0), (50.0, 60.0))


def test_float16_halves_the_real_rest(path, network, tmp_path):
    half = tmp_path / "half.bnn.safetensors"
    save(half, packed_of(network[1]), accounting={"bits": 7}, tested=TESTED, float16=True)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(network[1]) if leaf.dtype == jnp.float32)
    assert script.opened(half.read_bytes())[0]["numbers"]["dtype"] == "F16"
    assert len(script.opened(path.read_bytes())[1]) - len(script.opened(half.read_bytes())[1]) == 2 * numbers
    loaded = load(half)
    assert_same_bits(loaded.variables, rounded(network[1]))
    for exact, kept in zip(jax.tree.leaves(network[1]), jax.tree.leaves(loaded.variables)):
        nearest = np.asarray(exact).astype(np.float16) if exact.dtype == jnp.float32 else exact
        np.testing.assert_array_equal(kept, np.asarray(nearest).astype(exact.dtype))


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65519.0, True), (65520.0, False), (np.inf, False)])
def test_numbers_that_float16_cannot_hold(value, fits):
    variables = {"packed": {"norm": {"gain": jnp.array([1.0, -value])}}}
    if fits:
        assert np.isfinite(rounded(variables)["packed"]["norm"]["gain"]).all()
        return
    with pytest.raises(UsageError, match=r"`float16` \(=True\) cannot hold .*, of packed/norm/gain; leave it out"):
        rounded(variables)


def test_the_header_does_not_grow_with_depth(tmp_path, monkeypatch):
    """150 layers of four variables, also of the rarer dtypes, in the place of the network's own."""
    dtypes = (jnp.uint32, jnp.float32, jnp.int32, jnp.bool_)
    layer = lambda i: {f"variable{j}": np.full((2, i % 3 + 1), i + j).astype(d) for j, d in enumerate(dtypes)}
    variables = {"packed": {f"stage{i}_block{i}_conv{i}": layer(i) for i in range(150)}}
    structure = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, variables))
    monkeypatch.setattr(artifact, "packed_structure", lambda model, image_shape: structure)
    header, tensors = save(tmp_path / "deep", packed_of(variables))
    assert header < 2048
    assert tensors == 150 * 4 * (4 + 4 + 4 + 1)  # (2, 1), (2, 2) and (2, 3): four elements on average
    loaded = load(tmp_path / "deep")
    assert loaded.metadata["leaves"] == "600"
    assert_same_bits(loaded.variables, jax.tree.map(jnp.asarray, variables))


CLEAN = """
import sys
from importlib.abc import MetaPathFinder

FORBIDDEN = {forbidden}

class Forbid(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(f"{{name}} is forbidden here")

sys.meta_path.insert(0, Forbid())
import numpy as np
from bnn_jax.packed import load

model = load({path!r})
print(model.predict(np.zeros((2, *model.metadata["image_shape"]), np.uint8)).shape)
"""


def test_loading_needs_numpy_jax_and_flax_alone(path, subprocess_env):
    """What flax itself imports, as optax and rich, is allowed."""
    forbidden = {"tensorflow", "tensorflow_datasets", "orbax", "tyro", "sklearn", "matplotlib", "PIL"}
    forbidden |= {"safetensors", "torch", "grain", "array_record", "pandas", "hypothesis", "pytest"}
    code = CLEAN.format(forbidden=forbidden, path=str(path))
    done = subprocess.run([sys.executable, "-c", code], env=subprocess_env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "(2,)\n", done.stderr


# -- what cannot be written


def test_variables_of_another_network(tmp_path, network):
    wider = packed_structure(build_model(num_classes=4, **SETTINGS | {"width": 9}), SHAPE)
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), wider)
    with pytest.raises(ValueError, match=r"`variables` are not those of this network, frozen: packed/.* differs; give"):
        save(tmp_path / "x", packed_of(variables))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"settings": SETTINGS | {"name": "mnist_mpl"}},
            r"cannot be built \(`name` \(='mnist_mpl'\) .* did you mean 'mnist",
        ),
        ({"settings": SETTINGS | {"options": {"f": {1}}}}, r"x cannot be written: .*not JSON serializable; correct"),
        ({"std": (0.0, 1.0)}, r"`mean` and `std` must have a finite number for each channel, and `std` a positive one"),
        ({"mean": (1.0,)}, r"`mean` and `std` must have a finite number for each channel"),
        ({"num_classes": 0}, r"`num_classes` and `image_shape` must be one and two to four positive whole numbers"),
        (
            {"tested": {"note": "n" * 4000}},
            r"would have a header of 4\d+ bytes .* at most 4096 and .* shorten `accounting`",
        ),
    ],
)
def test_descriptions_that_cannot_be_written(tmp_path, network, changes, text):
    written = {name: changes.pop(name) for name in ("accounting", "tested", "float16") if name in changes}
    with pytest.raises(UsageError, match=text):
        save(tmp_path / "x", packed_of(network[1], **changes), **written)
    assert not (tmp_path / "x").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, network):
    path = tmp_path / "model"
    path.write_bytes(b"old")
    (tmp_path / "model.tmp").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*model \(Is a directory\); make room, or choose another path"):
        save(path, packed_of(network[1]))
    assert path.read_bytes() == b"old"
    with pytest.raises(RunError, match=r"cannot write .*missing/model \(No such file or directory\)"):
        save(tmp_path / "missing" / "model", packed_of(network[1]))

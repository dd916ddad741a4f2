"""Files of networks that are in no table: by the name of a class where there is one, with the module given else."""

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy_program
import pytest
from packed_file import script

from bnn_jax.errors import RunError, UsageError
from bnn_jax.estimators import heaviside, ternary
from bnn_jax.layers import BinaryConv, BinaryDense
from bnn_jax.models.build import build_model, settings_of
from bnn_jax.packed import PackedModel, freeze, load, save, to_stablehlo, write_header, write_npz

SHAPE = (5, 5, 2)
METADATA = {"image_shape": SHAPE, "mean": (100.0, 90.0), "std": (60.0, 50.0)}
IMAGES = np.random.default_rng(1).integers(0, 256, (3, *SHAPE), dtype=np.uint8)


class Plain(nn.Module):
    """Logits alone, neither `train` nor `progress`."""

    num_classes: int = 10
    width: int = 8
    kernel_quantizer: object = "xnor"
    activation: object = nn.relu

    @nn.compact
    def __call__(self, x):
        signs = {"input_quantizer": "ste_sign", "kernel_quantizer": self.kernel_quantizer}
        x = BinaryConv(self.width, name="first", **signs)(x)
        x = BinaryConv(self.width, name="second", **signs)(nn.BatchNorm(use_running_average=True)(x))
        x = self.activation(nn.GroupNorm(2)(x)).reshape(x.shape[0], -1)
        return BinaryDense(self.num_classes, name="head", **signs)(x)


NAME = f"{Plain.__module__}:Plain"


def packed_of(model, **metadata):
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    return PackedModel(model, freeze(model, variables, SHAPE), {**METADATA, **metadata})


@pytest.fixture(scope="module")
def packed():
    return packed_of(Plain(4, width=6))


@pytest.fixture(scope="module")
def path(packed, tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.bnn.safetensors"
    save(path, packed)
    return path


def with_model(path, model, tmp_path):
    """The file, whole, as another author would write it: with other settings and the right hash."""
    header, tensors = script.opened(path.read_bytes())
    forged = tmp_path / "forged.bnn.safetensors"
    header["__metadata__"]["model"] = json.dumps(model, separators=(",", ":"))
    forged.write_bytes(script.checksummed(header, tensors))
    return forged


def test_a_file_names_a_class_that_can_be_imported(path, packed):
    found = load(path)
    assert found.metadata["model"] == {"name": NAME, "options": {"width": 6}} and found.model == packed.model
    assert found.metadata["num_classes"] == 4
    np.testing.assert_array_equal(found.logits(IMAGES), packed.logits(IMAGES))
    for model in (Plain(4, width=6), Plain, NAME):
        np.testing.assert_array_equal(load(path, model=model).logits(IMAGES), packed.logits(IMAGES))


def test_a_network_that_has_no_name_is_given(packed, tmp_path):
    model = Plain(4, width=6, activation=lambda x: nn.relu(x))
    assert settings_of(model) is None
    save(tmp_path / "own", PackedModel(model, packed.variables, METADATA))
    with pytest.raises(UsageError, match=r"`model` must be given for .*own, whose network \(Plain\) .* load\("):
        load(tmp_path / "own")
    found = load(tmp_path / "own", model=model)
    np.testing.assert_array_equal(found.logits(IMAGES), packed.logits(IMAGES))
    save(tmp_path / "again", found)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "own").read_bytes()


def test_another_network_than_the_one_of_the_file_is_refused(path):
    with pytest.raises(UsageError, match=r"`model` \(=Plain\) is not the network that .* was written of: its tensors"):
        load(path, model=Plain(4, width=8))
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    (path.parent / "damaged").write_bytes(damaged)
    with pytest.raises(RunError, match=r"is damaged, or no packed network: its bytes are not those that were written"):
        load(path.parent / "damaged", model=Plain(4, width=8))
    with pytest.raises(UsageError, match=r"`model` \(='int'\) must be a name, a module of flax.linen, its class"):
        load(path, model=3)


@pytest.mark.parametrize(
    "model",
    [
        {"name": "subprocess:run", "options": {"args": "true"}},
        {"name": "os.path:join"},
        {"name": "flax.linen:relu"},
        {"name": "FILE:Plain"},
        {"name": f"{NAME}.clone()"},
        {"name": "antigravity:Net"},
        {"name": NAME, "options": {"width": 6, "kernel_quantizer": "FILE:quantizer"}},
        {"name": "lenet", "kernel_quantizer": "FILE:quantizer"},
        {"name": "lenet", "quantizers": {"head": ["ste_sign", "FILE:quantizer"]}},
        {"name": "lenet", "kernel_quantizer": "xnor", "kernel_quantizer_options": {"estimator": "FILE:estimator"}},
    ],
    ids=lambda model: json.dumps(model)[:70],
)
def test_a_file_imports_nothing_but_a_class_of_modules(model, path, tmp_path):
    """What its author could have run otherwise, on the machine of whoever opens it."""
    trap = tmp_path / "trap.py"
    trap.write_text("raise SystemExit('the file ran this')")
    model = json.loads(json.dumps(model).replace("FILE", str(trap)))
    with pytest.raises(UsageError, match=r"`model` must be given for .*forged"):
        load(with_model(path, model, tmp_path))


@pytest.mark.full
def test_settings_of_a_run_are_kept_where_they_are_safe(packed, tmp_path):
    """A name of the table with an estimator of one's own is none that a file may have."""
    for settings in ({"name": "lenet", "kernel_quantizer": lambda: None}, {"name": "/a/b.py:Plain"}):
        save(tmp_path / "x", PackedModel(packed.model, packed.variables, METADATA | {"model": settings}))
        assert load(tmp_path / "x").metadata["model"]["name"] == NAME


def test_what_is_no_packed_model_is_told_how_it_becomes_one(packed, tmp_path, unchecked):
    for function in (lambda: save(tmp_path / "x", packed.variables), lambda: to_stablehlo(packed.model)):
        with pytest.raises(TypeError, match=r"`packed` .* must be a PackedModel; make one: PackedModel\(model, freeze"):
            function()
    with pytest.raises(ValueError, match=r"`metadata` \(=\['mean', 'std'\]\) must have 'image_shape'; it is"):
        PackedModel(packed.model, packed.variables, {"mean": (0,), "std": (1,)})


@pytest.mark.full
def test_its_stablehlo(packed):
    pytest.importorskip("flatbuffers", reason="the package flatbuffers is not installed")
    exported = jax.export.deserialize(bytearray(to_stablehlo(packed, platforms=("cpu",))))
    np.testing.assert_allclose(exported.call(IMAGES), packed.logits(IMAGES), 1e-5, 1e-5)


def test_settings_make_an_equal_module():
    model = Plain(7, width=3)
    assert build_model(num_classes=7, **settings_of(model)) == model


@pytest.mark.parametrize("estimator", [partial(heaviside, width=2.0, threshold=0.25), partial(ternary, delta=0.5)])
def test_inputs_quantized_by_a_partial_of_an_estimator_are_frozen_with_its_codes(estimator):
    layer = BinaryDense(3, input_quantizer=estimator, kernel_quantizer="xnor")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 40)), jnp.float32)
    variables = layer.init(jax.random.key(0), x)
    expected, packed = layer.apply(variables, x, mutable=["packed"])
    np.testing.assert_array_equal(layer.apply(packed, x), expected)


class Parameters(nn.Module):
    """Real parameters of any dtype."""

    dtype: object

    @nn.compact
    def __call__(self, x):
        x = BinaryConv(8, kernel_quantizer="xnor", param_dtype=jnp.bfloat16, name="conv")(x).mean((1, 2))
        x = BinaryDense(4, param_dtype=jnp.bfloat16, use_bias=True, name="head")(x)
        return x + self.param("table", lambda _: jnp.arange(4, dtype=self.dtype)[None]).astype(x.dtype)


@pytest.mark.full
def test_parameters_of_half_precision_are_stored_as_they_are_and_for_numpy_as_float32(tmp_path):
    packed = packed_of(Parameters(jnp.bfloat16))
    wanted = packed.logits(IMAGES)
    save(tmp_path / "own", packed)
    found = load(tmp_path / "own", model=packed.model)
    jax.tree.map(np.testing.assert_array_equal, found.variables, packed.variables)
    assert found.variables["params"]["head"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.logits(IMAGES), wanted)
    write_npz(tmp_path / "own.npz", packed)
    with np.load(tmp_path / "own.npz", allow_pickle=False) as file:
        arrays = dict(file)
    np.testing.assert_array_equal(arrays["head/kernel"], np.float32(packed.variables["params"]["head"]["kernel"]))
    assert {array.dtype.kind + str(array.itemsize) for name, array in arrays.items() if name != "steps"} <= {"i1", "f4"}
    np.testing.assert_allclose(numpy_program.logits(arrays, IMAGES), wanted, rtol=1e-5, atol=1e-5)
    write_header(tmp_path / "own.h", packed)


@pytest.mark.full
def test_a_dtype_that_no_file_has_is_refused_with_its_variable(tmp_path):
    packed = packed_of(Parameters(jnp.int8))
    reason = r"^`packed` has the variable params/table of int8 and shape \(1, 4\); a file holds .*: give its layer an"
    with pytest.raises(UsageError, match=reason):
        save(tmp_path / "own", packed)

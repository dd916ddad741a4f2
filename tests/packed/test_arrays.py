"""The arrays of a packed network, and programs that know nothing of this package and compute with them."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy_program
import pytest
from documentation_pages import ROOT, python_of
from networks import random_variables
from small_models import SIDES, small

from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense, PReLU, avg_pool_2x2, max_pool, mean_pool
from bnn_jax.packed import PackedModel, arrays, freeze, latent_variables, load, verify, write_header, write_npz
from bnn_jax.packed.c_header import header_text
from bnn_jax.packed.runs import freeze_run
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS
from bnn_jax.training.config import Config, ModelConfig, OptimConfig
from bnn_jax.training.experiment import make_model
from bnn_jax.training.loop import train

SHAPE = (9, 8, 3)
METADATA = {"image_shape": SHAPE, "mean": (120.0, 110.0, 100.0), "std": (60.0, 61.0, 62.0)}


class Everything(nn.Module):
    """A bit of all: borders of -1, strides, thresholds behind a pool, a residual, learned slopes, several bases."""

    @nn.compact
    def __call__(self, x, *, train=False, progress=1.0):
        signs = {"input_quantizer": "ste_sign", "kernel_quantizer": "binary"}
        x = BinaryConv(8, kernel_quantizer="xnor", padding=1, name="stem")(x)
        y = BinaryConv(32, **signs, pad_value=-1, padding=1, name="conv1")(x)
        y = BatchNorm(name="norm1")(max_pool(y, 2), train=train)
        y = BinaryConv(8, **signs | {"input_quantizer": "rsign"}, strides=2, name="conv2", use_bias=True)(y)
        y = y + max_pool(x, 3, strides=4, padding=1)[:, :2, :2]
        y = PReLU(name="slopes")(y)
        ternary = {"input_quantizer": "tbn", "kernel_quantizer": "ttq"}
        y = BinaryConv(8, **ternary, kernel_size=1, input_scaling=True, name="conv3")(y)
        y = jnp.concatenate([nn.sigmoid(y) - 0.5, mean_pool(y, 1)], axis=-1)
        y = BinaryDense(32, **signs | {"kernel_quantizer": "abc_net"}, name="dense1")(y.reshape(y.shape[0], -1))
        y = BatchNorm(name="norm2")(y, train=train)
        y = BinaryDense(16, **signs, name="dense2")(y)
        return BinaryDense(5, use_bias=True, name="head")(y)


def packed_of(model, shape=SHAPE):
    variables = random_variables(model, shape, mean=0.0)
    return PackedModel(model, freeze(model, variables, shape), METADATA | {"image_shape": shape}), variables


def images_of(shape, count=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.fixture(scope="module")
def everything():
    return packed_of(Everything())


@pytest.fixture(scope="module")
def found(everything):
    return arrays(everything[0])


@pytest.mark.full
def test_numpy_alone_computes_the_logits(everything, found):
    images = images_of(SHAPE)
    wanted = np.asarray(everything[0].logits(images))
    assert wanted.std(0).min() > 0.5
    np.testing.assert_allclose(numpy_program.logits(found, images), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.full
def test_what_the_arrays_are(everything, found):
    """The names, shapes and dtypes that the documentation states; codes and scales of the latent weights."""
    params = everything[1]["params"]
    latent = params["conv1"]["latent_kernel"]
    np.testing.assert_array_equal(found["conv1/kernel"], np.where(latent < 0, -1, 1))
    stem = params["stem"]["latent_kernel"]
    np.testing.assert_array_equal(found["stem/kernel"], np.where(stem < 0, -1, 1))
    np.testing.assert_allclose(found["stem/scale"], np.abs(stem.astype(np.float64)).mean((0, 1, 2)), rtol=1e-6)
    assert found["conv1/kernel"].dtype == np.int8
    assert "conv1/scale" not in found
    assert set(np.unique(found["conv3/kernel1"])) | set(np.unique(found["conv3/kernel2"])) <= {-1, 0, 1}
    assert [found[f"norm1/{name}"].dtype.name for name in ("threshold", "direction")] == ["int32", "int8"]
    np.testing.assert_array_equal(np.unique(found["norm1/direction"]), [-1, 1])
    np.testing.assert_array_equal(found["head/kernel"], params["head"]["kernel"])
    assert {name for name in found if name.startswith("dense1/")} >= {"dense1/kernel1", "dense1/scale1"}
    steps = json.loads(str(found["steps"]))
    made = {"images"}
    for step in steps:
        assert made | found.keys() >= {i for i in step["inputs"] if isinstance(i, str)}
        made.add(step["output"])
    assert steps[-1]["output"] == "logits"
    assert {step["layer"] for step in steps} >= {"stem", "conv1", "norm1", "conv2", "conv3", "dense1", "head"}


def test_a_file_of_a_saved_network(network, path, tmp_path):
    """All dense: the file that `save` wrote, as npz, which needs no pickle."""
    loaded = load(path)
    write_npz(tmp_path / "net.npz", loaded)
    with np.load(tmp_path / "net.npz", allow_pickle=False) as file:
        found = dict(file)
    images = images_of(loaded.metadata["image_shape"])
    np.testing.assert_array_equal(numpy_program.logits(found, images).argmax(1), loaded.predict(images))


class Counting(nn.Module):
    """Codes that are sums of comparisons, a mask that is fixed, and a limit of -inf."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, train=False):
        two_bits = ACTIVATION_QUANTIZERS["hwgq"](bits=2)
        x = BinaryConv(32, kernel_quantizer="xnor", dtype=self.dtype, name="stem")(x)
        x = BinaryConv(8, input_quantizer=two_bits, kernel_quantizer="binary", dtype=self.dtype, name="conv")(x)
        chess = (np.indices(x.shape[1:3]).sum(0) % 2 == 0)[..., None]
        x = jnp.where(chess, x, -(x > 0).astype(x.dtype)).mean((1, 2))
        limits = np.where(np.arange(8) < 6, -np.inf, 0.25).astype(x.dtype)
        return BinaryDense(5, use_bias=True, dtype=self.dtype, name="head")(jnp.maximum(x, limits[None]))


def test_truth_values_that_are_added_and_masks(tmp_path):
    packed, _ = packed_of(Counting())
    images, named = images_of(SHAPE), arrays(packed)
    wanted = np.asarray(packed.logits(images))
    np.testing.assert_allclose(numpy_program.logits(named, images), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    write_header(tmp_path / "net.h", packed)
    text = (tmp_path / "net.h").read_text()
    assert "-INFINITY, 0.25f" in text and "static const uint8_t constant" in text
    assert "0.666666687" in header_text({"steps": np.array(ONE_THIRD)}, guard="X")
    with pytest.raises(ValueError, match="`packed` has the array x of uint32, which has no type in C; save"):
        header_text({"x": np.zeros(1, np.uint32), "steps": np.array("[]")}, guard="X")


ONE_THIRD = json.dumps([{"output": "y", "op": "multiply", "inputs": ["x", float(np.float32(2 / 3))], "options": {}}])


def test_activations_of_float16_are_no_codes(standard_dtypes):
    packed, _ = packed_of(Counting(jnp.float16))
    images = images_of(SHAPE)
    wanted = np.asarray(packed.logits(images), np.float32)
    found = numpy_program.logits(arrays(packed), images)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


class Rounded(nn.Module):
    """Activations in half precision, real and quantized kernels, and arithmetic of JAX between them."""

    dtype: Any

    @nn.compact
    def __call__(self, x, *, train=False):
        signs = {"input_quantizer": "ste_sign", "kernel_quantizer": "xnor"}
        x = BinaryConv(32, kernel_quantizer="xnor", name="stem")(x.astype(self.dtype))
        x = BatchNorm(name="norm")(BinaryConv(32, **signs, name="conv")(x), train=train)
        x = x * jnp.asarray(0.3, x.dtype) + x
        x = BinaryDense(16, **signs, name="dense")(x.reshape(x.shape[0], -1))
        x = jax.lax.reduce_precision(x.astype(jnp.float32), 8, 7)
        return BinaryDense(5, use_bias=True, name="head")(x.astype(self.dtype)).astype(jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.full
def test_numpy_rounds_where_the_network_does(dtype, standard_dtypes):
    """All but numbers halfway between two of half precision, which sums in another order may turn."""
    packed, _ = packed_of(Rounded(dtype))
    images, found = images_of(SHAPE, 64), arrays(packed)
    wanted = np.asarray(packed.logits(images))
    near = np.abs(numpy_program.logits(found, images) - wanted) <= 1e-5 * np.abs(wanted).max()
    assert near.mean() > 0.9
    assert {dtype.dtype.name, "bfloat16"} <= {step["op"] for step in json.loads(str(found["steps"]))}
    rounding = numpy_program.OPERATIONS[dtype.dtype.name]
    x = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    x = np.concatenate(
        [x, np.float32(x.astype(dtype.dtype)) * np.float32(1 + 2.0**-9), np.float32([0, -0.0, 1 + 2**-8])]
    )
    np.testing.assert_array_equal(np.float32(rounding(x)), x.astype(dtype.dtype).astype(np.float32))


def test_another_operation_is_refused_by_its_layer():
    class Sorting(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            y = BinaryDense(4, kernel_quantizer="binary", name="dense")(x.reshape(x.shape[0], -1))
            return jnp.sort(y, axis=-1)

    with pytest.raises(ValueError, match="`packed` has the operation 'sort' at 'Sorting', for which there is no step"):
        arrays(packed_of(Sorting())[0])


class Named(nn.Module):
    """Layers that are called by name, and a parameter of any name."""

    parameter: str

    @nn.compact
    def __call__(self, x, *, train=False):
        x = BinaryConv(8, input_quantizer="ste_sign", kernel_quantizer="xnor", name="conv")(x=x, train=train)
        x = BatchNorm(name="norm")(x=x, train=train).mean((1, 2))
        x = x * self.param(self.parameter, nn.initializers.ones, ())
        return BinaryDense(4, kernel_quantizer="binary", name="head")(x=x, train=train)


def test_layers_called_by_name_have_arrays_are_verified_and_trained_further():
    model = Named("gamma")
    packed, trained = packed_of(model)
    images, wanted = images_of(SHAPE), np.asarray(packed.logits(images_of(SHAPE)))
    np.testing.assert_allclose(numpy_program.logits(arrays(packed), images), wanted, rtol=1e-5, atol=1e-5)
    assert verify(model, trained, packed.variables, [np.float32(images)]).passed
    latent = replace(packed, variables=latent_variables(packed, images))
    np.testing.assert_allclose(latent.logits(images), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["images", "steps", "logits", "x1", "constant2"])
def test_a_variable_has_not_the_name_of_a_step(name):
    packed, _ = packed_of(Named(name))
    with pytest.raises(ValueError, match=f"^`packed` has a variable '{name}', as a step may be called; rename it$"):
        arrays(packed)


def test_numbers_that_are_not_finite_are_not_written():
    packed, _ = packed_of(Named("own"))
    packed.variables["params"]["own"] = jnp.float32(np.nan)
    with pytest.raises(ValueError, match="`packed`"):
        arrays(packed)


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_words_of_c_are_names_too(tmp_path):
    write_header(tmp_path / "net.h", packed_of(Named("gamma"))[0])
    assert "static const float gamma_[1]" in (tmp_path / "net.h").read_text()
    (tmp_path / "net.c").write_text('#include <math.h>\n#include "net.h"\nint main(void) { return 0; }\n')
    subprocess.run(["cc", "-fsyntax-only", "-w", tmp_path / "net.c"], check=True)


PROGRAM = """
#include <stdio.h>
#include "net.h"
int main(void) {  /* The integer sums of conv1 where every input is +1 but those of the first channel. */
  for (int f = 0; f < 32; f++) {
    int sum = 0;
    for (int i = 0; i < 3; i++) for (int j = 0; j < 3; j++) for (int c = 0; c < 8; c++)
      sum += (c ? 1 : -1) * conv1_kernel[i][j][c][f];
    int code = sum >= norm1_threshold[f] ? norm1_direction[f] : -norm1_direction[f];
    printf("%d %d %.9g\\n", sum, code, head_bias[f % 5]);
  }
  return 0;
}
"""


@pytest.mark.full
def test_a_c_program_sums_a_layer(everything, found, tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc, clang) is installed")
    write_header(tmp_path / "net.h", everything[0])
    (tmp_path / "main.c").write_text(PROGRAM)
    strict = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-Wno-unused-const-variable", "-pedantic"]
    subprocess.run([compiler, *strict, "main.c", "-o", "main"], cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout
    signs = np.where(np.arange(8) == 0, -1, 1)
    sums = np.einsum("ijcf,c->f", found["conv1/kernel"].astype(int), signs)
    codes = np.where(sums >= found["norm1/threshold"], found["norm1/direction"], -found["norm1/direction"])
    shown = np.array([line.split() for line in printed.splitlines()], float)
    np.testing.assert_array_equal(shown[:, :2], np.stack([sums, codes], 1))
    np.testing.assert_array_equal(shown[:, 2].astype(np.float32), found["head/bias"][np.arange(32) % 5])


def test_bits_as_the_documentation_makes_them(found):
    assert found["conv1/kernel"].dtype == np.int8 and found["conv1/kernel"].shape == (3, 3, 8, 32)
    (block,) = [block for block in python_of(ROOT / "docs" / "weights.md") if "packbits" in block.text]
    names = {"np": np, "arrays": {"stage1_block1/conv1/kernel": found["conv1/kernel"]}}
    exec(block.text, names)
    unpacked = np.unpackbits(names["bits"], axis=1, count=72).reshape(32, 3, 3, 8).transpose(1, 2, 3, 0)
    np.testing.assert_array_equal(2.0 * unpacked - 1, found["conv1/kernel"])


def test_the_program_is_short():
    lines = [line for line in numpy_program.PATH.read_text().splitlines() if line.strip()]
    assert len(lines) <= 40
    assert {line.split()[1] for line in lines if line.startswith("import")} == {"json", "sys", "numpy"}


@pytest.mark.full
@pytest.mark.parametrize("model", [ModelConfig("resnet6"), ModelConfig("lenet", options={"kernel_size": 2})])
def test_a_trained_network_has_the_same_accuracy(model, tmp_path):
    """Of an XNOR-Net of ResNet's form and of LeNet on handwritten digits, image by image."""
    config = Config("digits", 4, 32, loss="cross_entropy", model=model, optim=OptimConfig("adam", learning_rate=0.01))
    train(config, tmp_path)
    run = freeze_run(tmp_path)
    test, described = run.dataset.test, {"image_shape": run.dataset.image_shape}
    packed = PackedModel(run.model, run.packed, described | {"mean": run.dataset.mean, "std": run.dataset.std})
    write_npz(tmp_path / "net.npz", packed)
    np.savez(tmp_path / "test.npz", images=test.images, labels=test.labels)
    accuracy, examples = packed.accuracy([(test.images, test.labels)])
    assert accuracy > 0.5
    with np.load(tmp_path / "net.npz") as file:
        predictions = numpy_program.logits(dict(file), test.images).argmax(1)
    np.testing.assert_array_equal(predictions, packed.predict(test.images))
    command = [sys.executable, numpy_program.PATH, "net.npz", "test.npz"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert printed == f"{100 * accuracy:.2f} % of {examples} images\n"


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        "binary_densenet28",
        "reactnet18",
        "tbn_resnet18",
        "vgg_small",
        "quicknet",
        "meliusnet22",
        "bnext_tiny",
        "pokebnn",
        "bireal50",
    ],
)
def test_networks_of_the_catalogue(name):
    side = SIDES.get(name, 8)
    packed, _ = packed_of(make_model(small(name), num_classes=5), (side, side, 3))
    images = images_of((side, side, 3), 8)
    wanted = np.asarray(packed.logits(images))
    ours = numpy_program.logits(arrays(packed), images)
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_array_equal(ours.argmax(1), wanted.argmax(1))


class Behind(nn.Module):
    """A function of what a layer returns."""

    function: Any

    @nn.compact
    def __call__(self, x, *, train=False):
        x = BinaryConv(4, kernel_quantizer="binary", name="conv")(x)
        x = self.function(x)
        return x.reshape(x.shape[0], -1).astype(jnp.float32)


def ones_of(x, *shape):
    return jnp.ones(shape, x.dtype)


OF_CONSTANTS = {
    "borders": avg_pool_2x2,
    "flax": lambda x: nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False),
    "sum": lambda x: x / ones_of(x, 4).sum(),
    "product": lambda x: x * (ones_of(x, 3) @ ones_of(x, 3)),
    "cumsum": lambda x: x * jnp.cumsum(ones_of(x, 1, 1, 1, 4), -1),
    "concatenate": lambda x: x * jnp.concatenate([2 * ones_of(x, 2), 3 * ones_of(x, 2)])[None, None, None],
    "pad": lambda x: x * jnp.pad(ones_of(x, 2), (1, 1), constant_values=0.5)[None, None, None],
    "mask": lambda x: (x * ones_of(x, 1, 9, 8, 1)).sum((1, 2)) / ones_of(x, 9, 8).sum(),
    "resize": lambda x: jax.image.resize(x, (x.shape[0], 18, 16, 4), "bilinear"),
    "broadcast": lambda x: x + jnp.broadcast_to(jnp.arange(8, dtype=x.dtype)[:, None], (1, 9, 8, 4)),
    "of the images": lambda x: (
        x * jnp.concatenate([ones_of(x, x.shape[0], 2), 0 * ones_of(x, x.shape[0], 2)], 1).T.T[:, None, None]
    ),
    "NaN": lambda x: jnp.where(x > 1e9, jnp.full((x.shape[0], 288), jnp.nan, x.dtype).reshape(x.shape), x),
    "barrier": lambda x: jnp.subtract(*jax.lax.optimization_barrier((x, 3 * ones_of(x, 1, 1, 1, 4)))),
    "least": lambda x: x.min(-1),
}


@pytest.mark.parametrize("function", OF_CONSTANTS.values(), ids=OF_CONSTANTS)
def test_constants_have_the_shape_that_their_operations_see(function, standard_dtypes):
    """A constant that is broadcast, and then summed, pooled, joined or reshaped."""
    packed, _ = packed_of(Behind(function))
    images = images_of(SHAPE)
    wanted = np.asarray(packed.logits(images))
    np.testing.assert_allclose(
        numpy_program.logits(arrays(packed), images), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max()
    )


whole = lambda x: x.astype(jnp.int32)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: whole(x) & 3, "'and' of int32 at"),
        (lambda x: whole(x) | 3, "'or' of int32 at"),
        (lambda x: ~whole(x), "'not' of int32 at"),
        (lambda x: jax.lax.div(whole(x), jnp.full_like(whole(x), 2)), "'div' of int32 at"),
        (lambda x: x - x.mean(0, keepdims=True), "'reduce_sum' over the images of a batch at"),
        (lambda x: x @ jnp.einsum("bhwc,bhwd->cd", x, x), "'dot_general' over the images of a batch at"),
        (lambda x: x / ones_of(x, x.shape[0], 1).sum(), "'reduce_sum' over the images of a batch at"),
        (lambda x: x * jnp.arange(x.shape[0], dtype=x.dtype)[:, None, None, None], "'iota' that chooses among the"),
    ],
)
def test_what_numpy_would_compute_otherwise_is_refused(function, reason, standard_dtypes):
    with pytest.raises(ValueError, match=f"^`packed` has the operation {reason}"):
        arrays(packed_of(Behind(function))[0])

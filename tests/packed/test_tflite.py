"""Files for the Larq Compute Engine: what is in them, what they compute, what is refused.

What a file computes is checked by an interpreter in NumPy, tests/tflite_interpreter.py.  Where BNN_JAX_LCE_PYTHON names
a Python that has larq_compute_engine, the engine's own interpreter runs the files too.
"""

import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_variables

from bnn_jax.errors import UsageError
from bnn_jax.layers import BinaryConv, PReLU, avg_pool_2x2, max_pool
from bnn_jax.models import MODELS
from bnn_jax.packed.tflite.model import tflite_bytes, write_tflite
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, make_quantizer

pytest.importorskip("flatbuffers", reason="writing .tflite files needs the package flatbuffers")

from tflite_interpreter import interpret, read

LCE_PYTHON = os.environ.get("BNN_JAX_LCE_PYTHON")
CHECK = Path(__file__).parents[2] / "scripts" / "check_tflite.py"


class Sequence(nn.Module):
    """Layers in a row, in the form of a network of the package."""

    layers: tuple[Any, ...]

    @nn.compact
    def __call__(self, images, *, train):
        x = images
        for layer in self.layers:
            x = layer(x)
        return x.reshape((len(x), -1)), {}


def quantizers(inputs="ste_sign", kernel="binary", **options):
    return {
        "input_quantizer": make_quantizer(ACTIVATION_QUANTIZERS, inputs, **options),
        "kernel_quantizer": make_quantizer(WEIGHT_QUANTIZERS, kernel, **options),
    }


def images_of(shape, count=3):
    return np.random.default_rng(7).normal(0, 1, (count, *shape)).astype(np.float32)


def logits_of(model, variables, images):
    return np.asarray(jax.jit(lambda images: model.apply(variables, images, train=False)[0])(images))


def conv(features=5, size=3, **options):
    return BinaryConv(features, kernel_size=(size, size), **quantizers(), **options)


# (layer, image): each way to say a border, and images smaller than the kernel.
LAYERS = {
    "same": (conv(), (6, 5, 3)),
    "valid": (conv(padding="VALID"), (6, 5, 33)),
    "pixel": (conv(size=1, strides=(2, 2)), (5, 6, 40)),
    "stride": (conv(strides=(2, 2)), (7, 6, 3)),
    "stride, padded on all sides": (conv(strides=(2, 2), padding=1), (6, 6, 3)),
    "stride of three": (conv(strides=(3, 2), padding=((2, 1), (0, 1))), (8, 7, 4)),
    "dilated": (conv(kernel_dilation=(2, 2)), (7, 7, 3)),
    "dilated and small": (conv(kernel_dilation=(3, 2)), (5, 4, 3)),
    "small image": (conv(size=5), (3, 2, 3)),
    "one pixel": (conv(), (1, 1, 3)),
    "padded by more than needed": (conv(size=1, padding=2), (3, 3, 3)),
    "padded with +1": (conv(pad_value=1), (5, 5, 3)),
    "padded with +1 on all sides": (conv(pad_value=1, strides=(2, 2), padding=1), (6, 6, 3)),
    "padded with -1": (conv(pad_value=-1), (5, 5, 3)),
}

NETWORKS = {
    "bnn_convnet": ({"width": 4, "stage_sizes": (1, 1)}, quantizers()),
    "vgg_small": ({"width": 4}, quantizers("ede_sign", "libra_pb")),
    "resnet20": ({"width": 4, "stage_sizes": (1, 1)}, quantizers("ste_sign", "xnor")),
    "bireal_resnet20": ({"width": 4, "stage_sizes": (1, 1)}, quantizers("approx_sign", "magnitude_aware")),
    "reactnet_resnet20": ({"width": 4, "stage_sizes": (1, 1)}, quantizers("rsign", "magnitude_aware")),
    "resnet6": ({"width": 4, "input_scaling": True}, quantizers("abc_net", "abc_net", bases=2)),
}
"""Networks and their images: 16x16 pixels."""


def network(name):
    settings, given = NETWORKS[name]
    return MODELS[name].constructor(num_classes=10, **settings, **given)


@pytest.mark.parametrize("name", LAYERS)
def test_a_binary_convolution_has_the_integers_of_training(name):
    layer, shape = LAYERS[name]
    model = Sequence((layer,))
    variables, images = random_variables(model, shape), images_of(shape)
    data = tflite_bytes(model, variables, shape)
    np.testing.assert_array_equal(interpret(data, images), logits_of(model, variables, images))
    assert read(data).count("LceBconv2d") == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_computes_what_the_network_computes(name):
    model, shape = network(name), (16, 16, 3) if name != "vgg_small" else (32, 32, 3)
    variables, images = random_variables(model, shape), images_of(shape)
    logits = logits_of(model, variables, images)
    np.testing.assert_allclose(interpret(tflite_bytes(model, variables, shape), images), logits, 1e-4, 1e-4)


@pytest.mark.parametrize("channels", [3, 32, 33, 70])
@pytest.mark.full
def test_bits_of_a_filter_are_its_negative_codes(channels):
    model = Sequence((conv(features=2),))
    variables = random_variables(model, (4, 4, channels))
    file = read(tflite_bytes(model, variables, (4, 4, channels)))
    (step,) = (step for step in file.steps if step.kind == "LceBconv2d")
    words = file.arrays[step.inputs[1]]
    latent = variables["params"]["layers_0"]["latent_kernel"]
    assert words.shape == (2, 3, 3, (channels + 31) // 32)
    for o, h, w in np.ndindex(2, 3, 3):
        number = sum(int(word) % 2**32 << 32 * i for i, word in enumerate(words[o, h, w]))
        assert number == sum(1 << c for c in range(channels) if latent[h, w, c, o] < 0)


def test_the_file_of_a_convnet_is_all_binary_layers_and_their_batch_norms():
    model, shape = network("bnn_convnet"), (16, 16, 3)
    data = tflite_bytes(model, random_variables(model, shape), shape)
    file = read(data)
    # Two convolutions and three dense layers, each with a batch norm; the first convolution sees the real image.
    wanted = {"CONV_2D": 1, "LceQuantize": 4, "LceBconv2d": 4, "MAX_POOL_2D": 2, "MUL": 5, "ADD": 5}
    assert {kind: file.count(kind) for kind in wanted} == wanted
    assert {step.kind for step in file.steps} - {"RESHAPE"} == set(wanted)
    assert [file.shapes[i] for i in (*file.inputs, *file.outputs)] == [(1, 16, 16, 3), (1, 10)]
    assert any("ConvNet/conv2/" in name for name in file.names)


def test_negative_zeros_count_as_positive():
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return conv(size=1)(x * jnp.array([-1.0, 1.0, 1.0]).reshape(1, 1, 1, 3))

    model, shape = Sequence((Scaled(),)), (2, 2, 3)
    variables, images = random_variables(model, shape), np.zeros((1, *shape), np.float32)
    assert np.signbit(images * np.array([-1.0, 1.0, 1.0])).any()
    found = interpret(tflite_bytes(model, variables, shape), images)
    np.testing.assert_array_equal(found, logits_of(model, variables, images))


@pytest.mark.parametrize(
    "choose",
    [
        lambda x: jnp.where(x < 0.5, -1.0, 1.0),
        lambda x: jnp.where(x <= 0.5, 1.0, -1.0),
        lambda x: jnp.where(x > 0.5, 1.0, -1.0),
        lambda x: jnp.where(x >= 0.5, -1.0, 1.0),
    ],
    ids=["<", "<=", ">", ">="],
)
def test_each_comparison_makes_the_codes_that_it_says(choose):
    class Chosen(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.ones, (3, 4))
            return choose(x).reshape((len(x), -1)) @ jnp.sign(kernel)

    model, shape = Sequence((Chosen(),)), (1, 1, 3)
    variables, images = random_variables(model, shape), np.array([[[[0.5, 0.4, 0.6]]]], np.float32)
    data = tflite_bytes(model, variables, shape)
    assert read(data).count("LceBconv2d") == 1
    np.testing.assert_array_equal(interpret(data, images), logits_of(model, variables, images))


def test_what_is_unequal_is_no_sign():
    class Chosen(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.ones, (3, 4))
            return jnp.where(x != 0, 1.0, -1.0).reshape((len(x), -1)) @ jnp.sign(kernel)

    model, shape = Sequence((Chosen(),)), (1, 1, 3)
    variables, images = random_variables(model, shape), np.array([[[[0.0, -0.4, 0.6]]]], np.float32)
    data = tflite_bytes(model, variables, shape)
    assert read(data).count("LceBconv2d") == 0
    np.testing.assert_array_equal(interpret(data, images), logits_of(model, variables, images))


def test_activations_and_pools_become_one_operator_each():
    overlapping = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    layers = (PReLU(), max_pool, nn.hard_tanh, avg_pool_2x2, PReLU(both_slopes=True), overlapping)
    model, shape = Sequence(layers), (8, 8, 3)
    variables, images = random_variables(model, shape), images_of(shape)
    data = tflite_bytes(model, variables, shape)
    wanted = {"PRELU": 1, "MAX_POOL_2D": 2, "MAXIMUM": 1, "MINIMUM": 1, "AVERAGE_POOL_2D": 1, "SELECT_V2": 1}
    assert {kind: read(data).count(kind) for kind in wanted} == wanted
    np.testing.assert_allclose(interpret(data, images), logits_of(model, variables, images), 1e-6, 1e-6)


@pytest.mark.parametrize("reduction", [jnp.sum, jnp.max])
def test_what_is_taken_over_the_tiles_of_an_image(reduction):
    model, shape = Sequence((lambda x: reduction(x.reshape((len(x), 2, 2, 2, 2, 3)), (2, 4)),)), (4, 4, 3)
    variables, images = random_variables(model, shape), images_of(shape)
    found = interpret(tflite_bytes(model, variables, shape), images)
    np.testing.assert_allclose(found, logits_of(model, variables, images), 1e-6, 1e-6)


def test_operators_that_no_output_needs_are_left_out():
    class Wasteful(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            unused = jnp.sort(jnp.exp(images))
            return images.reshape((1, -1)), {"unused": unused}

    file = read(tflite_bytes(Wasteful(), {}, (2, 2, 1)))
    assert [step.kind for step in file.steps] == ["RESHAPE"]
    assert len(file.shapes) == 3


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            BinaryConv(4, **quantizers("coupled")),
            r"'name' that marks input codes of 3 values, .* at 'Sequence/layers_0',",
        ),
        (BinaryConv(4, **quantizers("decoupled")), r"input codes of 2 values, other than -1 and \+1, at"),
        (BinaryConv(4, **quantizers("ste_sign", "ttq")), r"kernel of other numbers than -1 and \+1 at"),
        (lambda x: x.reshape((1, 2, 2, 2, 2, 3))[:, :, 0], "'slice' on tensors of 6 axes at"),
        (lambda x: jnp.sort(x), r"'sort' at 'Sequence', .* no operator; export to \.bnn\.safetensors instead"),
    ],
    ids=["ternary", "zero and one", "ternary kernel", "one row of tiles", "sort"],
)
def test_what_has_no_operator_is_refused_by_name(layer, text):
    model = Sequence((layer,))
    variables = random_variables(model, (4, 4, 3))
    with pytest.raises(ValueError, match=text):
        tflite_bytes(model, variables, (4, 4, 3))


def test_bad_arguments_are_refused():
    model = Sequence((conv(),))
    with pytest.raises(ValueError, match=r"`variables` \(with 'packed'\) are frozen; give those of training"):
        tflite_bytes(model, {"params": {}, "packed": {}}, (4, 4, 3))
    with pytest.raises(ValueError, match=r"`image_shape` \(=\(4, 4\)\) must be \(height, width, channels\)"):
        tflite_bytes(model, {}, (4, 4))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "flatbuffers", None)
    with pytest.raises(UsageError, match=r"needs the Python package flatbuffers, .*: pip install 'bnn_jax\[export\]'$"):
        tflite_bytes(Sequence(()), {}, (1, 1, 1))


def test_a_refused_network_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "network.tflite"
    model = Sequence((conv(),))
    write_tflite(path, model, random_variables(model, (4, 4, 3)), (4, 4, 3))
    before = path.read_bytes()
    assert read(before).count("LceBconv2d") == 1
    with pytest.raises(ValueError, match="'sort'"):
        write_tflite(path, Sequence((jnp.sort,)), {}, (4, 4, 3))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["network.tflite"]


def run_engine(folder, models, tolerance):
    """The engine's interpreter on files of `models`, name -> (model, shape); its report."""
    arguments = []
    for name, (model, shape) in models.items():
        variables, images = random_variables(model, shape), images_of(shape, count=8)
        network, expected = folder / f"{name}.tflite", folder / f"{name}.npz"
        write_tflite(network, model, variables, shape)
        np.savez(expected, images=images, logits=logits_of(model, variables, images))
        arguments += [network, expected]
    command = [LCE_PYTHON, CHECK, "--tolerance", str(tolerance), *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not LCE_PYTHON, reason="BNN_JAX_LCE_PYTHON names no Python with larq_compute_engine")
def test_the_engine_has_the_integers_of_training(tmp_path):
    layers = {name: (Sequence((layer,)), shape) for name, (layer, shape) in LAYERS.items()}
    done = run_engine(tmp_path, layers, 0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("largest difference 0 of") == len(LAYERS)


@pytest.mark.skipif(not LCE_PYTHON, reason="BNN_JAX_LCE_PYTHON names no Python with larq_compute_engine")
def test_the_engine_predicts_what_the_network_predicts(tmp_path):
    shapes = {name: (32, 32, 3) if name == "vgg_small" else (16, 16, 3) for name in NETWORKS}
    done = run_engine(tmp_path, {name: (network(name), shapes[name]) for name in NETWORKS}, 1e-5)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("8 of 8 predictions agree") == len(NETWORKS)

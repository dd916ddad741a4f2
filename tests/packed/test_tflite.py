"""Files for the Larq Compute Engine: what is in them, what they compute, what is refused.

What a file computes is checked by an interpreter in NumPy below, written from the definitions of its operators.  Where
BNN_JAX_LCE_PYTHON names a Python that has larq_compute_engine, the engine's own interpreter runs the files too.
"""

import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.errors import UsageError
from bnn_jax.layers import BinaryConv, PReLU, halve, max_pool
from bnn_jax.models import MODELS
from bnn_jax.packed.tflite.model import tflite_bytes, write_tflite
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, make_quantizer

flatbuffers = pytest.importorskip("flatbuffers", reason="writing .tflite files needs the package flatbuffers")

from flatbuffers import flexbuffers  # noqa: E402
from flatbuffers.number_types import Int8Flags, Int32Flags, Uint32Flags  # noqa: E402
from flatbuffers.table import Table  # noqa: E402

LCE_PYTHON = os.environ.get("BNN_JAX_LCE_PYTHON")
CHECK = Path(__file__).parents[2] / "scripts" / "check_tflite.py"

# The public schema's codes and options of the operators that these tests meet.
NAMES = {0: "ADD", 1: "AVERAGE_POOL_2D", 3: "CONV_2D", 9: "FULLY_CONNECTED", 17: "MAX_POOL_2D", 18: "MUL", 19: "RELU"}
NAMES |= {22: "RESHAPE", 34: "PAD", 36: "GATHER", 41: "SUB", 42: "DIV", 45: "STRIDED_SLICE", 54: "PRELU", 59: "NEG"}
NAMES |= {55: "MAXIMUM", 57: "MINIMUM", 60: "PADV2", 61: "GREATER", 74: "SUM", 101: "ABS", 123: "SELECT_V2"}
CONV = ("padding", "stride_w", "stride_h", None, "dilation_w", "dilation_h")
POOL = ("padding", "stride_w", "stride_h", "filter_w", "filter_h")
OPTIONS = {"CONV_2D": CONV, "MAX_POOL_2D": POOL, "AVERAGE_POOL_2D": POOL, "GATHER": ("axis",)}


class Step(NamedTuple):
    kind: str
    inputs: list[int]
    output: int
    options: dict[str, int]


class File(NamedTuple):
    steps: list[Step]
    shapes: list[tuple[int, ...]]
    arrays: list[np.ndarray | None]
    names: list[str]
    inputs: list[int]
    outputs: list[int]

    def count(self, kind):
        return sum(step.kind == kind for step in self.steps)


def read(data):
    """A `.tflite` file, by the generic reader of flatbuffers and the public schema's field numbers."""
    assert data[4:8] == b"TFL3"
    model = Table(bytearray(data), int.from_bytes(data[:4], "little"))
    assert scalar(model, 0, Uint32Flags) == 3
    codes, buffers, (graph,) = tables(model, 1), tables(model, 4), tables(model, 2)
    tensors = tables(graph, 0)
    shapes = [tuple(vector(tensor, 0, np.int32).tolist()) for tensor in tensors]
    arrays = [constant(tensor, buffers, shape) for tensor, shape in zip(tensors, shapes)]
    steps = [read_step(operator, codes) for operator in tables(graph, 3)]
    inputs, outputs = (vector(graph, slot, np.int32).tolist() for slot in (1, 2))
    return File(steps, shapes, arrays, [text(tensor, 3) for tensor in tensors], inputs, outputs)


def constant(tensor, buffers, shape):
    buffer = buffers[scalar(tensor, 2, Uint32Flags)]
    raw = vector(buffer, 0, np.uint8)
    if not raw.size:
        return None
    assert buffer.Vector(buffer.Offset(4)) % 16 == 0
    return raw.view({0: np.float32, 2: np.int32}[scalar(tensor, 1, Int8Flags)]).reshape(shape)


def read_step(operator, codes):
    code = codes[scalar(operator, 0, Uint32Flags)]
    number = scalar(code, 3, Int32Flags)
    assert scalar(code, 0, Int8Flags) == number
    kind = text(code, 1) if number == 32 else NAMES[number]
    inputs, (output,) = vector(operator, 1, np.int32).tolist(), vector(operator, 2, np.int32).tolist()
    options = {}
    if kind == "LceBconv2d":
        options = flexbuffers.Loads(vector(operator, 5, np.uint8).tobytes())
    elif kind in OPTIONS:
        table = Table(operator.Bytes, operator.Indirect(operator.Pos + operator.Offset(4 + 2 * 4)))
        flags = lambda name: Int8Flags if name == "padding" else Int32Flags
        options = {name: scalar(table, slot, flags(name)) for slot, name in enumerate(OPTIONS[kind]) if name}
    return Step(kind, inputs, output, options)


def scalar(table, slot, flags):
    offset = table.Offset(4 + 2 * slot)
    return table.Get(flags, table.Pos + offset) if offset else 0


def text(table, slot):
    return table.String(table.Pos + table.Offset(4 + 2 * slot)).decode()


def tables(table, slot):
    offset = table.Offset(4 + 2 * slot)
    start = table.Vector(offset)
    return [Table(table.Bytes, table.Indirect(start + 4 * i)) for i in range(table.VectorLen(offset))]


def vector(table, slot, dtype):
    offset = table.Offset(4 + 2 * slot)
    if not offset:
        return np.zeros(0, dtype)
    return np.frombuffer(table.Bytes, dtype, table.VectorLen(offset), table.Vector(offset))


def windows(x, window, strides, dilation, padding, border):
    """The pixels under each tap, (batch, rows, columns, channels), by TensorFlow's rules of padding."""
    extents = [(k - 1) * d + 1 for k, d in zip(window, dilation)]
    if padding == 0:
        sizes = zip(x.shape[1:3], extents, strides)
        totals = [max((-(-size // stride) - 1) * stride + extent - size, 0) for size, extent, stride in sizes]
        pads = [(total // 2, total - total // 2) for total in totals]
        x = np.pad(x, [(0, 0), *pads, (0, 0)], constant_values=border)
    rows, columns = ((n - e) // s + 1 for n, e, s in zip(x.shape[1:3], extents, strides))
    for i, j in np.ndindex(*window):
        top, left = i * dilation[0], j * dilation[1]
        tall = slice(top, top + (rows - 1) * strides[0] + 1, strides[0])
        yield x[:, tall, left : left + (columns - 1) * strides[1] + 1 : strides[1]]


def convolve(x, kernel, *geometry):
    """A cross-correlation with an OHWI kernel."""
    taps = kernel.reshape(len(kernel), -1, kernel.shape[-1]).swapaxes(0, 1)
    return sum(pixels @ tap.T for pixels, tap in zip(windows(x, kernel.shape[1:3], *geometry), taps))


def unpack(words, channels):
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    assert not bits[..., channels:].any()
    return 1.0 - 2.0 * bits[..., :channels]


def lce_bconv2d(o, words, kernel, multiplier, bias):
    assert o["fused_activation_function"] == 0
    strides = (o["stride_height"], o["stride_width"])
    dilation = (o["dilation_height_factor"], o["dilation_width_factor"])
    x, kernel = (unpack(packed, o["channels_in"]) for packed in (words, kernel))
    return convolve(x, kernel, strides, dilation, o["padding"], o["pad_values"]) * multiplier + bias


def lce_quantize(o, x):
    packed = np.packbits(np.signbit(x), axis=-1, bitorder="little")
    gap = [(0, 0)] * (x.ndim - 1) + [(0, -packed.shape[-1] % 4)]
    return np.ascontiguousarray(np.pad(packed, gap)).view(np.int32)


def pool(reduce):
    def run(o, x):
        window, strides = ((o[f"{n}_h"], o[f"{n}_w"]) for n in ("filter", "stride"))
        return reduce(list(windows(x, window, strides, (1, 1), o["padding"], -np.inf)), axis=0)

    return run


def conv_2d(o, x, kernel, bias):
    strides, dilation = ((o[f"{n}_h"], o[f"{n}_w"]) for n in ("stride", "dilation"))
    return convolve(x, kernel, strides, dilation, o["padding"], 0) + bias


INTERPRETER = {
    "ADD": lambda o, a, b: a + b,
    "SUB": lambda o, a, b: a - b,
    "MUL": lambda o, a, b: a * b,
    "DIV": lambda o, a, b: a / b,
    "NEG": lambda o, a: -a,
    "ABS": lambda o, a: np.abs(a),
    "MAXIMUM": lambda o, a, b: np.maximum(a, b),
    "MINIMUM": lambda o, a, b: np.minimum(a, b),
    "RELU": lambda o, a: np.maximum(a, 0),
    "PRELU": lambda o, a, slope: np.where(a >= 0, a, slope * a),
    "GREATER": lambda o, a, b: a > b,
    "SELECT_V2": lambda o, c, a, b: np.where(c, a, b),
    "SUM": lambda o, a, axes: a.sum(tuple(axes)),
    "RESHAPE": lambda o, a, shape: a.reshape(shape),
    "PAD": lambda o, a, pads: np.pad(a, pads),
    "PADV2": lambda o, a, pads, value: np.pad(a, pads, constant_values=value),
    "GATHER": lambda o, a, indices: a.take(indices, o["axis"]),
    "STRIDED_SLICE": lambda o, a, b, e, s: a[tuple(map(slice, b, e, s))],
    "FULLY_CONNECTED": lambda o, a, weights, bias: a @ weights.T + bias,
    "CONV_2D": conv_2d,
    "MAX_POOL_2D": pool(np.max),
    "AVERAGE_POOL_2D": pool(np.mean),
    "LceQuantize": lce_quantize,
    "LceBconv2d": lce_bconv2d,
}


def interpret(data, images):
    """The outputs of a file, image by image; every tensor must have the shape that the file says."""
    file, results = read(data), []
    for image in np.asarray(images):
        values = dict(enumerate(file.arrays)) | {file.inputs[0]: image[None]}
        for step in file.steps:
            given = [values[i] for i in step.inputs if i >= 0]
            values[step.output] = np.asarray(INTERPRETER[step.kind](step.options, *given))
            assert values[step.output].shape == file.shapes[step.output], step
        results.append(values[file.outputs[0]][0])
    return np.stack(results)


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
        "kernel_quantizer": make_quantizer(WEIGHT_QUANTIZERS, kernel),
    }


def random_variables(model, shape, seed=0):
    """Normal numbers in every variable: batch norms have negative gains, variances are positive."""
    rng = np.random.default_rng(seed)
    init = partial(model.init, train=False)
    structure = jax.eval_shape(
        init, {"params": jax.random.key(0), "quantizer": jax.random.key(0)}, jnp.zeros((1, *shape))
    )
    draw = lambda path, like: rng.normal(0, 1, like.shape).astype(np.float32)
    drawn = jax.tree_util.tree_map_with_path(draw, structure)
    is_variance = lambda path: path[-1].key == "var"
    return jax.tree_util.tree_map_with_path(lambda path, x: x * x + 0.1 if is_variance(path) else x, drawn)


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
    "resnet6": ({"width": 4, "input_scaling": True}, quantizers("abc_net", "abc_net")),
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


def test_activations_and_pools_become_one_operator_each():
    overlapping = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    layers = (PReLU(), max_pool, nn.hard_tanh, halve, PReLU(both_slopes=True), overlapping)
    model, shape = Sequence(layers), (8, 8, 3)
    variables, images = random_variables(model, shape), images_of(shape)
    data = tflite_bytes(model, variables, shape)
    wanted = {"PRELU": 1, "MAX_POOL_2D": 2, "MAXIMUM": 1, "MINIMUM": 1, "AVERAGE_POOL_2D": 1, "SELECT_V2": 1}
    assert {kind: read(data).count(kind) for kind in wanted} == wanted
    np.testing.assert_allclose(interpret(data, images), logits_of(model, variables, images), 1e-6, 1e-6)


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
        (lambda x: jnp.sort(x), r"'sort' at 'Sequence', .* no operator; export to \.bnn\.safetensors instead"),
        (lambda x: x.reshape((1, 2, 2, 2, 2, 3)).sum((2, 4)), "of an image cut into tiles, other than their maxima,"),
    ],
    ids=["ternary", "zero and one", "ternary kernel", "sort", "tiles"],
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
    with pytest.raises(UsageError, match=r"needs the package flatbuffers; install it with: pip install 'bnn_jax\[exp"):
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

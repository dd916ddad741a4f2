"""An interpreter of `.tflite` files in NumPy, written from the definitions of the operators and the public schema.

`read` takes a file apart by the generic reader of flatbuffers, `interpret` runs it.
"""

from typing import NamedTuple

import numpy as np
from flatbuffers import flexbuffers
from flatbuffers.number_types import Int8Flags, Int32Flags, Uint32Flags
from flatbuffers.table import Table

# The public schema's codes and options of the operators that these tests meet.
NAMES = {0: "ADD", 1: "AVERAGE_POOL_2D", 3: "CONV_2D", 9: "FULLY_CONNECTED", 17: "MAX_POOL_2D", 18: "MUL", 19: "RELU"}
NAMES |= {22: "RESHAPE", 34: "PAD", 36: "GATHER", 41: "SUB", 42: "DIV", 45: "STRIDED_SLICE", 54: "PRELU", 59: "NEG"}
NAMES |= {55: "MAXIMUM", 57: "MINIMUM", 60: "PADV2", 61: "GREATER", 74: "SUM", 101: "ABS", 123: "SELECT_V2"}
NAMES |= {72: "NOT_EQUAL"}
NAMES |= {76: "RSQRT", 82: "REDUCE_MAX", 92: "SQUARE", 130: "BROADCAST_TO"}
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
    assert scalar(code, 0, Int8Flags) == min(number, 127)  # the field of the first schema
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
    "SQUARE": lambda o, a: a * a,
    "RSQRT": lambda o, a: np.float32(1) / np.sqrt(a),
    "BROADCAST_TO": lambda o, a, shape: np.broadcast_to(a, shape),
    "MAXIMUM": lambda o, a, b: np.maximum(a, b),
    "MINIMUM": lambda o, a, b: np.minimum(a, b),
    "RELU": lambda o, a: np.maximum(a, 0),
    "PRELU": lambda o, a, slope: np.where(a >= 0, a, slope * a),
    "GREATER": lambda o, a, b: a > b,
    "NOT_EQUAL": lambda o, a, b: a != b,
    "SELECT_V2": lambda o, c, a, b: np.where(c, a, b),
    "SUM": lambda o, a, axes: a.sum(tuple(axes)),
    "REDUCE_MAX": lambda o, a, axes: a.max(tuple(axes)),
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

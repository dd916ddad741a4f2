r"""The part of the TensorFlow Lite file format that a network of float and binary operators needs.

A :class:`Graph` is filled operator by operator and turned into the bytes of a file, a FlatBuffer, without TensorFlow.
The numbers below are those of the public schema, of its version 3; binary operators are custom operators of the Larq
Compute Engine, whose options are a FlexBuffer map.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from bnn_jax.extras import import_extra

SCHEMA_VERSION = 3
FILE_IDENTIFIER = b"TFL3"
SAME, VALID = 0, 1
"""How TensorFlow pads, in the options of builtin and of custom operators."""

TENSOR_TYPES = {"float32": 0, "int32": 2, "bool": 6}
CUSTOM = 32
"""The builtin code of every custom operator."""


class Builtin(NamedTuple):
    """A builtin operator.

    Attributes:
      code: in the schema.
      options: number of its table of options in the schema's union; 0 where it needs none.
      fields: names and types of that table's fields, in the order of their slots; those that are not given are 0.
    """

    code: int
    options: int = 0
    fields: tuple[tuple[str, str], ...] = ()


_WINDOW = (("padding", "Int8"), ("stride_w", "Int32"), ("stride_h", "Int32"))
_CONV = (*_WINDOW, ("activation", "Int8"), ("dilation_w", "Int32"), ("dilation_h", "Int32"))
_POOL = (*_WINDOW, ("filter_w", "Int32"), ("filter_h", "Int32"))

BUILTINS: Mapping[str, Builtin] = {
    "ADD": Builtin(0, 11),
    "AVERAGE_POOL_2D": Builtin(1, 5, _POOL),
    "CONCATENATION": Builtin(2, 10, (("axis", "Int32"),)),
    "CONV_2D": Builtin(3, 1, _CONV),
    "FLOOR": Builtin(8),
    "FULLY_CONNECTED": Builtin(9, 8),
    "LOGISTIC": Builtin(14),
    "MAX_POOL_2D": Builtin(17, 5, _POOL),
    "MUL": Builtin(18, 21),
    "RELU": Builtin(19),
    "RESHAPE": Builtin(22, 17),
    "TANH": Builtin(28),
    "PAD": Builtin(34),
    "GATHER": Builtin(36, 23, (("axis", "Int32"),)),
    "TRANSPOSE": Builtin(39),
    "SUB": Builtin(41, 28),
    "DIV": Builtin(42, 29),
    "STRIDED_SLICE": Builtin(45, 32),
    "EXP": Builtin(47),
    "CAST": Builtin(53, 37, (("from_type", "Int8"), ("to_type", "Int8"))),
    "PRELU": Builtin(54),
    "MAXIMUM": Builtin(55),
    "MINIMUM": Builtin(57),
    "LESS": Builtin(58),
    "NEG": Builtin(59),
    "PADV2": Builtin(60),
    "GREATER": Builtin(61),
    "NOT_EQUAL": Builtin(72),
    "GREATER_EQUAL": Builtin(62),
    "LESS_EQUAL": Builtin(63),
    "LOG": Builtin(73),
    "SUM": Builtin(74, 27),
    "SQRT": Builtin(75),
    "RSQRT": Builtin(76),
    "REDUCE_MAX": Builtin(82, 27),
    "LOGICAL_AND": Builtin(86),
    "SQUARE": Builtin(92),
    "ABS": Builtin(101),
    "CEIL": Builtin(104),
    "ROUND": Builtin(116),
    "SELECT_V2": Builtin(123),
    "BROADCAST_TO": Builtin(130),
}

CUSTOMS = ("LceQuantize", "LceDequantize", "LceBconv2d")
"""Operators of the Larq Compute Engine: bits are packed into int32 along the last axis, LSB first, 1 for a negative."""

# Registered from version 2 on; all others from version 1 on.
_VERSIONS = {"BROADCAST_TO": 2}


class Tensor(NamedTuple):
    """A tensor of a graph; `array` holds a constant's values."""

    shape: tuple[int, ...]
    dtype: str
    name: str
    array: np.ndarray | None = None


class Operator(NamedTuple):
    """One operator: its name in `BUILTINS` or `CUSTOMS`, ids of tensors (an input of -1 is absent), and options."""

    kind: str
    inputs: tuple[int, ...]
    output: int
    options: Mapping[str, int]


@dataclass
class Graph:
    """Tensors and operators under construction.

    Attributes:
      tensors: by their ids.
      makers: tensor -> the operator that makes it, in an order in which they can run.
      path: the layer that new tensors are named by.
    """

    tensors: list[Tensor] = field(default_factory=list)
    makers: dict[int, Operator] = field(default_factory=dict)
    path: str = ""
    _known: dict[Any, int] = field(default_factory=dict)

    def tensor(self, shape: Sequence[int], dtype: str, name: str) -> int:
        """Add a tensor without values."""
        self.tensors.append(Tensor(tuple(map(int, shape)), dtype, name))
        return len(self.tensors) - 1

    def constant(self, values: Any, dtype: str = "float32") -> int:
        """Add a constant; equal ones are stored once."""
        array = np.ascontiguousarray(np.asarray(values, dtype))
        if dtype == "float32":
            # Compiled code, which trained the network, takes what is smaller for zeros.
            array = np.where(np.abs(array) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), array), array)
        key = (array.shape, dtype, array.tobytes())
        if key not in self._known:
            self.tensors.append(Tensor(array.shape, dtype, self._name("constant"), array))
            self._known[key] = len(self.tensors) - 1
        return self._known[key]

    def operator(
        self, kind: str, inputs: Sequence[int], shape: Sequence[int], *, dtype: str = "float32", **options: int
    ) -> int:
        """Add an operator, or find the same one; returns the tensor that it makes."""
        key = (kind, tuple(inputs), tuple(shape), dtype, tuple(sorted(options.items())))
        if key not in self._known:
            output = self._known[key] = self.tensor(shape, dtype, self._name(kind))
            self.makers[output] = Operator(kind, tuple(inputs), output, options)
        return self._known[key]

    def _name(self, kind):
        return "/".join(filter(None, (self.path, f"{kind}_{len(self.tensors)}")))


def to_bytes(graph: Graph, *, inputs: Sequence[int], outputs: Sequence[int], description: str) -> bytes:
    """The file of a graph, less the operators and constants that no output needs.

    Raises:
      UsageError: where the package flatbuffers is missing.
      ValueError: for a constant that is NaN or +inf; -inf may surround an image whose maxima are taken.
    """
    flatbuffers = import_extra("flatbuffers", "writing a .tflite file")
    operators = _needed(graph, outputs)
    used = sorted({*inputs, *outputs, *(t for o in operators for t in (*o.inputs, o.output) if t >= 0)})
    number = {tensor: position for position, tensor in enumerate(used)} | {-1: -1}
    builder = flatbuffers.Builder(1024)

    kinds = sorted({operator.kind for operator in operators})
    codes = [_operator_code(builder, kind) for kind in kinds]
    rows = [_operator(builder, operator, kinds.index(operator.kind), number) for operator in operators]
    # By the schema's rule buffer 0 is empty, and stands for every tensor without values.
    buffers, tensors = [_table(builder, {})], []
    for tensor in (graph.tensors[i] for i in used):
        tensors.append(_tensor(builder, tensor, 0 if tensor.array is None else len(buffers)))
        if tensor.array is not None:
            if not np.all(tensor.array < np.inf):
                raise ValueError(f"`variables` make the constant {tensor.name!r} not finite; train again")
            buffers.append(_buffer(builder, tensor.array))
    subgraph = {
        0: ("Offset", _offsets(builder, tensors)),
        1: ("Offset", _integers(builder, [number[i] for i in inputs])),
        2: ("Offset", _integers(builder, [number[i] for i in outputs])),
        3: ("Offset", _offsets(builder, rows)),
        4: ("Offset", builder.CreateString("main")),
    }
    subgraphs = _offsets(builder, [_table(builder, subgraph)])
    model = {
        0: ("Uint32", SCHEMA_VERSION),
        1: ("Offset", _offsets(builder, codes)),
        2: ("Offset", subgraphs),
        3: ("Offset", builder.CreateString(description)),
        4: ("Offset", _offsets(builder, buffers)),
    }
    builder.Finish(_table(builder, model), file_identifier=FILE_IDENTIFIER)
    return bytes(builder.Output())


def _needed(graph, outputs):
    needed, operators = set(outputs), []
    for operator in reversed(graph.makers.values()):
        if operator.output in needed:
            needed.update(operator.inputs)
            operators.append(operator)
    return operators[::-1]


def _operator_code(builder, kind):
    version = ("Int32", _VERSIONS.get(kind, 1))
    if kind in CUSTOMS:
        name = builder.CreateString(kind)
        return _table(builder, {0: ("Int8", CUSTOM), 1: ("Offset", name), 2: version, 3: ("Int32", CUSTOM)})
    code = BUILTINS[kind].code
    # Older readers know the code as a byte, in which codes above 126 do not fit.
    return _table(builder, {0: ("Int8", min(code, 127)), 2: version, 3: ("Int32", code)})


def _operator(builder, operator, code, number):
    inputs = _integers(builder, [number[i] for i in operator.inputs])
    fields = {0: ("Uint32", code), 1: ("Offset", inputs), 2: ("Offset", _integers(builder, [number[operator.output]]))}
    if operator.kind in CUSTOMS:
        if operator.options:
            fields[5] = ("Offset", builder.CreateByteVector(_flexbuffer(operator.options)))
        return _table(builder, fields)
    builtin = BUILTINS[operator.kind]
    if builtin.options:
        slots = {i: (kind, operator.options.get(name, 0)) for i, (name, kind) in enumerate(builtin.fields)}
        fields |= {3: ("Uint8", builtin.options), 4: ("Offset", _table(builder, slots))}
    return _table(builder, fields)


def _flexbuffer(options):
    from flatbuffers import flexbuffers

    builder = flexbuffers.Builder()
    with builder.Map():
        for name in sorted(options):
            builder.Int(name, options[name])
    return bytes(builder.Finish())


def _tensor(builder, tensor, buffer):
    shape, name = _integers(builder, tensor.shape), builder.CreateString(tensor.name)
    kind = ("Int8", TENSOR_TYPES[tensor.dtype])
    return _table(builder, {0: ("Offset", shape), 1: kind, 2: ("Uint32", buffer), 3: ("Offset", name)})


def _buffer(builder, array):
    data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    # Kernels read constants in place, in vector registers: the schema asks for 16 bytes of alignment.
    builder.Prep(16, len(data))
    return _table(builder, {0: ("Offset", builder.CreateByteVector(data))})


def _table(builder, fields):
    """A table with slot -> (type, value); a field that is 0 is left out, as readers take it to be."""
    builder.StartObject(max(fields, default=-1) + 1)
    for slot, (kind, value) in sorted(fields.items()):
        prepend = "PrependUOffsetTRelativeSlot" if kind == "Offset" else f"Prepend{kind}Slot"
        getattr(builder, prepend)(slot, value, 0)
    return builder.EndObject()


def _offsets(builder, items):
    builder.StartVector(4, len(items), 4)
    for item in reversed(items):
        builder.PrependUOffsetTRelative(item)
    return builder.EndVector()


def _integers(builder, numbers):
    builder.StartVector(4, len(numbers), 4)
    for number in reversed(numbers):
        builder.PrependInt32(number)
    return builder.EndVector()

r"""Operations of JAX as operators of a `.tflite` file: one rule a primitive.

A value of the traced computation is an array, which is a constant of the file; a :class:`Real` tensor of the graph; or
one of the forms that wait for the operation which says what they are for: :class:`Signs`, :class:`Compared`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from bnn_jax.packed.tflite.products import (
    NO_PADS,
    POOLS,
    PRODUCTS,
    Real,
    Signs,
    Unsupported,
    codes_tensor,
    reshape,
)
from bnn_jax.packed.tflite.schema import TENSOR_TYPES, Graph
from bnn_jax.quantizers.codes import read_mark


class Compared(NamedTuple):
    """left < right and the like, by the primitive's name."""

    primitive: str
    left: Any
    right: Any
    shape: tuple[int, ...]


Value: TypeAlias = np.ndarray | Real | Signs | Compared


def as_tensor(graph: Graph, value: Value, *, whole: bool = False) -> int:
    """The id of a value's tensor; adds the operators that make it, where it waited for its use.

    Args:
      graph: of the file.
      value: whose tensor is wanted.
      whole: keep the axes along which a constant does not change, for an operator that does not broadcast.
    """
    if isinstance(value, np.ndarray):
        kind = {"f": "float32", "i": "int32", "u": "int32", "b": "bool"}[value.dtype.kind]
        return graph.constant(value if whole else _narrowed(value), kind)
    if isinstance(value, Signs):
        return codes_tensor(graph, value)
    if isinstance(value, Compared):
        inputs = _together(graph, value.shape, value.left, value.right)
        return graph.operator(_COMPARISONS[value.primitive], inputs, value.shape, dtype="bool")
    return value.tensor


def _narrowed(array):
    """The array with size 1 on every axis along which it does not change."""
    for axis in range(array.ndim):
        first = array.take([0], axis) if array.shape[axis] > 1 else array
        array = first if np.all(array == first) else array
    return array


def _together(graph, shape, *values):
    """Tensors that broadcast to `shape`: constants narrow where another value has all of it."""
    whole = not any(value.shape == shape for value in values if not isinstance(value, np.ndarray))
    return [as_tensor(graph, value, whole=whole) for value in values]


def _made(graph, call, kind, *inputs, dtype="float32", **options):
    return Real(graph.operator(kind, inputs, call.shape, dtype=dtype, **options), call.shape)


def _require_short(call):
    if len(call.shape) > 4:
        raise Unsupported(f"on tensors of {len(call.shape)} axes")


def _same(graph, call, x):
    return x


# Element by element.

_UNARY = {"neg": "NEG", "abs": "ABS", "exp": "EXP", "log": "LOG", "sqrt": "SQRT", "rsqrt": "RSQRT", "tanh": "TANH"}
_UNARY |= {"logistic": "LOGISTIC", "floor": "FLOOR", "ceil": "CEIL", "round": "ROUND", "square": "SQUARE"}
_BINARY = {"add": "ADD", "sub": "SUB", "mul": "MUL", "div": "DIV", "max": "MAXIMUM", "min": "MINIMUM"}
_COMPARISONS = {"lt": "LESS", "gt": "GREATER", "ge": "GREATER_EQUAL", "le": "LESS_EQUAL", "ne": "NOT_EQUAL"}
_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}
_TO_EVEN = 1


def _unary(graph, call, x):
    if call.name == "round" and int(call.params["rounding_method"]) != _TO_EVEN:
        raise Unsupported("that rounds halves away from zero,")
    return _made(graph, call, _UNARY[call.name], as_tensor(graph, x))


def _binary(graph, call, left, right):
    if _is_neutral(call, right) and left.shape == call.shape:
        return left
    if call.name in ("add", "mul") and _is_neutral(call, left) and right.shape == call.shape:
        return right
    _require_short(call)
    if call.name == "max" and _is_zero(right) and left.shape == call.shape:
        return _made(graph, call, "RELU", as_tensor(graph, left))
    return _made(graph, call, _BINARY[call.name], *_together(graph, call.shape, left, right))


def _is_neutral(call, value):
    return isinstance(value, np.ndarray) and call.name in _NEUTRAL and bool(np.all(value == _NEUTRAL[call.name]))


def _compare(graph, call, left, right):
    return Compared(call.name, left, right, call.shape)


def _select(graph, call, condition, *cases):
    if len(cases) != 2:
        raise Unsupported(f"among {len(cases)} cases")
    if isinstance(condition, np.ndarray) and (condition == condition.flat[0]).all():
        return cases[int(condition.flat[0])]
    if isinstance(condition, Compared):
        if condition.primitive == "ne" and condition.left is condition.right:
            # x != x holds for NaN alone, which a file of finite numbers does not meet.
            return cases[0]
        for known in (_as_signs, _as_maximum, _as_bound, _as_prelu):
            value = known(graph, condition, *cases)
            if value is not None:
                return value
    _require_short(call)
    condition, otherwise, then = _together(graph, call.shape, condition, *cases)
    return _made(graph, call, "SELECT_V2", condition, then, otherwise, dtype=call.dtype)


def _as_signs(graph, compared, otherwise, then):
    """-1 or +1 by a comparison with constants."""
    real, limit, primitive = compared.left, compared.right, compared.primitive
    arrays = all(isinstance(value, np.ndarray) for value in (limit, otherwise, then))
    if not arrays or not isinstance(real, Real) or real.shape != compared.shape:
        return None
    if primitive not in ("lt", "le", "gt", "ge"):
        return None
    if sorted([*np.unique(otherwise), *np.unique(then)]) != [-1, 1]:
        return None
    if primitive == "le" and np.all(limit == -np.finfo(np.float32).tiny):
        # The sign of the package, for which a denormal number is zero; the engine may look at its sign bit.
        primitive, limit = "lt", np.zeros_like(limit)
    # Signs are +1 at a difference of 0: that of x - limit for < and >=, that of limit - x for > and <=.
    if primitive in ("gt", "le"):
        real = Real(graph.operator("SUB", [as_tensor(graph, limit), real.tensor], real.shape), real.shape)
    elif limit.any():
        real = Real(graph.operator("SUB", [real.tensor, as_tensor(graph, limit)], real.shape), real.shape)
    positive = otherwise if primitive in ("lt", "gt") else then
    return Signs(_without_negative_zeros(graph, real), opposite=bool(positive.flat[0] < 0))


def _without_negative_zeros(graph, real):
    """x + 0, as LceQuantize may look at the sign bit alone; not needed behind a sum with constants, as a batch norm."""
    if _never_negative_zero(graph, real.tensor):
        return real
    return Real(graph.operator("ADD", [real.tensor, graph.constant(0.0)], real.shape), real.shape)


def _never_negative_zero(graph, tensor):
    array, maker = graph.tensors[tensor].array, graph.makers.get(tensor)
    if array is not None:
        return not np.any(np.signbit(array) & (array == 0))
    if maker is None:
        return False
    if maker.kind in ("RESHAPE", "MAX_POOL_2D"):
        return _never_negative_zero(graph, maker.inputs[0])
    combine = {"ADD": any, "MAXIMUM": all, "MINIMUM": all}.get(maker.kind)
    return combine is not None and combine(_never_negative_zero(graph, i) for i in maker.inputs)


def _as_maximum(graph, compared, otherwise, then):
    """where(a > b, a, b)."""
    if compared.primitive != "gt" or then is not compared.left or otherwise is not compared.right:
        return None
    if isinstance(then, Real) and isinstance(otherwise, Real) and then.shape == otherwise.shape:
        return Real(graph.operator("MAXIMUM", [then.tensor, otherwise.tensor], then.shape), then.shape)
    return None


def _as_bound(graph, compared, otherwise, then):
    """where(x < c, c, x), where(x > c, c, x), and the latter of a maximum of x, as in a clip."""
    x, limit, primitive = compared.left, compared.right, compared.primitive
    if not all(isinstance(value, np.ndarray) for value in (limit, then)) or not np.all(limit == then):
        return None
    if primitive not in ("lt", "gt") or not isinstance(x, Real) or not isinstance(otherwise, Real):
        return None
    if otherwise is not x and not (primitive == "gt" and _is_bounded(graph, x, otherwise, limit)):
        return None
    kind = "MAXIMUM" if primitive == "lt" else "MINIMUM"
    inputs = _together(graph, compared.shape, otherwise, then)
    return Real(graph.operator(kind, inputs, compared.shape), compared.shape)


def _is_bounded(graph, x, y, limit):
    """Whether y = max(x, c) with c at most `limit`."""
    maker = graph.makers.get(y.tensor)
    if maker is None or maker.kind != "MAXIMUM" or maker.inputs[0] != x.tensor:
        return False
    below = graph.tensors[maker.inputs[1]].array
    return below is not None and bool(np.max(below) <= np.min(limit))


def _as_prelu(graph, compared, otherwise, then):
    """where(x > 0, x, slope x) with a slope a channel."""
    if compared.primitive not in ("gt", "ge") or then is not compared.left:
        return None
    if not (isinstance(then, Real) and isinstance(otherwise, Real) and _is_zero(compared.right)):
        return None
    maker = graph.makers.get(otherwise.tensor)
    if maker is None or maker.kind != "MUL" or then.tensor not in maker.inputs:
        return None
    slope = graph.tensors[next((i for i in maker.inputs if i != then.tensor), then.tensor)].array
    if slope is None or slope.size not in (1, slope.shape[-1] if slope.ndim else 1):
        return None
    slopes = np.broadcast_to(slope.reshape(-1), (*(1,) * (len(then.shape) - 2), then.shape[-1]))
    return Real(graph.operator("PRELU", [then.tensor, graph.constant(slopes)], then.shape), then.shape)


def _is_zero(value):
    return isinstance(value, np.ndarray) and not value.any()


def _convert(graph, call, x):
    if isinstance(x, Signs) and call.dtype in TENSOR_TYPES:
        return x
    if call.dtype not in ("float32", "int32"):
        raise Unsupported(f"to {call.dtype}")
    tensor = as_tensor(graph, x)
    old = graph.tensors[tensor].dtype
    if old == call.dtype:
        return Real(tensor, call.shape)
    types = {"from_type": TENSOR_TYPES[old], "to_type": TENSOR_TYPES[call.dtype]}
    return _made(graph, call, "CAST", tensor, dtype=call.dtype, **types)


def _name(graph, call, x):
    """The mark of a quantizer: codes of inputs must be those that LceQuantize makes."""
    mark = read_mark(call.params["name"])
    if mark and mark.values and mark.place == "input_quantizer" and not isinstance(x, Signs):
        raise Unsupported(f"that marks input codes of {mark.values} values, other than -1 and +1,")
    return x


# Moving numbers.


def _reshape(graph, call, x):
    if isinstance(x, Signs) and x.pads == NO_PADS:
        return x._replace(real=reshape(graph, x.real, call.shape))
    return reshape(graph, Real(as_tensor(graph, x), x.shape), call.shape)


def _slice(graph, call, x):
    starts, limits = call.params["start_indices"], call.params["limit_indices"]
    _require_short(call)
    strides = call.params["strides"] or (1,) * len(starts)
    numbers = [graph.constant(values, "int32") for values in (starts, limits, strides)]
    return _made(graph, call, "STRIDED_SLICE", as_tensor(graph, x), *numbers)


def _pad(graph, call, x, filling):
    config = tuple(tuple(map(int, axis)) for axis in call.params["padding_config"])
    if any(low < 0 or high < 0 or inner for low, high, inner in config) or len(config) > 4:
        raise Unsupported("that crops, spreads, or has more than four axes,")
    pads = tuple((low, high) for low, high, _ in config)
    value = float(filling)
    if isinstance(x, Signs) and len(pads) == 4 and pads[0] == pads[3] == (0, 0) and abs(value) == 1:
        return x._replace(pads=pads[1:3], pad=int(value))
    inputs = [as_tensor(graph, x, whole=True), graph.constant(pads, "int32")]
    return _made(graph, call, "PADV2", *inputs, graph.constant(value)) if value else _made(graph, call, "PAD", *inputs)


def _broadcast(graph, call, x):
    axes, tensor = call.params["broadcast_dimensions"], as_tensor(graph, x)
    aligned = tuple(x.shape[axes.index(axis)] if axis in axes else 1 for axis in range(len(call.shape)))
    real = reshape(graph, Real(tensor, x.shape), aligned)
    if aligned == call.shape:
        return real
    return _made(graph, call, "BROADCAST_TO", real.tensor, graph.constant(call.shape, "int32"))


def _transpose(graph, call, x):
    permutation = graph.constant(call.params["permutation"], "int32")
    return _made(graph, call, "TRANSPOSE", as_tensor(graph, x), permutation)


def _concatenate(graph, call, *parts):
    inputs = [as_tensor(graph, part, whole=True) for part in parts]
    return _made(graph, call, "CONCATENATION", *inputs, axis=call.params["dimension"])


def _reduction(kind):
    def rule(graph, call, x):
        return _made(graph, call, kind, as_tensor(graph, x), graph.constant(call.params["axes"], "int32"))

    return rule


RULES: Mapping[str, Callable[..., Value]] = {
    **PRODUCTS,
    **POOLS,
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_COMPARISONS, _compare),
    **dict.fromkeys(("stop_gradient", "copy", "copy_p", "optimization_barrier"), _same),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "select_n": _select,
    "convert_element_type": _convert,
    "name": _name,
    "slice": _slice,
    "pad": _pad,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "concatenate": _concatenate,
    "reduce_sum": _reduction("SUM"),
    "reduce_max": _reduction("REDUCE_MAX"),
}
"""Rules (graph, call, *values) -> value, by the primitive's name."""

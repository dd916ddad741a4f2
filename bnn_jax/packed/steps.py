r"""A traced network as a short list of steps on NumPy arrays.

A step is {"output": name, "op": operation, "inputs": [names and numbers], "options": {...}, "layer": path}.  Most
operations are functions of NumPy by their names, which broadcast; those that are not have a rule each below.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr

from bnn_jax.tracing.interpret import Unsupported, evaluate, interpret, is_array

THRESHOLD = "threshold"
"""The jitted function that is one step."""

_UFUNCS = {"add": "add", "sub": "subtract", "mul": "multiply", "div": "divide", "max": "maximum", "min": "minimum"}
_UFUNCS |= {"neg": "negative", "abs": "absolute", "exp": "exp", "log": "log", "sqrt": "sqrt", "tanh": "tanh"}
_UFUNCS |= {"floor": "floor", "ceil": "ceil", "square": "square", "pow": "power"}
_UFUNCS |= {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal"}
_UFUNCS |= {"ne": "not_equal", "and": "logical_and", "or": "logical_or", "not": "logical_not"}
_OF_TRUTH = {"and", "or", "not"}
_SAME = {"convert_element_type", "stop_gradient", "copy", "copy_p", "name"}
_REDUCTIONS = {"reduce_sum": "sum", "reduce_max": "max", "reduce_min": "min"}
_POOLS = {"reduce_window_max": "max_pool", "reduce_window_sum": "sum_pool"}
_CONSTANT_BY_ELEMENT = {*_UFUNCS, *_SAME, "select_n", "clamp"}
_OF_ANY_NUMBER = {"slice", "dynamic_slice", "gather", "reduce_max", "reduce_min"}
_ROUNDING = {
    "add",
    "sub",
    "mul",
    "div",
    "exp",
    "log",
    "sqrt",
    "tanh",
    "square",
    "pow",
    "integer_pow",
    "logistic",
    "rsqrt",
}
_ROUNDING |= {"convert_element_type", "reduce_sum", "reduce_window_sum", "conv_general_dilated", "dot_general"}
_HALF = {"bfloat16", "float16"}
_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}
_WHOLE = {"sign", "threshold", "trunc", "rint", "floor", "ceil"}
_KEEPS_WHOLE = {"reshape", "slice", "pad", "concatenate", "transpose", "max_pool", "matmul", "conv", "multiply", "add"}
_TO_EVEN = 1
_AMONG_IMAGES = "that chooses among the images"
_OVER_IMAGES = "over the images of a batch"


class Ref(NamedTuple):
    """What a name stands for; `shape` as NumPy has it, which may broadcast to that of the traced value."""

    name: str
    shape: tuple[int, ...]


class Steps:
    """The steps of a traced function of named arrays and images, in an order in which they can run.

    Attributes:
      steps: as above.
      constants: name -> array, those that the function holds besides the named ones.
    """

    def __init__(self, jaxpr: ClosedJaxpr, names: Sequence[str], output: str, batch: int):
        """Read `jaxpr`, whose inputs have these names and whose only result is to be called `output`.

        It was traced for `batch` images, a number that divides no size but those that depend on how many there are.

        Raises:
          ValueError: for an operation that has no step; the layer is named.
        """
        self.steps: list[dict[str, Any]] = []
        self.constants: dict[str, np.ndarray] = {}
        self._known: dict[str, Ref] = {}
        inputs = [Ref(name, _shape(v.aval)) for name, v in zip(names, jaxpr.jaxpr.invars, strict=True)]
        self._named, self._batch = set(names), batch
        whole = [np.issubdtype(v.aval.dtype, np.integer) for v in jaxpr.jaxpr.invars]
        self._whole_numbers = {name for name, is_whole in zip(names, whole) if is_whole}
        needed, _ = dce_jaxpr(jaxpr.jaxpr, [True], instantiate=True)
        (result,) = interpret(ClosedJaxpr(needed, jaxpr.consts), inputs, self._results, whole=(THRESHOLD,))
        self._finish(result, output)

    def _finish(self, result: Ref, output: str) -> None:
        """Leave out what the output does not need; number the values anew."""
        needed, kept = {result.name}, []
        for step in reversed(self.steps):
            if step["output"] in needed:
                needed.update(i for i in step["inputs"] if isinstance(i, str))
                kept.append(step)
        self.steps = kept[::-1]
        new = {step["output"]: f"x{number}" for number, step in enumerate(self.steps, 1)} | {result.name: output}
        for step in self.steps:
            step["output"] = new[step["output"]]
            step["inputs"] = [new.get(i, i) for i in step["inputs"]]
        self.constants = {name: array for name, array in self.constants.items() if name in needed}

    def _results(self, equation: JaxprEqn, inputs: list[Any], path: str) -> list[Any]:
        if equation.primitive.name == "optimization_barrier":
            return inputs
        self._layer = "/".join(path.split("/")[1:])
        try:
            if all(map(is_array, inputs)):
                return self._constants(equation, inputs)
            result = self._result(equation, inputs, path)
            return result if isinstance(result, list) else [self._rounded(result, equation)]
        except Unsupported as cause:
            what = " ".join(filter(None, (f"the operation {equation.primitive.name!r}", str(cause))))
            raise ValueError(
                f"`packed` has {what} at {path or 'its top'!r}, for which there is no step on NumPy arrays; "
                "save it as .bnn.safetensors or .stablehlo instead"
            ) from None

    def _constants(self, equation: JaxprEqn, inputs: list[Any]) -> list[Any]:
        """The results of an operation on constants, of size 1 along the axes that broadcasting or the images make."""
        name = equation.primitive.name
        if name == "broadcast_in_dim":
            return [inputs[0].reshape(_aligned(equation, inputs[0].shape))]
        if name in _CONSTANT_BY_ELEMENT:
            return evaluate(equation, inputs if len(inputs) == 1 else list(np.broadcast_arrays(*inputs)))
        shapes = [_shape(atom.aval) for atom in equation.invars]
        full = [x if x.shape == shape else np.broadcast_to(x, shape) for x, shape in zip(inputs, shapes)]
        results = evaluate(equation, full)
        before, after = ([any(map(self._counts_images, x.shape)) for x in arrays] for arrays in (full, results))
        if any(before) and not all(after) and name not in _OF_ANY_NUMBER:
            raise Unsupported(_OVER_IMAGES)
        return [self._of_one_image(result) for result in results]

    def _counts_images(self, size: int) -> bool:
        """Whether an axis of this size is that of the images, or holds it."""
        return size > 0 and size % self._batch == 0

    def _of_one_image(self, constant: Any) -> Any:
        """A constant of size 1 along the axes of the images; NaN everywhere is the same for each."""
        for axis, size in enumerate(constant.shape):
            if self._counts_images(size):
                first = constant[(slice(None),) * axis + (slice(1),)]
                if ((constant != first) & ((constant == constant) | (first == first))).any():
                    raise Unsupported(_AMONG_IMAGES)
                constant = first
        return constant

    def _result(self, equation: JaxprEqn, inputs: list[Any], path: str) -> Any:
        name, params = equation.primitive.name, equation.params
        shape = _shape(equation.outvars[0].aval)
        if params.get("name") == THRESHOLD:
            return self._step("threshold", inputs, shape)
        if name in _SAME:
            return self._converted(inputs[0], equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype)
        if name in _UFUNCS:
            self._require_kind(name, equation.invars[0].aval.dtype)
            return self._elementwise(name, inputs, shape)
        if name in ("select_n", "clamp"):
            return self._select(inputs, shape) if name == "select_n" else self._clip(inputs, shape)
        wide = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims")
        for value, atom in zip(inputs, equation.invars):
            if value.shape != _shape(atom.aval) and name not in wide:
                raise Unsupported("of values that are the same along an axis")
        rule = getattr(self, f"_{name}", None)
        if name in wide:
            return self._reshape(inputs[0], equation, shape, path)
        if name in _REDUCTIONS:
            self._require_no_images(inputs[0], params["axes"])
            return self._step(_REDUCTIONS[name], inputs, shape, axis=[int(axis) for axis in params["axes"]])
        if name in _POOLS:
            return self._pool(_POOLS[name], inputs[0], params, shape)
        if rule is None:
            raise Unsupported("")
        return rule(inputs, params, shape)

    def _step(self, op: str, inputs: Sequence[Any], shape: tuple[int, ...], /, **options: Any) -> Ref:
        """Add a step, or find the same one."""
        given = [self._input(value) for value in inputs]
        key = repr((op, given, options))
        if key not in self._known:
            self._known[key] = Ref(f" {len(self._known)}", tuple(shape))
            step = {"output": self._known[key].name, "op": op, "inputs": given, "options": options}
            self.steps.append(step | {"layer": self._layer})
            if op in _WHOLE or (op in _KEEPS_WHOLE and all(map(self._is_whole, inputs))):
                self._whole_numbers.add(step["output"])
        return self._known[key]

    def _is_whole(self, value: Any) -> bool:
        """Whether a value is known to hold whole numbers."""
        return value.name in self._whole_numbers if isinstance(value, Ref) else bool(np.all(value % 1 == 0))

    def _input(self, value: Any) -> str | float:
        """The name of a value, or a number where a constant is the same everywhere."""
        if isinstance(value, Ref):
            return value.name
        if value.size and np.all(value == value.flat[0]):
            return float(value.flat[0])
        array = value.reshape(_without_leading_ones(value.shape))
        for name, known in self.constants.items():
            if known.shape == array.shape and known.tobytes() == array.tobytes():
                return name
        name = f"constant{len(self.constants) + 1}"
        self.constants[name] = array
        return name

    def _whole(self, value: Any) -> Ref:
        """A value as a name: a constant is stored, not written as a number."""
        if isinstance(value, Ref):
            return value
        name = f"constant{len(self.constants) + 1}"
        self.constants[name] = np.asarray(value)
        return Ref(name, value.shape)

    # Element by element.

    def _converted(self, x: Ref, before: np.dtype, after: np.dtype) -> Ref:
        """A value in another dtype; truth values become 0 and 1, for NumPy adds them as `or`."""
        if before.kind == "b" and after.kind != "b":
            truth = self._step("where", [x, np.ones(()), np.zeros(())], x.shape)
            self._whole_numbers.add(truth.name)
            return truth
        to_whole = np.issubdtype(after, np.integer)
        return self._step("trunc", [x], x.shape) if to_whole and not self._is_whole(x) else x

    def _require_kind(self, name: str, dtype: np.dtype) -> None:
        """Refuse what works on the bits of whole numbers, and their division, which cuts off."""
        if (name in _OF_TRUTH and dtype.kind != "b") or (name == "div" and np.issubdtype(dtype, np.integer)):
            raise Unsupported(f"of {dtype.name}")

    def _require_no_images(self, x: Any, axes: Sequence[int]) -> None:
        """Refuse to sum over the images: a mean would divide by as many as the function was traced for."""
        if any(self._counts_images(x.shape[axis]) for axis in axes):
            raise Unsupported(_OVER_IMAGES)

    def _elementwise(self, name, inputs, shape):
        left, right = inputs[0], inputs[-1]
        if name == "ne" and left is right:
            return np.zeros((1,) * len(shape), bool)  # x != x holds for NaN alone.
        if name in _NEUTRAL and _is_all(right, _NEUTRAL[name]):
            return left
        if name in ("add", "mul") and _is_all(left, _NEUTRAL[name]):
            return right
        return self._step(_UFUNCS[name], inputs, _broadcast(inputs))

    def _logistic(self, inputs, params, shape):
        half = np.array(0.5)
        tanh = self._step("tanh", [self._step("multiply", [inputs[0], half], shape)], shape)
        return self._step("multiply", [self._step("add", [tanh, np.ones(())], shape), half], shape)

    def _rsqrt(self, inputs, params, shape):
        return self._step("divide", [np.ones(()), self._step("sqrt", inputs, shape)], shape)

    def _round(self, inputs, params, shape):
        if int(params["rounding_method"]) != _TO_EVEN:
            raise Unsupported("that rounds halves away from zero")
        return self._step("rint", inputs, shape)

    def _integer_pow(self, inputs, params, shape):
        return self._step("power", [inputs[0], np.array(params["y"])], shape)

    def _clip(self, inputs, shape):
        low, x, high = inputs
        return self._step("minimum", [self._step("maximum", [x, low], shape), high], shape)

    def _select(self, inputs, shape):
        condition, otherwise, *then = inputs
        if len(then) != 1:
            raise Unsupported(f"among {1 + len(then)} cases")
        if isinstance(condition, np.ndarray) and np.all(condition == condition.flat[0]):
            return then[0] if condition.flat[0] else otherwise
        if otherwise is then[0]:
            return otherwise
        made = isinstance(condition, Ref) and next((s for s in self.steps if s["output"] == condition.name), None)
        if made and _is_sign(made, otherwise, then[0]):
            return self._step("sign", [Ref(made["inputs"][0], condition.shape)], condition.shape)
        return self._step("where", [condition, then[0], otherwise], _broadcast(inputs))

    def _rounded(self, x: Any, equation: JaxprEqn) -> Any:
        """What an operation computes in half precision, rounded to it: steps are on float32."""
        dtype = equation.outvars[0].aval.dtype
        if equation.primitive.name not in _ROUNDING or not isinstance(x, Ref) or dtype.name not in _HALF:
            return x
        return self._step(dtype.name, [x], x.shape)

    def _reduce_precision(self, inputs, params, shape):
        found = [params["exponent_bits"], params["mantissa_bits"]]
        dtypes = {name: [jnp.finfo(name).nexp, jnp.finfo(name).nmant] for name in ("float32", *_HALF)}
        if found not in dtypes.values():
            raise Unsupported("to {} and {} bits".format(*found))
        (name,) = (name for name, bits in dtypes.items() if bits == found)
        return self._step(name, inputs, shape) if name in _HALF else inputs[0]

    # Moving numbers.

    def _reshape(self, x, equation, shape, path):
        name = equation.primitive.name
        if name == "broadcast_in_dim":
            shape = _aligned(equation, _shape(equation.invars[0].aval))
        before = tuple(size for size in x.shape if size != 1)
        if x.name in self._named and _without_leading_ones(shape) == x.shape:
            return Ref(x.name, x.shape)
        full = _shape(equation.invars[0].aval)
        if before != tuple(size for size in shape if size != 1) and x.shape != full:
            if len(x.shape) != len(full) or x.shape[0] != full[0]:
                raise Unsupported("of values that are the same along an axis")
            # Written out, as the mean of a group for each of its channels.
            ones = np.ones([size if own == 1 else 1 for own, size in zip(x.shape, full)], np.float32)
            x = self._step("multiply", [x, self._whole(ones)], full)
        if x.shape == shape:
            return x
        return self._step("reshape", [x], shape, shape=[size if size % self._batch else -1 for size in shape])

    def _transpose(self, inputs, params, shape):
        return self._step("transpose", inputs, shape, axes=[int(axis) for axis in params["permutation"]])

    def _tile(self, inputs, params, shape):
        reps = [int(n) for n in params["reps"]]
        if reps[0] != 1:
            raise Unsupported(_AMONG_IMAGES)
        return self._step("tile", inputs, shape, reps=reps)

    def _concatenate(self, inputs, params, shape):
        return self._step("concatenate", list(map(self._whole, inputs)), shape, axis=int(params["dimension"]))

    def _slice(self, inputs, params, shape):
        starts, stops = params["start_indices"], params["limit_indices"]
        strides = params["strides"] or (1,) * len(starts)
        ranges = [[int(a), int(b), int(s)] for a, b, s in list(zip(starts, stops, strides))[1:]]
        if starts[0] != 0 or strides[0] != 1 or shape[0] != inputs[0].shape[0]:
            raise Unsupported(_AMONG_IMAGES)
        return self._step("slice", inputs, shape, ranges=ranges)

    def _split(self, inputs, params, shape):
        (x,), axis, stops = inputs, params["axis"], np.cumsum(params["sizes"]).tolist()
        whole = [[0, size, 1] for size in x.shape]
        if axis == 0:
            raise Unsupported(_AMONG_IMAGES)
        parts = []
        for start, stop in zip([0, *stops], stops):
            ranges = [*whole[1:axis], [start, stop, 1], *whole[axis + 1 :]]
            shape = (*x.shape[:axis], stop - start, *x.shape[axis + 1 :])
            parts.append(self._step("slice", [x], shape, ranges=ranges))
        return parts

    def _pad(self, inputs, params, shape):
        x, value = inputs
        config = [tuple(map(int, axis)) for axis in params["padding_config"]]
        if any(low < 0 or high < 0 or inner for low, high, inner in config) or not isinstance(value, np.ndarray):
            raise Unsupported("that crops or spreads")
        pads = [[low, high] for low, high, _ in config]
        return self._step("pad", [x], shape, pad_width=pads, constant_values=float(value))

    # Products and pools.

    def _conv_general_dilated(self, inputs, params, shape):
        ndim, layout = len(shape), params["dimension_numbers"]
        inner = tuple(range(1, ndim - 1))
        usual = ((0, ndim - 1, *inner), (ndim - 1, ndim - 2, *range(ndim - 2)), (0, ndim - 1, *inner))
        if tuple(layout) != usual or params["batch_group_count"] != 1 or set(params["lhs_dilation"]) != {1}:
            raise Unsupported("of other layouts than channels last, or of spread inputs")
        options = {
            "strides": [int(n) for n in params["window_strides"]],
            "padding": [[int(low), int(high)] for low, high in params["padding"]],
            "dilation": [int(n) for n in params["rhs_dilation"]],
            "groups": int(params["feature_group_count"]),
        }
        if min(map(min, options["padding"])) < 0:
            raise Unsupported("with negative padding")
        return self._step("conv", list(map(self._whole, inputs)), shape, **options)

    def _dot_general(self, inputs, params, shape):
        (left, right), (left_batch, right_batch) = params["dimension_numbers"]
        x, y = map(self._whole, inputs)
        self._require_no_images(x, left)
        if (left, right) == ((len(x.shape) - 1,), (0,)) and len(y.shape) == 2 and not left_batch:
            return self._step("matmul", [x, y], shape)
        letters = iter("abcdefghijklmnopqrstuvwxyz")
        a, b = [next(letters) for _ in x.shape], [next(letters) for _ in y.shape]
        for i, j in (*zip(left, right), *zip(left_batch, right_batch)):
            b[j] = a[i]
        free = [n for i, n in enumerate(a) if i not in (*left, *left_batch)]
        free += [n for j, n in enumerate(b) if j not in (*right, *right_batch)]
        text = f"{''.join(a)},{''.join(b)}->{''.join([a[i] for i in left_batch] + free)}"
        return self._step("einsum", [x, y], shape, subscripts=text)

    def _pool(self, op, x, params, shape):
        geometry = {
            "window": [int(n) for n in params["window_dimensions"]],
            "strides": [int(n) for n in params["window_strides"]],
            "padding": [[int(low), int(high)] for low, high in params["padding"]],
            "dilation": [int(n) for n in params["window_dilation"]],
        }
        ends = [sides[i] for sides in geometry.values() for i in (0, -1)]
        if ends != [1, 1, 1, 1, [0, 0], [0, 0], 1, 1] or set(params["base_dilation"]) != {1}:
            raise Unsupported("over other windows than those of images")
        return self._step(op, [x], shape, **{name: sides[1:-1] for name, sides in geometry.items()})


def _shape(aval: Any) -> tuple[int, ...]:
    return tuple(map(int, aval.shape))


def _aligned(equation: JaxprEqn, old: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what a `broadcast_in_dim` broadcasts, with axes of size 1, along which NumPy does it by itself."""
    axes = equation.params["broadcast_dimensions"]
    return tuple(old[axes.index(axis)] if axis in axes else 1 for axis in range(len(equation.params["shape"])))


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Less the axes that broadcasting puts in front; of a vector or a kernel."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _broadcast(values: Sequence[Any]) -> tuple[int, ...]:
    """The shape to which NumPy broadcasts."""
    shapes = [value.shape for value in values if isinstance(value, Ref)]
    longest = max(map(len, shapes))
    axes = zip(*[(1,) * (longest - len(shape)) + shape for shape in shapes])
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in axes)


def _is_all(value: Any, number: float) -> bool:
    return isinstance(value, np.ndarray) and bool(np.all(value == number))


def _is_sign(made: Mapping[str, Any], otherwise: Any, then: Any) -> bool:
    """Whether a step's comparison chooses -1 below zero and +1 elsewhere."""
    tiny = float(np.finfo(np.float32).tiny)
    below = (made["op"] == "less_equal" and made["inputs"][1] == -tiny) or (
        made["op"] == "less" and made["inputs"][1] == 0
    )
    return below and _is_all(then, -1) and _is_all(otherwise, 1)

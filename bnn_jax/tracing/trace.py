r"""A function as a flat graph of primitive operations, without running it: the ground of all counting.

Nothing is compiled and no array is allocated: a network of 100 convolutions is traced in a few seconds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax import ShapeDtypeStruct
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from bnn_jax.quantizers.codes import Mark, read_mark
from bnn_jax.tracing.interpret import default_branch

SCAN_SLICE, SCAN_STACK, BRANCH_JOIN = "scan_slice", "scan_stack", "branch_join"
"""Primitives of a :class:`Trace` alone: x[i] of a scanned x, the stack of a scan's outputs, the end of a cond."""

PRODUCTS = ("conv_general_dilated", "dot_general")
"""The primitives that multiply and accumulate."""

# Operations that move numbers without changing them; the first input is the tensor, others are sizes and fillings.
_LAYOUT = {"pad", "reshape", "transpose", "convert_element_type", "slice", "dynamic_slice", "broadcast_in_dim", "rev"}
_LAYOUT |= {"squeeze", "expand_dims", "split", "copy", "copy_p", "device_put", "sharding_constraint", "reshard", "name"}
_LAYOUT |= {SCAN_SLICE}
_JOINS = {"concatenate", BRANCH_JOIN}

# Their functions combine two numbers, or are kernels of another machine: no part of the graph.
_WHOLE = {"reduce", "reduce_window", "select_and_scatter", "pallas_call", "tpu_custom_call"}


class Operation(NamedTuple):
    """One primitive operation of a :class:`Trace`.

    Attributes:
      primitive: its name in JAX, as "conv_general_dilated".
      params: its parameters in JAX.
      inputs, outputs: ids of values.
      repeats: how often it runs: the product of the lengths of the scans around it.
      path: names of the modules around it, as "ResNet/stage1_block1/conv1".
    """

    primitive: str
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    repeats: int
    path: str


class ChosenGradient(NamedTuple):
    """A call whose derivative is chosen by hand (`jax.custom_jvp`, `jax.custom_vjp`).

    Attributes:
      inputs, outputs: ids of values.
      first, last: its inside is ``operations[first:last]``.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    first: int
    last: int


class Trace(NamedTuple):
    """The graph of a function.

    Attributes:
      operations: in an order in which they can run.
      values: id -> shape and dtype, of inputs, constants and results.
      arguments: path of each input array, as "0/params/conv1/latent_kernel" -> its id.
      outputs: ids, in the order of the function's flattened result.
      chosen: the calls with a derivative chosen by hand.
    """

    operations: tuple[Operation, ...]
    values: dict[int, ShapeDtypeStruct]
    arguments: dict[str, int]
    outputs: tuple[int, ...]
    chosen: tuple[ChosenGradient, ...]


class Operand(NamedTuple):
    """One factor of a product.

    Attributes:
      value: its id.
      mark: of the quantizer whose codes these are; None for real numbers.
      arguments: paths of all the input arrays that it is computed from.
    """

    value: int
    mark: Mark | None
    arguments: frozenset[str]


class Product(NamedTuple):
    """A convolution or matrix product and its two factors, in the operation's order.

    Attributes:
      operation: of `PRODUCTS`.
      left, right: the factors; the right one is the kernel of a convolution.
    """

    operation: Operation
    left: Operand
    right: Operand


class _Scope(NamedTuple):
    path: str = ""
    repeats: int = 1


@dataclass
class _Graph:
    unroll: bool
    operations: list[Operation] = field(default_factory=list)
    values: dict[int, ShapeDtypeStruct] = field(default_factory=dict)
    chosen: list[ChosenGradient] = field(default_factory=list)

    def value(self, like: Any) -> int:
        self.values[len(self.values)] = ShapeDtypeStruct(like.shape, like.dtype)
        return len(self.values) - 1

    def operation(
        self, primitive: str, inputs: Sequence[int], like: Sequence[Any], scope: _Scope, params: dict[str, Any]
    ) -> list[int]:
        outputs = [self.value(aval) for aval in like]
        self.operations.append(Operation(primitive, params, tuple(inputs), tuple(outputs), scope.repeats, scope.path))
        return outputs


def trace(function: Callable[..., Any], *arguments: Any, unroll: bool = False) -> Trace:
    """The graph of ``function(*arguments)`` with every nested call inlined.

    Calls (jit, remat, custom derivatives) are replaced by their insides; all branches of a cond stand side by side, of
    one that chooses by the platform the default alone; the body of a scan stands once with `repeats` times its length,
    that of a while loop, whose length is not known, once.

    Args:
      function: of pytrees of arrays.
      *arguments: pytrees of arrays or of `jax.ShapeDtypeStruct`.
      unroll: write the body of a scan as often as it runs, each with `repeats` of one.

    Raises:
      NotImplementedError: for a primitive that carries a function in a way that is not known here; it is named.

    >>> import jax.numpy as jnp
    >>> traced = trace(lambda p, x: jax.nn.relu(x @ p["w"]), {"w": jnp.ones((3, 4))}, jnp.ones((2, 3)))
    >>> [operation.primitive for operation in traced.operations], traced.arguments
    (['dot_general', 'max'], {'0/w': 0, '1': 1})
    """
    jaxpr = jax.make_jaxpr(function)(*arguments)
    graph = _Graph(unroll)
    inputs = [graph.value(variable.aval) for variable in jaxpr.jaxpr.invars]
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(arguments)[0]]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    outputs = _inline(graph, jaxpr, inputs, _Scope())
    operations, chosen = tuple(graph.operations), tuple(graph.chosen)
    return Trace(operations, graph.values, dict(zip(names, inputs)), tuple(outputs), chosen)


def _inline(graph: _Graph, jaxpr: Jaxpr | ClosedJaxpr, inputs: Sequence[int], scope: _Scope) -> list[int]:
    """Add the operations of `jaxpr`, called with the values `inputs`; returns the ids of its results."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    ids = dict(zip(jaxpr.invars, inputs))
    ids |= {variable: graph.value(variable.aval) for variable in jaxpr.constvars}

    def read(atom: Any) -> int:
        return graph.value(atom.aval) if isinstance(atom, Literal) else ids[atom]

    for equation in jaxpr.eqns:
        own = str(equation.source_info.name_stack)
        inside = scope._replace(path="/".join(filter(None, (scope.path, own))))
        results = _add(graph, equation, [read(atom) for atom in equation.invars], inside)
        ids.update(zip(equation.outvars, results))
    return [read(atom) for atom in jaxpr.outvars]


def _add(graph: _Graph, equation: JaxprEqn, inputs: list[int], scope: _Scope) -> list[int]:
    name, params = equation.primitive.name, equation.params
    if name in _CONTROL:
        return _CONTROL[name](graph, equation, inputs, scope)
    functions = [leaf for value in params.values() for leaf in _leaves(value) if isinstance(leaf, Jaxpr | ClosedJaxpr)]
    if not functions or name in _WHOLE or name.startswith("scatter"):
        return graph.operation(name, inputs, [variable.aval for variable in equation.outvars], scope, params)
    fitting = [function for function in functions if _fits(graph, equation, inputs, function)]
    if len(fitting) != 1:
        raise NotImplementedError(
            f"the operation {name!r} at {scope.path or 'the top'!r} carries {len(functions)} functions, "
            f"{len(fitting)} of which fit its inputs and outputs; trace a function without it"
        )
    first = len(graph.operations)
    outputs = _inline(graph, fitting[0], inputs, scope)
    if name.startswith(("custom_jvp_call", "custom_vjp_call")):
        graph.chosen.append(ChosenGradient(tuple(inputs), tuple(outputs), first, len(graph.operations)))
    return outputs


def _leaves(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else (value,)


def _fits(graph: _Graph, equation: JaxprEqn, inputs: list[int], function: Jaxpr | ClosedJaxpr) -> bool:
    jaxpr = function.jaxpr if isinstance(function, ClosedJaxpr) else function
    outside = [graph.values[i].shape for i in inputs], [variable.aval.shape for variable in equation.outvars]
    return outside == ([v.aval.shape for v in jaxpr.invars], [v.aval.shape for v in jaxpr.outvars])


def _add_cond(graph: _Graph, equation: JaxprEqn, inputs: list[int], scope: _Scope) -> list[int]:
    _, *operands = inputs
    default = default_branch(equation)
    if default is not None:
        return _inline(graph, default, operands, scope)
    results = [_inline(graph, branch, operands, scope) for branch in equation.params["branches"]]
    avals = [variable.aval for variable in equation.outvars]
    return [graph.operation(BRANCH_JOIN, ends, [aval], scope, {})[0] for ends, aval in zip(zip(*results), avals)]


def _add_while(graph: _Graph, equation: JaxprEqn, inputs: list[int], scope: _Scope) -> list[int]:
    of_condition, of_body = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    carry = inputs[of_condition + of_body :]
    _inline(graph, equation.params["cond_jaxpr"], inputs[:of_condition] + carry, scope)
    return _inline(graph, equation.params["body_jaxpr"], inputs[of_condition : of_condition + of_body] + carry, scope)


def _add_scan(graph: _Graph, equation: JaxprEqn, inputs: list[int], scope: _Scope) -> list[int]:
    length, body = equation.params["length"], equation.params["jaxpr"]
    constants, carried = equation.params["num_consts"], equation.params["num_carry"]
    fixed, carry, scanned = inputs[:constants], inputs[constants : constants + carried], inputs[constants + carried :]
    slices = [variable.aval for variable in body.jaxpr.invars[constants + carried :]]
    times = length if graph.unroll else min(length, 1)
    inside = scope if graph.unroll else scope._replace(repeats=scope.repeats * length)
    stacks: list[list[int]] = [[] for _ in equation.outvars[carried:]]
    for _ in range(times):
        xs = [graph.operation(SCAN_SLICE, [x], [aval], inside, {})[0] for x, aval in zip(scanned, slices)]
        results = _inline(graph, body, [*fixed, *carry, *xs], inside)
        carry = results[:carried]
        for stack, result in zip(stacks, results[carried:]):
            stack.append(result)
    avals = [variable.aval for variable in equation.outvars[carried:]]
    return carry + [graph.operation(SCAN_STACK, ys, [aval], scope, {})[0] for ys, aval in zip(stacks, avals)]


_CONTROL = {"cond": _add_cond, "while": _add_while, "scan": _add_scan}


def products(traced: Trace) -> tuple[Product, ...]:
    """Every convolution and matrix product of a trace, with the quantizers and the arguments behind each factor.

    A factor carries the mark of a quantizer when it comes from its codes through operations that only move numbers:
    pad, reshape, transpose, a cast, slice, broadcast, reversal, and the concatenation of equally marked parts.
    """
    marks = _marks(traced)
    names = tuple(traced.arguments)
    bits = {value: 1 << position for position, value in enumerate(traced.arguments.values())}
    # Sets of arguments as bits of an integer: a deep network has hundreds of each.
    for operation in traced.operations:
        union = 0
        for value in operation.inputs:
            union |= bits.get(value, 0)
        bits.update(dict.fromkeys(operation.outputs, union))

    def operand(value: int) -> Operand:
        behind = bits.get(value, 0)
        return Operand(value, marks.get(value), frozenset(name for i, name in enumerate(names) if behind >> i & 1))

    return tuple(
        Product(operation, *map(operand, operation.inputs))
        for operation in traced.operations
        if operation.primitive in PRODUCTS
    )


def _marks(traced: Trace) -> dict[int, Mark]:
    """value -> the mark of the quantizer whose codes it holds, for the values that have one."""
    marks: dict[int, Mark] = {}
    for operation in traced.operations:
        mark = read_mark(operation.params["name"]) if operation.primitive == "name" else None
        if mark is not None and mark.values is None:
            continue
        if mark is None and operation.primitive in _LAYOUT:
            mark = marks.get(operation.inputs[0])
        elif operation.primitive in _JOINS:
            behind = {marks.get(value) for value in operation.inputs}
            mark = behind.pop() if len(behind) == 1 else None
        if mark is not None:
            marks.update(dict.fromkeys(operation.outputs, mark))
    return marks


def multiply_accumulates(operation: Operation, values: dict[int, ShapeDtypeStruct]) -> int:
    r"""Multiply-accumulates of one run of an operation of `PRODUCTS`, over the whole batch.

    convolution: batch * H_out W_out * k_h k_w * C_in C_out / groups, for any spatial axes;  dot: the outputs times the
    contracted sizes.  Zeros count as they are multiplied: those of a padding, and those that spread the inputs of a
    transposed convolution.
    """
    left, right = (values[value].shape for value in operation.inputs)
    outputs = math.prod(values[operation.outputs[0]].shape)
    if operation.primitive == "dot_general":
        (contracted, _), _ = operation.params["dimension_numbers"]
        return outputs * math.prod(left[axis] for axis in contracted)
    features = right[operation.params["dimension_numbers"].rhs_spec[0]]
    return outputs * math.prod(right) // features

r"""How many operations of binary convolutions a gradient passes on its way back through a block or a network.

The sign's derivative is chosen, not true, so each binary convolution adds noise to the gradient that passes it; a
full-precision layer adds much less and is not counted.  Shortcuts open cheaper ways.  A convolution costs

  N = H_out W_out k_h k_w C_in C_out / groups,

its multiply-accumulates for one image.  A gradient path is a chain of operations through which a gradient can pass from
the outputs to the inputs; its cost is the sum of N over its binary convolutions, its length their number.  N_1st,
N_2nd, N_3rd are the smallest distinct costs, L_1st, L_2nd, L_3rd the smallest distinct lengths, of all paths.

Two layers of a ResNet block with one shortcut give the costs 0, 2N; Bi-Real's shortcut around every layer 0, N, 2N.
Everything is read from the traced function, so it holds for one's own modules and shortcuts as well.

Reference: Zhu, Hofstee, Lee, Al-Ars, Improving Gradient Paths for Binary Convolutional Neural Networks.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jaxtyping import Array, Float

from bnn_jax.checks import is_whole, require
from bnn_jax.outputs import call_options as usual_options
from bnn_jax.quantizers.codes import read_mark
from bnn_jax.tracing.trace import ChosenGradient, Operation, Trace, multiply_accumulates, products, trace

# From floats to floats, with the derivative zero everywhere.
_FLAT = {"stop_gradient", "sign", "floor", "ceil", "round", "nextafter"}
_CHOSEN = "chosen gradient"
_STREAMS = ("params", "quantizer", "dropout")


class GradientPaths(NamedTuple):
    """The smallest distinct values over all gradient paths, in increasing order; fewer where there are fewer.

    Attributes:
      costs: N_1st, N_2nd, ...: multiply-accumulates of binary convolutions, for one image.
      lengths: L_1st, L_2nd, ...: numbers of binary convolutions.
    """

    costs: tuple[int, ...]
    lengths: tuple[int, ...]


class BinaryOperation(NamedTuple):
    """A convolution or dense product of quantized inputs with a quantized kernel.

    Attributes:
      path: names of the modules around it, as "Block/conv1".
      cost: N, its multiply-accumulates for one image.
    """

    path: str
    cost: int


class Edge(NamedTuple):
    """A gradient can pass from the value `target` back to the value `source`.

    Attributes:
      source, target: ids of values.
      operation: position of the binary operation between them in `PathGraph.operations`, or None.
      primitive: name of the operation between them; "chosen gradient" for a derivative chosen by hand.
    """

    source: int
    target: int
    operation: int | None
    primitive: str


class PathGraph(NamedTuple):
    """The gradient's ways through a traced function.

    Attributes:
      inputs, outputs: the ids of the input and the output activations.
      edges: in an order in which every way forward passes them.
      operations: the binary operations in the order in which they run.
    """

    inputs: int
    outputs: int
    edges: tuple[Edge, ...]
    operations: tuple[BinaryOperation, ...]


def gradient_paths(
    function: Callable[[Array], Any],
    x: Float[Array, "batch ..."] | ShapeDtypeStruct | tuple[int, ...],
    *,
    count: int = 3,
) -> GradientPaths:
    """The cheapest and the shortest gradient paths through a function of one array of activations.

    A kernel is not part of any path, nor is a quantizer's scale, nor what `jax.lax.stop_gradient` cuts off.  The work
    grows with the number of operations, not with that of the paths.

    Args:
      function: the first array of its result is the output activations; variables are closed over.
      x: the input activations, or their shape; the first axis is the batch.
      count: how many distinct values to return.

    Raises:
      ValueError: for a `count` that is no whole number of at least 1, an `x` without axes or examples, an `x` or output
        that is not floating point, or no output.

    >>> gradient_paths(lambda x: jnp.tanh(x) + x, (1, 8, 8, 16))
    GradientPaths(costs=(0,), lengths=(0,))

    Reference: Zhu, Hofstee, Lee, Al-Ars, Improving Gradient Paths for Binary Convolutional Neural Networks.
    """
    return smallest(path_graph(function, x), count)


def module_gradient_paths(
    module: Any,
    x_shape: tuple[int, ...],
    *,
    train: bool = True,
    count: int = 3,
    output: Callable[[Any], Any] | None = None,
    **call_options: Any,
) -> GradientPaths:
    """:func:`gradient_paths` of a Flax module for float32 inputs of `x_shape`, without initializing its parameters.

    Args:
      module: called as ``module(x)``, with ``train=`` and ``progress=`` where it takes them; returns the activations,
        or a tuple that begins with them, as the networks here.
      x_shape: with the batch first.
      train: passed on.
      count: how many distinct values to return.
      output: picks the activations where they are not the first of what the module returns.
      **call_options: further keyword arguments of the call.

    Raises:
      ValueError: as :func:`gradient_paths`.
    """
    _require_examples("x_shape", x_shape)
    return smallest(path_graph(module, x_shape, train=train, output=output, **call_options), count)


def operations(function_or_module: Any, x: Any, **call_options: Any) -> tuple[BinaryOperation, ...]:
    """The binary convolutions and dense products in the order in which they run, with the cost N of each.

    A kernel or input of several bases makes one operation a pair of bases.  The arguments are :func:`path_graph`'s.
    """
    return path_graph(function_or_module, x, **call_options).operations


def smallest(graph: PathGraph, count: int = 3) -> GradientPaths:
    """The `count` smallest distinct costs and lengths over all paths from the outputs to the inputs of `graph`.

    best(inputs) = {0},  best(v) = the `count` smallest of the union over edges u -> v of best(u) + cost(edge)

    Raises:
      ValueError: for a `count` that is no whole number of at least 1.
    """
    require("count", count, is_whole(count, 1), "must be a whole number of at least 1", "the paper gives 3")
    costs = [operation.cost for operation in graph.operations]
    return GradientPaths(_smallest(graph, costs, count), _smallest(graph, [1] * len(costs), count))


def _smallest(graph: PathGraph, costs: list[int], count: int) -> tuple[int, ...]:
    best: dict[int, tuple[int, ...]] = {graph.inputs: (0,)}
    for edge in graph.edges:
        if edge.source in best:
            step = 0 if edge.operation is None else costs[edge.operation]
            union = {*best.get(edge.target, ()), *(value + step for value in best[edge.source])}
            best[edge.target] = tuple(heapq.nsmallest(count, union))
    return best.get(graph.outputs, ())


def path_graph(
    function_or_module: Any,
    x: Any,
    *,
    train: bool = True,
    output: Callable[[Any], Any] | None = None,
    **call_options: Any,
) -> PathGraph:
    """The gradient's ways through a function of activations or a Flax module.

    Args:
      function_or_module: as of :func:`gradient_paths` or :func:`module_gradient_paths`.
      x: the input activations, or their shape; the first axis is the batch.
      train, output: of a module, as of :func:`module_gradient_paths`.
      **call_options: further keyword arguments of the call.

    Raises:
      ValueError: for an `x` without axes or examples, an `x` or output that is not floating point, or no output.
    """
    x = ShapeDtypeStruct(x, jnp.float32) if isinstance(x, tuple) else x
    _require_examples("x.shape", x.shape)
    if hasattr(function_or_module, "apply") and hasattr(function_or_module, "init"):
        traced = _trace_module(function_or_module, x, train, output or (lambda found: found), call_options)
    else:
        traced = trace(partial(function_or_module, **call_options), x, unroll=True)
    # The activations are the last argument and the first result in either case.
    inputs, outputs = list(traced.arguments.values())[-1], traced.outputs[:1]
    _check(traced, inputs, outputs)
    binary = {
        product.operation.outputs: BinaryOperation(
            product.operation.path,
            multiply_accumulates(product.operation, traced.values) * product.operation.repeats // x.shape[0],
        )
        for product in products(traced)
        if product.left.mark and product.right.mark
    }
    positions = {results: position for position, results in enumerate(binary)}
    return PathGraph(inputs, outputs[0], tuple(_edges(traced, positions)), tuple(binary.values()))


def _require_examples(argument: str, shape: tuple[int, ...]) -> None:
    require(argument, shape, shape[:1] != (0,), "must have one example at least", "the batch comes first")


def _check(traced: Trace, inputs: int, outputs: tuple[int, ...]) -> None:
    if not outputs:
        raise ValueError("the function must return the output activations; it returned no array")
    if not traced.values[inputs].shape:
        raise ValueError("`x` (of shape ()) must have the batch as its first axis; give it one of size 1")
    for name, value in (("x", inputs), ("the output", outputs[0])):
        if not _differentiable(traced, [value]):
            dtype = traced.values[value].dtype
            raise ValueError(f"`{name}` (of dtype {dtype}) must be floating point; a gradient passes through no other")


def _trace_module(
    module: Any, x: Any, train: bool, output: Callable[[Any], Any], call_options: dict[str, Any]
) -> Trace:
    options = usual_options(module, train=train) | call_options
    keys = dict.fromkeys(_STREAMS, jax.eval_shape(lambda: jax.random.key(0)))
    variables = jax.eval_shape(lambda keys, x: module.init(keys, x, **options), keys, x)

    def call(variables, keys, x):
        return output(module.apply(variables, x, rngs=keys, mutable=True, **options)[0])

    return trace(call, variables, keys, x, unroll=True)


def _edges(traced: Trace, positions: dict[tuple[int, ...], int]) -> list[Edge]:
    ending = defaultdict(list)
    for call in traced.chosen:
        ending[call.last].append(call)
    edges: list[Edge] = []
    starts: list[int] = []
    for index in range(len(traced.operations) + 1):
        for call in ending[index]:
            inside = edges[starts[call.first] :] if call.first < index else []
            edges += _chosen_edges(traced, call, inside, positions)
        starts.append(len(edges))
        if index < len(traced.operations):
            operation = traced.operations[index]
            edges += _true_edges(traced, operation, positions.get(operation.outputs))
    return edges


def _true_edges(traced: Trace, operation: Operation, position: int | None) -> Iterator[Edge]:
    if operation.primitive in _FLAT or _leaves_the_activations(operation):
        return
    for source in _differentiable(traced, operation.inputs):
        for target in _differentiable(traced, operation.outputs):
            yield Edge(source, target, position, operation.primitive)


def _leaves_the_activations(operation: Operation) -> bool:
    """Whether this marks a kernel or a scale, which are not followed."""
    mark = read_mark(operation.params["name"]) if operation.primitive == "name" else None
    return mark is not None and (mark.place == "kernel_quantizer" or mark.values is None)


def _chosen_edges(
    traced: Trace, call: ChosenGradient, inside: list[Edge], positions: dict[tuple[int, ...], int]
) -> Iterator[Edge]:
    """Edges between inputs and outputs that no derivative joins inside, as a sign's: the chosen one does.

    Where binary operations lie inside, it is by way of them.
    """
    body = traced.operations[call.first : call.last]
    steps = [
        Edge(source, target, positions.get(operation.outputs), _CHOSEN)
        for operation in body
        if not _leaves_the_activations(operation)
        for source in operation.inputs
        for target in operation.outputs
    ]
    costly = any(step.operation is not None for step in steps)
    through = False
    for source in _differentiable(traced, call.inputs):
        joined = _reached(source, inside)
        missing = [target for target in _differentiable(traced, call.outputs) if target not in joined]
        by_steps = _reached(source, steps) if costly else set()
        through |= not by_steps.isdisjoint(missing)
        yield from (Edge(source, target, None, _CHOSEN) for target in missing if target not in by_steps)
    if through:
        yield from steps


def _reached(source: int, edges: Iterable[Edge]) -> set[int]:
    reached = {source}
    for edge in edges:
        if edge.source in reached:
            reached.add(edge.target)
    return reached


def _differentiable(traced: Trace, values: Iterable[int]) -> list[int]:
    """Those of the values, each once, that a gradient can have."""
    return [value for value in dict.fromkeys(values) if jnp.issubdtype(traced.values[value].dtype, jnp.inexact)]

"""Where a normalization and the step behind it can be a comparison of integers: found in the traced computation."""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn

from bnn_jax.bitops.planes import multiplies_on_bits
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense
from bnn_jax.layers.frozen import code_sets
from bnn_jax.tracing.trace import PRODUCTS, Operation, Trace

# What scales, biases and quantizers are made of that treat every element alike, but for vectors over the channels.
_ELEMENTWISE = {"add", "sub", "mul", "div", "neg", "abs", "max", "min", "clamp", "sign", "round", "floor", "lt", "le"}
_ELEMENTWISE |= {"gt", "ge", "eq", "ne", "and", "or", "not", "select_n", "convert_element_type", "stop_gradient"}
_ELEMENTWISE |= {"name", "reshape", "broadcast_in_dim", "squeeze", "expand_dims", "copy", "copy_p"}

_LAYER, _POOL, _NORM, _POOL_OF_CODES, _FLATTEN, _QUANTIZER = range(6)


class Chain(NamedTuple):
    """A packed layer, the normalization that alone sees it, and the layer whose inputs these two alone make.

    Attributes:
      layer, norm, consumer: their paths.
      pooled: a max pool stands between the layer and the normalization.
    """

    layer: str
    norm: str
    consumer: str
    pooled: bool


class _Graph(NamedTuple):
    """A trace, and who makes and who uses the values that the images decide and the outputs need."""

    operations: tuple[Operation, ...]
    maker: dict[int, Operation | None]
    users: dict[int, list[Operation]]
    modules: Mapping[str, nn.Module]


def find_chains(traced: Trace, modules: Mapping[str, nn.Module]) -> tuple[Chain, ...]:
    """The chains  packed layer -> [max pool] -> BatchNorm -> [max pool] -> [flattening] -> two-valued quantizer.

    Each has one product and one normalization, nothing but element-wise operations in the layer behind its product and
    in the quantizer, and no other use of anything between.

    Args:
      traced: the network's logits as a function of variables and images.
      modules: its layers and normalizations by path; the operations below that path are theirs.
    """
    graph = _graph(traced, modules)
    marks = [operation for operation in graph.operations if _is_input_mark(operation)]
    found = [chain for mark in marks if (chain := _chain(graph, mark)) is not None]
    return tuple(chain for chain in found if _is_alone(graph, chain))


def _graph(traced: Trace, modules: Mapping[str, nn.Module]) -> _Graph:
    maker: dict[int, Operation | None] = {v: None for path, v in traced.arguments.items() if not path.startswith("0")}
    for operation in traced.operations:
        if not maker.keys().isdisjoint(operation.inputs):
            maker.update(dict.fromkeys(operation.outputs, operation))
    users: dict[int, list[Operation]] = {value: [] for value in traced.outputs}
    live = []
    for operation in reversed(traced.operations):
        if not users.keys().isdisjoint(operation.outputs):
            live.append(operation)
            for value in set(operation.inputs):
                users.setdefault(value, []).append(operation)
    return _Graph(tuple(reversed(live)), maker, users, modules)


def _owner(graph: _Graph, operation: Operation) -> str | None:
    """The path of the layer or normalization that an operation is part of."""
    parts = operation.path.split("/")[1:]
    paths = ("/".join(parts[:depth]) for depth in range(len(parts), 0, -1))
    return next((path for path in paths if path in graph.modules), None)


def _is_input_mark(operation: Operation) -> bool:
    return operation.primitive == "name" and operation.params["name"] == "input_quantizer codes: 2 values"


def _chain(graph: _Graph, mark: Operation) -> Chain | None:
    """The chain that ends in the codes of `mark`."""
    behind = _behind(graph, mark)
    if behind is None:
        return None
    between, product = behind
    layer, consumer = _owner(graph, product), _owner(graph, mark)
    norms = {_owner(graph, operation) for operation in between} - {layer, consumer, None}
    if len(norms) != 1 or layer == consumer or not _is_packed(graph, layer) or not _is_packed(graph, consumer):
        return None
    chain = Chain(layer, norms.pop(), consumer, pooled=False)
    if not isinstance(graph.modules[chain.norm], BatchNorm):
        return None
    phases = _phases(graph, chain, between)
    if phases is None or not _only_use(graph, [product, *between], mark):
        return None
    if _FLATTEN in phases and not _flattens_words(graph, chain):
        return None
    return chain._replace(pooled=_POOL in phases)


def _behind(graph: _Graph, mark: Operation) -> tuple[list[Operation], Operation] | None:
    """What the images decide between `mark` and the one product behind it, in order, and that product."""
    waiting, between, products = list(mark.inputs), set(), set()
    while waiting:
        value = waiting.pop()
        if value not in graph.maker:
            continue
        operation = graph.maker[value]
        if operation is None:
            return None
        if operation.primitive in PRODUCTS:
            products.add(operation.outputs)
        elif operation.outputs not in between:
            between.add(operation.outputs)
            waiting.extend(operation.inputs)
    if len(products) != 1:
        return None
    product = next(operation for operation in graph.operations if operation.outputs in products)
    return [operation for operation in graph.operations if operation.outputs in between], product


def _phases(graph: _Graph, chain: Chain, between: list[Operation]) -> set[int] | None:
    """The phases that the operations run through; None where one does not belong, or comes too late."""
    of_module = {chain.layer: _LAYER, chain.norm: _NORM, chain.consumer: _QUANTIZER}
    at, seen = _LAYER, set()
    for operation in between:
        phase = of_module.get(_owner(graph, operation))
        if phase is not None and operation.primitive not in _ELEMENTWISE:
            return None
        if phase is None and operation.path.split("/")[-1] == "max_pool":
            phase = _POOL if at < _NORM else _POOL_OF_CODES
        elif phase is None and operation.primitive == "reshape":
            phase = _FLATTEN
        if phase is None or phase < at:
            return None
        at = phase
        seen.add(phase)
    return seen


def _only_use(graph: _Graph, chain: list[Operation], mark: Operation) -> bool:
    """Whether nothing but these operations and `mark` uses their results."""
    own = {operation.outputs for operation in (*chain, mark)}
    values = (value for operation in chain for value in operation.outputs)
    return all(user.outputs in own for value in values for user in graph.users.get(value, []))


def _is_packed(graph: _Graph, path: str | None) -> bool:
    """Whether it is a layer that multiplies its codes on bits."""
    module = graph.modules.get(path)
    if not isinstance(module, BinaryConv | BinaryDense) or None in (module.input_quantizer, module.kernel_quantizer):
        return False
    (inputs, *others), (kernels, *more) = (code_sets(q, 1) for q in (module.input_quantizer, module.kernel_quantizer))
    return not others and not more and () not in (inputs, kernels) and multiplies_on_bits(inputs, kernels)


def _flattens_words(graph: _Graph, chain: Chain) -> bool:
    """Whether flattened words are the words of what is flattened, and the quantizer has no values a channel."""
    return graph.modules[chain.layer].features % 32 == 0 and graph.modules[chain.consumer].input_quantizer.init is None


def _is_alone(graph: _Graph, chain: Chain) -> bool:
    """Whether each of the three is called once, with one product."""
    for path in (chain.layer, chain.norm, chain.consumer):
        once = ("rsqrt",) if path == chain.norm else PRODUCTS
        if sum(o.primitive in once and _owner(graph, o) == path for o in graph.operations) != 1:
            return False
    return True

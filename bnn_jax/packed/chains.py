"""Where a normalization and the step behind it can be a comparison of integers: found in the traced computation."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bnn_jax.bitops.planes import multiplies_on_bits
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense
from bnn_jax.layers.frozen import code_sets
from bnn_jax.layers.pooling import MAX_POOL
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
      codes_pooled: one stands between the normalization and the consumer.
    """

    layer: str
    norm: str
    consumer: str
    pooled: bool
    codes_pooled: bool


class _Graph(NamedTuple):
    """A trace, and who makes and who uses the values that the images decide and the outputs need."""

    operations: tuple[Operation, ...]
    values: Mapping[int, jax.ShapeDtypeStruct]
    maker: dict[int, Operation | None]
    users: dict[int, list[Operation]]
    modules: Mapping[str, nn.Module]


def called_between_names(
    call: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any], path: str
) -> Any:
    """Call the module at `path` with its inputs and outputs named in the traced computation.

    A scope may have the name of a module and stand beside it, or around it in a class that extends it; what is computed
    there is not the module's own.
    """
    into, out = _edges(path)

    def named(tree, name):
        return jax.tree.map(lambda leaf: checkpoint_name(leaf, name) if isinstance(leaf, jax.Array) else leaf, tree)

    arguments, options = named((tuple(arguments), dict(options)), into)
    return named(call(*arguments, **options), out)


def _edges(path: str) -> tuple[str, str]:
    return f"into {path}", f"out of {path}"


def find_chains(traced: Trace, modules: Mapping[str, nn.Module]) -> tuple[Chain, ...]:
    """The chains  packed layer -> [max pool] -> BatchNorm -> [max pool] -> [flattening] -> two-valued quantizer.

    Each has one product and one normalization, nothing but element-wise operations in the layer behind its product and
    in the quantizer, no rounding to a narrower dtype, and no other use of anything between.

    Args:
      traced: the network's logits as a function of variables and images, its modules called between names.
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
    return _Graph(tuple(reversed(live)), traced.values, maker, users, modules)


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
    chain = Chain(layer, norms.pop(), consumer, pooled=False, codes_pooled=False)
    if not _computes_as(graph.modules[chain.norm], BatchNorm):
        return None
    phases = _phases(graph, chain, between)
    if phases is None or not _only_use(graph, [product, *between], mark):
        return None
    if _FLATTEN in phases and not _flattens_words(graph, chain):
        return None
    return chain._replace(pooled=_POOL in phases, codes_pooled=_POOL_OF_CODES in phases)


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
    (_, of_layer), (into_norm, of_norm), (into_consumer, _) = map(_edges, of_module)
    starts, ends = {into_norm: _NORM, into_consumer: _QUANTIZER}, {of_layer: _POOL, of_norm: _POOL_OF_CODES}
    at, seen, started = _LAYER, set(), {_LAYER}
    for operation in between:
        name = operation.params["name"] if operation.primitive == "name" else None
        if name in starts and starts[name] in seen:
            return None
        if name in starts or name in ends:
            started.add(starts.get(name))
            at = max(at, ends.get(name, at))
            continue
        phase = of_module.get(_owner(graph, operation))
        if phase is not None and (phase not in started or operation.primitive not in _ELEMENTWISE):
            return None
        if phase is None and operation.path.split("/")[-1] == MAX_POOL:
            phase = _POOL if at < _NORM else _POOL_OF_CODES
        elif phase is None and operation.primitive == "reshape":
            phase = _FLATTEN
        if phase is None or phase < at or _rounds(graph, operation):
            return None
        at = phase
        seen.add(phase)
    return seen


def _rounds(graph: _Graph, operation: Operation) -> bool:
    """Whether an operation returns numbers of a narrower dtype than it takes, as activations in half precision."""
    if operation.primitive != "convert_element_type":
        return False
    before, after = (graph.values[value].dtype for (value,) in (operation.inputs, operation.outputs))
    real = all(jnp.issubdtype(dtype, jnp.floating) for dtype in (before, after))
    return real and jnp.finfo(after).bits < jnp.finfo(before).bits


def _only_use(graph: _Graph, chain: list[Operation], mark: Operation) -> bool:
    """Whether nothing but these operations and `mark` uses their results."""
    own = {operation.outputs for operation in (*chain, mark)}
    values = (value for operation in chain for value in operation.outputs)
    return all(user.outputs in own for value in values for user in graph.users.get(value, []))


def _is_packed(graph: _Graph, path: str | None) -> bool:
    """Whether it is a layer that multiplies its codes on bits."""
    module = graph.modules.get(path)
    if not _computes_as(module, BinaryConv | BinaryDense) or None in (module.input_quantizer, module.kernel_quantizer):
        return False
    (inputs, *others), (kernels, *more) = (code_sets(q, 1) for q in (module.input_quantizer, module.kernel_quantizer))
    return not others and not more and () not in (inputs, kernels) and multiplies_on_bits(inputs, kernels)


def _computes_as(module: nn.Module | None, layers: Any) -> bool:
    """Whether it is one of these layers, or of a class that leaves their methods alone."""
    if not isinstance(module, layers):
        return False
    own = next(cls for cls in type(module).__mro__ if cls.__module__.startswith("bnn_jax.layers."))
    methods = [name for name, _ in inspect.getmembers(own, inspect.isfunction) if not name.startswith("__")]
    methods = [name for name in methods if getattr(own, name) is not getattr(nn.Module, name, None)]
    return all(getattr(type(module), name) is getattr(own, name) for name in methods)


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

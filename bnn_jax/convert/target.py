"""What a network of this package wants from weights that come from outside."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax import ShapeDtypeStruct

from bnn_jax.layers import BatchNorm, BinaryConv, BinaryConvTranspose, BinaryDense
from bnn_jax.outputs import init_network, network_logits
from bnn_jax.tracing.trace import PRODUCTS, Trace, trace


class Target(NamedTuple):
    """A network's variables, without values, and what of its computation decides how others' are converted.

    Attributes:
      variables: name, as params/conv1/latent_kernel, -> shape and dtype.
      layers: paths of the layers with a kernel, in the order of their calls.
      grouped: those among them that convolve in groups.
      transposed: transposed convolutions among them -> whether their kernel is (..., features, inputs).
      norms: path of a batch norm -> its epsilon, in that order.
      flattened: path of a module that takes flattened images -> their (height, width, channels).
      branches: whether results of two layers meet, so that the order of calls does not say which layer is which.
    """

    variables: dict[str, ShapeDtypeStruct]
    layers: tuple[str, ...]
    grouped: frozenset[str]
    transposed: dict[str, bool]
    norms: dict[str, float]
    flattened: dict[str, tuple[int, int, int]]
    branches: bool


def describe(model: nn.Module, image_shape: Sequence[int]) -> Target:
    """The :class:`Target` that a network for images (height, width, channels) is; nothing is computed."""
    layers: dict[str, nn.Module] = {}
    norms: dict[str, float] = {}

    def remember(call, arguments, options, context):
        module = context.module
        if context.method_name == "__call__":
            path = "/".join(module.path)
            if isinstance(module, BinaryConv | BinaryDense | nn.Conv | nn.ConvTranspose | nn.Dense):
                layers[path] = module
            elif isinstance(module, BatchNorm | nn.BatchNorm):
                norms[path] = module.epsilon
        return call(*arguments, **options)

    images = ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(remember), jax.disable_jit():
        _, variables = jax.eval_shape(partial(init_network, model), jax.random.key(0), images)
    variables = {name: variables[name] for name in variables if name not in ("intermediates", "packed")}
    traced = trace(partial(network_logits, model), variables, images)
    found = flatten_dict(variables, sep="/")
    grouped = frozenset(path for path, layer in layers.items() if getattr(layer, "feature_group_count", 1) > 1)
    kinds = BinaryConvTranspose | nn.ConvTranspose
    transposed = {
        path: getattr(layer, "transpose_kernel", False) for path, layer in layers.items() if isinstance(layer, kinds)
    }
    branches = _branches(traced, {*layers, *norms})
    flattened = _flattened(traced, {module_and_leaf(name)[0] for name in found})
    return Target(found, tuple(layers), grouped, transposed, norms, flattened, branches)


def _flattened(traced: Trace, modules: set[str]) -> dict[str, tuple[int, int, int]]:
    """Follow flattened images through what keeps their shape, as quantizers and norms do, into their products."""
    found: dict[str, tuple[int, int, int]] = {}
    images: dict[int, tuple[int, ...]] = {}
    for operation in traced.operations:
        value = next((value for value in operation.inputs if value in images), None)
        if operation.primitive == "reshape" and value is None:
            before, after = (traced.values[v].shape for v in (operation.inputs[0], operation.outputs[0]))
            if len(before) == 4 and len(after) == 2 and before[0] == after[0] == 1:
                images[operation.outputs[0]] = before[1:]
        elif value is not None:
            found |= {path: images[value] for path in _around(operation.path.split("/")[1:]) if path in modules}
        if value is not None and operation.primitive not in PRODUCTS:
            same = [v for v in operation.outputs if traced.values[v].shape == traced.values[value].shape]
            images |= dict.fromkeys(same, images[value])
    return found


def _branches(traced: Trace, modules: set[str]) -> bool:
    reached = {value for path, value in traced.arguments.items() if not path.startswith("0")}
    for operation in traced.operations:
        inputs = {value for value in operation.inputs if value in reached}
        if inputs:
            reached.update(operation.outputs)
        inside = _inside(operation.path.split("/")[1:], modules)
        if len(inputs) > 1 and operation.primitive in ("add", "concatenate") and not inside:
            return True
    return False


def _inside(parts: Sequence[str], modules: set[str]) -> bool:
    return not modules.isdisjoint(_around(parts))


def _around(parts: Sequence[str]) -> list[str]:
    """The paths of the modules around an operation, outermost first."""
    return ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def module_and_leaf(name: str) -> tuple[str, str]:
    """The path of the module that has a variable, and the variable's own name.

    >>> module_and_leaf("params/stage1_block1/conv1/latent_kernel")
    ('stage1_block1/conv1', 'latent_kernel')
    """
    _, _, path = name.partition("/")
    module, _, leaf = path.rpartition("/")
    return module, leaf

"""What a network of this package wants from weights that come from outside."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from math import prod
from typing import NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax import ShapeDtypeStruct

from bnn_jax.layers import BatchNorm, BinaryConv, BinaryConvTranspose, BinaryDense
from bnn_jax.outputs import init_network, network_logits
from bnn_jax.tracing.trace import PRODUCTS, Operation, Trace, trace

_CHANNELS_LAST, _CHANNELS_FIRST = (0, 1, 2, 3), (0, 3, 1, 2)
"""Which of the axes (batch, height, width, channels) those of images are."""

Parts: TypeAlias = tuple[tuple[int, ...], ...]
"""Of flattened images, one behind the other, their (height, width, channels); (numbers,) where their order is mixed."""


class Target(NamedTuple):
    """A network's variables, without values, and what of its computation decides how others' are converted.

    Attributes:
      variables: name, as params/conv1/latent_kernel, -> shape and dtype.
      layers: paths of the layers with a kernel, in the order of their calls.
      grouped: those among them that convolve in groups -> how many these are.
      transposed: transposed convolutions among them -> whether their kernel is (..., features, inputs).
      norms: path of a batch norm -> its epsilon, in that order.
      flattened: path of a module that takes flattened images, and how many numbers it takes -> what these are.
      branches: whether results of two layers meet, so that the order of calls does not say which layer is which.
    """

    variables: dict[str, ShapeDtypeStruct]
    layers: tuple[str, ...]
    grouped: dict[str, int]
    transposed: dict[str, bool]
    norms: dict[str, float]
    flattened: dict[tuple[str, int], Parts]
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
    groups = {path: getattr(layer, "feature_group_count", 1) for path, layer in layers.items()}
    grouped = {path: count for path, count in groups.items() if count > 1}
    kinds = BinaryConvTranspose | nn.ConvTranspose
    transposed = {
        path: getattr(layer, "transpose_kernel", False) for path, layer in layers.items() if isinstance(layer, kinds)
    }
    branches = _branches(traced, {*layers, *norms})
    flattened = _flattened(traced, {module_and_leaf(name)[0] for name in found})
    return Target(found, tuple(layers), grouped, transposed, norms, flattened, branches)


def _flattened(traced: Trace, modules: set[str]) -> dict[tuple[str, int], Parts]:
    """Follow flattened images through what keeps or joins them, as quantizers and norms do, into their products."""
    found: dict[tuple[str, int], Parts] = {}
    images: dict[int, Parts] = {}
    axes = {value: _CHANNELS_LAST for path, value in traced.arguments.items() if not path.startswith("0")}
    for operation in traced.operations:
        followed = [value for value in operation.inputs if value in images]
        for value in followed:
            numbers = traced.values[value].shape[-1:]
            for path in _around(operation.path.split("/")[1:]):
                if path in modules and prod(numbers) > 1:
                    found.setdefault((path, *numbers), images[value])
        is_product = operation.primitive in PRODUCTS
        reached = [value for value in operation.inputs if value in axes]
        if followed and not is_product:
            images |= _passed_on(traced, operation, images, axes.keys())
        elif operation.primitive == "reshape" and reached and axes[reached[0]] != _CHANNELS_FIRST:
            before, after = (traced.values[v].shape for v in (operation.inputs[0], operation.outputs[0]))
            if len(before) == 4 and len(after) == 2 and before[0] == after[0] == 1:
                if axes[reached[0]] != _CHANNELS_LAST:
                    images[operation.outputs[0]] = (after[1:],)
                elif 1 < before[3] < after[1]:  # of one channel or one pixel there is but one order
                    images[operation.outputs[0]] = (before[1:],)
        if reached:
            order = _CHANNELS_LAST if is_product else axes[reached[0]]
            if operation.primitive == "transpose" and len(operation.params["permutation"]) == 4:
                order = tuple(order[axis] for axis in operation.params["permutation"])
            # One number that meets parameters, as in a layer norm, is as many numbers without an order of pixels.
            is_one = not is_product and all(prod(traced.values[value].shape) == 1 for value in reached)
            axes |= {v: order for v in operation.outputs if not is_one or prod(traced.values[v].shape) == 1}
    return found


def _passed_on(
    traced: Trace, operation: Operation, images: Mapping[int, Parts], reached: Collection[int]
) -> dict[int, Parts]:
    """The flattened images that the results of an operation are, but for single numbers and images as they were.

    Args:
      traced: the network.
      operation: with flattened images among its inputs.
      images: value -> the flattened images that it is.
      reached: the values that come of the network's images.
    """
    shapes = {value: traced.values[value].shape for value in (*operation.inputs, *operation.outputs)}
    numbers = [value for value in operation.inputs if value in reached and prod(shapes[value]) > 1]
    parts = {images.get(value) for value in numbers}
    kept = {_long(shapes[value]) for value in numbers}
    passed = {}
    for value in operation.outputs:
        shape = shapes[value]
        if operation.primitive == "concatenate" and _long(shape) == shape[operation.params["dimension"] :]:
            both = (images.get(v, ((1, 1, *shapes[v][-1:]),)) for v in operation.inputs)
            passed[value] = tuple(part for several in both for part in several)
        elif len(parts) == 1 and kept == {_long(shape)}:
            passed[value] = images[numbers[0]]
        elif prod(shape) > 1 and parts != {(shape[1:],)}:
            passed[value] = (shape[-1:],)
    return passed


def _long(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size > 1)


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

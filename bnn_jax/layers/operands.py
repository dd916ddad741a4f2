"""The operands of a binary layer: its inputs and its kernel as bases of codes and scales; and what follows the product.

Randomness and the order of parameters are those of Flax: the kernel comes first, then its quantizer's parameters, then
those of the inputs' quantizer, then the bias.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bnn_jax.bitops.bits import word_count
from bnn_jax.bitops.planes import Values
from bnn_jax.layers.arguments import require_floats
from bnn_jax.layers.frozen import code_sets, freeze_kernel, is_freezing, is_words, packed_kernel, record_kernel
from bnn_jax.layers.precision import activation_dtype, holds
from bnn_jax.precision import widened
from bnn_jax.quantizers import Bases, Quantized, Quantizer, bases, dequantize, mark
from bnn_jax.types import LATENT_KERNEL


class Phase(NamedTuple):
    """What of the run's course a layer is told: training or evaluation, and the share of the training done."""

    train: bool
    progress: Array | float


class InputBase(NamedTuple):
    """One base of a layer's inputs: codes, their scale and their code set, () for real numbers."""

    codes: Array
    scale: Array
    values: Values


def require_inputs(layer: nn.Module, x: Array) -> None:
    """Refuse inputs but floats and, of a frozen layer, the words that a frozen normalization packs.

    Raises:
      TypeError: naming the layer.
    """
    packed = packed_kernel(layer)
    if packed is None or not is_words(x) or x.shape[-1] != word_count(input_channels(layer, packed.shape)):
        require_floats(layer, x)


def input_channels(layer: nn.Module, kernel_shape: tuple[int, ...]) -> int:
    """Channels of the inputs of a layer with a kernel of this shape, those of all groups."""
    return kernel_shape[-2] * getattr(layer, "feature_group_count", 1)


def operands(
    layer: nn.Module, x: Array, kernel_shape: tuple[int, ...], phase: Phase
) -> tuple[list[InputBase], tuple[Quantized, ...]]:
    """Quantize what a layer in training or evaluation multiplies: the bases of its inputs and those of its kernel."""
    kernel = _kernel_bases(layer, kernel_shape, phase)
    inputs = input_bases(layer, x, phase)
    return inputs, kernel_for(layer, inputs, kernel)


def input_bases(layer: nn.Module, x: Array, phase: Phase) -> list[InputBase]:
    """The bases of x, their codes in x's dtype if that holds every code of inputs and kernel, else in the layer's."""
    dtype = activation_dtype(x, layer.dtype)
    if layer.input_quantizer is None and layer.real_activation is not None:
        x = layer.real_activation(x)
    quantized = _quantize(layer, "input_quantizer", x.astype(dtype), phase)
    if dtype != layer.dtype:
        quantizers = filter(None, (layer.input_quantizer, layer.kernel_quantizer))
        exact = all(holds(dtype, values) for quantizer in quantizers for values in code_sets(quantizer, 1))
        dtype = dtype if exact else layer.dtype
    sets = code_sets(layer.input_quantizer, len(quantized))
    return [InputBase(b.codes.astype(dtype), b.scale, values) for b, values in zip(quantized, sets, strict=True)]


def kernel_for(layer: nn.Module, inputs: Sequence[InputBase], kernel: tuple[Quantized, ...]) -> tuple[Quantized, ...]:
    """The kernel as it meets these inputs: for real ones a single base, with its scale multiplied in."""
    # A kernel that is about to be rounded to a narrower dtype keeps its scale apart.
    if layer.input_quantizer is None and (len(kernel) > 1 or inputs[0].codes.dtype == layer.dtype):
        weights = dequantize(kernel)
        return (Quantized(weights, jnp.ones((), weights.dtype)),)
    return kernel


def finish(layer: nn.Module, y: Array, x: Array, phase: Phase) -> Array:
    """Add the bias; quantize the gradient that will come back through here; return to the dtype of the inputs x."""
    if layer.use_bias:
        bias = layer.param("bias", nn.initializers.zeros, (layer.features,), layer.param_dtype)
        y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    if layer.gradient_quantizer is not None and phase.train:
        y = layer.gradient_quantizer(y, layer.make_rng("quantizer"))
    return y.astype(activation_dtype(x, layer.dtype))


def _kernel_bases(layer: nn.Module, shape: tuple[int, ...], phase: Phase) -> tuple[Quantized, ...]:
    """The bases of a kernel of `shape`; a call of :func:`bnn_jax.packed.freeze` gets them packed besides."""
    name = "kernel" if layer.kernel_quantizer is None else LATENT_KERNEL
    kernel = layer.param(name, layer.kernel_init, shape, layer.param_dtype).astype(layer.dtype)
    kernel = _quantize(layer, "kernel_quantizer", kernel, phase)
    record_kernel(layer, lambda: [base.codes for base in kernel])
    if layer.kernel_quantizer is not None and is_freezing(layer, phase.train):
        freeze_kernel(layer, kernel, shape)
    return kernel


def _quantize(layer: nn.Module, name: str, x: Array, phase: Phase) -> tuple[Quantized, ...]:
    """The bases of x by the layer's quantizer `name`, which is the name of its learned parameters and its state too.

    Quantizers see x in float32 at least, in which their thresholds and scales are not rounded.
    """
    quantizer = getattr(layer, name)
    if quantizer is None:
        return (Quantized(x, jnp.ones((), x.dtype)),)
    x = widened(x)
    given = {}
    if quantizer.init and packed_kernel(layer) is not None:
        # What decides only the backward pass is not stored.
        given = quantizer.init(jax.random.key(0), x) | dict(layer.get_variable("params", name, {}))
    elif quantizer.init:
        given = dict(layer.param(name, quantizer.init, x))
    given |= {wanted: value for wanted, value in phase._asdict().items() if wanted in quantizer.wants}
    if "key" in quantizer.wants:
        given["key"] = layer.make_rng("quantizer") if phase.train else None
    if quantizer.init_state is None:
        return _marked(quantizer.apply(x, **given), name, quantizer)
    state = layer.variable("quantizer_state", name, lambda: quantizer.init_state(layer.make_rng("params"), x))
    quantized, updated = quantizer.apply(x, state.value, **given)
    if phase.train and not layer.is_initializing():
        state.value = lax.stop_gradient(updated)
    return _marked(quantized, name, quantizer)


def _marked(quantized: Bases, name: str, quantizer: Quantizer) -> tuple[Quantized, ...]:
    """The bases, their codes and scales named in the traced computation, by which the analyses know them."""
    quantized = bases(quantized)
    return tuple(
        Quantized(mark(base.codes, name, values=len(values)), mark(base.scale, name)) if values else base
        for base, values in zip(quantized, code_sets(quantizer, len(quantized)), strict=True)
    )

"""The call of a frozen layer: products of packed codes, or of the numbers that they stand for."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from bnn_jax.bitops.bits import unpack
from bnn_jax.bitops.paths import AS_NUMBERS, ON_BITS, chosen_path
from bnn_jax.bitops.planes import PackedBase, PackedKernel, multiplies_on_bits, unpack_codes
from bnn_jax.layers.frozen import code_sets, is_words, record, record_kernel, record_path, scale_of
from bnn_jax.layers.operands import InputBase, Phase, input_bases, input_channels, kernel_for
from bnn_jax.precision import promoted
from bnn_jax.quantizers import Quantized

LARGEST_EXACT = 2**24
"""Up to which every whole number is a float32."""


def packed_call(layer: nn.Module, x: Array, packed: PackedKernel, phase: Phase, *geometry) -> Array:
    """Return what a :class:`BinaryConv` or :class:`BinaryDense` with a packed kernel makes of x.

    Args:
      layer: of which the methods `product`, `product_on_bits`, `sums`, `scaled` and `finished` are used.
      x: numbers, or the packed codes that a normalization with thresholds returns.
      packed: the kernel.
      phase: of the run.
      *geometry: what these methods take besides.

    Returns:
      The layer's outputs; where a normalization with thresholds follows, the integers alone.
    """
    dtype = promoted(layer.dtype, jnp.dtype(jnp.float32))  # Sums and scales are not rounded to half precision.
    record_kernel(layer, lambda: [unpack_codes(base, packed.shape) for base in packed.bases])
    if is_words(x):
        inputs = [InputBase(x, jnp.asarray(packed.input_scale, dtype), *code_sets(layer.input_quantizer, 1))]
    else:
        inputs = input_bases(layer, x, phase)
    pairs = [(a, w) for a in inputs for w in packed.bases]
    exact = all(multiplies_on_bits(a.values, w.values) for a, w in pairs)
    path = _path(layer, packed, pairs) if exact else AS_NUMBERS
    record_path(layer, path)
    if not exact:
        unpacked = (unpack_codes(w, packed.shape, dtype) for w in packed.bases)
        kernel = tuple(Quantized(codes, scale_of(w, dtype)) for codes, w in zip(unpacked, packed.bases))
        kernel = kernel_for(layer, inputs, kernel)
        y = sum(layer.product(a, w, *geometry) for a in inputs for w in kernel)
        return layer.finished(y, x, phase, *geometry)
    y = 0
    for a, w in pairs:
        if path == ON_BITS:
            integers = layer.product_on_bits(a, w, packed.shape, *geometry)
        else:
            kernel = unpack_codes(w, packed.shape, layer.dtype)
            integers = layer.sums(_codes(layer, a, packed), kernel, *geometry).astype(jnp.int32)
        record(layer, a.codes, a.values, lambda integers=integers: integers)
        if packed.integers:
            return integers
        y = y + layer.scaled(integers.astype(dtype), a.scale, scale_of(w, dtype))
    return layer.finished(y, x, phase, *geometry)


def _path(layer: nn.Module, packed: PackedKernel, pairs: Sequence[tuple[InputBase, PackedBase]]) -> str:
    """The one of PATHS on which a layer multiplies: what it was told, else the faster, if float32 holds the sums."""
    fan_in = math.prod(packed.shape[:-1])
    largest = max(abs(code * weight) for a, w in pairs for code in a.values for weight in w.values)
    if fan_in * largest > LARGEST_EXACT:
        return ON_BITS
    groups = getattr(layer, "feature_group_count", 1)
    channels, features = packed.shape[-2:]
    return packed.path or chosen_path(channels=channels, fan_in=fan_in, features=features, groups=groups)


def _codes(layer: nn.Module, base: InputBase, packed: PackedKernel) -> Array:
    """The codes of a base of the inputs as numbers, of words too."""
    if not is_words(base.codes):
        return base.codes
    low, high = base.values
    return jnp.where(unpack(base.codes, input_channels(layer, packed.shape)), high, low).astype(layer.dtype)

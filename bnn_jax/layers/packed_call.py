"""The call of a frozen layer: products of packed codes, or of the numbers that they stand for."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from bnn_jax.bitops.planes import PackedKernel, multiplies_on_bits, unpack_codes
from bnn_jax.layers.frozen import code_sets, is_words, record, record_kernel, scale_of
from bnn_jax.layers.operands import InputBase, Phase, input_bases, kernel_for
from bnn_jax.quantizers import Quantized


def packed_call(layer: nn.Module, x: Array, packed: PackedKernel, phase: Phase, *geometry) -> Array:
    """Return what a :class:`BinaryConv` or :class:`BinaryDense` with a packed kernel makes of x.

    Codes are multiplied on bits where that takes few products; else, and where the inputs are real, as numbers.

    Args:
      layer: of which the methods `product`, `product_on_bits`, `scaled` and `finished` are used.
      x: numbers, or the packed codes that a normalization with thresholds returns.
      packed: the kernel.
      phase: of the run.
      *geometry: what these methods take besides.

    Returns:
      The layer's outputs; where a normalization with thresholds follows, the integers alone.
    """
    record_kernel(layer, lambda: [unpack_codes(base, packed.shape) for base in packed.bases])
    if is_words(x):
        inputs = [InputBase(x, jnp.asarray(packed.input_scale, layer.dtype), *code_sets(layer.input_quantizer, 1))]
    else:
        inputs = input_bases(layer, x, phase)
    pairs = [(a, w) for a in inputs for w in packed.bases]
    if not all(multiplies_on_bits(a.values, w.values) for a, w in pairs):
        unpacked = (unpack_codes(w, packed.shape, layer.dtype) for w in packed.bases)
        kernel = tuple(Quantized(codes, scale_of(w, layer.dtype)) for codes, w in zip(unpacked, packed.bases))
        kernel = kernel_for(layer, inputs, kernel)
        y = sum(layer.product(a, w, *geometry) for a in inputs for w in kernel)
        return layer.finished(y, x, phase, *geometry)
    y = 0
    for a, w in pairs:
        integers = layer.product_on_bits(a, w, packed.shape, *geometry)
        record(layer, a.codes, a.values, lambda integers=integers: integers)
        if packed.integers:
            return integers
        y = y + layer.scaled(integers.astype(layer.dtype), a.scale, scale_of(w, layer.dtype))
    return layer.finished(y, x, phase, *geometry)

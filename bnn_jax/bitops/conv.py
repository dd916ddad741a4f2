r"""The windows of 2-D convolutions on packed bits, NHWC and HWIO.

The words of a patch are those of its pixels, joined without gaps; a matrix product of bits does the rest, in
:func:`bnn_jax.bitops.planes.conv_product`.  What the padding adds at the borders is a sum of weights.
"""

from collections.abc import Sequence
from functools import reduce
from math import prod
from operator import or_

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32, UInt32

from bnn_jax.bitops.bits import WORD_BITS, word_count
from bnn_jax.checks import Pair, check_arrays


def out_shape(shape: Pair, kernel_size: Pair, strides: Pair, padding: Sequence[Pair], dilation: Pair) -> Pair:
    """Height and width of a convolution's result."""
    padded = [n + low + high for n, (low, high) in zip(shape, padding)]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation)]
    return tuple(max(0, (n - r) // s + 1) for n, r, s in zip(padded, reach, strides))


def outside(
    shape: Pair, kernel_size: Pair, strides: Pair, padding: Sequence[Pair], dilation: Pair
) -> Bool[np.ndarray, "pixels taps"]:
    """Which taps of the kernel lie outside the image, for every pixel of the result.

    >>> outside((2, 2), (1, 2), (1, 1), ((0, 0), (1, 0)), (1, 1)).astype(int)
    array([[1, 0],
           [0, 0],
           [1, 0],
           [0, 0]])
    """
    out = out_shape(shape, kernel_size, strides, padding, dilation)
    axes = zip(shape, kernel_size, strides, padding, dilation, out)
    rows, columns = (outside_of_axis(n, k, s, low, d, m) for n, k, s, (low, _), d, m in axes)
    taps = rows[:, None, :, None] | columns[None, :, None, :]
    return taps.reshape(out[0] * out[1], kernel_size[0] * kernel_size[1])


def outside_of_axis(
    size: int, taps: int, stride: int, low: int, dilation: int, outputs: int
) -> Bool[np.ndarray, "outputs taps"]:
    """Which taps lie outside an axis of `size` pixels that is padded by `low` in front, for every output."""
    place = np.arange(outputs)[:, None] * stride + np.arange(taps) * dilation - low
    return (place < 0) | (place >= size)


@check_arrays
def patch_words(
    lhs: UInt32[Array, "batch height width words"],
    channels: int,
    kernel_size: Pair,
    window_strides: Pair,
    padding: Sequence[Pair],
    rhs_dilation: Pair = (1, 1),
) -> list[UInt32[Array, "patches"]]:
    r"""The words of every patch: its bits in the order (kernel height, kernel width, channel), without gaps.

    Args:
      lhs: words of each pixel, packed along the channels; padding pixels are words 0.
      channels: how many bits of a pixel's words are channels.

    Returns:
      ceil(kernel height * kernel width * channels / 32) arrays, one entry a pixel of the result.

    Raises:
      TypeError: if `lhs` is not uint32.
      ValueError: if it is not NHWC or has not ceil(channels / 32) words a pixel.

    >>> image = jnp.array([1, 0, 1, 1], jnp.uint32).reshape(1, 2, 2, 1)
    >>> patch_words(image, 1, (2, 2), (1, 1), ((0, 0), (0, 0)))
    [Array([13], dtype=uint32)]
    """
    if lhs.shape[-1] != word_count(channels):
        raise ValueError(f"`channels` (={channels}) take {word_count(channels)} words; got {lhs.shape[-1]} in `lhs`")
    out = out_shape(lhs.shape[1:3], kernel_size, window_strides, padding, rhs_dilation)
    lhs = lax.pad(lhs, jnp.uint32(0), ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)))
    if 0 in out:
        return [jnp.zeros(0, jnp.uint32)] * word_count(prod(kernel_size) * channels)
    starts = [(i * rhs_dilation[0], j * rhs_dilation[1]) for i in range(kernel_size[0]) for j in range(kernel_size[1])]
    dense = [[] for _ in range(word_count(len(starts) * channels))]
    for tap, (row, column) in enumerate(starts):
        for w in range(lhs.shape[-1]):
            stops = (row + (out[0] - 1) * window_strides[0] + 1, column + (out[1] - 1) * window_strides[1] + 1)
            word = lax.slice(lhs, (0, row, column, w), (lhs.shape[0], *stops, w + 1), (1, *window_strides, 1)).ravel()
            k, shift = divmod(tap * channels + w * WORD_BITS, WORD_BITS)
            dense[k].append(word << jnp.uint32(shift) if shift else word)
            if shift + min(WORD_BITS, channels - w * WORD_BITS) > WORD_BITS:
                dense[k + 1].append(word >> jnp.uint32(WORD_BITS - shift))
    return [reduce(or_, parts) for parts in dense]


def tap_sums(rhs: UInt32[Array, "words features"], kernel_size: Pair, channels: int) -> Int32[Array, "taps features"]:
    r"""The sum over channels of the weights -1/+1 of every tap: 2 popcount(bits of the tap) - channels.

    >>> tap_sums(jnp.array([[0b01_11]], jnp.uint32), (1, 2), 2)
    Array([[2],
           [0]], dtype=int32)
    """
    start = np.arange(prod(kernel_size)) * channels
    ones = 0
    for w in range(word_count(channels) + 1):
        word = start // WORD_BITS + w
        low, high = (np.clip(bit - word * WORD_BITS, 0, WORD_BITS) for bit in (start, start + channels))
        mask = ((1 << high) - (1 << low)).astype(np.uint32)
        if mask.any():
            bits = rhs[np.minimum(word, len(rhs) - 1)] & mask[:, None]
            ones += lax.population_count(bits).astype(jnp.int32)
    return 2 * ones - channels


def border_sums(
    rhs: UInt32[Array, "words features"], kernel_size: Pair, channels: int, taps: Bool[np.ndarray, "pixels taps"]
) -> Int32[Array, "pixels features"]:
    """For every pixel of the result the sum of the weights -1/+1 of its taps outside the image.

    Padding words 0 count as codes -1 there: add this once for zeros in their place, twice for +1.
    """
    patterns, which = np.unique(taps, axis=0, return_inverse=True)
    sums = tap_sums(rhs, kernel_size, channels).astype(jnp.float32)
    # Exact in float32, for which XLA has a fast product on CPU; of three ways to add the sums, the gather was fastest
    # on most shapes.
    table = jnp.dot(patterns.astype(np.float32), sums, precision=lax.Precision.HIGHEST).astype(jnp.int32)
    return table[which.ravel()]

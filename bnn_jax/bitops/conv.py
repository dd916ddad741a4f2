r"""The windows of convolutions on packed bits, channels last, with any number of spatial axes.

The words of a patch are those of its pixels, joined without gaps; a matrix product of bits does the rest, in
:func:`bnn_jax.bitops.planes.conv_product`.  What the padding adds at the borders is a sum of weights.
"""

from collections.abc import Sequence
from functools import reduce
from math import prod
from operator import or_
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32, UInt32

from bnn_jax.bitops.bits import WORD_BITS, word_count
from bnn_jax.checks import Pads, Sizes, check_arrays


class Geometry(NamedTuple):
    """How a kernel moves over an image; sizes have one number for each spatial axis.

    Attributes:
      strides: steps between windows.
      padding: (before, after) of each axis.
      dilation: steps between the taps of the kernel.
      groups: of channels, each convolved with features of its own.
      input_dilation: steps between the pixels of the image, zeros in between; () is steps of one.
    """

    strides: Sizes
    padding: Pads
    dilation: Sizes
    groups: int = 1
    input_dilation: Sizes = ()

    @property
    def spread(self) -> Sizes:
        """The steps between pixels, one for each axis."""
        return self.input_dilation or (1,) * len(self.strides)


def spread_shape(shape: Sequence[int], geometry: Geometry) -> Sizes:
    """Sizes of an image with zeros between its pixels."""
    return tuple(max(0, (n - 1) * s + 1) for n, s in zip(shape, geometry.spread))


def out_shape(shape: Sequence[int], kernel_size: Sizes, geometry: Geometry) -> Sizes:
    """Spatial sizes of a convolution's result."""
    padded = [n + low + high for n, (low, high) in zip(spread_shape(shape, geometry), geometry.padding)]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel_size, geometry.dilation)]
    return tuple(max(0, (n - r) // s + 1) for n, r, s in zip(padded, reach, geometry.strides))


def outside(
    shape: Sequence[int], kernel_size: Sizes, geometry: Geometry
) -> tuple[Bool[np.ndarray, "pixels taps"], Bool[np.ndarray, "pixels taps"]]:
    """Which taps of the kernel meet the padding, and which a zero between pixels, for every pixel of the result.

    >>> outside((2, 2), (1, 2), Geometry((1, 1), ((0, 0), (1, 0)), (1, 1)))[0].astype(int)
    array([[1, 0],
           [0, 0],
           [1, 0],
           [0, 0]])
    """
    out, rank = out_shape(shape, kernel_size, geometry), len(kernel_size)
    border = gaps = np.zeros((*out, *kernel_size), bool)
    axes = zip(spread_shape(shape, geometry), kernel_size, *geometry[:3], geometry.spread, out)
    for axis, (size, taps, stride, (low, _), dilation, step, outputs) in enumerate(axes):
        place = taken_of_axis(taps, stride, low, dilation, outputs)
        place = place.reshape([outputs if i == axis else taps if i == rank + axis else 1 for i in range(2 * rank)])
        border = border | (place < 0) | (place >= size)
        gaps = gaps | (place % step != 0)
    taps = prod(out), prod(kernel_size)
    return border.reshape(taps), (gaps & ~border).reshape(taps)


def taken_of_axis(taps: int, stride: int, low: int, dilation: int, outputs: int) -> np.ndarray:
    """Which pixel of an axis that is padded by `low` in front each tap meets, for every output: (outputs, taps)."""
    return np.arange(outputs)[:, None] * stride + np.arange(taps) * dilation - low


def outside_of_axis(
    size: int, taps: int, stride: int, low: int, dilation: int, outputs: int
) -> Bool[np.ndarray, "outputs taps"]:
    """Which taps lie outside an axis of `size` pixels that is padded by `low` in front, for every output."""
    place = taken_of_axis(taps, stride, low, dilation, outputs)
    return (place < 0) | (place >= size)


@check_arrays
def patch_words(
    lhs: UInt32[Array, "batch *spatial words"], channels: int, kernel_size: Sizes, geometry: Geometry
) -> list[UInt32[Array, "patches"]]:
    r"""The words of every patch: its bits in the order (kernel's spatial axes, channel), without gaps.

    Args:
      lhs: words of each pixel, packed along the channels; pixels of the padding and between others are words 0.
      channels: how many bits of a pixel's words are channels.
      geometry: its groups are not looked at.

    Returns:
      ceil(kernel taps * channels / 32) arrays, one entry a pixel of the result.

    Raises:
      TypeError: if `lhs` is not uint32.
      ValueError: if it has not ceil(channels / 32) words a pixel.

    >>> image = jnp.array([1, 0, 1, 1], jnp.uint32).reshape(1, 2, 2, 1)
    >>> patch_words(image, 1, (2, 2), Geometry((1, 1), ((0, 0), (0, 0)), (1, 1)))
    [Array([13], dtype=uint32)]
    """
    if lhs.shape[-1] != word_count(channels):
        raise ValueError(f"`channels` (={channels}) take {word_count(channels)} words; got {lhs.shape[-1]} in `lhs`")
    out = out_shape(lhs.shape[1:-1], kernel_size, geometry)
    pads = ((low, high, step - 1) for (low, high), step in zip(geometry.padding, geometry.spread))
    lhs = lax.pad(lhs, jnp.uint32(0), ((0, 0, 0), *pads, (0, 0, 0)))
    if 0 in out:
        return [jnp.zeros(0, jnp.uint32)] * word_count(prod(kernel_size) * channels)
    strides = (1, *geometry.strides, 1)
    dense = [[] for _ in range(word_count(prod(kernel_size) * channels))]
    for tap, place in enumerate(np.ndindex(*kernel_size)):
        start = [i * d for i, d in zip(place, geometry.dilation)]
        stop = [a + (m - 1) * s + 1 for a, m, s in zip(start, out, geometry.strides)]
        for w in range(lhs.shape[-1]):
            word = lax.slice(lhs, (0, *start, w), (lhs.shape[0], *stop, w + 1), strides).ravel()
            k, shift = divmod(tap * channels + w * WORD_BITS, WORD_BITS)
            dense[k].append(word << jnp.uint32(shift) if shift else word)
            if shift + min(WORD_BITS, channels - w * WORD_BITS) > WORD_BITS:
                dense[k + 1].append(word >> jnp.uint32(WORD_BITS - shift))
    return [reduce(or_, parts) for parts in dense]


def tap_sums(rhs: UInt32[Array, "words features"], kernel_size: Sizes, channels: int) -> Int32[Array, "taps features"]:
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
    rhs: UInt32[Array, "words features"], kernel_size: Sizes, channels: int, taps: Bool[np.ndarray, "pixels taps"]
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

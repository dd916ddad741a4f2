r"""2-D convolutions of two-valued codes from their packed bits, NHWC and HWIO.

The words of a patch are those of its pixels, joined without gaps; a matrix product of bits does the rest.  On GPU and
TPU :func:`binary_conv_general_dilated` unpacks the codes to bfloat16 for the convolution of the matrix units instead,
while frozen layers multiply their patches there as int8 codes; neither was measured.
"""

from collections.abc import Sequence
from functools import partial, reduce
from math import prod
from operator import or_
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32, UInt32

from bnn_jax.bitops.bits import WORD_BITS, require_words, unpack, word_count
from bnn_jax.bitops.matmul import xor_counts

Pair: TypeAlias = tuple[int, int]
Padding: TypeAlias = str | Sequence[Pair]


class Geometry(NamedTuple):
    """Where the windows of a convolution lie: in the order that the functions of this file take it."""

    kernel_size: Pair
    window_strides: Pair
    padding: Sequence[Pair]
    rhs_dilation: Pair


def explicit_padding(padding: Padding, shape: Pair, kernel_size: Pair, strides: Pair, dilation: Pair) -> list[Pair]:
    """[(top, bottom), (left, right)] of "SAME", "VALID" or of such pairs themselves.

    Raises:
      ValueError: if `padding` is another word.

    >>> explicit_padding("SAME", (8, 8), (3, 3), (2, 2), (1, 1))
    [(0, 1), (0, 1)]
    """
    if not isinstance(padding, str):
        return [(int(low), int(high)) for low, high in padding]
    if padding.upper() not in ("SAME", "VALID"):
        raise ValueError(f"`padding` (={padding!r}) must be SAME, VALID or ((top, bottom), (left, right))")
    reach = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation)]
    return lax.padtype_to_pads(shape, reach, strides, padding.upper())


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

    def beyond(n, k, s, low, d, m):
        place = np.arange(m)[:, None] * s + np.arange(k) * d - low
        return (place < 0) | (place >= n)

    rows, columns = (
        beyond(n, k, s, low, d, m)
        for n, k, s, (low, _), d, m in zip(shape, kernel_size, strides, padding, dilation, out)
    )
    taps = rows[:, None, :, None] | columns[None, :, None, :]
    return taps.reshape(out[0] * out[1], kernel_size[0] * kernel_size[1])


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
      ValueError: if `lhs` is not uint32 or has not ceil(channels / 32) words a pixel.

    >>> image = jnp.array([1, 0, 1, 1], jnp.uint32).reshape(1, 2, 2, 1)
    >>> patch_words(image, 1, (2, 2), (1, 1), ((0, 0), (0, 0)))
    [Array([13], dtype=uint32)]
    """
    require_words("lhs", lhs)
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


def binary_conv_general_dilated(
    lhs: UInt32[Array, "batch height width words"],
    rhs: UInt32[Array, "fan_in_words features"],
    window_strides: Pair,
    padding: Padding,
    rhs_dilation: Pair = (1, 1),
    *,
    kernel_size: Pair,
    channels: int,
    feature_group_count: int = 1,
    pad_value: int = 0,
) -> Int32[Array, "batch h w features"]:
    r"""`jax.lax.conv_general_dilated` of packed codes -1/+1, NHWC and HWIO; exact.

    y[b,h,w,f] = sum_{i,j,c} x[b, h s + i d - p, w s + j d - p, c] k[i,j,c,f],  x outside the image = pad_value
               = n - 2 popcount(patch xor filter) + (1 + pad_value) sum of the weights of the taps outside,
    n = kernel height * kernel width * channels; the bits 0 of the padding count as -1 in the popcount.

    Args:
      lhs: words of each pixel, packed along the channels; with groups (batch, height, width, groups * words), each
        group's channels packed for themselves.
      rhs: every filter's fan-in, flattened in the order (kernel height, kernel width, channel) and packed without gaps.
      padding: "SAME", "VALID" or ((top, bottom), (left, right)); negative numbers crop.
      kernel_size: (height, width).
      channels: of the image, over all groups.
      pad_value: 0, +1 or -1.

    Raises:
      ValueError: if the words are not uint32 or do not hold the channels and the fan-in, the groups do not divide the
        channels and the features, or `pad_value` is another.
    """
    _check(lhs, rhs, kernel_size, channels, feature_group_count, pad_value)
    geometry = Geometry(
        tuple(kernel_size),
        tuple(window_strides),
        explicit_padding(padding, lhs.shape[1:3], kernel_size, window_strides, rhs_dilation),
        tuple(rhs_dilation),
    )
    options = {"geometry": geometry, "channels": channels, "groups": feature_group_count, "pad_value": pad_value}
    return lax.platform_dependent(lhs, rhs, cpu=partial(word_conv, **options), default=partial(unit_conv, **options))


def word_conv(lhs, rhs, *, geometry: Geometry, channels: int, groups: int, pad_value: int):
    """The convolution from the bits themselves."""
    channels, features = channels // groups, rhs.shape[1]
    shape, out = lhs.shape[1:3], (lhs.shape[0], *out_shape(lhs.shape[1:3], *geometry))
    lhs = jnp.moveaxis(lhs.reshape(*lhs.shape[:3], groups, -1), 3, 0)
    words = patch_words(lhs.reshape(-1, *lhs.shape[2:]), channels, *geometry)
    if groups == 1:
        counts = xor_counts(words, rhs)
    else:
        rows = [word.reshape(groups, -1) for word in words]
        counts = jax.vmap(xor_counts, (0, 1), 1)(rows, rhs.reshape(rhs.shape[0], groups, -1))
    y = (prod(geometry.kernel_size) * channels - 2 * counts).reshape(*out, features)
    taps = outside(shape, *geometry)
    if pad_value == -1 or not taps.any():
        return y
    return y + (1 + pad_value) * border_sums(rhs, geometry.kernel_size, channels, taps).reshape(1, *out[1:], features)


def unit_conv(lhs, rhs, *, geometry: Geometry, channels: int, groups: int, pad_value: int):
    """The same from the codes in bfloat16, summed in float32: exact below a fan-in of 2^24, for matrix units."""
    codes = [
        2 * bits.astype(jnp.bfloat16) - 1
        for bits in (
            unpack(lhs.reshape(*lhs.shape[:3], groups, -1), channels // groups).reshape(*lhs.shape[:3], channels),
            unpack(rhs, prod(geometry.kernel_size) * channels // groups, 0),
        )
    ]
    pads = ((0, 0, 0), *((low, high, 0) for low, high in geometry.padding), (0, 0, 0))
    return lax.conv_general_dilated(
        lax.pad(codes[0], jnp.bfloat16(pad_value), pads),
        codes[1].reshape(*geometry.kernel_size, channels // groups, -1),
        geometry.window_strides,
        "VALID",
        rhs_dilation=geometry.rhs_dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        preferred_element_type=jnp.float32,
    ).astype(jnp.int32)


def _check(lhs, rhs, kernel_size, channels, groups, pad_value):
    require_words("lhs", lhs)
    require_words("rhs", rhs)
    if pad_value not in (-1, 0, 1):
        raise ValueError(f"`pad_value` (={pad_value!r}) must be 0, +1 or -1")
    if groups < 1 or channels % groups or rhs.shape[1] % groups:
        raise ValueError(
            f"`feature_group_count` (={groups}) must divide the {channels} channels and the {rhs.shape[1]} features"
        )
    if lhs.shape[-1] != groups * word_count(channels // groups):
        raise ValueError(
            f"`channels` (={channels}) in {groups} groups take {groups * word_count(channels // groups)} words a "
            f"pixel; got {lhs.shape[-1]} in `lhs`"
        )
    size = prod(kernel_size) * channels // groups
    if rhs.shape[0] != word_count(size):
        raise ValueError(
            f"`rhs` has {rhs.shape[0]} words a filter; `kernel_size` (={kernel_size}) and {channels // groups} "
            f"channels take {word_count(size)}"
        )

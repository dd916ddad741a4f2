"""Bits packed into 32-bit words, least significant first: element i of an axis is bit i % 32 of word i // 32.

The bits beyond the axis's size are 0 in every word that is made here, so that they cancel in an exclusive or.
"""

from collections.abc import Callable
from functools import reduce
from operator import or_

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Shaped, UInt32

from bnn_jax.checks import Pads, Pair, as_pads, as_sizes, check_arrays, pads_rule, require

WORD_BITS = 32


def word_count(size: int) -> int:
    """How many words hold `size` bits.

    >>> word_count(32), word_count(33)
    (1, 2)
    """
    return -(-size // WORD_BITS)


@check_arrays
def pack(bits: Bool[Array, "..."], axis: int = -1) -> UInt32[Array, "..."]:
    r"""Words of the bits along one axis.

    words[w] = sum_i bits[32 w + i] 2^i;  bits beyond the axis's size are 0

    Args:
      bits: bool; the axis of size n becomes one of ceil(n / 32) words.

    Raises:
      TypeError: if `bits` is not bool.

    >>> pack(jnp.array([True, False, True]))
    Array([5], dtype=uint32)
    """
    bits = jnp.moveaxis(bits, axis, -1)
    count = word_count(bits.shape[-1])
    missing = count * WORD_BITS - bits.shape[-1]
    bits = lax.pad(bits, False, [(0, 0, 0)] * (bits.ndim - 1) + [(0, missing, 0)])
    bits = bits.reshape(*bits.shape[:-1], count, 4, 8).astype(jnp.uint32)
    # Sums of eight neighbours and an OR of four sums: faster on CPU than one sum of 32, than 32 strided slices,
    # and than a product with powers of two.
    octets = (bits << lax.broadcasted_iota(jnp.uint32, bits.shape, bits.ndim - 1)).sum(-1, dtype=jnp.uint32)
    words = reduce(or_, (octets[..., i] << jnp.uint32(8 * i) for i in range(4)))
    return jnp.moveaxis(words, -1, axis)


@check_arrays
def unpack(words: UInt32[Array, "..."], size: int, axis: int = -1) -> Bool[Array, "..."]:
    r"""The first `size` bits of the words along one axis; the inverse of :func:`pack`.

    bits[i] = bit i % 32 of words[i // 32]

    Raises:
      TypeError: if `words` is not uint32.
      ValueError: if it does not have ceil(size / 32) words along the axis.

    >>> unpack(jnp.array([5], jnp.uint32), 4)
    Array([ True, False,  True, False], dtype=bool)
    """
    words = jnp.moveaxis(words, axis, -1)
    if words.shape[-1] != word_count(size):
        raise ValueError(f"`size` (={size}) takes {word_count(size)} words; got {words.shape[-1]} along the axis")
    places = lax.broadcasted_iota(jnp.uint32, (*words.shape, WORD_BITS), words.ndim)
    bits = (words[..., None] >> places) & 1 != 0
    bits = bits.reshape(*words.shape[:-1], words.shape[-1] * WORD_BITS)
    return jnp.moveaxis(bits[..., :size], -1, axis)


@check_arrays
def max_pool(
    words: UInt32[Array, "batch height width words"],
    window: int | Pair = 2,
    *,
    strides: int | Pair | None = None,
    padding: int | Pair | Pads = 0,
) -> UInt32[Array, "batch h w words"]:
    r"""The largest code of each window: the OR of its bits, padding counting as the smaller code.

    y[b,h,w] = OR_{i,j} words[b, h s + i - p, w s + j - p];  words outside are 0

    Rows and columns that do not fill a window are left out.

    Args:
      words: packed along the channels.
      window, strides: a number or a pair (height, width); strides None are `window`.
      padding: a number, a pair (height, width) or ((top, bottom), (left, right)).

    Raises:
      TypeError: if `words` is not uint32.
      ValueError: for words of another shape; for another window, strides or padding.

    >>> max_pool(jnp.array([1, 2, 4, 8], jnp.uint32).reshape(1, 2, 2, 1)).ravel()
    Array([15], dtype=uint32)
    """
    window = as_sizes("window", window)
    strides = window if strides is None else as_sizes("strides", strides)
    pads = as_pads(padding)
    require("padding", padding, pads is not None, pads_rule())
    return combine_windows(or_, words, window, strides, pads, outside=0)


def combine_windows(
    combine: Callable[[Array, Array], Array],
    x: Shaped[Array, "batch height width channels"],
    window: Pair,
    strides: Pair,
    padding: Pads,
    *,
    outside: float,
) -> Shaped[Array, "batch h w channels"]:
    """The elements of each window, combined two at a time, row by row from the first; padding counts as `outside`.

    >>> combine_windows(jnp.add, jnp.ones((1, 2, 3, 1)), (2, 2), (1, 1), ((0, 0), (0, 0)), outside=0.0).ravel()
    Array([4., 4.], dtype=float32)
    """
    x = lax.pad(x, jnp.asarray(outside, x.dtype), ((0, 0, 0), *((*side, 0) for side in padding), (0, 0, 0)))
    counts = [max(0, (n - k) // s + 1) for n, k, s in zip(x.shape[1:3], window, strides)]

    def place(i, j):
        rows, columns = (slice(a, a + (m - 1) * s + 1, s) for a, m, s in zip((i, j), counts, strides))
        return x[:, rows, columns]

    if 0 in counts:
        return jnp.zeros((x.shape[0], *counts, x.shape[3]), x.dtype)
    return reduce(combine, (place(i, j) for i in range(window[0]) for j in range(window[1])))

r"""A normalization followed by a two-valued quantizer, as a comparison of integers.

What stands between the integer product v of a packed layer and the next codes, scale, bias, normalization and step, is
in exact arithmetic a monotone function of v, and in floating point too.  So codes = higher one  <=>  (v >= t) xor flip,
with a t and a flip for each channel: gamma > 0 does not flip, gamma < 0 does, gamma = 0 gives a t that no v or every v
reaches.  They are found by computing the codes of *every* integer that v can be, in the network's own arithmetic, so
that the comparison agrees with it where rounding decides too.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

CHANNELS_AT_ONCE = 64


def above(v: Int32[Array, "... #channels"], threshold: Int32[Array, "channels"]) -> Bool[Array, "... channels"]:
    """(v >= t) xor flip, of thresholds 2 t + flip.

    >>> above(jnp.array([[-2, -2], [0, 0]]), jnp.array([2 * 0, 2 * 0 + 1])).tolist()
    [[False, True], [True, False]]
    """
    threshold = threshold.reshape((1,) * (v.ndim - 1) + (-1,))
    return (v >= threshold >> 1) ^ (threshold & 1).astype(bool)


def find_thresholds(
    is_higher: Callable[[Array, Array], Bool[Array, "integers channels"]], low: int, high: int, channels: int
) -> tuple[Int32[Array, "channels"], Bool[Array, "channels"]]:
    """The thresholds 2 t + flip of a monotone function of the integers low ... high, and where it is not monotone.

    Args:
      is_higher: (v, index) -> whether the codes of channels `index` are the higher ones: v (integers, 1), index
        (some channels), result (integers, some channels).
      low, high: the range of v.
      channels: how many.

    Returns:
      (thresholds, broken): `broken` is true for a channel that no threshold describes.

    >>> rising = lambda v, index: (2 * v + 1 >= 2 * index)
    >>> find_thresholds(lambda v, index: rising(v, index[None]), -3, 3, 2)[0].tolist()
    [0, 2]
    """
    v = jnp.arange(low, high + 1, dtype=jnp.int32)[:, None]

    def some(index):
        bits = is_higher(v, jnp.minimum(index, channels - 1))
        rising = ~bits[0]
        # A constant code is reached by every v, or flipped to be so.
        zeros = jnp.where(rising & bits[-1], (~bits).sum(0), jnp.where(rising | bits[-1], 0, bits.sum(0)))
        flip = jnp.where(bits[-1], 0, 1)
        threshold = 2 * (low + zeros.astype(jnp.int32)) + flip
        return threshold, (above(v, threshold) != bits).any(0)

    blocks = -(-channels // CHANNELS_AT_ONCE)
    index = jnp.arange(blocks * CHANNELS_AT_ONCE).reshape(blocks, CHANNELS_AT_ONCE)
    thresholds, broken = jax.lax.map(some, index)
    return thresholds.reshape(-1)[:channels], broken.reshape(-1)[:channels]

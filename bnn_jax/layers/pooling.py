"""Pooling: maxima, and the means in front of a shortcut's convolution."""

from collections.abc import Sequence
from functools import reduce

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

from bnn_jax.bitops import bits
from bnn_jax.layers.convolution import Padding, Pair
from bnn_jax.layers.frozen import is_words
from bnn_jax.precision import widened


@jax.named_scope("max_pool")
def max_pool(
    x: Num[Array, "batch height width channels"],
    window: Pair = (2, 2),
    *,
    strides: Pair | None = None,
    padding: Padding = ((0, 0), (0, 0)),
) -> Num[Array, "batch h w channels"]:
    r"""The largest value of each window.

    Forward   y[b,h,w,c] = max_{i,j} x[b, h s + i - p, w s + j - p, c]; padding counts as -infinity
    Backward  to the largest value, the first of equal ones

    Rows and columns that do not fill a window are left out.  Windows that tile the image, the usual ones, take half the
    time of `flax.linen.max_pool` on CPU.

    Args:
      x: numbers; or uint32, packed codes, of which the higher one is found with an OR (frozen networks).
      window: (height, width).
      strides: None is `window`.

    >>> import jax.numpy as jnp
    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0]
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    """
    if is_words(x):
        return bits.max_pool(x, window, strides=strides, padding=padding)
    strides = window if strides is None else strides
    if tuple(strides) != tuple(window) or max(map(max, padding)) > 0:
        return nn.max_pool(x, window, strides, padding)
    b, h, w, c = x.shape
    rows, columns = h // window[0], w // window[1]
    tiles = x[:, : rows * window[0], : columns * window[1]].reshape(b, rows, window[0], columns, window[1], c)
    return _largest(_largest(tiles, 4), 2)


def avg_pool_2x2(x: Float[Array, "batch h w channels"]) -> Float[Array, "batch rows columns channels"]:
    """Means over 2x2 windows; at an odd edge over the pixels that are there, so that a 3x3 convolution, stride 2, fits.

    >>> import jax.numpy as jnp
    >>> avg_pool_2x2(jnp.arange(9.0).reshape(1, 3, 3, 1))[0, :, :, 0]
    Array([[2. , 3.5],
           [6.5, 8. ]], dtype=float32)
    """
    padding = [(0, x.shape[1] % 2), (0, x.shape[2] % 2)]
    return mean_pool(x, (2, 2), (2, 2), padding, count_include_pad=padding == [(0, 0), (0, 0)])


def mean_pool(
    x: Float[Array, "batch h w channels"],
    window: Pair,
    strides: Pair,
    padding: Sequence[Pair] = ((0, 0), (0, 0)),
    *,
    count_include_pad: bool = True,
) -> Float[Array, "batch rows columns channels"]:
    """The mean of each window, as `flax.linen.avg_pool`; summed in float32 at least, returned in x's dtype.

    >>> import jax.numpy as jnp
    >>> mean_pool(jnp.array([256, 1, 1, 1], jnp.bfloat16).reshape(1, 2, 2, 1), (2, 2), (2, 2)).ravel()
    Array([65], dtype=bfloat16)
    """
    with jax.numpy_dtype_promotion("standard"):  # Flax divides by whole numbers.
        return nn.avg_pool(widened(x), window, strides, padding, count_include_pad).astype(x.dtype)


def _largest(x: Array, axis: int) -> Array:
    """The maximum, by selection: the gradient of `jnp.max` compares x with its maximum again and divides by the number
    of equal ones, which is 0 where XLA computes x a second time with other rounding."""
    parts = (lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis]))
    return reduce(lambda largest, part: jnp.where(part > largest, part, largest), parts)

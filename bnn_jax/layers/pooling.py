"""Pooling: maxima, and the means in front of a shortcut's convolution."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Num

from bnn_jax.bitops import bits
from bnn_jax.checks import Pads, Pair, as_sizes, check_arrays
from bnn_jax.layers.convolution import Padding, resolve_padding
from bnn_jax.layers.frozen import is_words
from bnn_jax.precision import widened

MAX_POOL = f"{__name__}.max_pool()"
"""The scope of :func:`max_pool` in a traced computation, by which freezing knows it: no module has such a name."""


def _geometry(x: Array, window: int | Pair, strides: int | Pair | None, padding: Padding) -> tuple[Pair, Pair, Pads]:
    window = as_sizes("window", window)
    strides = window if strides is None else as_sizes("strides", strides)
    sizes = {"shape": x.shape[1:3], "kernel_size": window, "dilation": (1, 1)}
    return window, strides, resolve_padding(padding, strides=strides, **sizes)


@jax.named_scope(MAX_POOL)
@check_arrays
def max_pool(
    x: Num[Array, "batch height width channels"],
    window: int | Pair = 2,
    *,
    strides: int | Pair | None = None,
    padding: Padding = 0,
) -> Num[Array, "batch h w channels"]:
    r"""The largest value of each window.

    Forward   y[b,h,w,c] = max_{i,j} x[b, h s + i - p, w s + j - p, c]; padding counts as -infinity
    Backward  to the largest value, the first of equal ones

    Rows and columns that do not fill a window are left out.  NaN is larger than any number.  On CPU the gradient takes
    a quarter to a thirtieth of the time of that of `flax.linen.max_pool`.

    Args:
      x: numbers; or uint32, packed codes, of which the higher one is found with an OR (frozen networks).
      window: a number or a pair (height, width).
      strides: the same; None is `window`.
      padding: see :func:`bnn_jax.layers.convolution.resolve_padding`.

    Raises:
      TypeError, ValueError: for x of another dtype or shape; for another window, strides or padding.

    >>> import jax.numpy as jnp
    >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0]
    Array([[ 5.,  7.],
           [13., 15.]], dtype=float32)
    """
    window, strides, padding = _geometry(x, window, strides, padding)
    if is_words(x):
        return bits.max_pool(x, window, strides=strides, padding=padding)
    least = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else int(jnp.iinfo(x.dtype).min)

    def by_windows(x):
        sizes = ((1, *window, 1), (1, *strides, 1), ((0, 0), *padding, (0, 0)))
        return lax.reduce_window(x, np.asarray(least, x.dtype), lax.max, *sizes)

    def by_places(x):
        return bits.combine_windows(_larger, x, window, strides, padding, outside=least)

    # The gradient of windows takes many times as long on CPUs and has no deterministic form on GPUs.
    return lax.platform_dependent(x, cpu=by_places, cuda=by_places, rocm=by_places, default=by_windows)


@check_arrays
def avg_pool_2x2(x: Float[Array, "batch h w channels"]) -> Float[Array, "batch rows columns channels"]:
    """Means over 2x2 windows; at an odd edge over the pixels that are there, so that a 3x3 convolution, stride 2, fits.

    >>> import jax.numpy as jnp
    >>> avg_pool_2x2(jnp.arange(9.0).reshape(1, 3, 3, 1))[0, :, :, 0]
    Array([[2. , 3.5],
           [6.5, 8. ]], dtype=float32)
    """
    padding = ((0, x.shape[1] % 2), (0, x.shape[2] % 2))
    return mean_pool(x, 2, 2, padding, count_include_pad=padding == ((0, 0), (0, 0)))


@check_arrays
def mean_pool(
    x: Float[Array, "batch h w channels"],
    window: int | Pair,
    strides: int | Pair | None = None,
    padding: Padding = 0,
    *,
    count_include_pad: bool = True,
) -> Float[Array, "batch rows columns channels"]:
    """The mean of each window, as `flax.linen.avg_pool`; summed in float32 at least, returned in x's dtype.

    Args:
      window, strides, padding: as those of :func:`max_pool`.
      count_include_pad: divide by the whole window at the borders too.

    Raises: as :func:`max_pool`.

    >>> import jax.numpy as jnp
    >>> mean_pool(jnp.array([256, 1, 1, 1], jnp.bfloat16).reshape(1, 2, 2, 1), (2, 2), (2, 2)).ravel()
    Array([65], dtype=bfloat16)
    """
    window, strides, padding = _geometry(x, window, strides, padding)
    with jax.numpy_dtype_promotion("standard"):  # Flax divides by whole numbers.
        return nn.avg_pool(widened(x), window, strides, padding, count_include_pad).astype(x.dtype)


def _larger(largest: Array, x: Array) -> Array:
    """The maximum, by selection: the gradient of `jnp.max` compares x with its maximum again and divides by the number
    of equal ones, which is 0 where XLA computes x a second time with other rounding."""
    return jnp.where((x > largest) | (x != x), x, largest)

r"""Quantizers of the gradient that flows back through a layer: identity forward, few bits backward."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.finite import keep_nan
from bnn_jax.precision import widened
from bnn_jax.quantizers.multibit import require_bits, require_codes
from bnn_jax.quantizers.quantizer import full_precision
from bnn_jax.types import Key

GradientQuantizer = Callable[[Array, Key], Array]
"""(y, key) -> y, whose backward pass quantizes the cotangent."""


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _quantized_backward(y, key, bits):
    return y


def _forward(y, key, bits):
    return y, key


def _backward(bits, key, cotangent):
    wide = widened(cotangent)
    n = 2**bits - 1
    largest = jnp.abs(wide).max(tuple(range(1, wide.ndim)), keepdims=True)
    noise = jax.random.uniform(key, wide.shape, wide.dtype, -0.5, 0.5)
    level = n * (wide / jnp.where(largest == 0, 1, 2 * largest) + 0.5) + noise
    quantized = 2 * largest * (jnp.round(jnp.clip(level, 0, n)) / n - 0.5)
    return keep_nan(cotangent, quantized.astype(cotangent.dtype)), None


_quantized_backward.defvjp(_forward, _backward)


def dorefa_gradient(y: Float[Array, "batch ..."], key: Key, *, bits: int = 6) -> Float[Array, "batch ..."]:
    r"""DoReFa-Net gradients: the gradient of each example is rounded to 2^bits levels, at random and unbiased.

    With g = dL/dy, n = 2^bits - 1, m = max|g| over all axes but the first, N ~ U(-1/2, 1/2)/n for each element:

    Forward   y
    Backward  (chosen)  dL/dy := 2m [q(g/(2m) + 1/2 + N) - 1/2],  q(r) = round(n clip(r, 0, 1)) / n

    The mean over N is g, and no element is off by more than 2m/n.  Zero is none of the levels: a zero gradient among
    others becomes +-m/n; an example whose gradient is all zero keeps it.

    Args:
      y: output of a layer, before its normalization; the examples on the first axis.
      key: for the noise; fresh in every step.
      bits: of a gradient; DoReFa-Net trains well with 6.

    Returns:
      y itself.

    Raises:
      ValueError: if `y` is a scalar, `bits` is no whole number of at least 1, or y's dtype cannot hold 2^bits - 1.
      TypeError: if `y` is not a floating-point array.

    >>> gradient = jax.grad(lambda y: (dorefa_gradient(y, jax.random.key(0), bits=1) ** 2).sum() / 2)
    >>> abs(gradient(jnp.array([[0.5, -2.0, 1.0], [0.0, 0.0, 0.0]])))
    Array([[2., 2., 2.],
           [0., 0., 0.]], dtype=float32)

    Reference: Zhou et al., DoReFa-Net, 2016, arXiv:1606.06160.
    """
    require_codes("y", y, bits=bits)
    if y.ndim == 0:
        raise ValueError("`y` (of shape ()) must have the examples on its first axis; add one with `y[None]`")
    return _quantized_backward(y, key, bits)


def dorefa(*, bits: int = 6) -> GradientQuantizer:
    """:func:`dorefa_gradient` with its `bits`, as layers take it.

    Raises:
      ValueError: if `bits` is no whole number of at least 1.

    Reference: Zhou et al., DoReFa-Net, 2016, arXiv:1606.06160.
    """
    require_bits(bits, dtype=jnp.float32)
    return partial(dorefa_gradient, bits=bits)


GRADIENT_QUANTIZERS: Mapping[str, Callable[..., GradientQuantizer | None]] = {
    "full_precision": full_precision,
    "dorefa": dorefa,
}

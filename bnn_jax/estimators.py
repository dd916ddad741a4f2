r"""Sign functions with a chosen derivative.

The true derivative of sign is zero almost everywhere, so each function here has two formulas: the forward value, which
is always the same two-valued :func:`sign`, and the backward factor that stands in for its derivative.
A new estimator is its derivative: ``my_sign = make_sign(lambda x: ...)``.
"""

from collections.abc import Callable
from functools import wraps

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.types import Estimator


def sign(x: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Two-valued sign: -1 if x < 0 else +1, of x's shape and dtype; sign(0) = sign(-0.0) = +1.

    Its derivative is zero; the estimators of this module choose another one.

    Raises:
      TypeError: if `x` is not a floating-point array.

    >>> sign(jnp.array([-2.0, -0.0, 0.0, 3.0]))
    Array([-1.,  1.,  1.,  1.], dtype=float32)
    """
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(f"`x` must be a floating-point array; got {jnp.result_type(x)}; convert it with `.astype`")
    return jnp.where(x < 0, -1, 1).astype(jnp.result_type(x))


def make_sign(derivative: Callable[..., Float[Array, "..."]]) -> Callable[..., Float[Array, "..."]]:
    r"""An estimator from its derivative.

    Forward   q(x) = sign(x)
    Backward  (chosen)  dL/dx := dL/dq * derivative(x, **parameters)

    Args:
      derivative: elementwise factor, called with x and the keyword parameters of the estimator.  The parameters are
        arrays to jit: a new value does not recompile.  They receive a zero cotangent.

    Returns:
      The estimator, called as ``estimator(x, **parameters)``; its output has x's shape and dtype.

    >>> triangle_sign = make_sign(lambda x, width: jnp.maximum(0.0, 1.0 - jnp.abs(x) / width))
    >>> jax.grad(lambda x: triangle_sign(x, width=2.0))(1.0)
    Array(0.5, dtype=float32)
    """

    @jax.custom_vjp
    def quantize(x, parameters):
        return sign(x)

    def forward(x, parameters):
        return sign(x), (x, parameters)

    def backward(residuals, cotangent):
        x, parameters = residuals
        factor = derivative(x, **parameters).astype(cotangent.dtype)
        return cotangent * factor, jax.tree.map(jnp.zeros_like, parameters)

    quantize.defvjp(forward, backward)

    @wraps(derivative)
    def estimator(x, **parameters):
        return quantize(x, {name: jnp.asarray(value, jnp.result_type(x)) for name, value in parameters.items()})

    return estimator


_clipped = make_sign(lambda x, clip_value: jnp.abs(x) <= clip_value)
_identity = make_sign(lambda x: jnp.ones_like(x))
_approx = make_sign(lambda x: jnp.maximum(2 - 2 * jnp.abs(x), 0))


def ste_sign(x: Float[Array, "..."], *, clip_value: float | Array = 1.0) -> Float[Array, "..."]:
    r"""Sign with the clipped straight-through estimator.

    Forward   q(x) = -1 if x < 0 else +1
    Backward  (chosen)  dq/dx := 1 if |x| <= clip_value else 0

    The ends are inclusive: a latent weight that a box constraint holds at +-1 still receives its gradient.

    Args:
      x: float array of any shape.
      clip_value: positive scalar; may be traced.

    Raises:
      ValueError: if `clip_value` is not positive.

    >>> ste_sign(jnp.array([-2.0, 0.0, 3.0]))
    Array([-1.,  1.,  1.], dtype=float32)
    >>> jax.grad(lambda x: ste_sign(x).sum())(jnp.array([-1.5, -1.0, 0.0, 1.0]))
    Array([0., 1., 1., 1.], dtype=float32)

    Reference: Hubara et al., Binarized Neural Networks, 2016, arXiv:1602.02830.
    """
    if not isinstance(clip_value, jax.core.Tracer) and not clip_value > 0:
        raise ValueError(f"`clip_value` (={clip_value}) must be positive; 1.0 is the usual choice")
    return _clipped(x, clip_value=clip_value)


def identity_sign(x: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Sign with the identity straight-through estimator.

    Forward   q(x) = -1 if x < 0 else +1
    Backward  (chosen)  dq/dx := 1

    >>> jax.grad(lambda x: identity_sign(x).sum())(jnp.array([-100.0, 0.0]))
    Array([1., 1.], dtype=float32)

    Reference: Bengio, Leonard, Courville, Estimating or Propagating Gradients Through Stochastic Neurons, 2013,
    arXiv:1308.3432.
    """
    return _identity(x)


def approx_sign(x: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Sign with the derivative of a piecewise quadratic (ApproxSign, the "second order" estimator).

    Forward   q(x) = -1 if x < 0 else +1
    Backward  (chosen)  dq/dx := 2 - 2|x| if |x| <= 1 else 0

    >>> jax.grad(lambda x: approx_sign(x).sum())(jnp.array([-1.5, -0.25, 0.0, 1.0]))
    Array([0. , 1.5, 2. , 0. ], dtype=float32)

    Reference: Liu et al., Bi-Real Net, 2018, arXiv:1808.00278.
    """
    return _approx(x)


ESTIMATORS: dict[str, Estimator] = {
    "identity_sign": identity_sign,
    "ste_sign": ste_sign,
    "approx_sign": approx_sign,
}

r"""Sign estimators whose derivative has one shape throughout training."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import require_positive
from bnn_jax.estimators.definition import is_negative, make_sign


def sech_squared(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 / cosh(z)^2 with one exponential that cannot overflow; also the derivative of tanh.

    >>> sech_squared(jnp.array([0.0, 1e4]))
    Array([1., 0.], dtype=float32)
    """
    e = jnp.exp(-2 * jnp.abs(z))
    return 4 * e / (1 + e) ** 2


def _swish_slope(x, beta):
    # Below -100 the exponential is zero in float32: the bound keeps an overflowing beta * x from 0 * inf.
    z = jnp.maximum(-jnp.abs(beta * x), -100)
    e = jnp.exp(z)
    upper = 1 / (1 + e)
    lower = e * upper
    return 2 * upper * lower * (2 + z * (upper - lower))


_clipped = make_sign(lambda x, clip_value: jnp.abs(x) <= clip_value)
_identity = make_sign(lambda x: jnp.ones_like(x))
_approx = make_sign(lambda x: jnp.maximum(2 - 2 * jnp.abs(x), 0))
_tanh = make_sign(lambda x, slope: slope * sech_squared(slope * x))
_cosh = make_sign(lambda x, scale: scale * sech_squared(x))
_swish = make_sign(
    lambda x, beta: beta * _swish_slope(x, beta),
    parameter_derivatives={"beta": lambda x, beta: x * _swish_slope(x, beta)},
)
_long_tailed = make_sign(lambda x: jnp.where(jnp.abs(x) <= 1, jnp.maximum(2 - 4 * jnp.abs(x), 0.4), 0))
_state_aware = make_sign(
    lambda x, positive, negative: jnp.where(jnp.abs(x) <= 1, jnp.where(is_negative(x), negative, positive), 0)
)


def ste_sign(x: Float[Array, "..."], *, clip_value: float | Array = 1.0) -> Float[Array, "..."]:
    r"""Sign with the clipped straight-through estimator.

    Forward   q(x) = -1 if x < 0 else +1
    Backward  (chosen, not derived)  dq/dx := 1 if |x| <= clip_value else 0

    The ends are inclusive: a latent weight that a box constraint holds at +-1 still receives its gradient.

    Args:
      x: float array of any shape.
      clip_value: positive; a scalar, or an array that broadcasts to x; may be traced.

    Raises:
      ValueError: if `clip_value` is not positive.

    >>> ste_sign(jnp.array([-2.0, 0.0, 3.0]))
    Array([-1.,  1.,  1.], dtype=float32)
    >>> import jax
    >>> jax.grad(lambda x: ste_sign(x).sum())(jnp.array([-1.5, -1.0, 0.0, 1.0]))
    Array([0., 1., 1., 1.], dtype=float32)

    Reference: Hubara et al., Binarized Neural Networks, 2016, arXiv:1602.02830.
    """
    require_positive("clip_value", clip_value, "1.0 is the usual choice")
    return _clipped(x, clip_value=clip_value)


def identity_sign(x: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Sign with the identity straight-through estimator.

    Forward   q(x) = -1 if x < 0 else +1
    Backward  (chosen)  dq/dx := 1

    >>> import jax
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

    >>> import jax
    >>> jax.grad(lambda x: approx_sign(x).sum())(jnp.array([-1.5, -0.25, 0.0, 1.0]))
    Array([0. , 1.5, 2. , 0. ], dtype=float32)

    Reference: Liu et al., Bi-Real Net, 2018, arXiv:1808.00278.
    """
    return _approx(x)


def tanh_sign(x: Float[Array, "..."], *, slope: float | Array = 1.0) -> Float[Array, "..."]:
    r"""Sign with the derivative of tanh.

    Forward   q(x) = -1 if x < 0 else +1
    Backward  (chosen)  dq/dx := slope (1 - tanh(slope x)^2)

    The source gives no slope; 1 is this package's reading.

    Args:
      x: float array of any shape.
      slope: positive; a scalar, or an array that broadcasts to x; may be traced.

    Raises:
      ValueError: if `slope` is not positive.

    >>> import jax
    >>> jax.grad(lambda x: tanh_sign(x, slope=2.0).sum())(jnp.array([0.0, 1e4]))
    Array([2., 0.], dtype=float32)

    Reference: So, A Survey of Gradient Estimators for Binary Neural Networks for Image Classification,
    Stanford, poster.
    """
    require_positive("slope", slope, "1.0 is the plain tanh")
    return _tanh(x, slope=slope)


def cosh_sign(x: Float[Array, "..."], *, scale: float | Array = 4.0) -> Float[Array, "..."]:
    r"""Sign with the factor (2 / cosh x)^2.

    Forward   q(x) = -1 if x < 0 else +1
    Backward  (chosen)  dq/dx := scale / cosh(x)^2

    The survey prints (2 / cosh x)^2, which is scale 4 and four times the jump of sign; whether it ran that form or
    (2 / (e^x + e^-x))^2, which is scale 1 and the same as :func:`tanh_sign`, could not be confirmed.  The factor
    multiplies up over the binarized layers that a gradient passes.

    Args:
      x: float array of any shape.
      scale: positive; 4 as printed, 1 for the area of sign; may be traced.

    Raises:
      ValueError: if `scale` is not positive.

    >>> import jax
    >>> jax.grad(lambda x: cosh_sign(x).sum())(jnp.array([0.0, 1e4]))
    Array([4., 0.], dtype=float32)

    Reference: So, A Survey of Gradient Estimators for Binary Neural Networks for Image Classification,
    Stanford, poster.
    """
    require_positive("scale", scale, "4.0 is the printed formula, 1.0 has the area of sign")
    return _cosh(x, scale=scale)


def swish_sign(x: Float[Array, "..."], *, beta: float | Array = 5.0) -> Float[Array, "..."]:
    r"""Sign with the derivative of SignSwish, SS(x) = 2 s(bx) (1 + bx (1 - s(bx))) - 1; s the sigmoid, b = beta.

    Forward   q(x) = -1 if x < 0 else +1
    Backward  (chosen)  dq/dx := SS'(x) = b (2 - bx tanh(bx / 2)) / (1 + cosh(bx)),
              dL/dbeta := sum dL/dq (x / b) SS'(x)

    SS overshoots +-1, so that the derivative is negative beyond |x| = 2.399 / beta: large inputs are pulled back.

    Args:
      x: float array of any shape.
      beta: positive; a scalar, or an array that broadcasts to x, which the sum for its cotangent then keeps; may be
        traced and trained.

    Raises:
      ValueError: if `beta` is not positive, or does not broadcast to x.

    >>> import jax
    >>> jax.grad(lambda x: swish_sign(x).sum())(jnp.array([0.0, 1e4]))
    Array([ 5., -0.], dtype=float32)
    >>> print(f"{jax.grad(lambda beta: swish_sign(jnp.array(0.1), beta=beta))(5.0):.4f}")
    0.0882

    Reference: Darabi et al., BNN+: Improved Binary Network Training, 2018, arXiv:1812.11800.
    """
    require_positive("beta", beta, "5.0 is usual")
    return _swish(x, beta=beta)


def long_tailed_sign(x: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Sign with a triangle on a plateau, so that inputs far from zero still learn.

    Forward   q(x) = -1 if x < 0 else +1
    Backward  (chosen)  dq/dx := 2 - 4|x| if |x| <= 0.4;  0.4 if 0.4 < |x| <= 1;  0 beyond

    >>> import jax
    >>> jax.grad(lambda x: long_tailed_sign(x).sum())(jnp.array([0.0, 0.25, 1.0, 1.5]))
    Array([2. , 1. , 0.4, 0. ], dtype=float32)

    Reference: Xu, Cheung, Accurate and Compact Convolutional Neural Networks with Trained Binarization, 2019,
    arXiv:1909.11366.
    """
    return _long_tailed(x)


def state_aware_sign(
    x: Float[Array, "..."], *, positive: float | Array = 1.2, negative: float | Array = 0.8
) -> Float[Array, "..."]:
    r"""Sign whose two states learn at different rates (SA-BNN), so that they flip less often.

    Forward   q(x) = -1 if x < 0 else +1
    Backward  (chosen)  dq/dx := (positive if x >= 0 else negative) if |x| <= 1 else 0

    The paper's exact form and its coefficients could not be confirmed; this is a reading.  The defaults are this
    package's: they differ, and their mean is the coefficient 1 of :func:`ste_sign`.

    Args:
      x: float array of any shape.
      positive: coefficient of the state +1; positive, a scalar or an array that broadcasts to x; may be traced.
      negative: coefficient of the state -1, likewise.

    Raises:
      ValueError: if a coefficient is not positive.

    >>> import jax
    >>> jax.grad(lambda x: state_aware_sign(x).sum())(jnp.array([-2.0, -0.5, 0.0, 1.0]))
    Array([0. , 0.8, 1.2, 1.2], dtype=float32)

    Reference: Liu et al., SA-BNN: State-Aware Binary Neural Network, AAAI 2021.
    """
    require_positive("positive", positive, "1.2 is the default")
    require_positive("negative", negative, "0.8 is the default")
    return _state_aware(x, positive=positive, negative=negative)

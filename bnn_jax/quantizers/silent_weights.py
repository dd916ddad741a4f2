r"""Quantizers against weights that stop changing their sign: ReCU, OvSW."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bnn_jax.checks import require, require_floating
from bnn_jax.estimators import EstimatorLike, approx_sign, identity_sign
from bnn_jax.precision import widened
from bnn_jax.quantizers.binary import binary
from bnn_jax.quantizers.codes import Quantized
from bnn_jax.quantizers.quantizer import Quantizer, with_estimator
from bnn_jax.types import EstimatorFunction

EPSILON = 1e-5


def _deviation(x: Array, axes: tuple[int, ...]) -> Array:
    """The root of the unbiased variance + 1e-5, as both programs have it; of a single value the root of 1e-5."""
    centered = x - x.mean(axes, keepdims=True)
    count = math.prod(x.shape[axis] for axis in axes)
    return jnp.sqrt((centered * centered).sum(axes, keepdims=True) / max(1, count - 1) + EPSILON)


def _standardized(w: Float[Array, "*fan_in features"]) -> Float[Array, "*fan_in features"]:
    """Each filter, in float32 at least, with mean 0 and deviation 1."""
    require_floating("w", w)
    w, axes = widened(w), tuple(range(w.ndim - 1))
    return (w - w.mean(axes, keepdims=True)) / _deviation(w, axes)


def recu_weights(
    w: Float[Array, "*fan_in features"],
    scale: Float[Array, "*ones features"],
    *,
    progress: float | Array = 1.0,
    tau_min: float = 0.85,
    tau_max: float = 0.99,
    estimator: EstimatorFunction = identity_sign,
) -> Quantized:
    r"""Sign of standardized weights that a rectified clamp keeps from the tails of their distribution (ReCU).

    With tau = tau_min + (tau_max - tau_min) (e^progress - 1) / (e - 1), the quantile that moves outward in training:

    Forward   w^ = 2 sqrt(2) (w_f - mean(w_f)) / sqrt(var(w_f) + 1e-5)  with the unbiased variance,
              Q = -b ln(2 - 2 tau),  b = mean|w^| over the layer: the quantile tau of a Laplace distribution,
              w~ = max(min(w^, Q), -Q),  codes = sign(w~) = sign(w^),  scale_f = alpha_f, a parameter
    Backward  with g the gradient of alpha_f sign(w~):  dL/dalpha_f = sum_j g_j sign(w~_j), exact;
              dL/dw~_i := alpha_f g_i e'(w~_i), e' = 1;  dL/dw^ = dL/dw~ 1{|w^| <= Q}, Q constant;
              then exact through mean and variance

    Args:
      w: latent weights, the filter on the last axis.
      scale: alpha, of shape (1, ..., 1, features).
      progress: share of the training done, in [0, 1]; may be traced.
      tau_min, tau_max: tau at progress 0 and 1, 0.5 < tau_min <= tau_max < 1.
      estimator: gives e'.

    Returns:
      codes of w's shape; scale of shape (1, ..., 1, features).

    Raises:
      ValueError: if `tau_min` and `tau_max` are not in order.
      TypeError: if `w` is not a floating-point array.

    >>> recu_weights(jnp.array([[1.0], [2.0], [6.0]]), jnp.ones((1, 1))).codes.ravel()
    Array([-1., -1.,  1.], dtype=float32)

    Reference: Xu et al., ReCU: Reviving the Dead Weights in Binary Neural Networks, ICCV 2021, arXiv:2103.12369;
    z-hXu/ReCU.
    """
    _check_quantiles(tau_min, tau_max)
    standardized = 2 * math.sqrt(2) * _standardized(w)
    progress = jnp.asarray(progress, standardized.dtype)
    tau = tau_min + (tau_max - tau_min) * jnp.expm1(progress) / (math.e - 1)
    bound = lax.stop_gradient(-jnp.abs(standardized).mean() * jnp.log(2 - 2 * tau))
    # Not jnp.clip, whose derivative at the bound is 1/2.
    clamped = lax.stop_gradient(jnp.where(standardized > 0, bound, -bound))
    rectified = jnp.where(jnp.abs(standardized) > bound, clamped, standardized)
    return Quantized(estimator(rectified.astype(w.dtype)), scale.astype(w.dtype))


def _check_quantiles(tau_min, tau_max):
    rule = "must satisfy 0.5 < tau_min <= tau_max < 1"
    require("tau_min, tau_max", (tau_min, tau_max), 0.5 < tau_min <= tau_max < 1, rule, "0.85 and 0.99 are usual")


def recu(
    estimator: EstimatorLike = "identity_sign", *, tau_min: float = 0.85, tau_max: float = 0.99, **options
) -> Quantizer:
    """The quantizer of :func:`recu_weights`; it owns `scale`, drawn from [0, 1) at the start.

    Raises:
      ValueError: for an unknown estimator or option, or if `tau_min` and `tau_max` are not in order.
    """
    _check_quantiles(tau_min, tau_max)
    return with_estimator(
        recu_weights,
        estimator,
        init=lambda key, w: {"scale": drawn_scale(key, w)},
        wants=("progress",),
        tau_min=tau_min,
        tau_max=tau_max,
        **options,
    )


def drawn_scale(key: Array, w: Float[Array, "*fan_in features"]) -> Float[Array, "*ones features"]:
    """A learned scale a filter, drawn from [0, 1): what ReCU and BiPer start from."""
    return jax.random.uniform(key, (1,) * (w.ndim - 1) + w.shape[-1:]).astype(w.dtype)


def scaled_inputs(
    x: Float[Array, "batch ..."],
    *,
    train: bool = False,
    constant_deviation: bool = False,
    estimator: EstimatorFunction = approx_sign,
) -> Quantized:
    r"""Sign of activations that each example's deviation divides in training (ReCU, OvSW, BiPer): codes -1/+1.

    Forward   codes = sign(a)
    Backward  training, with g the gradient of the codes, s = sqrt(var(a) + 1e-5) over all values of an example, the
              unbiased variance, and a^ = a / s:  dL/da^_i := g_i e'(a^_i), then exact through s, by default with
              e' = max(0, 2 - 2|a^|);  with `constant_deviation`, as OvSW, dL/da = dL/da^ / s

    The deviation moves no sign, so that evaluation does without it.

    Args:
      x: activations, the examples on the first axis.
      train: training (True) or evaluation.
      constant_deviation: hold s constant in the backward pass.
      estimator: gives e'.

    Raises:
      TypeError: if `x` is not a floating-point array.

    >>> scaled_inputs(jnp.array([[1.0, -2.0, 6.0]])).codes
    Array([[ 1., -1.,  1.]], dtype=float32)

    Reference: Xu et al., ReCU: Reviving the Dead Weights in Binary Neural Networks, ICCV 2021, arXiv:2103.12369; Xiang
    et al., OvSW: Overcoming Silent Weights for Accurate Binary Neural Networks, ECCV 2024, arXiv:2407.05257; their
    programs.
    """
    require_floating("x", x)
    if not train:
        return binary(x, estimator=estimator)
    wide = widened(x)
    deviation = _deviation(wide, tuple(range(1, x.ndim)))
    deviation = lax.stop_gradient(deviation) if constant_deviation else deviation
    return binary((wide / deviation).astype(x.dtype), estimator=estimator)


def ovsw(w: Float[Array, "*fan_in features"], *, estimator: EstimatorFunction = identity_sign) -> Quantized:
    r"""Sign with the mean magnitude of the standardized filter as a constant scale (OvSW).

    Forward   codes = sign(w),  scale_f = mean|w^|,
              w^ = (w_f - mean(w_f)) / sqrt(var(w_f) + 1e-5)  with the unbiased variance
    Backward  (chosen)  with g the gradient of scale_f sign(w_f):  dL/dw_i := scale_f g_i e'(w_i), e' = 1

    That gradient does not depend on the size of w: weights far from 0 stay silent.  The other half of the method, which
    sees to them, is the optimizer "ovsw", see :func:`bnn_jax.optim.overcome_silent_weights`.

    Args:
      w: latent weights, the filter on the last axis.
      estimator: gives e'.

    Returns:
      codes of w's shape; scale of shape (1, ..., 1, features).

    Raises:
      TypeError: if `w` is not a floating-point array.

    >>> ovsw(jnp.array([[1.0], [-1.0]])).scale.round(3)
    Array([[0.707]], dtype=float32)

    Reference: Xiang et al., OvSW: Overcoming Silent Weights for Accurate Binary Neural Networks, ECCV 2024,
    arXiv:2407.05257; JingyangXiang/OvSW.
    """
    magnitude = jnp.abs(lax.stop_gradient(_standardized(w))).mean(tuple(range(w.ndim - 1)), keepdims=True)
    return Quantized(estimator(w), magnitude.astype(w.dtype))

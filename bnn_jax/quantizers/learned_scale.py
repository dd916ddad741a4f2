r"""Binary quantizers with parameters of their own: learned scales (XNOR-Net++, BNN+, SA-BNN) and proxies (ProxyBNN)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import look_up, require
from bnn_jax.estimators import EstimatorLike, ste_sign
from bnn_jax.quantizers.binary import mean_magnitude, xnor
from bnn_jax.quantizers.codes import Quantized
from bnn_jax.quantizers.quantizer import Quantizer, with_estimator
from bnn_jax.types import EstimatorFunction


def _quantile(share):
    def initial(w):
        magnitude = jnp.abs(w).astype(jnp.float32)
        return jnp.quantile(magnitude, share, axis=tuple(range(w.ndim - 1)), keepdims=True).astype(w.dtype)

    return initial


INITIAL_SCALES: dict[str, Callable[[Float[Array, "*fan_in features"]], Float[Array, "*ones features"]]] = {
    "ones": lambda w: jnp.ones((1,) * (w.ndim - 1) + w.shape[-1:], w.dtype),
    "mean": mean_magnitude,
    "median": _quantile(0.5),
    "percentile75": _quantile(0.75),
}
"""Where a learned scale starts, from the latent weights: 1, or a statistic of |w| in each filter."""


def learned_scale_weights(
    w: Float[Array, "*fan_in features"],
    scale: Float[Array, "*ones features"],
    *,
    estimator: EstimatorFunction = ste_sign,
) -> Quantized:
    r"""Sign with one learned scale a filter (XNOR-Net++ case 1, BNN+).

    Forward   codes = sign(w),  scale_f = alpha_f, a parameter
    Backward  with g the gradient of alpha_f sign(w_f):  dL/dalpha_f = sum_j g_j sign(w_j), exact;
              dL/dw_i := alpha_f g_i e'(w_i), e' the estimator's derivative (BNN+: that of SignSwish)

    Args:
      w: latent weights, the filter on the last axis.
      scale: alpha, of shape (1, ..., 1, features).
      estimator: gives e', by default 1{|w| <= 1}.

    >>> learned_scale_weights(jnp.array([[-0.5], [1.5]]), jnp.array([[2.0]])).scale
    Array([[2.]], dtype=float32)

    Reference: Bulat and Tzimiropoulos, XNOR-Net++, 2019, arXiv:1909.13863; Darabi et al., BNN+, 2018, arXiv:1812.11800.
    """
    return Quantized(estimator(w), scale.astype(w.dtype))


def learned_scale(
    estimator: EstimatorLike = "ste_sign",
    *,
    initial: Literal["ones", "mean", "median", "percentile75"] = "ones",
    **options,
) -> Quantizer:
    """The quantizer of :func:`learned_scale_weights`; it owns `scale`, which starts as INITIAL_SCALES[initial].

    XNOR-Net++ starts from ones.  BNN+ takes the estimator "swish_sign" and starts from the median with its regularizer
    R1, the mean with R2, and the 75th percentile on CIFAR-10.

    Raises:
      ValueError: for an unknown `initial`, estimator or option.
    """
    initial_scale = look_up("initial", initial, INITIAL_SCALES)
    return with_estimator(
        learned_scale_weights,
        estimator,
        init=lambda key, w: {"scale": initial_scale(w)},
        factory_options=("initial",),
        **options,
    )


def state_aware_weights(
    w: Float[Array, "..."],
    positive_scale: Float[Array, ""],
    negative_scale: Float[Array, ""],
    *,
    estimator: EstimatorFunction = ste_sign,
) -> tuple[Quantized, Quantized]:
    r"""Two learned values a layer, one for each state of a weight (SA-BNN).

    With tau_+ = positive_scale and tau_- = negative_scale:

    Forward   W = tau_+ if w >= 0;  -tau_- if w < 0
    Backward  with g = dL/dW: dL/dtau_+ = sum_{w >= 0} g,  dL/dtau_- = -sum_{w < 0} g, exact;
              (chosen)  dL/dw := tau_+ g e'(w) if w >= 0;  tau_- g e'(w) if w < 0

    Two states that learn at different rates flip less often.  The paper's exact form could not be confirmed; this is a
    reading.  Fixed coefficients are the estimator `state_aware_sign`.

    Args:
      w: latent weights of any shape.
      positive_scale: tau_+, a scalar.
      negative_scale: tau_-, a scalar; the negative weights are -tau_-.
      estimator: gives e', by default 1{|w| <= 1}.

    Returns:
      The positive part, codes 0/+1 with scale tau_+, and the negative, codes -1/0 with scale tau_-; W is their sum.

    >>> positive, negative = state_aware_weights(jnp.array([-1.0, 0.0]), jnp.array(2.0), jnp.array(3.0))
    >>> positive.codes * positive.scale + negative.codes * negative.scale
    Array([-3.,  2.], dtype=float32)

    Reference: Liu et al., SA-BNN: State-Aware Binary Neural Network, AAAI 2021.
    """
    codes = estimator(w)
    positive, negative = jnp.where(codes > 0, codes, 0), jnp.where(codes > 0, 0, codes)
    return Quantized(positive, positive_scale.astype(w.dtype)), Quantized(negative, negative_scale.astype(w.dtype))


def state_aware(estimator: EstimatorLike = "ste_sign", **options) -> Quantizer:
    """The quantizer of :func:`state_aware_weights`; it owns `positive_scale` and `negative_scale`, both 1 at the start.

    Raises:
      ValueError: for an unknown estimator or option.
    """
    return with_estimator(
        state_aware_weights,
        estimator,
        init=lambda key, w: {"positive_scale": jnp.ones((), w.dtype), "negative_scale": jnp.ones((), w.dtype)},
        code_set=((0, 1), (-1, 0)),
        **options,
    )


def proxy_weights(
    w: Float[Array, "*fan_in features"],
    basis: Float[Array, "size size"],
    *,
    mixing: Literal["fan_in", "features"] = "fan_in",
    estimator: EstimatorFunction = ste_sign,
) -> Quantized:
    r"""Binarize a learned linear combination of the latent weights (ProxyBNN).

    With Z the latent weights as a matrix (n, features), n the fan-in, and D = basis:

    Forward   W~ = D Z (mixing "fan_in", D of shape (n, n)) or Z D^T ("features", D of shape (features, features)),
              codes = sign(W~),  scale_f = ||W~_f||_1 / n
    Backward  that of :func:`xnor` to W~, then exact: dL/dZ = D^T dL/dW~,  dL/dD = dL/dW~ Z^T, and alike for "features"

    The matrix product runs at full precision, so that the identity gives :func:`xnor` of w.  The size of the paper's
    matrix could not be confirmed; this is a reading.

    Args:
      w: latent weights, the filter on the last axis.
      basis: D, the proxy matrix.
      mixing: "fan_in" or "features", what D combines.
      estimator: of the sign.

    Returns:
      codes of w's shape; scale of shape (1, ..., 1, features).

    Raises:
      ValueError: for another `mixing`, or a `basis` whose shape does not fit.

    >>> proxy_weights(jnp.array([[-0.5], [1.5]]), jnp.array([[0.0, 1.0], [1.0, 0.0]])).codes.ravel()
    Array([ 1., -1.], dtype=float32)

    Reference: He et al., ProxyBNN: Learning Binarized Neural Networks via Proxy Matrices, ECCV 2020.
    """
    size = _proxy_size(w.shape, mixing)
    if basis.shape != (size, size):
        raise ValueError(f"`basis` (of shape {basis.shape}) must have shape {(size, size)} for mixing {mixing!r}")
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    latent, basis = w.reshape(-1, w.shape[-1]), basis.astype(w.dtype)
    mixed = product(basis, latent) if mixing == "fan_in" else product(latent, basis.T)
    return xnor(mixed.reshape(w.shape), estimator=estimator)


def _proxy_size(shape, mixing):
    known = mixing in ("fan_in", "features")
    require("mixing", mixing, known, "must be 'fan_in' or 'features'", "'fan_in' is the default")
    features = shape[-1]
    return features if mixing == "features" else math.prod(shape[:-1])


def proxy(
    estimator: EstimatorLike = "ste_sign",
    *,
    mixing: Literal["fan_in", "features"] = "fan_in",
    **options,
) -> Quantizer:
    """The quantizer of :func:`proxy_weights`; it owns `basis`, the identity at the start.

    Raises:
      ValueError: for an unknown estimator or option.
    """
    return with_estimator(
        proxy_weights,
        estimator,
        init=lambda key, w: {"basis": jnp.eye(_proxy_size(w.shape, mixing), dtype=w.dtype)},
        mixing=mixing,
        **options,
    )

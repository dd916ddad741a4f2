r"""Adaptive binary sets: two values b - a and b + a, of each filter's distribution or learned for a layer (AdaBin).

Such a set has a middle b as well as a half width a, so that it is the sum of two bases: codes -1/+1 with the scale a,
and codes that are 1 everywhere with the scale b.  The second takes no bits.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bnn_jax.checks import require_floating
from bnn_jax.estimators import EstimatorLike, approx_sign, ste_sign
from bnn_jax.precision import widened
from bnn_jax.quantizers.codes import Quantized
from bnn_jax.quantizers.quantizer import Quantizer, require_signs, with_estimator, with_input_estimator
from bnn_jax.types import EstimatorFunction

CODES = ((-1, 1), (1,))
"""Of the two bases."""


def around(
    x: Float[Array, "..."], middle: Array, half_width: Array, estimator: EstimatorFunction
) -> tuple[Quantized, Quantized]:
    """half_width sign((x - middle) / half_width) + middle, as two bases; of a half width of 0 sign(x - middle)."""
    wide, middle, half_width = widened(x), widened(middle), widened(half_width)
    centered = (wide - middle) / jnp.where(half_width == 0, 1, half_width)
    codes = estimator(centered.astype(x.dtype))
    return Quantized(codes, half_width.astype(x.dtype)), Quantized(ones_of(codes), middle.astype(x.dtype))


def ones_of(codes: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 for every code, none of which is 0, and NaN for NaN: computed from them, so that the base is known for theirs.

    >>> ones_of(jnp.array([-3.0, 1.0]))
    Array([1., 1.], dtype=float32)
    """
    return jnp.minimum(jnp.abs(lax.stop_gradient(codes)), 1)


def adabin_weights(
    w: Float[Array, "*fan_in features"], *, estimator: EstimatorFunction = ste_sign
) -> tuple[Quantized, Quantized]:
    r"""Two values a filter, at its mean plus and minus its standard deviation (AdaBin).

    Forward   W = alpha_f sign((w - beta_f) / alpha_f) + beta_f,
              beta_f = mean(w_f),  alpha_f = ||w_f - beta_f|| / sqrt(n)
    Backward  with e' the estimator's derivative:  (chosen)  dsign(z)/dz := e'(z);  else exact, also through alpha, beta

    Their mean is that of the filter where half of its weights lie on each side, and for Gaussian weights the distance
    of the distributions (Kullback-Leibler) is least at this distance of the values.  A constant filter has alpha = 0.

    Args:
      w: latent weights, the filter on the last axis.
      estimator: gives e'; AdaBin uses `ede_sign`.

    Returns:
      codes sign(...) with the scale alpha, and codes 1 with the scale beta, both of shape (1, ..., 1, features).

    Raises:
      TypeError: if `w` is not a floating-point array.

    >>> signs, ones = adabin_weights(jnp.array([[1.0], [2.0], [3.0], [6.0]]))
    >>> signs.codes.ravel(), float(ones.scale[0, 0])
    (Array([-1., -1.,  1.,  1.], dtype=float32), 3.0)

    Reference: Tu et al., AdaBin: Improving Binary Neural Networks with Adaptive Binary Sets, ECCV 2022,
    arXiv:2208.08084; huawei-noah/Efficient-Computing.
    """
    require_floating("w", w)
    wide, axes = widened(w), tuple(range(w.ndim - 1))
    mean = wide.mean(axes, keepdims=True)
    variance = ((wide - mean) ** 2).mean(axes, keepdims=True)
    deviation = jnp.where(variance == 0, 0, jnp.sqrt(jnp.where(variance == 0, 1, variance)))
    return around(w, mean, deviation, estimator)


def adabin_inputs(
    x: Float[Array, "..."],
    half_width: Float[Array, ""],
    middle: Float[Array, ""],
    *,
    estimator: EstimatorFunction = approx_sign,
) -> tuple[Quantized, Quantized]:
    r"""Two learned values for the activations of a layer (AdaBin).

    Forward   A = alpha sign((a - beta) / alpha) + beta,  alpha = half_width, beta = middle
    Backward  with e' the estimator's derivative at z = (a - beta) / alpha:  (chosen) dsign(z)/dz := e'(z), else exact:
              dA/da = e'(z),  dA/dbeta = 1 - e'(z),  dA/dalpha = sign(z) - z e'(z)

    The authors' program returns alpha (sign(z) + beta), which this follows the paper in not doing.

    Args:
      x: activations of any shape.
      half_width, middle: scalars, one a layer.
      estimator: gives e'.

    Returns:
      codes sign(z) with the scale alpha, and codes 1 with the scale beta.

    Raises:
      TypeError: if `x` is not a floating-point array.

    >>> signs, _ = adabin_inputs(jnp.array([0.2, 0.8]), jnp.array(1.0), jnp.array(0.5))
    >>> signs.codes
    Array([-1.,  1.], dtype=float32)

    Reference: Tu et al., AdaBin: Improving Binary Neural Networks with Adaptive Binary Sets, ECCV 2022,
    arXiv:2208.08084; huawei-noah/Efficient-Computing.
    """
    require_floating("x", x)
    return around(x, middle, half_width, estimator)


def adabin(estimator: EstimatorLike = "ede_sign", **options) -> Quantizer:
    """The quantizer of :func:`adabin_weights`.

    Raises:
      ValueError: for an unknown estimator or option, or one of other codes than -1/+1.
    """
    require_signs(estimator)
    return with_estimator(adabin_weights, estimator, code_set=CODES, **options)


def adabin_activations(estimator: EstimatorLike = "approx_sign", **options) -> Quantizer:
    """The quantizer of :func:`adabin_inputs`; it owns `half_width`, 1 at the start, and `middle`, 0.

    Raises:
      ValueError: for an unknown estimator or option, or one of other codes than -1/+1.
    """
    require_signs(estimator)
    return with_input_estimator(
        adabin_inputs,
        estimator,
        init=lambda key, x: {"half_width": jnp.ones((), x.dtype), "middle": jnp.zeros((), x.dtype)},
        code_set=CODES,
        **options,
    )

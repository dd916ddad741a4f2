r"""Weights as the sign of a sine of the latent ones (BiPer)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import require, require_floating, require_positive
from bnn_jax.estimators import EstimatorLike, identity_sign
from bnn_jax.precision import widened
from bnn_jax.quantizers.codes import Quantized
from bnn_jax.quantizers.quantizer import Quantizer, with_estimator
from bnn_jax.quantizers.silent_weights import drawn_scale
from bnn_jax.types import EstimatorFunction


def biper_weights(
    w: Float[Array, "*fan_in features"],
    scale: Float[Array, "*ones features"],
    *,
    frequency: float | Array = 20.0,
    stage: int = 2,
    estimator: EstimatorFunction = identity_sign,
) -> Quantized:
    r"""The sign of a periodic function of the weights, so that every weight is near a change of sign (BiPer).

    With s = sin(frequency w):

    Forward   stage 1:  the *real* numbers s stand in for the codes;  stage 2:  codes = sign(s);
              scale_f = alpha_f, a parameter
    Backward  with g the gradient of alpha_f codes:  stage 1: exact;  stage 2: (chosen)  dL/ds_i := alpha_f g_i e'(s_i),
              e' = 1;  then exact in both:  dL/dw = frequency cos(frequency w) dL/ds,  dL/dalpha_f = sum_j g_j codes_j

    A low frequency gives small gradients, a high one a small error of quantization in the mean of stage 1's network.

    Args:
      w: latent weights, the filter on the last axis.
      scale: alpha, of shape (1, ..., 1, features).
      frequency: positive; 20 in the authors' program for ResNet-18.
      stage: 1 or 2.
      estimator: gives e' of the second stage.

    Returns:
      codes of w's shape; scale of shape (1, ..., 1, features).

    Raises:
      ValueError: for another `stage`, or a `frequency` that is not positive.
      TypeError: if `w` is not a floating-point array.

    >>> biper_weights(jnp.array([[0.1], [0.2]]), jnp.ones((1, 1))).codes.ravel()  # sin(2), sin(4)
    Array([ 1., -1.], dtype=float32)

    Reference: Vargas et al., BiPer: Binary Neural Networks using a Periodic Function, CVPR 2024, arXiv:2404.01278;
    edmav4/BiPer.
    """
    _check(frequency, stage)
    require_floating("w", w)
    wide = widened(w)
    wave = jnp.sin(jnp.asarray(frequency, wide.dtype) * wide).astype(w.dtype)
    return Quantized(wave if stage == 1 else estimator(wave), scale.astype(w.dtype))


def _check(frequency, stage):
    require_positive("frequency", frequency, "20 is usual")
    require("stage", stage, stage in (1, 2), "must be 1, real weights, or 2, binary ones")


def biper(
    estimator: EstimatorLike = "identity_sign", *, frequency: float = 20.0, stage: int = 2, **options
) -> Quantizer:
    """The quantizer of :func:`biper_weights`; it owns `scale`, drawn from [0, 1) at the start.

    The first stage evaluates with real weights and has nothing to pack; the second starts from its variables.

    Raises:
      ValueError: for an unknown estimator or option, another `stage`, or a `frequency` that is not positive.
    """
    _check(frequency, stage)
    return with_estimator(
        biper_weights,
        estimator,
        init=lambda key, w: {"scale": drawn_scale(key, w)},
        code_set=() if stage == 1 else None,
        frequency=frequency,
        stage=stage,
        **options,
    )

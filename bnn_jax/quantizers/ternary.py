r"""Ternary quantizers: codes -1/0/+1."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import require, require_floating, require_positive
from bnn_jax.estimators import ESTIMATORS, make_estimator, ternary
from bnn_jax.finite import keep_nan
from bnn_jax.precision import widened
from bnn_jax.quantizers.codes import Quantized
from bnn_jax.quantizers.quantizer import Quantizer


@jax.custom_vjp
def _asymmetric_codes(w, threshold, positive_scale, negative_scale):
    positive, negative = (w > threshold).astype(w.dtype), -(w < -threshold).astype(w.dtype)
    return keep_nan(w, positive), keep_nan(w, negative)


def _forward(w, threshold, positive_scale, negative_scale):
    codes = _asymmetric_codes(w, threshold, positive_scale, negative_scale)
    return codes, (w, threshold, positive_scale, negative_scale)


def _backward(residuals, cotangents):
    w, threshold, positive_scale, negative_scale = residuals
    positive, negative = cotangents
    # The cotangents arrive multiplied by their scale; the dead zone wants them without, so the larger scale is undone.
    from_positive = jnp.abs(positive_scale) >= jnp.abs(negative_scale)
    scale = jnp.where(from_positive, positive_scale, negative_scale)
    dead_zone = jnp.where(from_positive, positive, negative) / jnp.where(scale == 0, 1, scale)
    dw = jnp.where(w > threshold, positive, jnp.where(w < -threshold, negative, dead_zone))
    return keep_nan(w, dw), jnp.zeros_like(threshold), jnp.zeros_like(positive_scale), jnp.zeros_like(negative_scale)


_asymmetric_codes.defvjp(_forward, _backward)


def trained_ternary(
    w: Float[Array, "..."],
    positive_scale: Float[Array, ""],
    negative_scale: Float[Array, ""],
    *,
    threshold: float | Array = 0.05,
) -> tuple[Quantized, Quantized]:
    r"""Trained ternary quantization (TTQ): two learned scales a layer.

    With D = threshold * max|w| (no gradient), W_p = positive_scale, W_n = negative_scale:

    Forward   W = W_p if w > D;  0 if |w| <= D;  -W_n if w < -D
    Backward  with g = dL/dW: dL/dW_p = sum_{w > D} g,  dL/dW_n = -sum_{w < -D} g,
              (chosen)  dL/dw := W_p g if w > D;  g if |w| <= D;  W_n g if w < -D

    Args:
      w: latent weights of any shape.
      positive_scale: W_p, a scalar.
      negative_scale: W_n, a scalar; the negative weights are -W_n.
      threshold: D as a fraction of max|w|, in [0, 1).

    Returns:
      The positive part, codes 0/+1 with scale W_p, and the negative part, codes -1/0 with scale W_n; W is their sum.

    Raises:
      ValueError: if `threshold` is not in [0, 1).
      TypeError: if `w` is not a floating-point array.

    >>> positive, negative = trained_ternary(jnp.array([-1.0, 0.01, 0.5]), jnp.array(2.0), jnp.array(3.0))
    >>> positive.codes * positive.scale + negative.codes * negative.scale
    Array([-3.,  0.,  2.], dtype=float32)

    Reference: Zhu et al., Trained Ternary Quantization, 2017, arXiv:1612.01064.
    """
    require_floating("w", w)
    rule = "must be in [0, 1), a fraction of max|w|"
    require("threshold", threshold, lambda t: (t >= 0) & (t < 1), rule, "0.05 is usual")
    delta = jax.lax.stop_gradient(threshold * jnp.abs(w).max())
    positive, negative = _asymmetric_codes(w, delta, positive_scale, negative_scale)
    return Quantized(positive, positive_scale), Quantized(negative, negative_scale)


def ttq(*, threshold: float = 0.05) -> Quantizer:
    """The quantizer of :func:`trained_ternary`; it owns `positive_scale` and `negative_scale`, both 1 at the start."""
    return Quantizer(
        init=lambda key, w: {"positive_scale": jnp.ones((), w.dtype), "negative_scale": jnp.ones((), w.dtype)},
        apply=partial(trained_ternary, threshold=threshold),
        code_set=((0, 1), (-1, 0)),
    )


_thresholded = make_estimator(
    lambda w, delta, scale, clip_value: jnp.where(w > delta, 1, jnp.where(w < -delta, -1, 0)),
    # The cotangent of the codes arrives multiplied by the scale, which the identity does not have.
    lambda w, delta, scale, clip_value: jnp.where(jnp.abs(w) <= clip_value, 1 / scale, 0),
)


def twn(
    w: Float[Array, "*fan_in features"],
    *,
    threshold: float | Array = 0.7,
    per_channel: bool = False,
    clip_value: float | Array = math.inf,
) -> Quantized:
    r"""Ternary weights with a scale by least squares (TWN): codes -1/0/+1.

    With D = threshold * mean|w|:

    Forward   W = scale T,  T = sign(w) 1{|w| > D},  scale = mean(|w| where |w| > D) = argmin_a |w - a T|^2
    Backward  (chosen) identity straight-through from W to w:  dL/dw := g 1{|w| <= clip_value},  g = dL/dW

    Where no weight is above D, as in a tensor of zeros, the scale is 1: W is zero all the same, and g arrives.

    Args:
      w: latent weights, the filter on the last axis.
      threshold: D as a fraction of mean|w|, not negative.
      per_channel: one D and one scale a filter, of shape (1, ..., 1, features), instead of one for the whole tensor.
      clip_value: positive; by default all weights receive their gradient.

    Raises:
      ValueError: if `threshold` is negative or `clip_value` not positive.
      TypeError: if `w` is not a floating-point array.

    >>> twn(jnp.array([-2.0, 0.5, 0.1, 4.0]))
    Quantized(codes=Array([-1.,  0.,  0.,  1.], dtype=float32), scale=Array(3., dtype=float32))

    Reference: Li, Zhang, Liu, Ternary Weight Networks, 2016, arXiv:1605.04711.
    """
    require("threshold", threshold, lambda t: t >= 0, "must be at least 0", "0.7 is usual")
    require_positive("clip_value", clip_value, "1.0 is usual, infinity is the identity")
    require_floating("w", w)
    axes = tuple(range(w.ndim - 1 if per_channel else w.ndim))
    magnitude = widened(jax.lax.stop_gradient(jnp.abs(w)))
    delta = threshold * magnitude.mean(axes, keepdims=per_channel)
    above = magnitude > delta
    count = above.sum(axes, keepdims=per_channel).astype(magnitude.dtype)
    mean = jnp.where(above, magnitude, 0).sum(axes, keepdims=per_channel) / jnp.maximum(count, 1)
    scale = jnp.where(count == 0, 1, mean).astype(w.dtype)
    return Quantized(_thresholded(w, delta=delta, scale=scale, clip_value=clip_value), scale)


def ternary_activations(x: Float[Array, "..."], delta: float | Float[Array, ""]) -> Quantized:
    r"""Ternary activations (TBN): codes -1/0/+1, scale 1.

    Forward   T(x) = +1 if x >= delta;  -1 if x <= -delta;  else 0
    Backward  (chosen)  dT/dx := 1{|x| <= 1}

    >>> ternary_activations(jnp.array([-0.5, 0.0, 0.3]), 0.4).codes
    Array([-1.,  0.,  0.], dtype=float32)

    Reference: Wan et al., TBN: Convolutional Neural Network with Ternary Inputs and Binary Weights, ECCV 2018.
    """
    return Quantized(ternary(x, delta=delta, straight_through=True), jnp.ones((), x.dtype))


def scaled_ternary_activations(x: Float[Array, "..."], delta: float | Float[Array, ""]) -> Quantized:
    r"""Ternary activations of the second version of TBN: codes -1/0/+1, scale 2 delta.

    Forward   2 delta T(x),  T(x) = +1 if x >= delta;  -1 if x <= -delta;  else 0
    Backward  (chosen)  d(2 delta T)/dx := 2 max(0, 1 - ||x| / delta - 1|), triangles of height 2 at +-delta, whose
              area 4 delta is the height of both steps; delta constant

    >>> scaled_ternary_activations(jnp.array([-0.5, 0.0, 0.5]), 0.4)
    Quantized(codes=Array([-1.,  0.,  1.], dtype=float32), scale=Array(0.8, dtype=float32))

    Reference: Wan et al., TBN: Convolutional Neural Network with Ternary Inputs and Binary Weights, ECCV 2018; the
    authors' program.
    """
    scale = jnp.asarray(2 * jax.lax.stop_gradient(delta), x.dtype)
    return Quantized(ternary(x, delta=delta), scale)


def _with_running_delta(function: Callable[..., Quantized], threshold: float, momentum: float) -> Quantizer:
    require("threshold", threshold, lambda t: t >= 0, "must be at least 0", "0.5 is usual")
    require("momentum", momentum, lambda m: (m >= 0) & (m <= 1), "must be in [0, 1]", "0.01 is usual")

    def apply(x, state, *, train=False):
        if not train:
            return function(x, state["delta"]), state
        delta = threshold * jnp.abs(widened(jax.lax.stop_gradient(x))).mean()
        running = (1 - momentum) * state["delta"] + momentum * delta
        return function(x, delta), {"delta": running.astype(state["delta"].dtype)}

    # 0.7979 = sqrt(2 / pi) is the mean of |x| for standard normal x.
    return Quantizer(
        apply=apply,
        init_state=lambda key, x: {"delta": jnp.array(0.7979 * threshold, jnp.float32)},
        wants=("train",),
        code_set=ESTIMATORS["ternary"].code_set,
    )


def tbn(*, threshold: float = 0.5, momentum: float = 0.01) -> Quantizer:
    r"""The quantizer of :func:`ternary_activations` with delta from the data.

    Training  delta = threshold * mean|x| over the whole tensor;
              state: running delta := (1 - momentum) running delta + momentum delta, at first 0.7979 threshold
    Evaluation  delta = the running one

    Args:
      threshold: delta as a fraction of mean|x|, not negative; 0.5 in the authors' program, 0.4 in the paper.
      momentum: share of the new delta, in [0, 1].

    Raises:
      ValueError: if `threshold` is negative or `momentum` not in [0, 1].

    Reference: Wan et al., TBN: Convolutional Neural Network with Ternary Inputs and Binary Weights, ECCV 2018.
    """
    return _with_running_delta(ternary_activations, threshold, momentum)


def tbn_v2(*, threshold: float = 0.5, momentum: float = 0.01) -> Quantizer:
    r"""The quantizer of :func:`scaled_ternary_activations`, delta as that of :func:`tbn`.

    Raises:
      ValueError: if `threshold` is negative or `momentum` not in [0, 1].

    Reference: Wan et al., TBN: Convolutional Neural Network with Ternary Inputs and Binary Weights, ECCV 2018; the
    authors' program.
    """
    return _with_running_delta(scaled_ternary_activations, threshold, momentum)

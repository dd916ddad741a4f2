r"""Ternary quantizers: codes -1/0/+1."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.quantizers.codes import Quantized, Quantizer


@jax.custom_vjp
def _asymmetric_codes(w, threshold, positive_scale, negative_scale):
    return (w > threshold).astype(w.dtype), -(w < -threshold).astype(w.dtype)


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
    return dw, jnp.zeros_like(threshold), jnp.zeros_like(positive_scale), jnp.zeros_like(negative_scale)


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

    >>> positive, negative = trained_ternary(jnp.array([-1.0, 0.01, 0.5]), jnp.array(2.0), jnp.array(3.0))
    >>> positive.codes * positive.scale + negative.codes * negative.scale
    Array([-3.,  0.,  2.], dtype=float32)

    Reference: Zhu et al., Trained Ternary Quantization, 2017, arXiv:1612.01064.
    """
    if not isinstance(threshold, jax.core.Tracer) and not 0 <= threshold < 1:
        raise ValueError(f"`threshold` (={threshold}) must be in [0, 1), a fraction of max|w|; 0.05 is usual")
    delta = jax.lax.stop_gradient(threshold * jnp.abs(w).max())
    positive, negative = _asymmetric_codes(w, delta, positive_scale, negative_scale)
    return Quantized(positive, positive_scale), Quantized(negative, negative_scale)


def ttq(*, threshold: float = 0.05) -> Quantizer:
    """The quantizer of :func:`trained_ternary`; it owns `positive_scale` and `negative_scale`, both 1 at the start."""
    return Quantizer(
        init=lambda key, w: {"positive_scale": jnp.ones((), w.dtype), "negative_scale": jnp.ones((), w.dtype)},
        apply=partial(trained_ternary, threshold=threshold),
    )

r"""Elastic binarization (BiT): two levels whose distance and place are learned, signed or from zero."""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bnn_jax.checks import require_floating
from bnn_jax.estimators import sign
from bnn_jax.precision import widened
from bnn_jax.quantizers.codes import Quantized
from bnn_jax.quantizers.learned_step import NORMAL_MAGNITUDE, lsq
from bnn_jax.quantizers.multibit import straight_through
from bnn_jax.quantizers.quantizer import Quantizer


def elastic_binary(
    x: Float[Array, "..."],
    scale: Float[Array, ""],
    shift: float | Float[Array, "..."] = 0.0,
    *,
    signed: bool = True,
    gradient_scale: float = 1.0,
) -> Quantized:
    r"""Codes -1/+1, or 0/1, with a learned scale above a learned shift (BiT).

    With z = x - shift, a = scale and g the gradient of scale * codes:

    Forward   signed: codes = sign(z);  from zero: codes = round(clip(z / a, 0, 1));  scale = a
    Backward  (chosen)  signed: dL/dx := g 1{|z| <= a},  dL/da := gradient_scale sum g codes;  from zero:
              dL/dx := g 1{0 < z / a < 1},  dL/da := gradient_scale sum g (codes - z / a inside;  codes outside);
              dL/dshift := -sum dL/dx

    These are the formulas of the authors' program, which has LSQ's gradient for the levels from zero, see
    :func:`bnn_jax.quantizers.learned_step.lsq`.

    Args:
      x: activations.
      scale: a, a scalar; one that training drives to 0 or below counts as the least positive one.
      shift: broadcasts to x.
      signed: codes -1/+1, for activations of both signs; else 0/1, for those behind a ReLU or a softmax.
      gradient_scale: 1 / sqrt(N), N the activations of an example.

    Raises:
      TypeError: if `x` is not a floating-point array.

    >>> elastic_binary(jnp.array([-0.1, 0.3]), jnp.array(0.5)).codes
    Array([-1.,  1.], dtype=float32)
    >>> elastic_binary(jnp.array([0.1, 0.3]), jnp.array(0.5), signed=False).codes
    Array([0., 1.], dtype=float32)

    Reference: Liu et al., BiT: Robustly Binarized Multi-distilled Transformer, 2022, arXiv:2205.13016.
    """
    require_floating("x", x)
    z = x - shift
    if not signed:
        return lsq(z, scale, lowest=0, highest=1, gradient_scale=gradient_scale)
    wide = widened(z)
    learned = jnp.asarray(scale, wide.dtype)
    a, codes = lax.stop_gradient(jnp.maximum(learned, float(jnp.finfo(x.dtype).eps))), sign(wide)
    inside = jnp.where(jnp.abs(wide) > a, lax.stop_gradient(wide), wide)
    by_scale = gradient_scale * lax.stop_gradient(codes) * (learned - lax.stop_gradient(learned))
    return straight_through(inside + by_scale, Quantized(codes, a), dtype=x.dtype)


def elastic(*, signed: bool = True) -> Quantizer:
    r"""The quantizer of :func:`elastic_binary`; it owns `scale`, a scalar, and `shift`, a value a channel, 0 at first.

    The authors' program starts from the first batch, 2 mean|x| or from zero 4 mean|x|; this from the value of that for
    standard normal x.

    Reference: Liu et al., BiT: Robustly Binarized Multi-distilled Transformer, 2022, arXiv:2205.13016.
    """
    start = (2 if signed else 4) * NORMAL_MAGNITUDE

    def init(key, x):
        return {
            "scale": jnp.asarray(start, x.dtype),
            "shift": jnp.zeros((1,) * (x.ndim - 1) + x.shape[-1:], x.dtype),
        }

    def apply(x, scale, shift):
        return elastic_binary(x, scale, shift, signed=signed, gradient_scale=1 / math.sqrt(math.prod(x.shape[1:])))

    return Quantizer(apply=apply, init=init, code_set=(-1, 1) if signed else (0, 1))

r"""Evenly spaced levels whose place is learned: LSQ's step size, DSQ's range and the sharpness of its soft steps."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bnn_jax.checks import require
from bnn_jax.precision import widened
from bnn_jax.quantizers.adaptive import ones_of
from bnn_jax.quantizers.codes import Quantized
from bnn_jax.quantizers.multibit import odd_codes, require_bits, require_codes, straight_through, unsigned_codes
from bnn_jax.quantizers.quantizer import Quantizer

NORMAL_MAGNITUDE = math.sqrt(2 / math.pi)
"""The mean |x| of standard normal x, what activations are taken for before there are any."""
SHARPEST, SOFTEST = 0.01, 0.5
"""Bounds of DSQ's alpha."""


def lsq(
    x: Float[Array, "..."], step: Float[Array, ""], *, lowest: int, highest: int, gradient_scale: float = 1.0
) -> Quantized:
    r"""Codes at a learned distance, the step size (LSQ).

    Forward   codes = round(clip(x / s, lowest, highest)),  scale = s = step
    Backward  (chosen)  with g the gradient of scale * codes:  dL/dx := g 1{lowest < x / s < highest},
              dL/ds := gradient_scale sum g (round(x / s) - x / s inside;  lowest below;  highest above)

    Ties round to even.  A step that training drives to 0 or below counts as the least positive one that x's dtype
    resolves beside 1, and keeps its gradient.

    Args:
      x: of any shape.
      step: s, a scalar, one a layer.
      lowest, highest: -2^(bits-1) and 2^(bits-1) - 1 for weights, 0 and 2^bits - 1 for activations.
      gradient_scale: 1 / sqrt(N highest), N the weights of the layer, or the activations of an example.

    Raises:
      TypeError: if `x` is not a floating-point array.

    >>> lsq(jnp.array([-1.0, 0.2, 0.4, 9.0]), jnp.array(0.5), lowest=-2, highest=1).codes
    Array([-2.,  0.,  1.,  1.], dtype=float32)

    Reference: Esser et al., Learned Step Size Quantization, ICLR 2020, arXiv:1902.08153.
    """
    require_codes("x", x, bits=(highest - lowest + 1).bit_length() - 1)
    wide, learned = widened(x), jnp.asarray(step, widened(x).dtype)
    s = lax.stop_gradient(jnp.maximum(learned, float(jnp.finfo(x.dtype).eps)))
    ratio = wide / s
    codes = jnp.round(jnp.clip(ratio, lowest, highest))
    outside = (ratio <= lowest) | (ratio >= highest)
    by_step = gradient_scale * lax.stop_gradient(jnp.where(outside, codes, codes - ratio))
    surrogate = jnp.where(outside, lax.stop_gradient(wide), wide) + by_step * (learned - lax.stop_gradient(learned))
    return straight_through(surrogate, Quantized(codes, s), dtype=x.dtype)


def lsq_weights(*, bits: int = 2) -> Quantizer:
    r"""The quantizer of :func:`lsq` for weights; it owns `step`, 2 mean|w| / sqrt(highest) at the start.

    Args:
      bits: at least 2; the codes are the integers from -2^(bits-1) to 2^(bits-1) - 1.

    Raises:
      ValueError: if `bits` is no whole number of at least 2.

    Reference: Esser et al., Learned Step Size Quantization, ICLR 2020, arXiv:1902.08153.
    """
    require_bits(bits, dtype=jnp.float64)
    require("bits", bits, bits >= 2, "must be at least 2", "with 1 no code would be positive")
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return Quantizer(
        apply=lambda w, step: lsq(
            w, step, lowest=lowest, highest=highest, gradient_scale=1 / math.sqrt(w.size * highest)
        ),
        init=lambda key, w: {"step": (2 * jnp.abs(widened(w)).mean() / math.sqrt(highest)).astype(w.dtype)},
        code_set=tuple(range(lowest, highest + 1)),
    )


def lsq_activations(*, bits: int = 2) -> Quantizer:
    r"""The quantizer of :func:`lsq` for activations, from 0 upward; it owns `step`.

    The paper starts from the first batch, 2 mean|x| / sqrt(highest); this from the value of that for standard normal x.

    Args:
      bits: at least 1; the codes are the integers from 0 to 2^bits - 1.

    Raises:
      ValueError: if `bits` is no whole number of at least 1.

    Reference: Esser et al., Learned Step Size Quantization, ICLR 2020, arXiv:1902.08153.
    """
    codes = unsigned_codes(bits)
    highest = codes[-1]
    start = 2 * NORMAL_MAGNITUDE / math.sqrt(highest)

    def apply(x, step):
        scale = 1 / math.sqrt(math.prod(x.shape[1:]) * highest)
        return lsq(x, step, lowest=0, highest=highest, gradient_scale=scale)

    return Quantizer(apply=apply, init=lambda key, x: {"step": jnp.asarray(start, x.dtype)}, code_set=codes)


def dsq_levels(
    x: Float[Array, "..."],
    lower: Float[Array, ""],
    upper: Float[Array, ""],
    sharpness: Float[Array, ""],
    *,
    bits: int = 2,
) -> tuple[Quantized, Quantized]:
    r"""Evenly spaced levels of a learned range; the gradient is that of soft steps between them (DSQ).

    With l = lower, u = upper, n = 2^bits - 1, D = (u - l) / n, alpha = sharpness, the interval i = floor((x - l) / D),
    its middle m_i = l + (i + 1/2) D,  k = ln(2 / alpha - 1) / D  and  phi(x) = tanh(k (x - m_i)) / (1 - alpha):

    Forward   Q = l if x < l;  u if x > u;  else l + D (i + (sign(phi) + 1) / 2), the nearer end of the interval;
              as two bases: the odd codes from -n to n with the scale D / 2, and codes 1 with the scale (l + u) / 2
    Backward  (chosen)  dsign(phi)/dphi := 1 and i constant;  else exact, to x, l, u and alpha

    phi is -1 and +1 at the ends of an interval, so that soft steps, with phi in the place of its sign, are continuous;
    as alpha goes to 0 they come to the hard ones.  That l, u and alpha are learned by these derivatives is a reading,
    and so are the bounds of alpha here, 0.01 and 0.5.

    Args:
      x: of any shape.
      lower, upper: scalars; where they do not rise, the range above `lower` is the least that x's dtype resolves.
      sharpness: alpha, a scalar.
      bits: of a code; 1 is a binary set {l, u}.

    Raises:
      ValueError: if `bits` is no whole number of at least 1.
      TypeError: if `x` is not a floating-point array.

    >>> signs, ones = dsq_levels(jnp.array([-0.1, 0.9]), jnp.array(-1.0), jnp.array(1.0), jnp.array(0.2), bits=1)
    >>> signs.codes, float(signs.scale), float(ones.scale)
    (Array([-1.,  1.], dtype=float32), 1.0, 0.0)

    Reference: Gong et al., Differentiable Soft Quantization, ICCV 2019, arXiv:1908.05033.
    """
    require_codes("x", x, bits=bits)
    wide, n = widened(x), 2**bits - 1
    lower, upper, alpha = (jnp.asarray(value, wide.dtype) for value in (lower, upper, sharpness))
    alpha = jnp.clip(alpha, SHARPEST, SOFTEST)
    step = jnp.maximum(upper - lower, float(jnp.finfo(x.dtype).eps)) / n
    interval = lax.stop_gradient(jnp.clip(jnp.floor((wide - lower) / step), 0, n - 1))
    middle = lower + (interval + 0.5) * step
    phi = jnp.tanh(jnp.log(2 / alpha - 1) * (wide - middle) / step) / (1 - alpha)
    nearer = jnp.where(wide < middle, -1, 1) + phi - lax.stop_gradient(phi)
    between = lower + step * (interval + (nearer + 1) / 2)
    surrogate = jnp.where(wide < lower, lower, jnp.where(wide > upper, upper, between))
    codes = jnp.where(wide < lower, -n, jnp.where(wide > upper, n, 2 * interval - n + jnp.where(wide < middle, 0, 2)))
    levels = (Quantized(codes, step / 2), Quantized(ones_of(codes), lower + n * step / 2))
    return straight_through(surrogate, levels, dtype=x.dtype)


def dsq(*, bits: int = 2, sharpness: float = 0.2, of_weights: bool = True) -> Quantizer:
    r"""The quantizer of :func:`dsq_levels`; it owns `lower`, `upper` and `sharpness`.

    The range starts as -r and r, r = sqrt(2^bits - 1) mean|x|: of the weights themselves, or of standard normal
    activations.  It is near the best range for normal numbers; the paper says none, so that this is a reading.

    Args:
      bits: of a code.
      sharpness: alpha at the start, from 0.01 to 0.5.
      of_weights: False for activations.

    Raises:
      ValueError: if `bits` is no whole number of at least 1 or `sharpness` out of its bounds.

    Reference: Gong et al., Differentiable Soft Quantization, ICCV 2019, arXiv:1908.05033.
    """
    codes = odd_codes(bits)
    bounds = f"must be from {SHARPEST} to {SOFTEST}"
    require("sharpness", sharpness, SHARPEST <= sharpness <= SOFTEST, bounds, "0.2 is usual")

    def init(key: jax.Array, x: Array) -> dict[str, Array]:
        magnitude = jnp.abs(widened(x)).mean() if of_weights else jnp.asarray(NORMAL_MAGNITUDE)
        reach = (math.sqrt(codes[-1]) * magnitude).astype(x.dtype)
        return {"lower": -reach, "upper": reach, "sharpness": jnp.asarray(sharpness, x.dtype)}

    return Quantizer(apply=lambda x, **learned: dsq_levels(x, bits=bits, **learned), init=init, code_set=(codes, (1,)))

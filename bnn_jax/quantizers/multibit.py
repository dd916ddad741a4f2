r"""Uniform quantizers of one to many bits: DoReFa, WRPN, PACT, HWGQ.

Everywhere ties round to even (`jnp.round`, IEEE 754), and arithmetic runs in float32 at least.
"""

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import require, require_floating, require_positive
from bnn_jax.estimators import is_negative, sign
from bnn_jax.finite import keep_nan
from bnn_jax.precision import widened
from bnn_jax.quantizers.binary import xnor
from bnn_jax.quantizers.codes import Bases, Quantized, bases
from bnn_jax.quantizers.quantizer import Quantizer

HWGQ_STEPS = {1: 0.798, 2: 0.538, 3: 0.322, 4: 0.184}
"""bits -> step, argmin E(Q - x)^2 for x ~ N(0, 1) | x > 0; 2 bits as published (the exact optimum is 0.5388)."""


@jax.custom_vjp
def _attached(surrogate, codes, scales):
    return codes


def _forward(surrogate, codes, scales):
    return codes, (surrogate, scales)


def _backward(residuals, cotangents):
    surrogate, scales = residuals
    # Each cotangent is g times its scale; the largest scale loses least when it is divided out again.
    g, largest = cotangents[0], scales[0]
    for cotangent, scale in zip(cotangents[1:], scales[1:]):
        larger = jnp.abs(scale) > jnp.abs(largest)
        g, largest = jnp.where(larger, cotangent, g), jnp.where(larger, scale, largest)
    return keep_nan(surrogate, g.astype(largest.dtype) / jnp.where(largest == 0, 1, largest)), None, None


_attached.defvjp(_forward, _backward)


def straight_through(surrogate: Float[Array, "..."], quantized: Bases, *, dtype: jnp.dtype) -> Bases:
    r"""`quantized`, differentiated as though the sum of its bases were `surrogate`; codes and scales are constants.

    Forward   quantized, in `dtype`
    Backward  (chosen) with g the gradient of the sum of scale * codes:  dL/dsurrogate := g

    Args:
      surrogate: real tensor of the shape of the codes; only its derivative matters, and its NaN: where it is NaN, so
        are the codes and its gradient.
      quantized: one quantized tensor or a tuple of them.
      dtype: of the codes and scales that are returned.

    A scale that is 0 lets no gradient through.

    >>> clipped = lambda x: straight_through(jnp.minimum(x, 1), Quantized(x, jnp.float32(0.5)), dtype=x.dtype)
    >>> jax.grad(lambda x: (clipped(x).codes * 0.5).sum())(jnp.array([0.5, 2.0]))
    Array([1., 0.], dtype=float32)

    Reference: Bengio, Leonard, Courville, Estimating or Propagating Gradients Through Stochastic Neurons, 2013,
    arXiv:1308.3432.
    """
    parts = jax.lax.stop_gradient(bases(quantized))
    codes = tuple(keep_nan(surrogate, part.codes.astype(dtype)) for part in parts)
    scales = tuple(part.scale.astype(dtype) for part in parts)
    # The scales as they will be multiplied, rounded, are what has to be divided out.
    codes = _attached(surrogate, codes, tuple(scale.astype(surrogate.dtype) for scale in scales))
    attached = tuple(map(Quantized, codes, scales))
    return attached[0] if isinstance(quantized, Quantized) else attached


def dorefa_weights(w: Float[Array, "..."], *, bits: int = 2, max_gradient: bool = False) -> Quantized:
    r"""DoReFa-Net weights: one scale a layer for 1 bit, evenly spaced levels of tanh(w) for more.

    With n = 2^bits - 1, t = tanh(w), m = max|t| over the layer:

    Forward   1 bit:   codes = sign(w),  scale = mean|w|
              k bits:  codes = 2 round(n (t / (2m) + 1/2)) - n, the odd integers from -n to n,  scale = 1/n
    Backward  (chosen) with g the gradient of scale * codes:  1 bit: dL/dw := g;  k bits: dL/dw := g (1 - t^2) / m

    Ties round to even, so w = 0 has the code +1.

    Args:
      w: latent weights of any shape.
      bits: of a code.
      max_gradient: differentiate m too, as the authors' release does; by default it is a constant.

    Returns:
      codes of w's shape, a scalar scale.

    Raises:
      ValueError: if `bits` is no whole number of at least 1, or w's dtype cannot hold the codes exactly.
      TypeError: if `w` is not a floating-point array.

    >>> dorefa_weights(jnp.array([-3.0, -0.1, 0.0, 2.0])).codes
    Array([-3., -1.,  1.,  3.], dtype=float32)

    Reference: Zhou et al., DoReFa-Net, 2016, arXiv:1606.06160.
    """
    require_codes("w", w, bits=bits)
    wide = widened(w)
    if bits == 1:
        return straight_through(wide, Quantized(sign(wide), jnp.abs(wide).mean()), dtype=w.dtype)
    n = 2**bits - 1
    t = jnp.tanh(wide)
    largest = jnp.abs(t).max()
    largest = largest if max_gradient else jax.lax.stop_gradient(largest)
    normalized = t / jnp.where(largest == 0, 1, largest)
    codes = 2 * jnp.round(n * (normalized / 2 + 0.5)) - n
    return straight_through(normalized, Quantized(codes, _step(n)), dtype=w.dtype)


def dorefa_activations(x: Float[Array, "..."], *, bits: int = 2) -> Quantized:
    r"""DoReFa-Net activations: evenly spaced levels in [0, 1].

    Forward   codes = round(n clip(x, 0, 1)),  n = 2^bits - 1,  scale = 1/n
    Backward  (chosen) with g the gradient of scale * codes:  dL/dx := g 1{0 <= x <= 1}

    Ties round to even.

    Args:
      x: activations of any shape.
      bits: of a code; 1 bit has the codes 0 and 1.

    Raises:
      ValueError: if `bits` is no whole number of at least 1, or x's dtype cannot hold the codes exactly.
      TypeError: if `x` is not a floating-point array.

    >>> dorefa_activations(jnp.array([-1.0, 0.4, 0.5, 7.0])).codes
    Array([0., 1., 2., 3.], dtype=float32)

    Reference: Zhou et al., DoReFa-Net, 2016, arXiv:1606.06160.
    """
    require_codes("x", x, bits=bits)
    wide = widened(x)
    n = 2**bits - 1
    codes = jnp.round(n * jnp.clip(wide, 0, 1))
    inside = jnp.where((wide < 0) | (wide > 1), 0, wide)
    return straight_through(inside, Quantized(codes, _step(n)), dtype=x.dtype)


def wrpn_weights(w: Float[Array, "*fan_in features"], *, bits: int = 2) -> Quantized:
    r"""WRPN weights: clipped to [-1, 1] and rounded to evenly spaced levels, zero among them.

    Forward   codes = round(n clip(w, -1, 1)),  n = 2^(bits-1) - 1,  scale = 1/n;  1 bit: :func:`xnor`
    Backward  (chosen) with g the gradient of scale * codes:  dL/dw := g 1{|w| <= 1};  1 bit: that of :func:`xnor`

    Ties round to even.  The paper's form for 1 bit, sign with one scale a filter, could not be confirmed in detail;
    this is a reading.

    Args:
      w: latent weights, the filter on the last axis.
      bits: of a code.

    Returns:
      codes of w's shape, -n ... n; a scalar scale, or for 1 bit one of shape (1, ..., 1, features).

    Raises:
      ValueError: if `bits` is no whole number of at least 1, or w's dtype cannot hold the codes exactly.
      TypeError: if `w` is not a floating-point array.

    >>> wrpn_weights(jnp.array([-3.0, -0.4, 0.2, 1.0]), bits=3).codes
    Array([-3., -1.,  1.,  3.], dtype=float32)

    Reference: Mishra et al., WRPN: Wide Reduced-Precision Networks, 2017, arXiv:1709.01134.
    """
    require_codes("w", w, bits=bits)
    wide = widened(w)
    if bits == 1:
        return xnor(w)
    n = 2 ** (bits - 1) - 1
    codes = jnp.round(n * jnp.clip(wide, -1, 1))
    inside = jnp.where(jnp.abs(wide) > 1, 0, wide)
    return straight_through(inside, Quantized(codes, _step(n)), dtype=w.dtype)


def wrpn_activations(x: Float[Array, "..."], *, bits: int = 2) -> Quantized:
    r"""WRPN activations, the same map as :func:`dorefa_activations`.

    Forward   codes = round(n clip(x, 0, 1)),  n = 2^bits - 1,  scale = 1/n
    Backward  (chosen) with g the gradient of scale * codes:  dL/dx := g 1{0 <= x <= 1}

    Raises: as :func:`dorefa_activations`.

    >>> wrpn_activations(jnp.array([0.2, 0.9]), bits=4).codes
    Array([ 3., 14.], dtype=float32)

    Reference: Mishra et al., WRPN: Wide Reduced-Precision Networks, 2017, arXiv:1709.01134.
    """
    return dorefa_activations(x, bits=bits)


def pact_activations(x: Float[Array, "..."], clipping_level: float | Float[Array, ""], *, bits: int = 2) -> Quantized:
    r"""PACT activations: clipped at a learned level a, then evenly spaced levels in [0, a].

    Forward   codes = round(n clip(x, 0, a) / a),  n = 2^bits - 1,  scale = a / n
    Backward  (chosen) with g the gradient of scale * codes:  dL/dx := g 1{0 < x < a},  dL/da := sum g 1{x >= a}

    Ties round to even.  The gradient to a is that of the clipping alone: rounding counts as the identity, and the a in
    the scale as a constant.  A level that training drives to 0 or below acts as the dtype's machine epsilon, so that
    its gradient can raise it again.

    Args:
      x: activations of any shape.
      clipping_level: a, a scalar; learned, and decayed as the weights are.
      bits: of a code.

    Raises:
      ValueError: if `clipping_level` is not a scalar, `bits` is no whole number of at least 1, or x's dtype cannot
        hold the codes exactly.
      TypeError: if `x` is not a floating-point array.

    >>> pact_activations(jnp.array([-1.0, 4.0, 20.0]), 10.0)
    Quantized(codes=Array([0., 1., 3.], dtype=float32), scale=Array(3.3333333, dtype=float32))

    Reference: Choi et al., PACT: Parameterized Clipping Activation, 2018, arXiv:1805.06085.
    """
    require_codes("x", x, bits=bits)
    wide = widened(x)
    level = jnp.asarray(clipping_level, wide.dtype)
    if level.ndim:
        raise ValueError(f"`clipping_level` (of shape {level.shape}) must be a scalar, one a layer; give one value")
    n, top = 2**bits - 1, jnp.maximum(level, float(jnp.finfo(x.dtype).eps))
    codes = jnp.round(n * jnp.clip(wide / top, 0, 1))
    # Its derivative alone matters: by `level`, not `top`, which below eps would be 0 and leave the level stuck.
    clipped = jnp.where(wide >= top, level, jnp.where(wide <= 0, 0, wide))
    return straight_through(clipped, Quantized(codes, top / n), dtype=x.dtype)


def pact(*, bits: int = 2, clipping_level: float = 10.0) -> Quantizer:
    """The quantizer of :func:`pact_activations`; it owns `clipping_level`, at the start the one given.

    Raises:
      ValueError: if `clipping_level` is not positive.

    Reference: Choi et al., PACT: Parameterized Clipping Activation, 2018, arXiv:1805.06085.
    """
    require_positive("clipping_level", clipping_level, "8 to 10 is usual")
    return Quantizer(
        init=lambda key, x: {"clipping_level": jnp.asarray(clipping_level, x.dtype)},
        apply=lambda x, *, clipping_level: pact_activations(x, clipping_level, bits=bits),
        code_set=unsigned_codes(bits),
    )


def hwgq(x: Float[Array, "..."], *, bits: int = 2) -> Quantized:
    r"""Half-wave Gaussian quantization: evenly spaced levels, optimal for the positive half of a unit Gaussian.

    With the step D of the table HWGQ_STEPS (0.538 for 2 bits) and n = 2^bits - 1:

    Forward   codes = 0 if x <= 0;  1 if 0 < x <= 1.5 D;  i if (i - 1/2) D < x <= (i + 1/2) D;  n above,  scale = D
    Backward  (chosen) with g the gradient of scale * codes:  dL/dx := g 1{0 < x <= n D}

    Thresholds lie halfway between positive levels, so every x > 0 has a positive code.  Normalize x before: without a
    learned scale and shift its distribution is the one the levels are made for.

    Args:
      x: activations of any shape, about unit normal.
      bits: 1 to 4.

    Raises:
      ValueError: if `bits` is not in the table.
      TypeError: if `x` is not a floating-point array.

    >>> hwgq(jnp.array([-1.0, 0.1, 1.0, 5.0])).codes
    Array([0., 1., 2., 3.], dtype=float32)

    Reference: Cai et al., Deep Learning with Low Precision by Half-wave Gaussian Quantization, 2017, arXiv:1702.00953.
    """
    require("bits", bits, bits in HWGQ_STEPS, f"must be one of {sorted(HWGQ_STEPS)}", "2 is usual")
    require_codes("x", x, bits=bits)
    wide = widened(x)
    n, step = 2**bits - 1, HWGQ_STEPS[bits]
    above = [is_negative(-wide), *(wide > (i + 0.5) * step for i in range(1, n))]
    codes = sum(positive.astype(wide.dtype) for positive in above)
    inside = jnp.where((wide <= 0) | (wide > n * step), 0, wide)
    return straight_through(inside, Quantized(codes, jnp.asarray(step, wide.dtype)), dtype=x.dtype)


def require_bits(bits: Any, *, dtype: jnp.dtype) -> None:
    """Refuse `bits` that are no whole number of at least 1, or whose codes up to 2^bits - 1 are inexact in `dtype`.

    Raises:
      ValueError: naming the value, the rule and the way out.
    """
    require("bits", bits, isinstance(bits, numbers.Integral), "must be a whole number", "2 is usual")
    require("bits", bits, bits >= 1, "must be at least 1", "2 is usual")
    most = jnp.finfo(dtype).nmant + 1
    require("bits", bits, bits <= most, f"must be at most {most} in {dtype}, or codes are inexact", "use a wider dtype")


def require_codes(argument: str, x: Float[Array, "..."], *, bits: int) -> None:
    """Refuse an array that is not floating point, or whose dtype cannot hold codes of `bits`.

    Raises:
      TypeError: naming the argument and its dtype.
      ValueError: as :func:`require_bits`.
    """
    require_floating(argument, x)
    require_bits(bits, dtype=x.dtype)


def unsigned_codes(bits: int) -> Sequence[int]:
    """0, 1, ..., 2^bits - 1.

    >>> unsigned_codes(2)
    (0, 1, 2, 3)
    """
    return _listed(bits, lambda: range(2**bits))


def odd_codes(bits: int) -> Sequence[int]:
    """The odd integers from -(2^bits - 1) to 2^bits - 1.

    >>> odd_codes(2)
    (-3, -1, 1, 3)
    """
    return _listed(bits, lambda: range(1 - 2**bits, 2**bits, 2))


def signed_codes(bits: int) -> Sequence[int]:
    """The integers from -n to n, n = 2^(bits-1) - 1; -1 and +1 for 1 bit.

    >>> signed_codes(1), signed_codes(3)
    ((-1, 1), (-3, -2, -1, 0, 1, 2, 3))
    """
    n = 2 ** (bits - 1) - 1
    return odd_codes(1) if bits == 1 else _listed(bits, lambda: range(-n, n + 1))


def _listed(bits, codes):
    require_bits(bits, dtype=jnp.float64)
    # 2^24 integers are better not written out.
    return tuple(codes()) if bits <= 8 else codes()


def _step(n):
    return jnp.asarray(1 / n, jnp.float32)

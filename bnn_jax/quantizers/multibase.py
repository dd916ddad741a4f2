r"""Quantizers with several binary bases, whose sum approximates the real tensor: codes -1/+1."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnn_jax.checks import require, require_positive
from bnn_jax.estimators import is_negative, make_estimator, ste_sign
from bnn_jax.precision import widened
from bnn_jax.quantizers.codes import Quantized
from bnn_jax.quantizers.quantizer import Quantizer
from bnn_jax.types import EstimatorFunction

RIDGE = 1e-8


def _unit_range(x, shift):
    return (x + shift >= 0) & (x + shift <= 1)


_nested_sign = make_estimator(
    lambda w, offset, shift: jnp.where(is_negative(w - offset + shift), -1, 1),
    lambda w, offset, shift: jnp.ones_like(w),
)
_shifted_sign = make_estimator(
    lambda x, shift: jnp.where(x + shift < 0.5, -1, 1), _unit_range, parameter_derivatives={"shift": _unit_range}
)


def abc_net(w: Float[Array, "*fan_in features"], *, bases: int = 3, per_channel: bool = False) -> tuple[Quantized, ...]:
    r"""Weights as a least-squares combination of M binary bases (ABC-Net).

    Forward   B_m = sign(w - mean(w) + u_m std(w)),  u_m = -1 + 2 (m-1) / (M-1);  u = 0 for M = 1
              alpha = argmin_a mean (w - sum_m a_m B_m)^2 + 1e-8 |a|^2
    Backward  (chosen) alpha, mean and std constant, identity straight-through to every base:
              dL/dw := sum_m alpha_m g,  g the gradient of the sum of the bases

    The ridge decides where bases coincide on all weights: they share their alpha.  std is that of the population.

    Args:
      w: latent weights, the filter on the last axis.
      bases: M, at least 1.
      per_channel: one fit a filter, scales of shape (1, ..., 1, features), instead of one for the whole tensor.

    Returns:
      M quantized tensors whose sum is meant; an alpha may be negative.

    Raises:
      ValueError: if `bases` is less than 1.
      TypeError: if `w` is not a floating-point array.

    >>> [f"{base.scale:.3f} {base.codes}" for base in abc_net(jnp.array([-3.0, -1.0, 1.0, 3.0]), bases=2)]
    ['1.500 [-1. -1. -1.  1.]', '1.500 [-1.  1.  1.  1.]']

    Reference: Lin, Zhao, Pan, Towards Accurate Binary Convolutional Neural Network, 2017, arXiv:1711.11294.
    """
    _check_bases(bases)
    axes = tuple(range(w.ndim - 1 if per_channel else w.ndim))
    # In bfloat16 the fit would lose the small differences of nearly equal bases.
    x = widened(jax.lax.stop_gradient(w))
    offset, spread = x.mean(axes, keepdims=True), x.std(axes, keepdims=True)
    codes = [_nested_sign(w, offset=offset, shift=u * spread) for u in _evenly_spaced(bases)]
    features = w.shape[-1] if per_channel else 1
    flat = [jax.lax.stop_gradient(b).reshape(-1, features) for b in codes]
    scales = _least_squares(x.reshape(-1, features), flat).astype(w.dtype)
    shape = offset.shape if per_channel else ()
    return tuple(Quantized(b, scales[:, m].reshape(shape)) for m, b in enumerate(codes))


def _least_squares(x: Float[Array, "n features"], codes: list[Array]) -> Float[Array, "features bases"]:
    """The scales that minimise mean (x - sum_m scale_m codes_m)^2 + RIDGE |scales|^2 over n, for nested codes.

    The codes are nested: with +1 in k of them, it is the last k.  So the fit f is constant on each cell "k codes are
    +1", and f(0) = -f(M).  In the coordinates f(1) ... f(M) the Gram matrix is diagonal, the share of the tensor in
    each cell, which float32 holds even where cells are empty, that is where codes coincide and theirs is singular.
    """
    m = len(codes)
    positive = sum(jnp.where(b > 0, 1, 0) for b in codes)
    cells = [jnp.where(positive == k, 1, 0) for k in range(1, m)]
    cells.append(jnp.where(positive == m, 1, jnp.where(positive == 0, -1, 0)))
    share = jnp.stack([jnp.abs(cell).astype(x.dtype).mean(0) for cell in cells], -1)
    correlation = jnp.stack([(cell * x).mean(0) for cell in cells], -1)
    steps = np.eye(m) - np.eye(m, k=-1)
    steps[0, -1] += 1
    ridge = jnp.asarray(RIDGE * steps.T @ steps / 4, x.dtype)
    factor = jax.scipy.linalg.cho_factor(share[..., None] * jnp.eye(m, dtype=x.dtype)[None] + ridge[None])
    fit = jax.scipy.linalg.cho_solve(factor, correlation[..., None])[..., 0]
    below = jnp.concatenate([-fit[:, -1:], fit[:, :-1]], -1)
    return ((fit - below) / 2)[:, ::-1]


def shifted_bases(
    x: Float[Array, "..."], *, shift: Float[Array, "bases"], scale: Float[Array, "bases"]
) -> tuple[Quantized, ...]:
    r"""Activations as a sum of N shifted binary bases with learned shifts and scales (ABC-Net).

    Forward   A_n = 2 1{clip(x + shift_n, 0, 1) >= 1/2} - 1 = sign(x - (1/2 - shift_n));  the sum of scale_n A_n
    Backward  with g the gradient of the sum: dL/dscale_n = sum g A_n,
              (chosen)  dL/dx := sum_n scale_n g 1{0 <= x + shift_n <= 1},
              dL/dshift_n := sum scale_n g 1{0 <= x + shift_n <= 1}

    Args:
      x: activations of any shape.
      shift: N shifts.  Bases with equal shifts and scales stay equal for ever: let them differ.
      scale: N scales.

    Returns:
      N quantized tensors whose sum is meant, with scalar scales.

    Raises:
      ValueError: if `shift` and `scale` are not vectors of one length.
      TypeError: if `x` is not a floating-point array.

    >>> first, second = shifted_bases(jnp.array([-1.0, 0.0, 1.0]), shift=jnp.array([1.0, 0.0]), scale=jnp.ones(2) / 2)
    >>> print(first.codes * first.scale + second.codes * second.scale)
    [-1.  0.  1.]

    Reference: Lin, Zhao, Pan, Towards Accurate Binary Convolutional Neural Network, 2017, arXiv:1711.11294.
    """
    if shift.ndim != 1 or shift.shape != scale.shape:
        raise ValueError(
            f"`shift` (of shape {shift.shape}) must be a vector of `scale`'s shape {scale.shape}, one value a base"
        )
    return tuple(Quantized(_shifted_sign(x, shift=v), s) for v, s in zip(shift, scale))


def abc_net_activations(*, bases: int = 3, spread: float = 1.0) -> Quantizer:
    r"""The quantizer of :func:`shifted_bases`; it owns `shift` and `scale`, one value a base.

    At the start the thresholds 1/2 - shift_n stand evenly from -spread to +spread (at 0 for one base), where
    normalized activations are, and every scale is 1/N, so that N bases have the range [-1, 1] of a single sign.
    The paper's initial values could not be confirmed; this is a reading.  Re-implementations that start all bases at
    one shift and scale never tell them apart.

    Raises:
      ValueError: if `bases` is less than 1 or `spread` not positive.

    Reference: Lin, Zhao, Pan, Towards Accurate Binary Convolutional Neural Network, 2017, arXiv:1711.11294.
    """
    _check_bases(bases)
    require_positive("spread", spread, "at 0 all bases would stay equal; 1.0 is the default")
    shift = [0.5 - spread * u for u in _evenly_spaced(bases)]
    return Quantizer(
        init=lambda key, x: {"shift": jnp.array(shift, x.dtype), "scale": jnp.full((bases,), 1 / bases, x.dtype)},
        apply=shifted_bases,
    )


def residual_binary(
    x: Float[Array, "batch ..."], *, bases: int = 2, per_example: bool = True, estimator: EstimatorFunction = ste_sign
) -> tuple[Quantized, ...]:
    r"""Activations binarized again and again, each base the sign of what the bases before it leave.

    Forward   X_1 = x,  A_i = sign(X_i),  a_i = mean|X_i| = argmin_a |X_i - a A_i|^2,  X_{i+1} = X_i - a_i A_i
    Backward  (chosen) scales and earlier bases constant, the estimator to every base:
              dL/dx := sum_i a_i g e'(X_i),  g the gradient of the sum of the bases, e' by default 1{|X_i| <= 1}

    The paper's exact gradient could not be confirmed; this is a reading.

    Args:
      x: activations, the examples on the first axis.
      bases: at least 1; the paper uses 2.
      per_example: one scale an example, shape (batch, 1, ..., 1), so that what comes out for one image does not depend
        on the others in its batch; False takes the mean over the whole tensor, a scalar.
      estimator: gives e'.

    Returns:
      Quantized tensors whose sum is meant.

    Raises:
      ValueError: if `bases` is less than 1, or if there are examples to tell apart but no other axis.
      TypeError: if `x` is not a floating-point array.

    >>> first, second = residual_binary(jnp.array([[-3.0, 1.0]]))
    >>> print(first.codes * first.scale, second.codes * second.scale)
    [[-2.  2.]] [[-1. -1.]]

    Reference: Tang, Hua, Wang, How to Train a Compact Binary Neural Network with High Accuracy?, AAAI 2017.
    """
    _check_bases(bases)
    if per_example and x.ndim < 2:
        raise ValueError(f"`x` (of shape {x.shape}) must have an axis besides the examples; or set `per_example=False`")
    quantized = []
    for _ in range(bases):
        magnitude = jax.lax.stop_gradient(jnp.abs(x))
        scale = magnitude.mean(tuple(range(1, x.ndim)), keepdims=True) if per_example else magnitude.mean()
        codes = estimator(x)
        quantized.append(Quantized(codes, scale))
        x = x - jax.lax.stop_gradient(scale * codes)
    return tuple(quantized)


def _evenly_spaced(count):
    return [0.0] if count == 1 else [-1 + 2 * i / (count - 1) for i in range(count)]


def _check_bases(bases):
    require("bases", bases, lambda count: count >= 1, "must be at least 1", "ABC-Net uses 1 to 5")

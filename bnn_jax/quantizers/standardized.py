r"""Binary quantizers of standardized weights: IR-Net's Libra-PB, RBNN's rotation, scaled ones for BN-free networks."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bnn_jax.checks import require_floating, require_positive
from bnn_jax.estimators import EstimatorLike, sign, ste_sign
from bnn_jax.quantizers.binary import binary, magnitude_aware, mean_magnitude
from bnn_jax.quantizers.codes import Quantized
from bnn_jax.quantizers.quantizer import Quantizer, State, with_estimator
from bnn_jax.types import EstimatorFunction


def standardize(
    w: Float[Array, "*fan_in features"], *, unbiased: bool = True, epsilon: float = 0.0
) -> Float[Array, "*fan_in features"]:
    r"""Each filter with mean 0 and standard deviation 1:  (w - mean) / (std + epsilon).

    Computed in float32, returned in w's dtype.  A constant filter, whose deviation is 0, becomes 0.

    Args:
      w: weights, the filter on the last axis.
      unbiased: divide the squares by n - 1 instead of n, the fan-in.
      epsilon: added to the standard deviation.

    Raises:
      ValueError: if `w` has a fan-in of 1.
      TypeError: if `w` is not a floating-point array.

    >>> standardize(jnp.array([[1.0], [3.0]]), unbiased=False).ravel()
    Array([-1.,  1.], dtype=float32)

    Reference: Qiao et al., Weight Standardization, 2019, arXiv:1903.10520.
    """
    require_floating("w", w)
    if math.prod(w.shape[:-1]) < 2:
        raise ValueError(f"`w` (of shape {w.shape}) must have a fan-in of at least 2; one weight has no deviation")
    return _standardized(w, tuple(range(w.ndim - 1)), unbiased=unbiased, epsilon=epsilon)


def _standardized(x: Array, axes: tuple[int, ...], *, unbiased: bool = True, epsilon: float = 0.0) -> Array:
    wide = x.astype(jnp.float32)
    centered = wide - wide.mean(axes, keepdims=True)
    count = math.prod(x.shape[axis] for axis in axes)
    variance = (centered * centered).sum(axes, keepdims=True) / (count - unbiased)
    deviation = jnp.sqrt(jnp.where(variance == 0, 1, variance)) + epsilon
    return (centered / deviation).astype(x.dtype)


def _power_of_two(magnitude):
    exponent = jnp.round(jnp.log2(jnp.where(magnitude == 0, 1, magnitude).astype(jnp.float32)))
    return jnp.ldexp(jnp.ones_like(exponent), exponent.astype(jnp.int32)).astype(magnitude.dtype)


def libra_pb(
    w: Float[Array, "*fan_in features"], *, estimator: EstimatorFunction = ste_sign, shift: bool = True
) -> Quantized:
    r"""Sign of balanced, standardized weights, scaled by a power of two (Libra parameter binarization of IR-Net).

    Forward   w^ = (w_f - mean(w_f)) / std(w_f)  with the unbiased deviation,
              codes = sign(w^),  scale_f = s_f = 2^round(log2(||w^_f||_1 / n)), or 1 without `shift`
    Backward  with g the gradient of s_f sign(w^):  dL/dw^_i := s_f g_i e'(w^_i), e' the estimator's derivative,
              then exact through mean and deviation; s_f is held constant

    For Gaussian weights ||w^||_1/n = 0.798 and s = 1; s = 0.5 takes heavy tails.  The codes do not change when a filter
    is shifted or multiplied by a positive number.  A constant filter has w^ = 0 and s = 1.

    Args:
      w: latent weights, the filter on the last axis; fan-in at least 2.
      estimator: gives e'; IR-Net uses `ede_sign`.
      shift: use the power of two.

    Returns:
      codes of w's shape; scale of shape (1, ..., 1, features).

    Raises:
      ValueError: if `w` has a fan-in of 1.

    >>> libra_pb(jnp.array([[1.0], [2.0], [6.0]])).codes.ravel()
    Array([-1., -1.,  1.], dtype=float32)

    Reference: Qin et al., Forward and Backward Information Retention for Accurate Binary Neural Networks, 2020,
    arXiv:1909.10788.
    """
    standardized = standardize(w)
    magnitude = lax.stop_gradient(mean_magnitude(standardized))
    return Quantized(estimator(standardized), _power_of_two(magnitude) if shift else jnp.ones_like(magnitude))


def bn_free_weights(
    w: Float[Array, "*fan_in features"],
    gain: Float[Array, "*ones features"],
    *,
    gamma: float | Array = 1.0,
    epsilon: float = 1e-5,
    scaled_gradient: bool = False,
    estimator: EstimatorFunction = ste_sign,
) -> Quantized:
    r"""Binary weights for networks without batch normalization, from scaled weight standardization.

    Forward   w^ = gain_f (gamma / sqrt(n)) (w_f - mean(w_f)) / (std(w_f) + epsilon)  with the biased deviation,
              codes = sign(w^),  scale_f = ||w^_f||_1 / n
    Backward  that of :func:`magnitude_aware` to w^, then exact to w and gain

    Args:
      w: latent weights, the filter on the last axis; fan-in n at least 2.
      gain: learned, of shape (1, ..., 1, features).
      gamma: positive constant that makes up for the variance an activation takes away.
      epsilon: added to the deviation.
      scaled_gradient: keep the factor scale_f in the gradient.
      estimator: of the sign, on w^.

    Returns:
      codes of w's shape; scale of shape (1, ..., 1, features).

    Raises:
      ValueError: if `gamma` is not positive, or `w` has a fan-in of 1.

    >>> bn_free_weights(jnp.array([[1.0], [2.0], [6.0], [3.0]]), jnp.ones((1, 1)), epsilon=0.0).codes.ravel()
    Array([-1., -1.,  1.,  1.], dtype=float32)

    Reference: Chen et al., "BNN - BN = ?": Training Binary Neural Networks without Batch Normalization, 2021,
    arXiv:2104.08215.
    """
    require_positive("gamma", gamma, "1.0 is usual")
    factor = gain.astype(w.dtype) * jnp.asarray(gamma / math.sqrt(math.prod(w.shape[:-1])), w.dtype)
    standardized = factor * standardize(w, unbiased=False, epsilon=epsilon)
    return magnitude_aware(standardized, estimator=estimator, scaled_gradient=scaled_gradient)


def bn_free(
    estimator: EstimatorLike = "ste_sign",
    *,
    gamma: float = 1.0,
    epsilon: float = 1e-5,
    scaled_gradient: bool = False,
    **options,
) -> Quantizer:
    """The quantizer of :func:`bn_free_weights`; it owns `gain`, one at the start.

    Raises:
      ValueError: for an unknown estimator or option, or a `gamma` that is not positive.
    """
    require_positive("gamma", gamma, "1.0 is usual")
    return with_estimator(
        bn_free_weights,
        estimator,
        init=lambda key, w: {"gain": jnp.ones_like(mean_magnitude(w))},
        gamma=gamma,
        epsilon=epsilon,
        scaled_gradient=scaled_gradient,
        **options,
    )


class Rotations(NamedTuple):
    """Two rotations that act on a filter as X -> left^T X right, X the filter's n weights as a matrix (a, b)."""

    left: Float[Array, "a a"]
    right: Float[Array, "b b"]


def nearest_factors(n: int) -> tuple[int, int]:
    """a <= b with a b = n and a the largest divisor of n up to its square root.

    Raises:
      ValueError: if `n` is not positive.

    >>> [nearest_factors(n) for n in (576, 144, 27, 7)]
    [(24, 24), (12, 12), (3, 9), (1, 7)]
    """
    if n < 1:
        raise ValueError(f"`n` (={n}) must be positive; it is the fan-in of a filter")
    a = next(a for a in range(math.isqrt(n), 0, -1) if n % a == 0)
    return a, n // a


def as_matrices(w: Float[Array, "*fan_in features"]) -> Float[Array, "features a b"]:
    """Each filter's weights as a matrix (a, b), a b = n the fan-in, as nearly square as n allows.

    Row by row in the order (inputs, height, width) of the authors' program.
    """
    rows = jnp.moveaxis(w, (-1, -2), (0, 1))
    return rows.reshape(w.shape[-1], *nearest_factors(math.prod(w.shape[:-1])))


def rotate(w: Float[Array, "*fan_in features"], rotations: Rotations) -> Float[Array, "*fan_in features"]:
    """Rotate each filter: X -> left^T X right, in float32; lengths and angles stay as they are."""
    matrices = _turn(as_matrices(w).astype(jnp.float32), rotations)
    rows = matrices.reshape(w.shape[-1], w.shape[-2], *w.shape[:-2])
    return jnp.moveaxis(rows, (0, 1), (-1, -2)).astype(w.dtype)


_exact_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def _turn(x, rotations):
    return _exact_einsum("ba,fbc,cd->fad", rotations.left, x, rotations.right)


def rotation_objective(w: Float[Array, "*fan_in features"], rotations: Rotations) -> Float[Array, ""]:
    r"""sum_i max_B tr(B^T left^T X_i right) over B in {-1, +1}: the sum of magnitudes of the rotated weights."""
    return jnp.abs(rotate(w, rotations)).sum()


def rotate_sweep(w: Float[Array, "*fan_in features"], rotations: Rotations) -> Rotations:
    r"""One sweep of RBNN's alternation, which never lowers :func:`rotation_objective`.

    In turn, each the exact maximum of  sum_i tr(B_i^T left^T X_i right)  in one of its three arguments:

      B_i = sign(left^T X_i right)
      left  = V U^T  from the singular value decomposition  sum_i B_i right^T X_i^T = U S V^T
      right = U V^T  from  sum_i X_i^T left B_i = U S V^T

    Reference: Lin et al., Rotated Binary Neural Network, 2020, arXiv:2009.13055.
    """
    x = as_matrices(w).astype(jnp.float32)
    b = sign(_turn(x, rotations))
    left = _nearest_rotation(_exact_einsum("fac,dc,fed->ae", b, rotations.right, x)).T
    return Rotations(left, _nearest_rotation(_exact_einsum("fac,ad,fde->ce", x, left, b)))


def _nearest_rotation(matrix):
    u, _, vt = jnp.linalg.svd(matrix)
    return jnp.matmul(u, vt, precision=lax.Precision.HIGHEST)


def rbnn_weights(
    w: Float[Array, "*fan_in features"],
    state: State,
    scale: Float[Array, "*ones features"],
    angle: Float[Array, "*ones features"],
    *,
    train: bool = False,
    period_steps: int | None = None,
    sweeps: int = 3,
    detach_rotation: bool = False,
    estimator: EstimatorFunction = ste_sign,
) -> tuple[Quantized, State]:
    r"""Sign of weights turned towards the corners of the cube {-1, +1}^n (RBNN).

    With w^ = (w_f - mean(w_f)) / std(w_f), the unbiased deviation, and Rot the rotation of :func:`rotate`:

    Forward   w~ = w^ + |sin(angle_f)| (Rot w^ - w^),  codes = sign(w~),  scale_f = alpha_f, a parameter
    Backward  with g the gradient of alpha_f sign(w~):  dL/dalpha_f = sum_j g_j sign(w~_j), exact;
              dL/dw~_i := alpha_f g_i e'(w~_i), e' the estimator's derivative;  then exact, the rotation held constant:
              dL/dw^ = ((1 - |sin|) I + |sin| Rot^T) dL/dw~,  dL/dangle = sign(sin) cos <Rot w^ - w^, dL/dw~>
              with `detach_rotation`, as in the authors' program:  dL/dw^ = (1 - |sin|) dL/dw~, which is 0 at the
              initial angle pi/2: there the weights wait until weight decay has moved the angles

    Before every `period_steps`-th training call, the first included, `sweeps` sweeps of :func:`rotate_sweep` adapt the
    rotations, which all filters of the layer share, to the weights; else they stay.  The authors' program does so
    before the first batch of every epoch, and so does a run of this package, which gives `period_steps` itself.

    Args:
      w: latent weights, the filter on the last axis; fan-in at least 2.
      state: "left" (a, a) and "right" (b, b), the rotations, float32, a b the fan-in; "calls", the training calls made.
      scale: alpha, of shape (1, ..., 1, features).
      angle: of shape (1, ..., 1, features); 0 is no rotation, pi/2 the whole one.
      train: training (True), which adapts the rotations and counts the call, or evaluation.
      period_steps: training calls from one adaptation to the next, the steps of an epoch; None adapts in each.
      sweeps: of one adaptation.
      detach_rotation: the authors' gradient.
      estimator: gives e'; RBNN uses `rbnn_sign`.

    Returns:
      codes of w's shape and scale of shape (1, ..., 1, features); the state after the call.

    Raises:
      ValueError: if `w` has a fan-in of 1, or `period_steps` or `sweeps` is not positive.

    Reference: Lin et al., Rotated Binary Neural Network, 2020, arXiv:2009.13055; lmbxmu/RBNN.
    """
    period_steps = 1 if period_steps is None else period_steps
    require_positive("period_steps", period_steps, "give the steps of an epoch")
    require_positive("sweeps", sweeps, "3 is the paper's")
    standardized = standardize(w)
    rotations = Rotations(state["left"], state["right"])
    if train:
        x = lax.stop_gradient(standardized)
        adapt = lambda rotations: lax.fori_loop(0, sweeps, lambda _, r: rotate_sweep(x, r), rotations)
        rotations = lax.cond(state["calls"] % period_steps == 0, adapt, lambda rotations: rotations, rotations)
        state = {**rotations._asdict(), "calls": state["calls"] + 1}
    rotated = rotate(standardized, lax.stop_gradient(rotations))
    turn = jnp.abs(jnp.sin(angle.astype(w.dtype)))
    turned = standardized + turn * ((lax.stop_gradient(rotated) if detach_rotation else rotated) - standardized)
    return Quantized(estimator(turned), scale.astype(w.dtype)), state


def rbnn(
    estimator: EstimatorLike = "rbnn_sign",
    *,
    period_steps: int | None = None,
    sweeps: int = 3,
    detach_rotation: bool = False,
    **options,
) -> Quantizer:
    """The quantizer of :func:`rbnn_weights`.

    It owns `scale`, ||w_f||_1 / n at the start, and `angle`, pi/2; its state starts from random rotations.
    A run of this package adapts the rotations once an epoch; your own loop gives `period_steps`, the steps of an epoch:
    an adaptation costs singular value decompositions.

    Raises:
      ValueError: for an unknown estimator or option, or if `period_steps` or `sweeps` is not positive.
    """
    require_positive("period_steps", 1 if period_steps is None else period_steps, "give the steps of an epoch")
    require_positive("sweeps", sweeps, "3 is the paper's")

    def init(key, w):
        scale = mean_magnitude(w)
        return {"scale": scale, "angle": jnp.full_like(scale, math.pi / 2)}

    def init_state(key, w):
        keys = jax.random.split(key)
        left, right = (jax.random.orthogonal(k, n) for k, n in zip(keys, nearest_factors(math.prod(w.shape[:-1]))))
        return {"left": left, "right": right, "calls": jnp.zeros((), jnp.int32)}

    return with_estimator(
        rbnn_weights,
        estimator,
        init=init,
        init_state=init_state,
        wants=("train",),
        period_steps=period_steps,
        sweeps=sweeps,
        detach_rotation=detach_rotation,
        **options,
    )


def rbnn_inputs(x: Float[Array, "batch ..."], *, estimator: EstimatorFunction = ste_sign) -> Quantized:
    r"""Sign of activations that are standardized for each example (RBNN): codes -1/+1, scale 1.

    Forward   a^ = (a - mean(a)) / std(a), over all values of an example, the unbiased deviation;
              codes = sign(a^) = sign(a - mean(a))
    Backward  with g the gradient of the codes and e' that of the estimator:  dL/da^_i := g_i e'(a^_i),
              then exact through mean and deviation;  of a constant example a^ = 0, and only the mean has a gradient

    Evaluation compares each example with its own mean, which no threshold a channel can replace: a frozen network
    normalizes and compares real numbers in front of the packed product.

    Args:
      x: activations, the examples on the first axis.
      estimator: gives e'; RBNN uses `rbnn_sign`, on activations with k = 1 and t at least 1.

    Raises:
      ValueError: if an example has a single value.
      TypeError: if `x` is not a floating-point array.

    >>> rbnn_inputs(jnp.array([[1.0, 2.0, 6.0], [-6.0, -2.0, -1.0]])).codes
    Array([[-1., -1.,  1.],
           [-1.,  1.,  1.]], dtype=float32)

    Reference: Lin et al., Rotated Binary Neural Network, 2020, arXiv:2009.13055; lmbxmu/RBNN.
    """
    require_floating("x", x)
    if math.prod(x.shape[1:]) < 2:
        raise ValueError(f"`x` (of shape {x.shape}) must have at least 2 values an example; one has no deviation")
    return binary(_standardized(x, tuple(range(1, x.ndim))), estimator=estimator)

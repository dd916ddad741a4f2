r"""Binary weights that keep their sign while it is uncertain (UaBNN)."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bnn_jax.estimators import EstimatorLike, sign, ste_sign
from bnn_jax.quantizers.binary import mean_magnitude, without_scale
from bnn_jax.quantizers.codes import Quantized
from bnn_jax.quantizers.quantizer import Quantizer, State, require_signs, with_estimator
from bnn_jax.types import EstimatorFunction


def dead_band(w: Float[Array, "..."], threshold: Float[Array, ""]) -> Float[Array, ""]:
    r"""Half the width of the band in which u(w) = exp(-w^2 / (2 sigma^2)) > threshold, sigma the deviation of all of w.

    |w| < sigma sqrt(-2 ln threshold): 1.17741 sigma for 0.5, and nothing for 1.
    """
    sigma = w.astype(jnp.float32).std()
    return (sigma * jnp.sqrt(-2 * jnp.log(threshold.astype(jnp.float32)))).astype(w.dtype)


def c_sign_weights(
    w: Float[Array, "*fan_in features"],
    state: State,
    *,
    train: bool = False,
    progress: float | Array = 1.0,
    start: float = 0.5,
    end: float = 1.0,
    estimator: EstimatorFunction = ste_sign,
) -> tuple[Quantized, State]:
    r"""Certainty-sign: a weight near zero keeps its previous binary value; the band shrinks while training (UaBNN).

    With u(w) = exp(-w^2 / (2 sigma^2)), sigma the standard deviation of the layer's weights, and
    threshold = start + (end - start) progress:

    Forward   codes = the previous codes where u(w) > threshold;  sign(w) elsewhere,  scale_f = alpha_f = ||w_f||_1 / n
    Backward  (chosen)  with g the gradient of alpha_f codes:  dL/dw_i := g_i e'(w_i), e' the estimator's derivative

    At a threshold of 1 this is :func:`magnitude_aware`.  The paper's exact form could not be confirmed; this is a
    reading, with ReActNet's scale and gradient, to which the paper applies it.

    Args:
      w: latent weights, the filter on the last axis.
      state: "codes" of w's shape, those of the last training call, and "progress", that of the last training call.
      train: training (True), or evaluation, which takes the progress from the state.
      progress: share of the training done, in [0, 1]; may be traced.
      start, end: the threshold at progress 0 and 1, 0 < start <= end <= 1.
      estimator: gives e', by default 1{|w| <= 1}.

    Returns:
      codes of w's shape and scale of shape (1, ..., 1, features); the state after the call.

    Raises:
      ValueError: if `start` and `end` are not in order.

    >>> w, previous = jnp.array([[-0.1], [-2.0]]), jnp.ones((2, 1))
    >>> state = {"codes": previous, "progress": jnp.zeros(())}
    >>> c_sign_weights(w, state, train=True, progress=0.0)[0].codes.ravel()
    Array([ 1., -1.], dtype=float32)
    >>> c_sign_weights(w, state, train=True, progress=1.0)[0].codes.ravel()
    Array([-1., -1.], dtype=float32)

    Reference: Zhao et al., Uncertainty-aware Binary Neural Networks, IJCAI 2021.
    """
    _check_thresholds(start, end)
    progress = jnp.clip(jnp.asarray(progress if train else state["progress"], jnp.float32), 0, 1)
    # At progress 1 a float32 sum can miss `end` by one unit; the plain sign needs a threshold of exactly 1.
    threshold = jnp.where(progress == 1, end, start + (end - start) * progress)
    uncertain = jnp.abs(w) < dead_band(w, threshold)
    kept = jnp.where(uncertain, state["codes"].astype(w.dtype), sign(w))
    alpha = lax.stop_gradient(mean_magnitude(w))
    gradient = estimator(w)
    codes = lax.stop_gradient(kept) + (gradient - lax.stop_gradient(gradient))
    return Quantized(without_scale(codes, alpha), alpha), {"codes": kept, "progress": progress} if train else state


def _check_thresholds(start, end):
    if not 0 < start <= end <= 1:
        raise ValueError(f"`start` and `end` (={start}, {end}) must satisfy 0 < start <= end <= 1; 0.5 and 1 are usual")


def c_sign(estimator: EstimatorLike = "ste_sign", *, start: float = 0.5, end: float = 1.0, **options) -> Quantizer:
    """The quantizer of :func:`c_sign_weights`; its state starts from the signs of the first weights.

    Raises:
      ValueError: for an unknown estimator or option, one of other codes than -1/+1, or if `start` and `end` are not in
        order.
    """
    _check_thresholds(start, end)
    require_signs(estimator)
    return with_estimator(
        c_sign_weights,
        estimator,
        init_state=lambda key, w: {"codes": jax.lax.stop_gradient(sign(w)), "progress": jnp.zeros((), jnp.float32)},
        wants=("train", "progress"),
        start=start,
        end=end,
        **options,
    )

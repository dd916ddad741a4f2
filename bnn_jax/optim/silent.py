r"""OvSW: gradients that reach weights far from zero, and a decay of those that never change their sign."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from bnn_jax.checks import require
from bnn_jax.estimators import is_negative
from bnn_jax.precision import sum_dtype
from bnn_jax.types import Params

LEAST_GRADIENT, LEAST_WEIGHT = 1e-6, 1e-3
"""Below these norms of a filter, its gradient and its weights count as so large."""


class SilentWeightsState(NamedTuple):
    """State of :func:`overcome_silent_weights`.

    Attributes:
      flips: running share of the steps in which each weight changed its sign.
      negative: whether each weight was negative before the last step.
    """

    flips: Params
    negative: Params


def overcome_silent_weights(
    *,
    least_ratio: float | Array = 0.01,
    penalty: float | Array = 2e-5,
    flip_momentum: float | Array = 0.999,
    flip_threshold: float | Array = 1e-4,
) -> optax.GradientTransformation:
    r"""Scale gradients up to their filter's weights, and decay weights that keep their sign (OvSW).

    With g_f and w_f the gradient and the weights of a filter, |g_f| at least 1e-6 and |w_f| at least 1e-3, and delta,
    lambda, mu, sigma the arguments in their order:

        g_f <- delta (|w_f| / |g_f|) g_f  if  |g_f| / |w_f| < delta                adaptive gradient scaling
        m   <- mu m + (1 - mu) 1{sign(w) is not that of the step before}            m = 0 at the start
        g   <- g + lambda w 1{m < sigma}                                            silence awareness decaying

    The gradient of a binary network does not depend on the size of its latent weights, so that large ones are silent.
    Put it first in a chain, and mask it to latent weights: ``optax.masked(overcome_silent_weights(), is_latent)``.

    Args:
      least_ratio: delta, not negative; 0 scales nothing.
      penalty: lambda, not negative; 0 decays nothing.
      flip_momentum: mu, in [0, 1].
      flip_threshold: sigma, the share of flips below which a weight is silent.

    Raises:
      ValueError: if an argument is out of range; on update, if `params` are missing.

    >>> transform = overcome_silent_weights(least_ratio=0.1, penalty=0.5)
    >>> w = jnp.array([[3.0], [4.0]])
    >>> g, _ = transform.update(jnp.array([[0.03], [0.04]]), transform.init(w), w)
    >>> g.ravel()  # ten times the gradient, and half the weight
    Array([1.8, 2.4], dtype=float32)

    Reference: Xiang et al., OvSW: Overcoming Silent Weights for Accurate Binary Neural Networks, ECCV 2024,
    arXiv:2407.05257; JingyangXiang/OvSW.
    """
    require("least_ratio", least_ratio, lambda value: value >= 0, "must not be negative", "0.01 is usual")
    require("penalty", penalty, lambda value: value >= 0, "must not be negative", "2e-5 is usual")
    require("flip_momentum", flip_momentum, lambda m: (m >= 0) & (m <= 1), "must be in [0, 1]", "0.999 is usual")

    def init_fn(params):
        flips = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)
        return SilentWeightsState(flips, jax.tree.map(is_negative, params))

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("`params` must be given to `update`: gradients are scaled to the size of the weights")
        negative = jax.tree.map(is_negative, params)
        flips = jax.tree.map(
            lambda m, now, before: flip_momentum * m + (1 - flip_momentum) * (now != before).astype(m.dtype),
            state.flips,
            negative,
            state.negative,
        )

        def changed(g, w, m):
            wide = sum_dtype(w)
            scaled, w = _scaled(g.astype(wide), w.astype(wide), least_ratio), w.astype(wide)
            return (scaled + jnp.where(m < flip_threshold, penalty, 0) * w).astype(g.dtype)

        return jax.tree.map(changed, updates, params, flips), SilentWeightsState(flips, negative)

    return optax.GradientTransformation(init_fn, update_fn)


def _scaled(g: Array, w: Array, least_ratio: float | Array) -> Array:
    """The gradient of each filter, the last axis, its norm at least `least_ratio` times that of the weights."""
    axes = tuple(range(w.ndim - 1))
    norm = lambda x, least: jnp.maximum(jnp.sqrt((x * x).sum(axes, keepdims=True)), least)
    least = least_ratio * norm(w, LEAST_WEIGHT)
    size = norm(g, LEAST_GRADIENT)
    return jnp.where(size < least, least / size, 1) * g

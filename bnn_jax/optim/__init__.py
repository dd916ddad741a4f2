"""Optimizers as optax transforms, and the table that names those a comparison can run."""

from collections.abc import Callable

import jax
import optax
from optax import contrib

from bnn_jax.optim.deep_frank_wolfe import DeepFrankWolfeState, deep_frank_wolfe
from bnn_jax.optim.latent import Box, bound_statistics, is_latent, keep_in_box, latent_box, resolve_box
from bnn_jax.types import Params, Schedule


def _decayed(params: Params) -> Params:
    """Weight decay is for real weights: on latent ones it would only slow the sign flips."""
    return jax.tree.map(lambda latent: not latent, is_latent(params))


def _dfw(learning_rate, momentum, weight_decay, box):
    return deep_frank_wolfe(learning_rate, momentum, weight_decay, box=box, weight_decay_mask=_decayed)


def _adam(learning_rate, momentum, weight_decay, box):
    adam = optax.adamw(learning_rate, b1=momentum, weight_decay=weight_decay, mask=_decayed)
    return optax.chain(adam, keep_in_box(box))


def _sgd(learning_rate, momentum, weight_decay, box):
    decay = optax.add_decayed_weights(weight_decay, mask=_decayed)
    return optax.chain(decay, optax.sgd(learning_rate, momentum=momentum), keep_in_box(box))


def _polyak_sgd(learning_rate, momentum, weight_decay, box):
    # The step size min(max_learning_rate, L / |g|^2) has no schedule; `scaling` has, so the bound moves into it.
    decay = optax.add_decayed_weights(weight_decay, mask=_decayed)
    peak = learning_rate(0)
    polyak = optax.polyak_sgd(max_learning_rate=peak, scaling=lambda step: learning_rate(step) / peak)
    return optax.chain(decay, polyak, optax.trace(momentum), keep_in_box(box))


def _momo(learning_rate, momentum, weight_decay, box):
    return optax.chain(contrib.momo(learning_rate, beta=momentum, weight_decay=weight_decay), keep_in_box(box))


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "dfw": _dfw,
    "adam": _adam,
    "sgd": _sgd,
    "polyak_sgd": _polyak_sgd,
    "momo": _momo,
}


def make_optimizer(
    name: str,
    *,
    learning_rate: Schedule,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    box: Box | Callable[[Params], Box] = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of the table, with every weight kept inside its box.

    All are called as ``update(gradient, state, params, value=loss)``.

    Args:
      name: "dfw" (:func:`deep_frank_wolfe`), "adam" (decoupled weight decay), "sgd", "polyak_sgd" or "momo".
      learning_rate: schedule; for dfw the proximal eta, for polyak_sgd and momo the upper bound of the step size.
      momentum: Nesterov's for dfw, heavy-ball for sgd and polyak_sgd, beta1 of adam, beta of momo.
      weight_decay: on all weights but the latent ones; momo's own decays all.
      box: of the latent weights, as :func:`latent_box`, or None.

    Raises:
      KeyError: if `name` is not in OPTIMIZERS.

    References: Kingma and Ba, Adam, 2015; Loizou et al., Stochastic Polyak Step-size, 2021; Schaipp et al., MoMo, 2024.
    """
    return optax.with_extra_args_support(OPTIMIZERS[name](learning_rate, momentum, weight_decay, box))


__all__ = [
    "OPTIMIZERS",
    "Box",
    "DeepFrankWolfeState",
    "bound_statistics",
    "deep_frank_wolfe",
    "is_latent",
    "keep_in_box",
    "latent_box",
    "make_optimizer",
    "resolve_box",
]

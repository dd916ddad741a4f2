"""Optimizers as optax transforms, and the table that names those a comparison can run."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from optax import contrib

from bnn_jax.optim.bnew import PushToBoundsState, push_to_bounds
from bnn_jax.optim.bop import BopState, bop, bop_on_latent
from bnn_jax.optim.deep_frank_wolfe import DeepFrankWolfeState, deep_frank_wolfe
from bnn_jax.optim.latent import (
    Box,
    bound_statistics,
    is_latent,
    keep_in_box,
    latent_box,
    latent_learning_rate_scale,
    resolve_box,
    scale_latent_updates,
)
from bnn_jax.types import Params, Schedule


class Settings(NamedTuple):
    """What an optimizer of the table is made from; see :func:`make_optimizer`."""

    learning_rate: Schedule
    momentum: float
    weight_decay: float
    box: Box | Callable[[Params], Box]
    total_steps: int | None
    scale_latent: bool


def _decayed(params: Params) -> Params:
    """Weight decay is for real weights: on latent ones it would only slow the sign flips."""
    return jax.tree.map(lambda latent: not latent, is_latent(params))


def _boxed(settings: Settings, *transforms: optax.GradientTransformation) -> optax.GradientTransformation:
    scaled = [scale_latent_updates()] if settings.scale_latent else []
    return optax.chain(*transforms, *scaled, keep_in_box(settings.box))


def _decay(settings: Settings) -> optax.GradientTransformation:
    return optax.add_decayed_weights(settings.weight_decay, mask=_decayed)


def _adamw(settings: Settings) -> optax.GradientTransformation:
    return optax.adamw(settings.learning_rate, b1=settings.momentum, weight_decay=settings.weight_decay, mask=_decayed)


def _dfw(settings):
    return deep_frank_wolfe(
        settings.learning_rate,
        settings.momentum,
        settings.weight_decay,
        box=settings.box,
        weight_decay_mask=_decayed,
    )


def _adam(settings):
    return _boxed(settings, _adamw(settings))


def _sgd(settings):
    return _boxed(settings, _decay(settings), optax.sgd(settings.learning_rate, momentum=settings.momentum))


def _polyak_sgd(settings):
    # The step size min(max_learning_rate, L / |g|^2) has no schedule; `scaling` has, so the bound moves into it.
    peak = settings.learning_rate(0)
    polyak = optax.polyak_sgd(max_learning_rate=peak, scaling=lambda step: settings.learning_rate(step) / peak)
    return _boxed(settings, _decay(settings), polyak, optax.trace(settings.momentum))


def _momo(settings):
    return _boxed(
        settings, contrib.momo(settings.learning_rate, beta=settings.momentum, weight_decay=settings.weight_decay)
    )


def _bop(settings):
    peak = settings.learning_rate(0)
    return bop_on_latent(_adamw(settings), adaptivity_rate=lambda step: 1e-4 * settings.learning_rate(step) / peak)


def _bnew(settings):
    if settings.box is None or settings.total_steps is None:
        raise ValueError("`box` and `total_steps` must be given for bnew, which pushes to the bounds step by step")
    return optax.chain(_adamw(settings), push_to_bounds(settings.box, total_steps=settings.total_steps))


OPTIMIZERS: dict[str, Callable[[Settings], optax.GradientTransformation]] = {
    "dfw": _dfw,
    "adam": _adam,
    "sgd": _sgd,
    "polyak_sgd": _polyak_sgd,
    "momo": _momo,
    "bop": _bop,
    "bnew": _bnew,
}


def make_optimizer(
    name: str,
    *,
    learning_rate: Schedule,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    box: Box | Callable[[Params], Box] = None,
    total_steps: int | None = None,
    scale_latent: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of the table, with every weight kept inside its box.

    All are called as ``update(gradient, state, params, value=loss)``.

    Args:
      name: "dfw" (:func:`deep_frank_wolfe`), "adam" (decoupled weight decay), "sgd", "polyak_sgd", "momo", "bop"
        (:func:`bop` on the latent weights, its adaptivity rate 1e-4 decayed like the learning rate, adam on the rest)
        or "bnew" (adam and :func:`push_to_bounds`).
      learning_rate: schedule; for dfw the proximal eta, for polyak_sgd and momo the upper bound of the step size.
      momentum: Nesterov's for dfw, heavy-ball for sgd and polyak_sgd, beta1 of adam, beta of momo.
      weight_decay: on all weights but the latent ones; momo's own decays all.
      box: of the latent weights, as :func:`latent_box`, or None.
      total_steps: of the training; for bnew.
      scale_latent: BinaryConnect's layer-wise learning-rate scale, for adam, sgd, polyak_sgd and momo.

    Raises:
      KeyError: if `name` is not in OPTIMIZERS.
      ValueError: if bnew lacks `box` or `total_steps`.

    References: Kingma and Ba, Adam, 2015; Loizou et al., Stochastic Polyak Step-size, 2021; Schaipp et al., MoMo, 2024.
    """
    settings = Settings(learning_rate, momentum, weight_decay, box, total_steps, scale_latent)
    return optax.with_extra_args_support(OPTIMIZERS[name](settings))


__all__ = [
    "OPTIMIZERS",
    "BopState",
    "Box",
    "DeepFrankWolfeState",
    "PushToBoundsState",
    "bop",
    "bop_on_latent",
    "bound_statistics",
    "deep_frank_wolfe",
    "is_latent",
    "keep_in_box",
    "latent_box",
    "latent_learning_rate_scale",
    "make_optimizer",
    "push_to_bounds",
    "resolve_box",
    "scale_latent_updates",
]

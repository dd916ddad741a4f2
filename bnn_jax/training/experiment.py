"""From the names in a config to the functions that a training step is made of."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from bnn_jax.checks import look_up
from bnn_jax.losses import Loss, make_loss
from bnn_jax.models.build import build_model
from bnn_jax.optim import latent_box, make_optimizer, with_options
from bnn_jax.optim.frozen import train_only
from bnn_jax.regularizers import REGULARIZERS, penalty
from bnn_jax.schedules import make_schedule
from bnn_jax.training.config import Config, DataConfig, DiagnosticsConfig, DistillationConfig, ModelConfig
from bnn_jax.training.diagnostics import histogram_bounds
from bnn_jax.types import Params

HyperParameters: TypeAlias = dict[str, float | Array]
"""Those that are arguments of the training program: the numbers of :data:`OPTIMIZER_NUMBERS` that a config sets, and
`regularizer_strength`.  Other values do not compile again, and a sweep can map over them."""

OPTIMIZER_NUMBERS = (
    "learning_rate",
    "momentum",
    "weight_decay",
    "latent_weight_decay",
    "max_gradient_norm",
    "adaptive_clipping",
    "ema_decay",
)
"""Names of OptimConfig's fields; one that is None is left out of the program."""


class ImageInfo(NamedTuple):
    """What of a data set decides the programs: image shape, classes and the pixel statistics of the training split."""

    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Experiment(NamedTuple):
    """The functions that a training step is made of."""

    model: nn.Module
    loss: Loss
    optimizer: optax.GradientTransformationExtraArgs
    box: Callable[[Params], Any] | None
    learning_rate: Callable[[Array], Array] | None
    data: DataConfig
    info: ImageInfo
    inner_steps: int
    ema_decay: float | Array | None
    accumulate_steps: int
    total_steps: int
    penalty: Callable[[Params, Array], Array] | None
    distillation: DistillationConfig
    teacher: nn.Module | None
    diagnostics: DiagnosticsConfig
    histogram_bounds: tuple[float, float]
    precision: str
    devices: Mesh | None


def make_model(settings: ModelConfig, *, num_classes: int, steps_per_epoch: int | None = None) -> nn.Module:
    """The network of a validated config; to train it, with the steps of an epoch."""
    return build_model(num_classes=num_classes, steps_per_epoch=steps_per_epoch, **vars(settings))


def hyper_parameters(config: Config) -> HyperParameters:
    """Those of a config, as the training program takes them."""
    numbers = {name: getattr(config.optim, name) for name in OPTIMIZER_NUMBERS}
    numbers["regularizer_strength"] = config.regularizer_strength
    return {name: np.float32(value) for name, value in numbers.items() if value is not None}


def make_experiment(
    config: Config,
    info: ImageInfo,
    *,
    total_steps: int,
    teacher: ModelConfig | None = None,
    devices: Mesh | None = None,
    **hyper: float | Array,
) -> Experiment:
    """Look up the names of a validated config, or take the things in their place.

    Values in `hyper`, which may be traced, take the place of the config's own.
    """
    strength = hyper.pop("regularizer_strength", config.regularizer_strength)
    config = replace(config, regularizer_strength=strength, optim=replace(config.optim, **hyper))
    steps_per_epoch = max(1, total_steps // config.epochs)
    calls = steps_per_epoch * config.accumulate_steps  # of the network in an epoch of training
    model = make_model(config.model, num_classes=info.num_classes, steps_per_epoch=calls)
    optim = config.optim
    box = latent_box(*optim.latent_box) if optim.latent_box else None
    warmup = {"warmup_share": optim.warmup_share, "warmup_start_share": optim.warmup_start_share}
    schedule = make_schedule(optim.schedule, optim.learning_rate, total_steps, **warmup, **optim.schedule_options)
    record = with_options(optim.name, optim.options)
    optimizer = make_optimizer(
        record,
        learning_rate=schedule,
        peak=optim.learning_rate,
        momentum=optim.momentum if record.takes_momentum else None,
        weight_decay=optim.weight_decay,
        latent_weight_decay=optim.latent_weight_decay,
        decay_only=optim.decay_only,
        box=box,
        total_steps=total_steps,
        scale_latent=optim.scale_latent,
        max_gradient_norm=optim.max_gradient_norm,
        adaptive_clipping=optim.adaptive_clipping,
    )
    optimizer = train_only(optimizer, optim.train_only) if optim.train_only else optimizer
    return Experiment(
        model=model,
        loss=make_loss(config.loss, **config.loss_options),
        optimizer=optimizer,
        box=box,
        learning_rate=schedule if record.takes_learning_rate else None,
        data=config.data,
        info=info,
        inner_steps=optim.inner_steps,
        ema_decay=optim.ema_decay,
        accumulate_steps=config.accumulate_steps,
        total_steps=total_steps,
        penalty=_make_penalty(config, total_steps),
        distillation=config.distillation,
        teacher=None if teacher is None else make_model(teacher, num_classes=info.num_classes),
        diagnostics=config.diagnostics,
        histogram_bounds=histogram_bounds(optim.latent_box),
        precision=config.precision,
        devices=devices,
    )


def _make_penalty(config: Config, total_steps: int) -> Callable[[Params, Array], Array] | None:
    """(params, step) -> the regularizer's share of the objective."""
    regularizer = look_up("regularizer", config.regularizer, {"none": None, **REGULARIZERS})
    if regularizer is None:
        return None
    options = config.regularizer_schedule_options
    strength = make_schedule(config.regularizer_schedule, config.regularizer_strength, total_steps, **options)
    return lambda params, step: strength(step) * penalty(params, regularizer)

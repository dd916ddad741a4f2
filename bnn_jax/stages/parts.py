"""What recipes are made of: a network of a family, a stage of a config, He et al.'s optimizer."""

import inspect
from dataclasses import replace
from typing import Any

from bnn_jax.models.build import entry_of
from bnn_jax.stages.stage import Stage
from bnn_jax.training.config import Config, DistillationConfig, ModelConfig, OptimConfig


def at_epochs(epochs: int, *milestones: int, factor: float = 0.1) -> dict[str, Any]:
    """A stage's schedule: the rate times `factor` at the start of these of its `epochs`, counted from 0."""
    shares = tuple(milestone / epochs for milestone in milestones)
    return {"schedule": "milestones", "schedule_options": {"at_shares": shares, "factor": factor}}


REAL = OptimConfig("sgd", 0.1, weight_decay=1e-4, latent_box=None, **at_epochs(64, 32, 48))
"""He et al.'s settings for full precision (2016, section 4.2): 64,000 steps, all parameters decayed."""

ADAM = OptimConfig("adam", options={"decoupled": False}, latent_box=None)
"""That of PyTorch and Keras, whose weight decay is in the gradient."""


def network_of(
    base: Config,
    default: str,
    *,
    family: str | tuple[str, ...],
    inputs: str = "full_precision",
    kernels: str = "full_precision",
    kernel_options: dict[str, Any] | None = None,
    **options: Any,
) -> ModelConfig:
    """The network of `base` if its name begins with `family`, else `default` in its width, stage sizes and stem."""
    model = base.model
    own = model.name.startswith(family)
    name = model.name if own else default
    known = inspect.signature(entry_of(name).constructor).parameters
    taken = {key: value for key, value in model.options.items() if own or key in {"stage_sizes", "stem"} & set(known)}
    return ModelConfig(
        name,
        model.width,
        input_quantizer=inputs,
        kernel_quantizer=kernels,
        kernel_quantizer_options=kernel_options or {},
        options=taken | options,
    )


def stem_of(model: ModelConfig) -> str:
    """The stem of a network, for its teacher: stages that are matched have to be of the same size."""
    return model.options.get("stem", inspect.signature(entry_of(model.name).constructor).parameters["stem"].default)


def real_network(model: ModelConfig) -> ModelConfig:
    """A network in full precision."""
    return replace(
        model,
        input_quantizer="full_precision",
        kernel_quantizer="full_precision",
        input_quantizer_options={},
        kernel_quantizer_options={},
        gradient_quantizer=None,
        gradient_quantizer_options={},
        quantizers={},
        input_scaling=False,
    )


def taught_by_real(
    base: Config, real: ModelConfig, binary: ModelConfig, optim: OptimConfig, taught: DistillationConfig
) -> list[Stage]:
    """The stages real and binary, the second taught by the first."""
    return [
        stage_of(base, "real", real, optim),
        stage_of(base, "binary", binary, optim, taught=taught, teacher="real"),
    ]


def stage_of(
    base: Config,
    name: str,
    model: ModelConfig,
    optim: OptimConfig,
    *,
    epochs: float = 1.0,
    taught: DistillationConfig | None = None,
    changes: dict[str, Any] | None = None,
    **relations: Any,
) -> Stage:
    """A stage with `epochs` as a share of those of `base`, and what else `changes` in its config."""
    config = replace(
        base,
        name=f"{base.name}_{name}",
        epochs=max(1, round(base.epochs * epochs)),
        loss="cross_entropy",
        loss_options={},
        regularizer="none",
        model=model,
        optim=optim,
        distillation=taught or DistillationConfig(),
        optimizers=(),
    )
    return Stage(name, replace(config, **(changes or {})), **relations)

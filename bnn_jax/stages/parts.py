"""What recipes are made of: a network of a family, a stage of a config, He et al.'s optimizer."""

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

from bnn_jax.checks import require
from bnn_jax.errors import UsageError
from bnn_jax.models.binaryduo import BinaryDuoResNet
from bnn_jax.models.birealnet import BiRealBottleneckNet
from bnn_jax.models.bnext import BNext
from bnn_jax.models.build import NetworkLike, entry_of, settings_taken
from bnn_jax.models.mobilenet import ReActNetA
from bnn_jax.models.pokebnn import PokeBNN
from bnn_jax.models.residual import ResidualNetwork
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
    """The network of `base` if its name begins with `family`, else `default` in its width, stage sizes and stem.

    Raises:
      UsageError: if `base` quantizes its network in a way that recipes do not read.
    """
    model = base.model
    _check_read(model)
    own = is_of(model, family)
    width, taken = (model.width, model.options) if own else _size_for(default, model)
    return ModelConfig(
        model.name if own else default,
        width,
        input_quantizer=inputs,
        kernel_quantizer=kernels,
        kernel_quantizer_options=kernel_options or {},
        options=taken | options,
    )


def is_of(model: ModelConfig, family: str | tuple[str, ...]) -> bool:
    """Whether the name of a network begins with `family`."""
    return isinstance(model.name, str) and model.name.startswith(family)


def setting_of(model: ModelConfig, setting: str) -> Any:
    """What a network has, as its "stem": given, or the default of its constructor; None where it has no such setting.

    >>> setting_of(ModelConfig("resnet20"), "stem"), setting_of(ModelConfig("resnet20", width=4), "width")
    ('cifar', 4)
    """
    given = ({"width": model.width} | model.options).get(setting)
    if given is not None:
        return given
    constructor, taken = entry_of(model.name).constructor, settings_taken(model.name)
    if not taken:  # A network that is made.
        return getattr(constructor, setting, None)
    default = inspect.signature(constructor).parameters[setting].default if setting in taken else None
    return None if default is inspect.Parameter.empty else default


def stage_sizes_of(model: ModelConfig) -> tuple[int, ...]:
    """The stage sizes of a network that has some; a single number stands for a tuple of one."""
    sizes = setting_of(model, "stage_sizes")
    return tuple(sizes) if isinstance(sizes, tuple | list) else (sizes,)


OTHER_BLOCKS = (BiRealBottleneckNet, BNext, PokeBNN, ReActNetA)
"""Residual networks whose blocks are not two convolutions of 3x3."""


def _convolutions_counted(name: NetworkLike) -> int | None:
    """How many convolutions each number in `stage_sizes` counts: 2 of a block, 1 of a unit; None of other networks."""
    constructor = entry_of(name).constructor
    while isinstance(constructor, partial):
        constructor = constructor.func
    kind = constructor if isinstance(constructor, type) else type(constructor)
    if not issubclass(kind, ResidualNetwork | BinaryDuoResNet) or issubclass(kind, OTHER_BLOCKS):
        return None
    return 1 if getattr(kind, "counts_units", False) else 2


def _size_for(name: str, model: ModelConfig) -> tuple[int | None, dict[str, Any]]:
    """Width and options that give the network `name` the size of another one: as many convolutions in each stage."""
    stem = setting_of(model, "stem")
    taken = {"stem": stem} if isinstance(stem, str) else {}
    theirs, own = (_convolutions_counted(network) for network in (model.name, name))
    if theirs is None or own is None:
        return model.width, taken
    return setting_of(model, "width"), {
        "stage_sizes": tuple(-(-theirs * size // own) for size in stage_sizes_of(model)),
        **taken,
    }


def _check_read(model: ModelConfig) -> None:
    """Refuse what recipes do not read of a network.

    Raises:
      UsageError: for a gradient quantizer, quantizers of single layers, or XNOR-Net's map K.
    """
    rule, advice = "is not read by recipes, which set all quantizers themselves", "leave it out"
    for setting in ("gradient_quantizer", "quantizers", "input_scaling"):
        value = getattr(model, setting)
        require(f"model.{setting}", value, not value, rule, advice, error=UsageError)


def real_network(model: ModelConfig) -> ModelConfig:
    """A network in full precision.

    Raises:
      UsageError: as :func:`network_of`.
    """
    _check_read(model)
    return replace(
        model,
        input_quantizer="full_precision",
        kernel_quantizer="full_precision",
        input_quantizer_options={},
        kernel_quantizer_options={},
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
        regularizer_strength=Config.regularizer_strength,
        regularizer_schedule=Config.regularizer_schedule,
        regularizer_schedule_options={},
        model=model,
        optim=optim,
        distillation=taught or DistillationConfig(),
        optimizers=(),
    )
    return Stage(name, replace(config, **(changes or {})), **relations)

"""What a run is: frozen dataclasses, a file with `get_config()`, overrides from the command line."""

import argparse
import dataclasses
import inspect
import json
import runpy
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import tyro

from bnn_jax.errors import UsageError, unknown_name
from bnn_jax.losses import LOSSES, PIECEWISE_LINEAR
from bnn_jax.models import MODELS, PUBLISHED_QUANTIZERS
from bnn_jax.optim import OPTIMIZERS
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, make_quantizer
from bnn_jax.regularizers import REGULARIZERS
from bnn_jax.schedules import SCHEDULES

Options: TypeAlias = dict[str, int | float | bool | str | tuple[int, ...]]
"""Keyword arguments of a function that another setting names."""


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from, how they are split and augmented."""

    name: str = "digits"
    """digits, a FILE.npz, or a set prepared for TFDS."""
    data_dir: str | None = None
    """Folder that holds the prepared TFDS sets."""
    validation_examples: int | None = None
    """Taken from the training split; None takes the set's default share."""
    split_seed: int = 0
    """The split is the same for every run seed."""
    crop_padding: int = 0
    """Zero pixels around the image before a random crop of the old size."""
    flip: bool = False
    """Random horizontal flip."""


@dataclass(frozen=True)
class ModelConfig:
    """Which network; the quantizers make it binary, ternary or full precision."""

    name: str = "resnet20"
    width: int | None = None
    """Of the network's own unit, most often the filters of its first stage; None takes the published width."""
    input_quantizer: str | None = None
    """None takes the one with which the network was published; full_precision turns quantization off."""
    input_quantizer_options: Options = field(default_factory=dict, hash=False)
    """Of its function, as: bits 2 scale 0.5"""
    kernel_quantizer: str | None = None
    """Likewise."""
    kernel_quantizer_options: Options = field(default_factory=dict, hash=False)
    """Likewise."""
    input_scaling: bool = False
    """XNOR-Net's map K."""
    options: Options = field(default_factory=dict, hash=False)
    """What else this network's constructor takes, as: extra_layers 1"""


@dataclass(frozen=True)
class OptimConfig:
    """An optimizer and its settings."""

    name: str = "dfw"
    learning_rate: float = 1.0
    """Proximal eta of dfw; upper bound of the step size for polyak_sgd and momo."""
    momentum: float = 0.9
    weight_decay: float = 0.0
    """Not applied to latent weights, except by momo."""
    schedule: str = "constant"
    """constant, cosine, linear, exponential or staircase."""
    latent_box: tuple[float, float] | None = (-1.0, 1.0)
    """Bounds of the latent weights; None leaves them free."""
    scale_latent: bool = False
    """BinaryConnect's layer-wise scale of the latent weights' updates; for adam, sgd, polyak_sgd and momo."""
    inner_steps: int = 1
    """Frank-Wolfe steps on each linearised problem; for dfw."""
    tune_learning_rates: tuple[float, ...] = ()
    """The grid that --tune chooses from on the validation split."""


@dataclass(frozen=True)
class Config:
    """One run, complete: the same config and seed give the same parameters, bit for bit, on the same machine."""

    name: str
    epochs: int
    batch_size: int
    seed: int = 0
    """Of the initialisation, the order of examples and the augmentation."""
    loss: str = "smoothed_multiclass_hinge"
    regularizer: str = "none"
    """Of the latent weights, added to the loss; not for dfw."""
    regularizer_strength: float = 1e-6
    """Lambda, of the sum over weights."""
    regularizer_schedule: str = "constant"
    """Of lambda, one of those of the learning rate."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    optimizers: Annotated[tuple[OptimConfig, ...], tyro.conf.Suppress] = ()
    """The settings that a comparison uses, one for each optimizer."""
    tune_epochs: int = 1
    """Epochs of each trial of --tune."""
    scan_steps: int = 50
    """Training steps in one jitted call; between calls progress shows and an interrupt saves."""
    checkpoint_every_epochs: int = 1


Settings: TypeAlias = Annotated[Config, tyro.conf.arg(name="")]
"""The field type by which a script takes the config's own options."""


def load_config(path: str | Path) -> Config:
    """The :class:`Config` that the `get_config()` of a Python file returns.

    Raises:
      UsageError: if there is no such file, or it does not define `get_config`, or that returns something else.
    """
    path = Path(path)
    if not path.is_file():
        near = ", ".join(sorted(str(p) for p in path.parent.glob("*.py"))) or "none"
        raise UsageError(f"`--config` (={path}) does not exist; files in that folder: {near}")
    get_config = runpy.run_path(str(path)).get("get_config")
    config = get_config() if callable(get_config) else None
    if not isinstance(config, Config):
        raise UsageError(f"`--config` (={path}) must define a function get_config() that returns a bnn_jax Config")
    return config


def select_optimizer(config: Config, name: str) -> OptimConfig:
    """The settings that `config` keeps for the optimizer `name`.

    Raises:
      UsageError: if it has none; names the nearest.
    """
    settings = {optim.name: optim for optim in (*config.optimizers, config.optim)}
    if name not in settings:
        raise unknown_name("optimizer", name, settings)
    return settings[name]


def parse(arguments_type: type, *, argv: Sequence[str] | None = None):
    """Parse a script's command line, overrides of the config among it: ``--optim.learning-rate 0.1 --epochs 3``.

    An unknown or malformed option ends the program with exit code 2 and names the nearest.

    Args:
      arguments_type: dataclass with the script's own options; its field `config` is the path of a config file,
        `settings` becomes the resolved :class:`Config`, and `optimizer`, where there is one, names the settings to
        start from.
      argv: what follows the script's name; None takes it from `sys.argv`.

    Raises:
      UsageError: for a config file or optimizer that does not exist.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--config", default=arguments_type.config)
    first_look.add_argument("--optimizer")
    found, _ = first_look.parse_known_args(argv)
    config = load_config(found.config)
    if found.optimizer is not None and hasattr(arguments_type, "optimizer"):
        config = dataclasses.replace(config, optim=select_optimizer(config, found.optimizer))
    return tyro.cli(arguments_type, args=argv, default=arguments_type(settings=config))


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any]) -> Config:
    """The config that :func:`to_dict` wrote.

    Raises:
      UsageError: for a key or structure that this version does not know; the nearest key is named.
    """

    def build(dataclass_type, values, prefix):
        types = typing.get_type_hints(dataclass_type)
        for key in values:
            if key not in types:
                raise unknown_name("config key", f"{prefix}{key}", [f"{prefix}{name}" for name in types])
        made = {}
        for key, value in values.items():
            if dataclasses.is_dataclass(types[key]):
                value = build(types[key], value, f"{prefix}{key}.")
            elif key == "optimizers":
                value = tuple(build(OptimConfig, item, "optimizers.") for item in value)
            elif types[key] == Options:
                value = {name: tuple(v) if isinstance(v, list) else v for name, v in value.items()}
            made[key] = tuple(value) if isinstance(value, list) else value
        return dataclass_type(**made)

    return build(Config, values, "")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def with_published_quantizers(model: ModelConfig) -> ModelConfig:
    """`model` with a name for each quantizer; options that are given go before the published ones."""
    published = PUBLISHED_QUANTIZERS[model.name]
    if model.input_quantizer is None:
        options = dict(published.input_options) | model.input_quantizer_options
        model = replace(model, input_quantizer=published.input_quantizer, input_quantizer_options=options)
    if model.kernel_quantizer is None:
        options = dict(published.kernel_options) | model.kernel_quantizer_options
        model = replace(model, kernel_quantizer=published.kernel_quantizer, kernel_quantizer_options=options)
    return model


def validate(config: Config) -> Config:
    """Return `config`, its quantizers named, if a run can start from it.

    Raises:
      UsageError: for an unknown name (the nearest is named) or a value out of range.
    """
    if config.model.name not in MODELS:
        raise unknown_name("model.name", config.model.name, MODELS)
    config = replace(config, model=with_published_quantizers(config.model))
    _check_names(config)
    _check_options(config.model)
    _check_ranges(config)
    if config.optim.name == "dfw" and config.loss not in PIECEWISE_LINEAR:
        raise UsageError(
            f"`loss` (={config.loss!r}) does not go with dfw, whose step size is exact for a piecewise linear loss; "
            f"choose {' or '.join(PIECEWISE_LINEAR)}, or another optimizer"
        )
    if config.model.input_scaling and config.model.input_quantizer == "full_precision":
        raise UsageError("`model.input_scaling` (=True) needs quantized inputs; choose a `model.input_quantizer`")
    return config


def _check_names(config: Config) -> None:
    for argument, name, table in (
        ("loss", config.loss, LOSSES),
        ("model.input_quantizer", config.model.input_quantizer, ACTIVATION_QUANTIZERS),
        ("model.kernel_quantizer", config.model.kernel_quantizer, WEIGHT_QUANTIZERS),
        ("optim.name", config.optim.name, OPTIMIZERS),
        ("optim.schedule", config.optim.schedule, SCHEDULES),
        ("regularizer", config.regularizer, ("none", *REGULARIZERS)),
        ("regularizer_schedule", config.regularizer_schedule, SCHEDULES),
    ):
        if name not in table:
            raise unknown_name(argument, name, table)


def _check_options(model: ModelConfig) -> None:
    for table, name, options in (
        (ACTIVATION_QUANTIZERS, model.input_quantizer, model.input_quantizer_options),
        (WEIGHT_QUANTIZERS, model.kernel_quantizer, model.kernel_quantizer_options),
    ):
        try:
            make_quantizer(table, name, **options)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{name} cannot be made: {error}") from None
    taken = inspect.signature(MODELS[model.name]).parameters.keys()
    known = taken - {"parent", "name", "num_classes", *vars(model)}
    for option in model.options:
        if option not in known:
            raise unknown_name("model.options", option, known)
    if model.input_scaling and "input_scaling" not in taken:
        raise UsageError(f"`model.input_scaling` (=True) is not an option of {model.name}; turn it off")


def _check_ranges(config: Config) -> None:
    optim = config.optim
    for argument, value, holds, rule in (
        ("epochs", config.epochs, config.epochs >= 1, "must be at least 1"),
        ("batch_size", config.batch_size, config.batch_size >= 1, "must be at least 1"),
        ("seed", config.seed, 0 <= config.seed < 2**32, "must be in [0, 2^32)"),
        ("scan_steps", config.scan_steps, config.scan_steps >= 1, "must be at least 1"),
        ("tune_epochs", config.tune_epochs, config.tune_epochs >= 1, "must be at least 1"),
        (
            "checkpoint_every_epochs",
            config.checkpoint_every_epochs,
            config.checkpoint_every_epochs >= 1,
            "must be >= 1",
        ),
        ("data.crop_padding", config.data.crop_padding, config.data.crop_padding >= 0, "must not be negative"),
        ("model.width", config.model.width, config.model.width is None or config.model.width >= 1, "must be at least 1"),
        ("optim.learning_rate", optim.learning_rate, optim.learning_rate > 0, "must be positive"),
        ("optim.momentum", optim.momentum, 0 <= optim.momentum < 1, "must be in [0, 1)"),
        ("optim.weight_decay", optim.weight_decay, optim.weight_decay >= 0, "must not be negative"),
        ("optim.latent_box", optim.latent_box, _is_box(optim.latent_box), "must be (lower, upper) with lower < upper"),
        ("optim.inner_steps", optim.inner_steps, optim.inner_steps >= 1, "must be at least 1"),
        ("optim.inner_steps", optim.inner_steps, optim.inner_steps == 1 or optim.name == "dfw", "is for dfw alone"),
        (
            "optim.scale_latent",
            optim.scale_latent,
            not optim.scale_latent or optim.name in ("adam", "sgd", "polyak_sgd", "momo"),
            "is for adam, sgd, polyak_sgd and momo",
        ),
        (
            "optim.latent_box",
            optim.latent_box,
            optim.name != "bnew" or optim.latent_box is not None,
            "must not be None for bnew",
        ),
        (
            "optim.latent_box",
            optim.latent_box,
            optim.name != "bop" or optim.latent_box is None or optim.latent_box[0] <= -1 <= 1 <= optim.latent_box[1],
            "must contain -1 and 1 for bop, whose weights are those",
        ),
        (
            "regularizer_strength",
            config.regularizer_strength,
            config.regularizer_strength >= 0,
            "must not be negative",
        ),
        (
            "regularizer",
            config.regularizer,
            config.regularizer == "none" or optim.name != "dfw",
            "does not go with dfw, whose step size is exact for the loss alone; choose none, or another optimizer",
        ),
    ):
        if not holds:
            raise UsageError(f"`{argument}` (={value}) {rule}")


def _is_box(box) -> bool:
    return box is None or (len(box) == 2 and box[0] < box[1])

"""What a run is: frozen dataclasses, a file with `get_config()`, overrides from the command line."""

import argparse
import dataclasses
import json
import runpy
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import tyro

from bnn_jax.errors import UsageError, unknown_name

Options: TypeAlias = dict[str, int | float | bool | str | tuple[int, ...] | tuple[float, ...]]
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
    stream: bool = False
    """Read batches from disk while training, for a set that does not fit in memory."""
    preprocessing: str = "none"
    """How images of any size are cropped and resized, for stream: a name in PREPROCESSING, as random_resized_crop."""
    image_size: int | None = None
    """Height and width after the preprocessing; None takes 224."""
    lighting_std: float = 0.0
    """Of the random colour that is added to an RGB image; 0.1 is usual for ImageNet."""


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
    train_only: tuple[str, ...] = ()
    """Shell-style patterns of the parameters to train, as *norm*; the others are frozen; none trains all."""
    tune_learning_rates: tuple[float, ...] = ()
    """The grid that --tune chooses from on the validation split."""


@dataclass(frozen=True)
class DistillationConfig:
    """What a network is taught by another one, the teacher that its stage names."""

    losses: dict[str, float] = field(default_factory=dict, hash=False)
    """Weights of what is added to the loss, as: attention 30 knowledge 3; nothing without a teacher."""
    label_weight: float = 1.0
    """Weight of the loss of the labels."""
    temperature: float = 1.0
    """Of knowledge, where 1 is usual, and of similarity, where 0.2 is."""
    queue_size: int = 4096
    """Keys that similarity compares with; 65536 in S2-BNN."""


@dataclass(frozen=True)
class DiagnosticsConfig:
    """What is recorded of the inside of the network while it trains; nothing by default, at no cost."""

    every_steps: int = 0
    """A record at the end of the jitted call (see scan_steps) in which as many steps have passed; 0 records none."""
    histogram_bins: int = 20
    """Of the latent weights, over their box."""
    mismatch_coordinates: int = 4
    """Weights of each layer that compare gradient and flip, at a forward pass each; 0 leaves the comparison out."""


@dataclass(frozen=True)
class Config:
    """One run, complete: the same config and seed give the same parameters, bit for bit, on the same machine."""

    name: str
    epochs: int
    batch_size: int
    seed: int = 0
    """Of the initialisation, the order of examples and the augmentation."""
    loss: str = "smoothed_multiclass_hinge"
    precision: str = "float32"
    """Of the activations while training: float32 or bfloat16; weights, statistics and sums are float32 either way."""
    regularizer: str = "none"
    """Of the latent weights, added to the loss; not for dfw."""
    regularizer_strength: float = 1e-6
    """Lambda, of the sum over weights."""
    regularizer_schedule: str = "constant"
    """Of lambda, one of those of the learning rate."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    optimizers: Annotated[tuple[OptimConfig, ...], tyro.conf.Suppress] = ()
    """The settings that a comparison uses, one for each optimizer."""
    tune_epochs: int = 1
    """Epochs of each trial of --tune."""
    scan_steps: int = 50
    """At most so many training steps in one jitted call; between calls, which end within about three seconds where a
    step does, progress shows and an interrupt saves."""
    checkpoint_every_epochs: int = 1
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)


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

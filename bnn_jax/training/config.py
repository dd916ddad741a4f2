"""What a run is: frozen dataclasses, and a file with `get_config()`."""

import dataclasses
import json
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeAlias

import numpy as np
import tyro
from tyro.constructors import PrimitiveConstructorSpec

from bnn_jax.checks import Rule, plain_number, require
from bnn_jax.errors import UsageError, unknown_name
from bnn_jax.names import absolute, last_part, module_of_file, name_of, record_of, why_not_run
from bnn_jax.paths import local_path
from bnn_jax.training.options import Options


def _name_read_by(read: Callable[[list[str]], Any]) -> PrimitiveConstructorSpec:
    return PrimitiveConstructorSpec(1, "NAME", read, lambda value: True, lambda value: [str(value)])


Name: TypeAlias = Annotated[Any, _name_read_by(lambda words: words[0])]
"""A name in a table, `package.module:Name` or `file.py:Name`, or the thing that it stands for."""
OptionalName: TypeAlias = Annotated[Any, _name_read_by(lambda words: None if words[0] == "None" else words[0])]

POSITIVE = Rule(lambda value: value > 0, "must be positive")
SHARE = Rule(lambda value: 0 <= value <= 1, "must be in [0, 1]")
NOT_NEGATIVE = Rule(lambda value: value >= 0, "must not be negative")
AT_LEAST_1 = Rule(lambda value: value >= 1, "must be at least 1")
"""Rules of fields; bnn_jax.training.validation checks them wherever a value is not None."""


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from, how they are split and augmented."""

    name: str = "digits"
    """digits, a FILE.npz, a FOLDER with a folder of images for each class, a set prepared for TFDS; a FILE.txt, or
    text, the docstrings of this package, for networks of text."""
    data_dir: str | None = None
    """Folder that holds folders of images and prepared TFDS sets."""
    validation_examples: int | None = None
    """Taken from the training split, of each class its share; None takes the set's default share."""
    split_seed: int = 0
    """The split is the same for every run seed."""
    crop_padding: Annotated[int, NOT_NEGATIVE] = 0
    """Zero pixels around the image before a random crop of the old size."""
    smallest_area: Annotated[float, Rule(lambda value: 0 < value <= 1, "must be in (0, 1]; 1 is no crop")] = 1.0
    """Smallest share of an image's area that a random crop takes, of random shape and resized to the image's size."""
    flip: bool = False
    """Random horizontal flip."""
    mixup_alpha: Annotated[float, NOT_NEGATIVE._replace(sentence="must not be negative; 0 switches mixup off")] = 0.0
    """Mix each training image, and the loss of its label, with another one of the batch, by shares drawn from
    Beta(alpha, alpha); 0.2 is usual."""
    stream: bool = False
    """Read batches from disk while training, for a set that does not fit in memory."""
    preprocessing: str = "none"
    """How images of any size are cropped and resized: center_crop, which takes the middle of each resized by its
    shorter side, or for stream another name in PREPROCESSING, as random_resized_crop."""
    image_size: Annotated[int | None, AT_LEAST_1] = None
    """Height and width after the preprocessing; None takes 224."""
    tokens: Annotated[int | None, AT_LEAST_1] = None
    """Bytes of an example of a text; None takes 64."""
    lighting_std: Annotated[float, NOT_NEGATIVE._replace(sentence="must not be negative; 0 switches lighting off")] = (
        0.0
    )
    """Standard deviation of the random colour that is added to an RGB image; 0.1 is usual for ImageNet."""


@dataclass(frozen=True)
class ModelConfig:
    """Which network; the quantizers make it binary, ternary or full precision."""

    name: Name = "resnet20"
    """A network of `bnn-jax list models`; or package.module:Name of a Flax module, its class or a function that makes
    one, which gets what is set here, and `num_classes` if it takes them."""
    width: Annotated[int | None, AT_LEAST_1] = None
    """Size of the network in its own unit, most often the filters of its first stage; None takes the published one."""
    input_quantizer: OptionalName = None
    """What quantizes the inputs of layers; None takes the quantizer with which the network was published,
    full_precision leaves them real."""
    input_quantizer_options: Options = field(default_factory=dict, hash=False)
    """Keyword arguments of the input quantizer, as: bits 2 scale 0.5"""
    kernel_quantizer: OptionalName = None
    """What quantizes the weights of layers; None takes the quantizer with which the network was published,
    full_precision leaves them real."""
    kernel_quantizer_options: Options = field(default_factory=dict, hash=False)
    """Keyword arguments of the kernel quantizer, as: estimator approx_sign"""
    gradient_quantizer: OptionalName = None
    """What quantizes the gradients of the quantized layers' outputs, as dorefa; None leaves them as they are."""
    gradient_quantizer_options: Options = field(default_factory=dict, hash=False)
    """Keyword arguments of the gradient quantizer, as: bits 6"""
    quantizers: Options = field(default_factory=dict, hash=False)
    """Quantizers of single layers, as: stage3_* real head 8-bit; pattern of a name, then real, binary, 8-bit or a pair
    as ste_sign,xnor."""
    input_scaling: bool = False
    """Multiply the outputs of each layer by XNOR-Net's map K, the mean magnitude of the inputs."""
    options: Options = field(default_factory=dict, hash=False)
    """What else this network's constructor takes, as: extra_layers 1"""


@dataclass(frozen=True)
class OptimConfig:
    """An optimizer and its settings."""

    name: Name = "dfw"
    """One of `bnn-jax list optimizers`; or package.module:Name of what makes one of optax, as optax:lion."""
    learning_rate: Annotated[float, POSITIVE] = 1.0
    """Proximal eta of dfw; upper bound of the step size for polyak_sgd and momo. A transform of optax that is made has
    its own, and takes none."""
    momentum: Annotated[float, Rule(lambda value: 0 <= value < 1, "must be in [0, 1)")] = 0.9
    """Of the gradients, beta1 of adam; see `bnn_jax.make_optimizer`."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Decay of the weights that are not latent; momo's of all. In the gradient (coupled) of sgd and polyak_sgd, in the
    proximal problem of dfw, beside the step (decoupled) in momo, bop, bnew and adam; for adam see decoupled in options.
    """
    latent_weight_decay: Annotated[float, NOT_NEGATIVE] = 0.0
    """Decay of the latent weights, applied in the same way; not for momo and bop."""
    decay_only: tuple[str, ...] = ()
    """Shell-style patterns of the parameters that are decayed, as *kernel, which spares norms, biases and scales; none
    decays all."""
    options: Options = field(default_factory=dict, hash=False)
    """What else this optimizer takes, as: threshold 1e-6 adaptivity_rate 1e-4 for bop, decoupled False for adam."""
    schedule: Name = "constant"
    """How the learning rate falls: constant, cosine, linear, exponential or milestones."""
    schedule_options: Options = field(default_factory=dict, hash=False)
    """Keyword arguments of the schedule, as: at_shares 0.5 0.75 factor 0.1 for milestones, at these shares of the run;
    final_share 0.01 for cosine, linear and exponential, the last rate as a share of the first; cycles 5 for a cosine
    that starts anew."""
    warmup_share: Annotated[float, Rule(lambda value: 0 <= value < 1, "must be in [0, 1)")] = 0.0
    """Share of the run in which the learning rate first rises linearly to its value, with any schedule."""
    warmup_start_share: Annotated[float, SHARE] = 0.0
    """Share of the learning rate with which the warm-up begins."""
    latent_box: Annotated[
        tuple[float, float] | None,
        Rule(lambda box: len(box) == 2 and box[0] < box[1], "must be (lower, upper) with lower < upper"),
    ] = (-1.0, 1.0)
    """Bounds of the latent weights; None leaves them free."""
    max_gradient_norm: Annotated[float | None, POSITIVE] = None
    """Global norm to which gradients are clipped, for adam, sgd, bop and bnew; None leaves them as they are."""
    adaptive_clipping: Annotated[float | None, POSITIVE] = None
    """Share of the norm of each channel's weights to which their gradient is clipped, but in the last layer, as 0.02
    without batch normalization; for adam, sgd, bop and bnew."""
    scale_latent: bool = False
    """BinaryConnect's layer-wise scale of the latent weights' updates; for adam, sgd, polyak_sgd and momo."""
    ema_decay: Annotated[
        float | None, Rule(lambda value: 0 < np.float32(value) < 1, "must be in (0, 1), as float32")
    ] = None
    """Decay of an average of parameters and batch statistics over the steps, as 0.999; the average is what is
    evaluated, kept as best, exported, and taken by later stages. None takes the newest ones."""
    inner_steps: Annotated[int, AT_LEAST_1] = 1
    """Frank-Wolfe steps on each linearised problem; for dfw."""
    train_only: tuple[str, ...] = ()
    """Shell-style patterns of the parameters to train, as *norm*; the others are frozen; none trains all."""
    tune: Options = field(default_factory=dict, hash=False)
    """What --tune chooses on the validation split, as: learning_rate 0.1 0.3 1 weight_decay 1e-6 1e-3 schedule
    constant,cosine.  Two numbers are the ends of a range, three or more a grid that goes on while its edge is best."""


@dataclass(frozen=True)
class DistillationConfig:
    """What a network is taught by another one, the teacher that its stage names."""

    losses: Annotated[dict[str, float], tyro.conf.arg(metavar="[LOSS WEIGHT ...]")] = field(
        default_factory=dict, hash=False
    )
    """Weights of what is added to the loss, as: attention_mse 30 knowledge 3; nothing without a teacher."""
    label_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """Weight of the loss of the labels."""
    temperature: Annotated[float, POSITIVE] = 1.0
    """Divides the logits: of knowledge, where 1 is usual, and of embedding and similarity, where 0.2 is."""
    queue_size: Annotated[int, AT_LEAST_1] = 4096
    """Keys that similarity compares with; MoCo has 65536."""


@dataclass(frozen=True)
class DiagnosticsConfig:
    """What is recorded of the inside of the network while it trains; nothing by default, at no cost."""

    every_steps: Annotated[
        int,
        Rule(
            lambda value: value == 0 or value >= 2,
            "must be 0, which records none, or at least 2, in which a weight can flip and flip back",
        ),
    ] = 0
    """A record at the end of the jitted call (see scan_steps) in which as many steps have passed; 0 records none."""
    histogram_bins: Annotated[int, AT_LEAST_1._replace(sentence="must be at least 1; 20 is usual")] = 20
    """Bins of the histograms of latent weights, over their box."""
    mismatch_coordinates: Annotated[
        int, NOT_NEGATIVE._replace(sentence="must not be negative; 0 leaves the comparison out")
    ] = 4
    """Weights of each layer that compare gradient and flip, at a forward pass each; 0 leaves the comparison out."""


@dataclass(frozen=True)
class Config:
    """One run, complete.

    The same config gives the same parameters, bit for bit, with the same data, versions and devices: on a CPU; on a GPU
    with ``XLA_FLAGS=--xla_gpu_deterministic_ops=true``.  On another kind of device or machine it does not.
    """

    name: str
    """Of the experiment, by which its folder in runs/ is called."""
    epochs: Annotated[int, AT_LEAST_1]
    """Passes over the training images."""
    batch_size: Annotated[int, AT_LEAST_1]
    """Examples of a training step."""
    seed: Annotated[int, Rule(lambda value: 0 <= value < 2**32, "must be in [0, 2^32)")] = 0
    """Decides the initialisation, the order of examples and the augmentation."""
    loss: Name = "smoothed_multiclass_hinge"
    """One of `bnn-jax list losses`, or package.module:Name of a function (logits, labels) -> a loss for each example;
    dfw takes multiclass_hinge or smoothed_multiclass_hinge."""
    loss_options: Options = field(default_factory=dict, hash=False)
    """Keyword arguments of the loss, as: smoothing 0.2 for label_smoothed_cross_entropy, temperature 2.0 for
    smoothed_multiclass_hinge."""
    accumulate_steps: Annotated[int, AT_LEAST_1] = 1
    """Parts in which a step takes its batch, one after another, to need less memory: loss and gradient are those of the
    whole batch, batch normalization sees a part at a time."""
    precision: Annotated[str, Rule(lambda value: value in ("float32", "bfloat16"), "must be float32 or bfloat16")] = (
        "float32"
    )
    """Dtype of the activations while training, float32 or bfloat16; weights, statistics and sums are float32 either
    way."""
    regularizer: Name = "none"
    """What is added to the loss for the latent weights, as manhattan; not for dfw."""
    regularizer_strength: Annotated[float, NOT_NEGATIVE] = 1e-6
    """Lambda, by which the regularizer's sum over weights is multiplied."""
    regularizer_schedule: Name = "constant"
    """How lambda falls: constant, cosine, linear, exponential or milestones."""
    regularizer_schedule_options: Options = field(default_factory=dict, hash=False)
    """Keyword arguments of lambda's schedule, as: final_share 1e-2 for exponential."""
    init_from: str | None = None
    """Weights to start from: the folder of a run, or a file: .npz, .pth of PyTorch, .h5 of Keras or larq; all that is
    missing, unknown or of another shape is listed. None starts from random ones."""
    init_options: Options = field(default_factory=dict, hash=False)
    """How they are taken, as: layout reactnet_a epsilon 1e-5 for PyTorch, which last for a run, fresh params/head/* for
    variables that start from random ones all the same."""
    init_sha256: Annotated[str | None, tyro.conf.Suppress] = None
    """Hash of what is in `init_from`."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    optimizers: Annotated[tuple[OptimConfig, ...], tyro.conf.Suppress] = ()
    """The settings that a comparison uses, one for each optimizer."""
    tune_trials: Annotated[int, AT_LEAST_1] = 8
    """Trials of --tune for each row, at most."""
    tune_epochs: Annotated[int | None, AT_LEAST_1] = None
    """Epochs of each trial; None takes those of the run."""
    scan_steps: Annotated[int, AT_LEAST_1] = 50
    """At most so many training steps in one jitted call; between calls, which end within about three seconds where a
    step does, progress shows and an interrupt saves."""
    checkpoint_every_epochs: Annotated[int, AT_LEAST_1] = 1
    """Epochs from one checkpoint to the next; the last one is always saved."""
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)


PARTS = (Config, DataConfig, ModelConfig, OptimConfig, DistillationConfig, DiagnosticsConfig)
"""The dataclasses that a config is made of."""

Settings: TypeAlias = Annotated[Config, tyro.conf.arg(name="")]
"""The field type by which a script takes the config's own options."""


def find_config(path: str | Path) -> Path:
    """The file of a config: a path, or the name of one that comes with the package, as digits_xnor.

    Raises:
      UsageError: if there is neither; names the files in its folder, or those that come with the package.
    """
    path = local_path("--config", path)
    if path.is_file():
        return path
    # In a wheel the folder lies within the package, in a clone beside it.
    package = Path(__file__).parents[1]
    folder = next(found for found in (package / "configs", package.parent / "configs") if found.is_dir())
    shipped = {file.stem: file for file in sorted(folder.glob("*.py"))}
    if str(path) in shipped:
        return shipped[str(path)]
    near = ", ".join(sorted(str(file) for file in path.parent.glob("*.py"))) or "none"
    raise UsageError(
        f"`--config` (={path}) does not exist; files in that folder: {near}; by name alone: {', '.join(shipped)}"
    )


def load_config(path: str | Path) -> Config:
    """The :class:`Config` that the `get_config()` of a Python file returns, with a name in the place of each thing.

    What cannot be imported by a name of its own is named by where the file's config has it.

    Raises:
      UsageError: as :func:`config_module`; if it does not define `get_config`, or that raises an error or returns
        something else.
    """
    module = config_module(path)
    get_config = getattr(module, "get_config", None)
    with running(path):
        config = get_config() if callable(get_config) else None
    if not isinstance(config, Config):
        raise UsageError(f"`--config` (={path}) must define a function get_config() that returns a bnn_jax Config")
    return with_names(config, lambda where, thing: name_of(thing) or f"{module.__file__}:get_config().{where}")


def config_module(path: str | Path) -> ModuleType:
    """What the file of a config defines.

    Raises:
      UsageError: as :func:`find_config`; if the file raises an error, with its line.
    """
    file = find_config(path)
    with running(path):
        return module_of_file(file)


@contextmanager
def running(typed: object) -> Iterator[None]:
    """Tell what the code of a config's file raises as an error of `--config`, with its line.

    Args:
      typed: what the user typed for it.

    Raises:
      UsageError: for any error, and one of these as it is.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"`--config` (={typed}) cannot be run: {why_not_run(error)}") from error


def with_names(config: Any, name: Callable[[str, Any], Any], prefix: str = "") -> Any:
    """A config with what `name` makes of a setting's dotted name and a thing, in the place of each such thing.

    A thing is what is neither plain JSON nor part of the config: a class, a function, a module, a record of a table.
    NumPy's numbers become Python's, its arrays tuples.
    """
    if isinstance(config, PARTS):
        changed = {key: with_names(value, name, f"{prefix}{key}.") for key, value in vars(config).items()}
        return dataclasses.replace(config, **changed)
    if type(config) is dict:
        return {absolute(key): with_names(value, name, f"{prefix}{key}.") for key, value in config.items()}
    if type(config) in (tuple, list):
        return type(config)(with_names(value, name, f"{prefix}{index}.") for index, value in enumerate(config))
    if isinstance(config, np.ndarray) and config.ndim:
        return with_names(tuple(config), name, prefix)
    config = config.item() if isinstance(config, np.ndarray) else plain_number(config)
    if config is None or isinstance(config, str | int | float):
        return absolute(config)
    return name(prefix.removesuffix("."), config)


def require_config(config: Any) -> None:
    """Refuse what is no config.

    Raises:
      UsageError: for it.
    """
    way = "bnn_jax.training.config.load_config makes one from a name or a file"
    require("config", config, isinstance(config, Config), "must be of type Config", way, error=UsageError)


def select_optimizer(config: Config, name: str) -> OptimConfig:
    """The settings that `config` keeps for the optimizer `name`; the last part of one to import will do.

    Raises:
      UsageError: if it has none; names the nearest.
    """
    kept = (*config.optimizers, config.optim)
    settings = {last_part(optim.name): optim for optim in kept} | {optim.name: optim for optim in kept}
    if name not in settings:
        raise unknown_name("optimizer", name, settings)
    return settings[name]


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain JSON values; of a thing without a name, what it is, see :func:`bnn_jax.names.record_of`."""
    return json.loads(json.dumps(dataclasses.asdict(with_names(config, lambda where, thing: record_of(thing)))))


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
            elif typing.get_origin(types[key]) is dict:
                value = {name: tuple(v) if isinstance(v, list) else v for name, v in value.items()}
            made[key] = tuple(value) if isinstance(value, list) else value
        return dataclass_type(**made)

    return build(Config, values, "")


def without_tuning(config: Config) -> Config:
    """Return the config less what chooses settings among several: what is left decides a run."""
    optim = dataclasses.replace(config.optim, tune={})
    return dataclasses.replace(config, optim=optim, optimizers=(), tune_trials=1, tune_epochs=None)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat

"""Whether a run can start from a config: names, options and ranges, each with an error that says the way out."""

import inspect
from dataclasses import replace

from bnn_jax.data import PREPROCESSING
from bnn_jax.distillation import DISTILLATION_LOSSES
from bnn_jax.errors import UsageError, unknown_name
from bnn_jax.losses import LOSSES, PIECEWISE_LINEAR
from bnn_jax.models import MODELS
from bnn_jax.models.build import quantizer_settings
from bnn_jax.optim import OPTIMIZERS
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, make_quantizer
from bnn_jax.regularizers import REGULARIZERS
from bnn_jax.schedules import SCHEDULES
from bnn_jax.training.config import Config, DataConfig, ModelConfig


def with_published_quantizers(model: ModelConfig) -> ModelConfig:
    """`model` with a name for each quantizer; options that are given go before the published ones."""
    given = {key: value for key, value in vars(model).items() if "quantizer" in key}
    return replace(model, **quantizer_settings(model.name, **given))


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
    _check_data(config.data)
    if config.optim.name == "dfw" and config.loss not in PIECEWISE_LINEAR:
        raise UsageError(
            f"`loss` (={config.loss!r}) does not go with dfw, whose step size is exact for a piecewise linear loss; "
            f"choose {' or '.join(PIECEWISE_LINEAR)}, or another optimizer"
        )
    _check_distillation(config)
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


def _check_data(data: DataConfig) -> None:
    if data.preprocessing not in ("none", *PREPROCESSING):
        raise unknown_name("data.preprocessing", data.preprocessing, ("none", *PREPROCESSING))
    loaded_whole = data.name == "digits" or data.name.endswith(".npz")
    for argument, value, holds, rule in (
        (
            "stream",
            data.stream,
            not data.stream or not loaded_whole,
            f"does not go with {data.name}, which is loaded whole; turn it off, or name a set prepared for TFDS",
        ),
        (
            "preprocessing",
            data.preprocessing,
            data.preprocessing == "none" or data.stream,
            "is for images that are read from disk; set `data.stream`",
        ),
        (
            "image_size",
            data.image_size,
            data.image_size is None or data.preprocessing != "none",
            f"needs a `data.preprocessing`: {', '.join(PREPROCESSING)}",
        ),
        ("image_size", data.image_size, data.image_size is None or data.image_size >= 1, "must be at least 1"),
        ("lighting_std", data.lighting_std, data.lighting_std >= 0, "must not be negative; 0 switches lighting off"),
    ):
        if not holds:
            raise UsageError(f"`data.{argument}` (={value}) {rule}")


def _check_distillation(config: Config) -> None:
    taught = config.distillation
    for name, weight in taught.losses.items():
        if name not in DISTILLATION_LOSSES:
            raise unknown_name("distillation.losses", name, DISTILLATION_LOSSES)
        if not weight > 0:
            raise UsageError(f"`distillation.losses` (={name} {weight}) must have positive weights; leave {name} out")
    for argument, value, holds, rule in (
        ("label_weight", taught.label_weight, taught.label_weight >= 0, "must not be negative"),
        (
            "label_weight",
            taught.label_weight,
            taught.losses or taught.label_weight == 1,
            "must be 1 without `distillation.losses`, for there is nothing else to weigh",
        ),
        ("temperature", taught.temperature, taught.temperature > 0, "must be positive"),
        ("queue_size", taught.queue_size, taught.queue_size >= 1, "must be at least 1"),
        (
            "losses",
            taught.losses,
            not taught.losses or config.optim.name != "dfw",
            "do not go with dfw, whose step size is exact for a piecewise linear loss; choose another optimizer",
        ),
    ):
        if not holds:
            raise UsageError(f"`distillation.{argument}` (={value}) {rule}")


def _check_options(model: ModelConfig) -> None:
    for table, name, options in (
        (ACTIVATION_QUANTIZERS, model.input_quantizer, model.input_quantizer_options),
        (WEIGHT_QUANTIZERS, model.kernel_quantizer, model.kernel_quantizer_options),
    ):
        try:
            make_quantizer(table, name, **options)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{name} cannot be made: {error}") from None
    taken = inspect.signature(MODELS[model.name].constructor).parameters.keys()
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
        ("precision", config.precision, config.precision in ("float32", "bfloat16"), "must be float32 or bfloat16"),
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
        (
            "diagnostics.every_steps",
            config.diagnostics.every_steps,
            config.diagnostics.every_steps == 0 or config.diagnostics.every_steps >= 2,
            "must be 0, which records none, or at least 2, in which a weight can flip and flip back",
        ),
        (
            "diagnostics.histogram_bins",
            config.diagnostics.histogram_bins,
            config.diagnostics.histogram_bins >= 1,
            "must be at least 1; 20 is usual",
        ),
        (
            "diagnostics.mismatch_coordinates",
            config.diagnostics.mismatch_coordinates,
            config.diagnostics.mismatch_coordinates >= 0,
            "must not be negative; 0 leaves the comparison out",
        ),
        ("data.crop_padding", config.data.crop_padding, config.data.crop_padding >= 0, "must not be negative"),
        (
            "model.width",
            config.model.width,
            config.model.width is None or config.model.width >= 1,
            "must be at least 1",
        ),
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

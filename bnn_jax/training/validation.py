"""Whether a run can start from a config: names, options and ranges, each with an error that says the way out."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass, replace
from functools import partial, reduce
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import flax.linen as nn
import numpy as np

from bnn_jax.checks import Rule, check_options, look_up, require
from bnn_jax.data import PREPROCESSING
from bnn_jax.distillation import DISTILLATION_LOSSES
from bnn_jax.errors import UsageError, unknown_name
from bnn_jax.layers.arguments import QUANTIZERS
from bnn_jax.layers.by_layer import LayerQuantizers
from bnn_jax.losses import LOSSES, as_loss, make_loss
from bnn_jax.models import MODELS
from bnn_jax.models.build import build_model, entry_of, quantizer_settings, settings_taken
from bnn_jax.names import last_part, name_of
from bnn_jax.optim import OPTIMIZERS, Optimizer, as_optimizer, latent_box, make_optimizer, with_options
from bnn_jax.quantizers import make_quantizer, named_quantizer
from bnn_jax.regularizers import REGULARIZERS
from bnn_jax.schedules import SCHEDULES, constant, make_schedule
from bnn_jax.training.config import (
    Config,
    DataConfig,
    DistillationConfig,
    ModelConfig,
    OptimConfig,
    require_config,
    with_names,
)


def with_published_quantizers(model: ModelConfig) -> ModelConfig:
    """`model` with a name for each quantizer; options that are given go before the published ones."""
    entry_of(model.name, argument="model.name")
    given = {key: value for key, value in vars(model).items() if "_quantizer" in key}
    return replace(model, **quantizer_settings(model.name, **given))


NAMED: dict[str, dict[str, Any]] = {
    "loss": LOSSES,
    "model.name": MODELS,
    "optim.name": OPTIMIZERS,
    "optim.schedule": SCHEDULES,
    "regularizer": REGULARIZERS,
    "regularizer_schedule": SCHEDULES,
}
"""Setting -> the table whose names it takes; beside those of quantizers."""


def validate(config: Config) -> Config:
    """Return `config`, its quantizers and whatever has a name named, if a run can start from it.

    A thing that no name finds again, as a notebook's class, stays: such a run is for this process alone.

    Raises:
      UsageError: for an unknown name (the nearest is named), one that cannot be imported, an option that what is named
        does not take, a value out of range, or settings that do not go together.
    """
    config = _with_kinds(config)
    config = with_names(config, _name_or_thing)
    _check_names(config)
    config = with_names(replace(config, model=with_published_quantizers(config.model)), _name_or_thing)
    for argument, value, rule in _ruled_fields(config):
        _require(argument, value, rule.holds(value), rule.sentence)
    _check_model(config.model)
    _check_data(config.data)
    _check_loss_and_schedules(config)
    optimizer = as_optimizer(config.optim.name)
    _check_optimizer(config.optim, optimizer)
    _check_accumulation(config)
    if optimizer.exact_step:
        _check_exact_step(config)
    _check_distillation(config.distillation)
    return config


def _require(argument: str, value: Any, holds: bool, rule: str) -> None:
    require(argument, value, bool(holds), rule, error=UsageError)


def _all_of(types: tuple[type, ...]) -> Callable[[Any], bool]:
    return lambda values: all(isinstance(value, types) for value in values)


NUMBER = (Real,)
KINDS = {
    bool: Rule(lambda value: isinstance(value, bool | np.bool_), "must be True or False"),
    int: Rule(lambda value: isinstance(value, Integral) and not isinstance(value, bool), "must be a whole number"),
    float: Rule(lambda value: isinstance(value, NUMBER) and not isinstance(value, bool), "must be a number"),
    str: Rule(lambda value: isinstance(value, str), "must be a string"),
    tuple[str, ...]: Rule(
        lambda value: isinstance(value, tuple) and _all_of((str,))(value), "must be patterns, as ('head/*',)"
    ),
    tuple[float, float]: Rule(
        lambda value: isinstance(value, tuple) and len(value) == 2 and _all_of(NUMBER)(value), "must be two numbers"
    ),
    tuple[OptimConfig, ...]: Rule(
        lambda value: isinstance(value, tuple) and _all_of((OptimConfig,))(value),
        "must be as (OptimConfig('sgd', 0.1),)",
    ),
    dict[str, float]: Rule(
        lambda value: isinstance(value, Mapping) and _all_of((str,))(value) and _all_of(NUMBER)(value.values()),
        "must be names with numbers, as {'knowledge': 1.0}",
    ),
}
"""Annotation of a setting -> what it takes, NumPy's numbers too."""
OPTIONS = Rule(lambda value: isinstance(value, Mapping) and _all_of((str,))(value), "must be options, as {'b2': 0.99}")


def _with_kinds(config: Any, kind: type = Config, prefix: str = "") -> Any:
    """The config with tuples for lists; a value that is not of its field's kind is refused, as a string for a number.

    Raises:
      UsageError: for one, or a config of another type.
    """
    if kind is Config:
        require_config(config)
    _require(prefix.rstrip("."), config, isinstance(config, kind), f"must be of type {kind.__name__}")
    changed = {}
    for name, hint in get_type_hints(kind).items():
        value, choices = getattr(config, name), get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if is_dataclass(hint):
            changed[name] = _with_kinds(value, hint, f"{prefix}{name}.")
        elif hint is not Any and (value is not None or NoneType not in choices):
            changed[name] = value = tuple(value) if isinstance(value, list) else value
            (own,) = (choice for choice in choices if choice is not NoneType)
            own = OPTIONS if get_origin(own) is dict and own not in KINDS else KINDS[own]
            none = " or None" if NoneType in choices else ""
            _require(f"{prefix}{name}", value, own.holds(value), f"{own.sentence}{none}")
    return replace(config, **changed)


def _ruled_fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Rule]]:
    """Name, value and rule of every field whose type has one in its metadata, and whose value is not None."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if is_dataclass(value):
            yield from _ruled_fields(value, f"{prefix}{name}.")
        elif get_origin(hint) is Annotated and value is not None:
            yield from ((f"{prefix}{name}", value, rule) for rule in get_args(hint)[1:] if isinstance(rule, Rule))


def _name_or_thing(setting: str, thing: Any) -> Any:
    tables = NAMED | {f"model.{kind}": table for kind, table in QUANTIZERS.items()}
    in_table = (name for name, entry in tables.get(setting, {}).items() if entry is thing)
    return next(in_table, None) or name_of(thing) or thing


def _check_names(config: Config) -> None:
    for setting, table in NAMED.items():
        none = {"none": None} if setting == "regularizer" else {}
        look_up(setting, reduce(getattr, setting.split("."), config), none | table)
    entry_of(config.model.name, argument="model.name")
    as_loss(config.loss, argument="loss")
    as_optimizer(config.optim.name, argument="optim.name")
    for kind, table in QUANTIZERS.items():
        named_quantizer(table, getattr(config.model, kind), argument=f"model.{kind}")
    for name in config.distillation.losses:
        look_up("distillation.losses", name, DISTILLATION_LOSSES)
    if config.data.preprocessing not in ("none", *PREPROCESSING):
        raise unknown_name("data.preprocessing", config.data.preprocessing, ("none", *PREPROCESSING))


def _check_made(name: str, make: Callable[[], Any]) -> None:
    """Make what a name and its options stand for, to see that it can be made."""
    try:
        make()
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name} cannot be made: {error}") from None


def _check_model(model: ModelConfig) -> None:
    for kind, table in QUANTIZERS.items():
        name, options = getattr(model, kind), getattr(model, f"{kind}_options")
        _check_made(name or kind, partial(make_quantizer, table, name, argument=kind, **options))
    _check_made("model.quantizers", partial(LayerQuantizers, vars(model), model.quantizers))
    network, taken = entry_of(model.name).constructor, settings_taken(model.name)
    shipped = isinstance(model.name, str) and model.name in MODELS
    made, label = isinstance(network, nn.Module), model.name if shipped else last_part(network)
    not_taken = f"is for what makes a network, and this {label} is made" if made else f"is not an option of {label}"
    if taken is not None:
        for setting in ("width", *QUANTIZERS, "quantizers"):
            value = getattr(model, setting)
            _require(f"model.{setting}", value, value in (None, {}) or setting in taken, f"{not_taken}; leave it out")
        known = taken - {"name", "num_classes", *vars(model)}
        for option in model.options:
            if option not in known:
                raise unknown_name("model.options", option, known)
    if model.input_scaling:
        _require("model.input_scaling", True, taken is None or "input_scaling" in taken, f"{not_taken}; turn it off")
        quantized = model.input_quantizer != "full_precision"
        _require("model.input_scaling", True, quantized, "needs quantized inputs; choose a `model.input_quantizer`")
    if not shipped:
        _require("model.name", label, _is_hashable(network), "must have tuples in the place of lists and dicts")
    if model.options or not shipped:
        _check_made(label, partial(build_model, num_classes=10, **vars(model)))


def _is_hashable(thing: Any) -> bool:
    try:
        hash(thing)
    except TypeError:
        return False
    return True


def check_of_tokens(data: DataConfig) -> None:
    """Refuse what is done to images where the data are tokens, which their labels follow.

    Raises:
      UsageError: for it.
    """
    for argument in ("crop_padding", "smallest_area", "flip", "mixup_alpha", "lighting_std"):
        value, unset = getattr(data, argument), getattr(DataConfig(), argument)
        _require(f"data.{argument}", value, value == unset, f"is for images, and {data.name} is a text; leave it out")


def _check_data(data: DataConfig) -> None:
    is_text = data.name == "text" or data.name.endswith(".txt")
    loaded_whole = is_text or data.name == "digits" or data.name.endswith(".npz")
    if is_text:
        check_of_tokens(data)
        rule = f"is for sets that are divided at random, and of {data.name} the last parts are taken; leave it out"
        _require("data.split_seed", data.split_seed, data.split_seed == 0, rule)
    for argument, value, holds, rule in (
        (
            "stream",
            data.stream,
            not data.stream or not loaded_whole,
            f"does not go with {data.name}, which is loaded whole; turn it off, or name a folder or a TFDS set",
        ),
        (
            "smallest_area",
            data.smallest_area,
            data.smallest_area == 1 or data.preprocessing != "random_resized_crop",
            "does not go with random_resized_crop, which takes a random area of the image as it is read; choose one",
        ),
        (
            "preprocessing",
            data.preprocessing,
            data.preprocessing == "none" or data.stream or not PREPROCESSING[data.preprocessing].is_random,
            "crops at random as images are read; set `data.stream`, or choose center_crop",
        ),
        (
            "preprocessing",
            data.preprocessing,
            data.preprocessing == "none" or not loaded_whole,
            f"is for image files, and {data.name} has arrays of one size; leave it out",
        ),
        (
            "image_size",
            data.image_size,
            data.image_size is None or data.preprocessing != "none",
            f"needs a `data.preprocessing`: {', '.join(PREPROCESSING)}",
        ),
        ("tokens", data.tokens, data.tokens is None or is_text, f"is for texts, not {data.name}; leave it out"),
    ):
        _require(f"data.{argument}", value, holds, rule)


def _check_loss_and_schedules(config: Config) -> None:
    check_options("loss_options", as_loss(config.loss).apply, config.loss_options)
    _check_made(last_part(config.loss), lambda: make_loss(config.loss, **config.loss_options))
    for argument, schedule, options in (
        ("optim.schedule_options", config.optim.schedule, config.optim.schedule_options),
        ("regularizer_schedule_options", config.regularizer_schedule, config.regularizer_schedule_options),
    ):
        check_options(argument, look_up(argument, schedule, SCHEDULES), options)
        _check_made(
            last_part(schedule), lambda schedule=schedule, options=options: make_schedule(schedule, 1.0, 1, **options)
        )


def _check_optimizer(optim: OptimConfig, optimizer: Optimizer) -> None:
    inner_steps = [name for name, other in OPTIMIZERS.items() if other.takes_inner_steps]
    scale_latent = [name for name, other in OPTIMIZERS.items() if other.takes_scale_latent]
    one = optim.inner_steps == 1 or optimizer.takes_inner_steps
    _require("optim.inner_steps", optim.inner_steps, one, f"is for {_listed(inner_steps)}")
    unscaled = not optim.scale_latent or optimizer.takes_scale_latent
    _require("optim.scale_latent", optim.scale_latent, unscaled, f"is for {_listed(scale_latent)}")
    usual = optim.momentum == OptimConfig.momentum or optimizer.takes_momentum
    _require("optim.momentum", optim.momentum, usual, "is for the table's; give its own among the `optim.options`")
    whole = (
        "is for what makes an optimizer, and this one is made; give the function, as functools.partial(optax.sgd, ...)"
    )
    for argument in ("learning_rate", "schedule", "schedule_options", "warmup_share"):
        value, usual = getattr(optim, argument), getattr(OptimConfig(), argument)
        _require(f"optim.{argument}", value, optimizer.takes_learning_rate or value == usual, whole)
    separate_decay = [name for name, other in OPTIMIZERS.items() if other.separate_decay]
    for argument, value in (("latent_weight_decay", optim.latent_weight_decay), ("decay_only", optim.decay_only)):
        decayed = not value or optimizer.separate_decay
        _require(f"optim.{argument}", value, decayed, f"is for {_listed(separate_decay)}; leave it out")
    if optimizer.latent_box is not None:
        box_fits = optimizer.latent_box.holds(optim.latent_box)
        _require("optim.latent_box", optim.latent_box, box_fits, optimizer.latent_box.sentence)
    check_options("optim.options", optimizer.make, optim.options)
    box = latent_box(*optim.latent_box) if optim.latent_box else None
    settings = {"learning_rate": constant(1.0, 1), "box": box, "total_steps": 1}
    settings |= {"max_gradient_norm": optim.max_gradient_norm, "adaptive_clipping": optim.adaptive_clipping}
    _check_made(last_part(optim.name), lambda: make_optimizer(with_options(optimizer, optim.options), **settings))


def _check_accumulation(config: Config) -> None:
    parts = config.accumulate_steps
    whole = config.batch_size % parts == 0
    _require("accumulate_steps", parts, whole, f"must divide `batch_size` (={config.batch_size})")
    one = parts == 1 or config.optim.inner_steps == 1
    at_once = f"must be 1 with `optim.inner_steps` (={config.optim.inner_steps}), which need the whole batch at once"
    _require("accumulate_steps", parts, one, at_once)


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else f"{names[0]} alone"


def _check_exact_step(config: Config) -> None:
    """An optimizer whose step size is exact for a piecewise linear loss has nothing else to minimize."""
    name = config.optim.name
    linear = " or ".join(loss for loss, found in LOSSES.items() if found.piecewise_linear)
    exact = "whose step size is exact for a piecewise linear loss"
    for argument, value, holds, rule in (
        (
            "loss",
            config.loss,
            as_loss(config.loss).piecewise_linear,
            f"does not go with {name}, {exact}; choose {linear}, or another optimizer",
        ),
        (
            "optim.inner_steps",
            config.optim.inner_steps,
            config.optim.inner_steps == 1 or as_loss(config.loss) in LOSSES.values(),
            f"does not go with a loss of your own, whose linear pieces are not known; choose 1, or {linear}",
        ),
        (
            "regularizer",
            config.regularizer,
            config.regularizer == "none",
            f"does not go with {name}, whose step size is exact for the loss alone; choose none, or another optimizer",
        ),
        (
            "distillation.losses",
            config.distillation.losses,
            not config.distillation.losses,
            f"do not go with {name}, {exact}; choose another optimizer",
        ),
    ):
        _require(argument, value, holds, rule)


def _check_distillation(taught: DistillationConfig) -> None:
    for name, weight in taught.losses.items():
        _require("distillation.losses", {name: weight}, weight > 0, f"must have positive weights; leave {name} out")
    _require(
        "distillation.label_weight",
        taught.label_weight,
        taught.losses or taught.label_weight == 1,
        "must be 1 without `distillation.losses`, for there is nothing else to weigh",
    )
    read_by = {"temperature": ("knowledge", "embedding", "similarity"), "queue_size": ("similarity",)}
    for argument, readers in read_by.items():
        value, usual = getattr(taught, argument), getattr(DistillationConfig, argument)
        read = value == usual or not taught.losses.keys().isdisjoint(readers)
        _require(f"distillation.{argument}", value, read, f"is for the losses {_listed(list(readers))}; leave it out")


def check_teacher(config: Config, given: bool) -> None:
    """Refuse losses of a teacher without one, and a teacher without them.

    Raises:
      UsageError: for either.
    """
    losses = config.distillation.losses
    if losses and not given:
        raise UsageError(
            f"`distillation.losses` (={', '.join(losses)}) needs a teacher; train this as a stage that names one, as "
            "the recipes of bnn-jax stages do"
        )
    if given and not losses:
        raise UsageError("`distillation.losses` (={}) must name what to learn from the teacher; or leave it out")

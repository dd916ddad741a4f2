"""What a command line changes in a config: every option is applied, or refused with the way out."""

import argparse
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from bnn_jax.errors import UsageError
from bnn_jax.names import is_import, last_part
from bnn_jax.optim import OPTIMIZERS
from bnn_jax.paths import with_local_paths
from bnn_jax.training.command_line import read_command_line
from bnn_jax.training.config import PARTS, Config, ModelConfig, OptimConfig, load_config, select_optimizer

OWNERS: dict[type, dict[str, Callable[[Any], str]]] = {
    Config: {
        "loss_options": lambda config: config.loss,
        "init_options": lambda config: config.init_from,
        "regularizer_schedule_options": lambda config: config.regularizer_schedule,
    },
    ModelConfig: {
        "width": lambda model: model.name,
        "options": lambda model: model.name,
        "quantizers": lambda model: model.name,
        "input_quantizer_options": lambda model: model.input_quantizer or model.name,
        "kernel_quantizer_options": lambda model: model.kernel_quantizer or model.name,
        "gradient_quantizer_options": lambda model: model.gradient_quantizer,
    },
    OptimConfig: {
        "options": lambda optim: optim.name,
        "tune": lambda optim: optim.name,
        "schedule_options": lambda optim: optim.schedule,
    },
}
"""Settings that are of what another setting names: they do not go on to another name."""


class Condition(NamedTuple):
    """Settings that are read in some configs alone.

    Attributes:
      settings: their dotted names.
      holds: whether a config reads them.
      needed: the dotted names of the settings any of which makes it.
    """

    settings: tuple[str, ...]
    holds: Callable[[Config], bool]
    needed: tuple[str, ...]


CONDITIONS: tuple[Condition, ...] = (
    Condition(("init_options",), lambda config: config.init_from is not None, ("init_from",)),
    Condition(
        ("data.data_dir",),
        lambda config: config.data.name != "digits" and not config.data.name.endswith(".npz"),
        ("data.name",),
    ),
    Condition(
        ("optim.decay_only",),
        lambda config: config.optim.weight_decay > 0 or config.optim.latent_weight_decay > 0,
        ("optim.weight_decay", "optim.latent_weight_decay"),
    ),
    Condition(
        ("regularizer_strength", "regularizer_schedule", "regularizer_schedule_options"),
        lambda config: config.regularizer != "none",
        ("regularizer",),
    ),
    Condition(("optim.warmup_start_share",), lambda config: config.optim.warmup_share > 0, ("optim.warmup_share",)),
    Condition(
        ("distillation.temperature", "distillation.queue_size"),
        lambda config: bool(config.distillation.losses),
        ("distillation.losses",),
    ),
    Condition(
        ("diagnostics.histogram_bins", "diagnostics.mismatch_coordinates"),
        lambda config: config.diagnostics.every_steps > 0,
        ("diagnostics.every_steps",),
    ),
)

SEVERAL = {"optim.name": "optimizers", "seed": "seeds"}
"""A setting of one run -> the option of a script that names several in its place."""

NAMES = """
What --model.name, quantizers, estimators, --optim.name, --loss and --data.name may be: bnn-jax list
"""
"""End of every description of a script that takes a config."""

TUNING = ("optim.tune", "tune_trials", "tune_epochs")
"""Settings of --tune."""


def parse(
    arguments_type: type,
    description: str | None = None,
    *,
    argv: Sequence[str] | None = None,
    axes: Collection[str] = (),
) -> Any:
    """Parse a script's command line, overrides of the config among it: ``--optim.learning-rate 0.1 --epochs 3``.

    An unknown or malformed option ends the program with exit code 2 and names the nearest.  Overrides are applied as
    :func:`settled` says, those of the optimizer's settings to every one that is compared; what nothing would read is
    refused.

    Args:
      arguments_type: dataclass with the script's own options; its field `config` is the path of a config file,
        `settings` becomes the resolved :class:`Config`, and `optimizer`, where there is one, names the settings to
        start from.
      description: of the script, for `--help`.
      argv: what follows the script's name; None takes it from `sys.argv`.
      axes: dotted names of settings that `argv` leaves out because they have several values.

    Raises:
      UsageError: for a config file or optimizer that does not exist, one that is named twice, and an override that
        nothing reads; as :func:`settled`.
    """
    return parse_with_overrides(arguments_type, description, argv=argv, axes=axes)[0]


def parse_with_overrides(
    arguments_type: type,
    description: str | None = None,
    *,
    argv: Sequence[str] | None = None,
    axes: Collection[str] = (),
) -> tuple[Any, dict[str, Any]]:
    """Parse a script's command line as :func:`parse` does; the overrides too: dotted name -> value as it was given.

    Raises:
      UsageError: as :func:`parse`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--config", default=arguments_type.config)
    first_look.add_argument("--optimizer")
    found, _ = first_look.parse_known_args(argv)
    config = load_config(found.config)
    if found.optimizer is not None and hasattr(arguments_type, "optimizer"):
        config = replace(config, optim=select_optimizer(config, found.optimizer))
    arguments = read_command_line(
        arguments_type, description and description + NAMES, argv=argv, default=arguments_type(settings=config)
    )
    arguments = with_local_paths(arguments)
    given = given_settings(argv)
    overrides = {name: value for name, value in _settings_in(arguments.settings) if name in given}
    if found.optimizer is not None and hasattr(arguments, "optimizer") and "optim.name" in {*given, *axes}:
        raise UsageError(f"`--optimizer` (={found.optimizer}) does not go with `--optim.name`; leave one of them out")
    for setting, option in SEVERAL.items():
        if setting in given and isinstance(getattr(arguments, option, None), tuple):
            raise UsageError(f"{_option(setting)} is of a single run; name those to compare with {_option(option)}")
    settings = settled(config, arguments.settings, given)
    if hasattr(arguments, "optimizers") or "optim.name" in axes:
        of_all = given - {"optim.name"}
        each = tuple(_overridden(optim, config, arguments.settings, of_all) for optim in config.optimizers)
        settings = replace(settings, optimizers=each)
    options = {f"{name}.{key}" for name, value in overrides.items() if isinstance(value, dict) for key in value}
    if twice := sorted({*axes} & options):
        raise UsageError(
            f"{_option(twice[0])} is given twice, and in {_option(twice[0].rpartition('.')[0])}; leave one out"
        )
    _check_tuning(_tuned_of(settings, arguments), given | options, tune=getattr(arguments, "tune", False))
    compared = settings.optimizers if hasattr(arguments, "optimizers") or "optim.name" in axes else ()
    each = [settings, *(replace(settings, optim=optim) for optim in compared)]
    tuned = each if getattr(arguments, "tune", False) else []
    chosen = {name for cell in tuned for short in cell.optim.tune for name in (short, f"optim.{short}")}
    check_read(each, given, axes={*axes, *chosen})
    return replace(arguments, settings=settings), overrides


def _settings_in(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every setting."""
    for name, value in vars(config).items():
        if isinstance(value, PARTS):
            yield from _settings_in(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def given_settings(argv: Sequence[str]) -> set[str]:
    """The dotted names of the options on a command line.

    >>> sorted(given_settings(["--optim.learning-rate=0.1", "--data.no-flip", "--epochs", "3"]))
    ['data.flip', 'epochs', 'optim.learning_rate']
    """
    words = (word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--"))
    return {re.sub(r"(^|\.)no_", r"\1", word.replace("-", "_")) for word in words}


def settled(before: Config, after: Config, given: Collection[str]) -> Config:
    """Give every name in `after` its own settings, not those that went with another name in `before`.

    * Another optimizer starts from the settings that the config keeps for it in `optimizers`; where it keeps none, it
      needs a learning rate.
    * Options, the width of a network and what else stands in :data:`OWNERS` are added to those of `before` under the
      same name; under another name they start from the defaults.  What is to be tuned takes the place of the old.

    Args:
      before: the config as its file has it.
      after: with the overrides.
      given: dotted names of the overrides, as ``optim.learning_rate``, or ``optim.options.epsilon`` for one option.

    Raises:
      UsageError: for another optimizer without settings in the config and without a learning rate.
    """
    name, kept = after.optim.name, {optim.name: optim for optim in (*before.optimizers, before.optim)}
    if name not in kept and "optim.learning_rate" not in given and (name in OPTIMIZERS or is_import(name)):
        raise UsageError(
            f"`optim.name` (={name!r}) has no settings in the config, and the learning rate "
            f"{before.optim.learning_rate:g} is that of {before.optim.name}; give `--optim.learning-rate` too, or "
            f"choose one of: {', '.join(kept)}"
        )
    found = _with_overrides(before, before, after, given)
    return replace(found, optim=_overridden(kept.get(name, before.optim), before, after, given))


def _overridden(optim: OptimConfig, before: Config, after: Config, given: Collection[str]) -> OptimConfig:
    """`optim` with the overrides of the optimizer's settings."""
    return _with_overrides(optim, before.optim, after.optim, given, "optim.")


def _with_overrides(start: Any, before: Any, after: Any, given: Collection[str], prefix: str = "") -> Any:
    """`start` with what `after` changes of `before`; what is of a name that `start` does not have begins anew."""
    owners, changes = OWNERS.get(type(after), {}), {}
    for field in dataclasses.fields(after):
        value, old = getattr(after, field.name), getattr(before, field.name)
        if isinstance(value, PARTS):
            changes[field.name] = _with_overrides(old, old, value, given, f"{prefix}{field.name}.")
        elif field.name not in owners and (value != old or f"{prefix}{field.name}" in given):
            changes[field.name] = value
    found = replace(start, **changes)
    for field in dataclasses.fields(after):
        if field.name in owners:
            same = owners[field.name](start) == owners[field.name](found)
            begin = getattr(start, field.name) if same else default_of(field)
            own = _own_value(begin, getattr(after, field.name), f"{prefix}{field.name}", given)
            found = replace(found, **{field.name: own})
    return found


def _own_value(begin: Any, value: Any, name: str, given: Collection[str]) -> Any:
    if name in given:
        return begin | value if isinstance(value, dict) and value and name != "optim.tune" else value
    if isinstance(begin, dict):
        return begin | {option: value[option] for option in value if f"{name}.{option}" in given}
    return begin


def default_of(field: dataclasses.Field) -> Any:
    """The default of a dataclass's field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def check_read(configs: Sequence[Config], given: Collection[str], *, axes: Collection[str] = ()) -> None:
    """Refuse settings that none of the configs reads, but where an axis may change that.

    Raises:
      UsageError: for the first of them.
    """
    for condition in CONDITIONS:
        unread = [name for name in condition.settings if any(is_of(one, (name,)) for one in given)]
        if unread and not {*condition.needed} & {*axes} and not any(map(condition.holds, configs)):
            value = functools.reduce(getattr, unread[0].split("."), configs[0])
            needed = " or ".join(map(_option, condition.needed))
            raise UsageError(
                f"{_option(unread[0])} (={value}) is read only with {needed}; give that too, or leave it out"
            )


def is_of(name: str, groups: Collection[str]) -> bool:
    """Whether a dotted name is one of those given, or of an option of one.

    >>> is_of("optim.tune.learning_rate", TUNING), is_of("optim.tuned", TUNING)
    (True, False)
    """
    return any(f"{name}.".startswith(f"{group}.") for group in groups)


def check_applied(before: Config, after: Config, make: Callable[[Config], Any], maker: str) -> None:
    """Refuse an override that changes nothing of what is made from the config.

    Args:
      before: the config as its file has it.
      after: with the overrides.
      make: the rows of a comparison, or the stages of a recipe.
      maker: what makes them, for the message.

    Raises:
      UsageError: for the first override without which the same would be made.
    """
    made = make(after)
    for name, restored in _restored(before, after):
        if name.startswith("optim."):  # It holds for these too.
            restored = replace(restored, optimizers=before.optimizers)
        try:
            unchanged = make(restored) == made
        except ValueError:  # An override without which nothing can be made is applied.
            continue
        if unchanged:
            value = functools.reduce(getattr, name.split("."), after)
            raise UsageError(f"{_option(name)} (={value}) changes nothing, for {maker} sets it itself; leave it out")


def changed_settings(before: Config, after: Config) -> set[str]:
    """The dotted names of the settings in which two configs differ, of options those of each."""
    names = set()
    for name, restored in _restored(before, after):
        old, new = (functools.reduce(getattr, name.split("."), config) for config in (restored, after))
        if isinstance(new, dict):
            names |= {f"{name}.{key}" for key in {*old, *new} if old.get(key) != new.get(key)}
        names.add(name)
    return names


def _restored(before: Any, after: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting that differs, and `after` with that one as `before` has it."""
    for name, value in vars(after).items():
        old = getattr(before, name)
        if isinstance(value, PARTS):
            yield from (
                (inner, replace(after, **{name: part})) for inner, part in _restored(old, value, f"{prefix}{name}.")
            )
        elif value != old and name != "optimizers":
            yield f"{prefix}{name}", replace(after, **{name: old})


def _tuned_of(settings: Config, arguments: Any) -> set[str]:
    """The names of what is tuned: by the optimizers that are compared, or by that of the config."""
    kept = {optim.name: optim for optim in (*settings.optimizers, settings.optim)}
    compared = getattr(arguments, "optimizers", None)
    if compared is None:
        return {*settings.optim.tune}
    return {name for key, optim in kept.items() if {key, last_part(key)} & {*compared} for name in optim.tune}


def _check_tuning(chosen: Collection[str], given: Collection[str], *, tune: bool) -> None:
    """Refuse what is read with --tune alone, and with it the settings that it chooses."""
    for name in TUNING:
        if name in given and not tune:
            raise UsageError(
                f"{_option(name)} is read only with `--tune` of a comparison; give that too, or leave it out"
            )
    if tune:
        check_not_tuned(given, chosen)


def check_not_tuned(given: Collection[str], chosen: Collection[str]) -> None:
    """Refuse to override what --tune chooses.

    Args:
      given: dotted names of the overrides.
      chosen: names of what is tuned, as `optim.tune` has them.

    Raises:
      UsageError: for the first of them.
    """
    for name in sorted(given):
        if name in chosen or name.removeprefix("optim.") in chosen:
            raise UsageError(
                f"{_option(name)} is what `--tune` chooses; leave one of them out, or give what to choose from with "
                "`--optim.tune`"
            )


def _option(name: str) -> str:
    return f"`--{name.replace('_', '-')}`"

"""A grid of configs from a command line on which options have several values."""

import hashlib
import itertools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from types import NoneType
from typing import Any

import tyro

from bnn_jax.errors import UsageError, unknown_name
from bnn_jax.names import IN_MEMORY, last_part, name_of, record_of
from bnn_jax.paths import folder_name
from bnn_jax.training.config import Config, with_names
from bnn_jax.training.overrides import TUNING, check_read, given_settings, is_of, settled

SCALARS = {int, float, bool, str, Any}
"""Types of one value; a name, or the thing that it stands for, is Any."""

LONGEST_RECORD = 60
"""Characters of what a thing without a name is called in a table and in the name of a folder."""


def scalar_options(kind: type = Config, prefix: str = "") -> list[str]:
    """The dotted names of the config's options that have one value each.

    >>> [name for name in scalar_options() if name.startswith("optim.")][:3]
    ['optim.name', 'optim.learning_rate', 'optim.momentum']
    """
    names, extras = [], typing.get_type_hints(kind, include_extras=True)
    for name, hint in typing.get_type_hints(kind).items():
        if tyro.conf.Suppress in getattr(extras[name], "__metadata__", ()):
            continue
        if is_dataclass(hint):
            names += scalar_options(hint, f"{prefix}{name}.")
        elif typing.get_origin(hint) is not dict and (set(typing.get_args(hint)) or {hint}) <= SCALARS | {NoneType}:
            names.append(f"{prefix}{name}")
    return names


def is_setting(name: str) -> bool:
    """Whether a dotted name is that of an option of the config, or of what the config names, with one value.

    >>> is_setting("optim.schedule"), is_setting("optim.options.epsilon"), is_setting("optim.rate")
    (True, True, False)
    """
    return name in scalar_options() or _holds_options(name.rpartition(".")[0])


def kind_of(name: str) -> Any:
    """The type of the setting of a dotted name, that of its values for an option; None where there is no such setting.

    >>> kind_of("optim.learning_rate"), kind_of("distillation.losses.knowledge"), kind_of("optim.rate")
    (<class 'float'>, <class 'float'>, None)
    """
    hint: Any = Config
    for part in name.split("."):
        of_options = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
        hint = typing.get_type_hints(hint).get(part) if is_dataclass(hint) else of_options
    return hint


def _holds_options(name: str) -> bool:
    """Whether a dotted name is that of a field of the config which holds an option for each name."""
    return typing.get_origin(kind_of(name)) is dict


def split_axes(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The options of the config that have several values, as texts, and the rest of the command line.

    An option of an optimizer, loss, schedule, quantizer or network is named behind a dot.

    >>> split_axes(["--seeds", "5", "--optim.learning-rate", "0.1", "1", "--epochs", "3"])
    ({'optim.learning_rate': ['0.1', '1']}, ['--seeds', '5', '--epochs', '3'])
    >>> split_axes(["--optim.options.threshold", "1e-6", "1e-5"])
    ({'optim.options.threshold': ['1e-6', '1e-5']}, [])

    Raises:
      UsageError: if an axis is given twice; for several values of `seed`, or of a setting of tuning.
    """
    axes, rest = {}, []
    starts = [index for index, word in enumerate(argv) if word.startswith("--")]
    rest += argv[: starts[0]] if starts else argv
    for start, end in zip(starts, [*starts[1:], len(argv)]):
        name, values = argv[start].removeprefix("--").replace("-", "_"), list(argv[start + 1 : end])
        if len(values) < 2 or not is_setting(name):
            rest += argv[start:end]
            continue
        if name == "seed":
            raise UsageError(f"`--seed` (={' '.join(values)}) is the first seed; `--seeds` says how many there are")
        if is_of(name, TUNING):
            raise UsageError(
                f"`{argv[start]}` (={' '.join(values)}) is for `--tune` of a comparison, not for a grid; leave it out"
            )
        if name in axes:
            raise UsageError(f"`--{name}` (={' '.join(values)}) is given twice; give all of its values once")
        axes[name] = values
    if twice := sorted(given_settings(rest) & {*axes}):
        raise UsageError(f"`--{twice[0]}` (={' '.join(axes[twice[0]])}) is given twice; give all of its values once")
    return axes, rest


def parse_axes(config: Config, texts: Mapping[str, Sequence[str]]) -> dict[str, tuple[Any, ...]]:
    """The values of each axis, of the option's own type; one that does not parse ends the program with exit code 2.

    >>> parse_axes(Config("test", 1, 32), {"data.flip": ["True", "False"], "model.width": ["None", "8"]})
    {'data.flip': (True, False), 'model.width': (None, 8)}
    >>> parse_axes(Config("test", 1, 32), {"optim.schedule_options.factor": ["0.1", "0.2"]})
    {'optim.schedule_options.factor': (0.1, 0.2)}

    Raises:
      UsageError: if two values are the same.
    """
    axes = {}
    for name, values in texts.items():
        axes[name] = tuple(_value_of(_parsed(config, name, value), name) for value in values)
        if len(set(axes[name])) < len(axes[name]):
            raise UsageError(f"`--{name}` (={' '.join(values)}) must have values that differ; leave one out")
    return axes


def grid_cells(
    config: Config, axes: Mapping[str, Sequence[Any]], overrides: Mapping[str, Any] | None = None
) -> dict[str, tuple[Config, dict[str, Any]]]:
    """Label -> config and values, for each combination of the values, the last axis fastest.

    Every name has its own settings, see :func:`bnn_jax.training.overrides.settled`.  In labels and values a thing, as a
    class, stands by what :func:`bnn_jax.names.record_of` says of it.

    >>> list(grid_cells(Config("test", 1, 32), {"optim.momentum": (0.0, 0.9), "epochs": (1, 2)}))[:2]
    ['momentum=0.0,epochs=1', 'momentum=0.0,epochs=2']

    Args:
      config: of which the options that are no axes are taken.
      axes: dotted name of an option -> its values.
      overrides: dotted name of an option -> the value that it has in every cell, whatever name an axis brings; what
        `config` has of another name stays behind.

    Raises:
      UsageError: for an axis that is not known or has no values or the same twice; for an optimizer without settings of
        its own, and an axis that no cell reads.
    """
    for name, values in axes.items():
        _check_axis(name, values)
    overrides, cells = overrides or {}, {}
    with_overrides(config, overrides)
    options = {f"{name}.{key}" for name, value in overrides.items() if isinstance(value, Mapping) for key in value}
    if twice := sorted({*axes} & {*overrides, *options}):
        raise UsageError(f"`overrides` (={twice[0]!r}) is among the axes; leave one out")
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values))
        cell = config
        for name, value in (*overrides.items(), *chosen.items()):
            cell = with_setting(cell, name, value)
        recorded = {name: recorded_value(value) for name, value in chosen.items()}
        label = ",".join(f"{short_name(name)}={value}" for name, value in recorded.items()) or "all"
        # It is also the name of a folder.
        if folder_name(label) in cells:
            raise UsageError(f"`axes` (={recorded}) must have values that are written differently; leave one out")
        cells[folder_name(label)] = (settled(config, cell, {*overrides, *chosen}), recorded)
    check_read([cell for cell, _ in cells.values()], axes)
    return cells


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """The config in which settings have other values, as :func:`bnn_jax.training.overrides.settled` gives them.

    Args:
      config: whose settings stay where nothing is said of them.
      overrides: dotted name of a setting -> value.

    Raises:
      UsageError: for a setting that is not known, the nearest is named, and for seed; as `settled`.
    """
    changed = config
    for name, value in overrides.items():
        if name == "seed":
            raise UsageError("`overrides` (='seed') must be of other settings; name the seeds with `seeds`")
        if kind_of(name) is None:
            raise unknown_name("overrides", name, [known for known in scalar_options() if known != "seed"])
        changed = with_setting(changed, name, value)
    return settled(config, changed, {*overrides})


def recorded_value(value: Any) -> Any:
    """The value of a setting, with its record for a thing; of a long record a digest, for it is part of a label.

    >>> recorded_value(max), recorded_value("hinge"), recorded_value((1, 2))
    ('builtins:max', 'hinge', (1, 2))
    """

    def recorded(where: str, thing: Any) -> str:
        record = record_of(thing)
        if name_of(thing) or len(record) <= LONGEST_RECORD:
            return record
        return f"{IN_MEMORY}{last_part(thing)} {hashlib.sha256(record.encode()).hexdigest()[:8]}"

    return value if isinstance(value, str) else with_names(value, recorded)


def _check_axis(name: str, values: Sequence[Any]) -> None:
    if name == "seed":
        raise UsageError("`axes` (='seed') must be of other settings; name the seeds with `seeds`")
    if is_of(name, TUNING):
        raise UsageError(f"`axes` (={name!r}) is for the tuning of a comparison, not for a grid; leave it out")
    if kind_of(name) is None:
        raise unknown_name("axes", name, [known for known in scalar_options() if known not in ("seed", *TUNING)])
    if len(values) == 0:
        raise UsageError(f"`axes` (={{{name!r}: {values}}}) must have at least one value of each option; leave it out")


def short_name(name: str) -> str:
    """The last part of an option's name where no other option has the same.

    >>> short_name("optim.learning_rate"), short_name("optim.name")
    ('learning_rate', 'optim.name')
    """
    last = name.rpartition(".")[2]
    return last if [other.rpartition(".")[2] for other in scalar_options()].count(last) == 1 else name


def _parsed(config: Config, name: str, text: str) -> Config:
    field, _, option = name.rpartition(".")
    words = [f"--{field}", option, text] if _holds_options(field) else [f"--{name}", text]
    return tyro.cli(Config, args=words, default=config, config=(tyro.conf.FlagConversionOff,))


def _value_of(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def with_setting(config: Any, name: str, value: Any) -> Any:
    """The config with another value of the option of a dotted name.

    >>> with_setting(Config("test", 1, 32), "optim.options.epsilon", 0.0).optim.options
    {'epsilon': 0.0}
    """
    if isinstance(config, dict):
        return config | {name: value}
    first, _, rest = name.partition(".")
    return replace(config, **{first: with_setting(getattr(config, first), rest, value) if rest else value})

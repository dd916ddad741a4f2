"""The choice of settings on the validation split, within one budget of trials for every row.

One setting with a grid of numbers is tried value by value, and while the best value lies on the edge of those tried the
grid goes on by its own ratio.  Ranges, words and several settings are tried at the points of a scrambled Sobol sequence
(Sobol, 1967; Owen, 1998) for half of the budget; the rest, one after another, change one setting of the best in turn.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bnn_jax.checks import plain_number, require
from bnn_jax.data.sources import IN_MEMORY
from bnn_jax.errors import UsageError, renamed, unknown_name
from bnn_jax.paths import folder_name
from bnn_jax.sweeps.engine import LOADED_BY, Run, run_all
from bnn_jax.sweeps.grid import is_setting, kind_of, scalar_options, with_setting
from bnn_jax.training.config import Config, OptimConfig, without_tuning
from bnn_jax.training.validation import validate

TUNING_SEED = 1000
"""Of the trials and of the points they are made at; no run of a comparison has it."""

POINTS = 1024
"""Of the sequence; those that make a trial which has been made are passed over."""

NOT_TUNED = (
    "optim.name",
    "epochs",
    "seed",
    "tune_trials",
    "tune_epochs",
    "scan_steps",
    "checkpoint_every_epochs",
    "data.name",
    "data.data_dir",
    "data.split_seed",
    "data.validation_examples",
)
"""Settings that all trials share, or that change no accuracy."""

Settings: TypeAlias = dict[str, Any]
Tried: TypeAlias = Sequence[tuple[Settings, float | None]]
"""Settings and validation accuracy of each trial; None for one that diverged."""


def tune_cells(cells: Mapping[str, Config], workdir: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Config]]:
    """Choose the settings that `optim.tune` of each cell names by the best validation accuracy of its trials.

    Names are those of the optimizer's options, as schedule or options.epsilon, or dotted names of the config, as
    regularizer_strength.  Each cell has at most `tune_trials` trials of `tune_epochs` epochs, all of one seed; those of
    all cells that can run at the same time do.

    Args:
      cells: label -> config, validated.
      workdir: each trial has its own folder in it, `<label>/<settings>`, and is not run again when it is finished.
      **options: as :func:`bnn_jax.sweeps.engine.run_all` takes them.

    Returns:
      The trials as a table, and the cells with the chosen settings.

    Raises:
      UsageError: before anything runs, for a setting that is not known or that all trials share, or a value that
        cannot run, and for a cell that names none, or more values than it may try; for budgets that differ.
    """
    for label, cell in cells.items():
        _check(label, cell)
    cells = {label: _with_floats(cell) for label, cell in cells.items()}
    for name in ("tune_trials", "tune_epochs"):
        each = {label: getattr(cell, name) for label, cell in cells.items()}
        require(name, each, len(set(each.values())) == 1, "must be the same for every row", error=UsageError)
    tried: dict[str, list] = {label: [] for label in cells}

    def asked():
        return [(label, settings) for label, cell in cells.items() for settings in _next_of(cell, tried[label])]

    while trials := asked():
        runs = [_trial(label, cells[label], settings, workdir) for label, settings in trials]
        try:
            results = run_all(runs, **options)
        except UsageError as error:
            own = next(iter(cells.values())).tune_epochs is not None
            raise UsageError(renamed(str(error), {"epochs": "tune_epochs"} if own else {})) from None
        for (label, settings), result in zip(trials, results):
            tried[label].append((settings, result["validation_accuracy_best"]))
    chosen = {label: best_of(tried[label]) for label in cells}
    rows = [
        {
            "label": label,
            "chosen": chosen[label],
            "trials": [settings | {"validation_accuracy": accuracy} for settings, accuracy in tried[label]],
        }
        for label in cells
    ]
    first = next(iter(cells.values()))
    record = {"seed": TUNING_SEED, "epochs": first.tune_epochs, "budget": first.tune_trials, "rows": rows}
    return record, {label: _with_settings(cell, chosen[label]) for label, cell in cells.items()}


def _next_of(cell: Config, tried: Tried) -> list[Settings]:
    def allowed(settings):
        try:
            validate(_with_settings(cell, settings))
        except UsageError:
            return False
        return True

    return next_trials(cell.optim.tune, tried, budget=cell.tune_trials, allowed=allowed)


def _trial(label: str, cell: Config, settings: Settings, workdir: Path) -> Run:
    config = without_tuning(_with_settings(cell, settings))
    config = replace(config, seed=TUNING_SEED, epochs=cell.tune_epochs or cell.epochs)
    name = ",".join(f"{name}={value}" for name, value in settings.items())
    return Run(f"tuning {label} {name}", config, workdir / label / folder_name(name))


def _with_settings(cell: Config, settings: Settings) -> Config:
    for name, value in settings.items():
        cell = with_setting(cell, _full_name(name), value)
    return cell


def _full_name(name: str) -> str:
    of_optimizer = name.split(".")[0] in {field.name for field in fields(OptimConfig)}
    return f"optim.{name}" if of_optimizer else name


def _with_floats(cell: Config) -> Config:
    """The cell with floats for the whole numbers among the values of settings that are real numbers."""
    tune = {
        name: tuple(_as_kind(name, value) for value in _several(values)) for name, values in cell.optim.tune.items()
    }
    return replace(cell, optim=replace(cell.optim, tune=tune))


def _as_kind(name: str, value: Any) -> Any:
    kind = kind_of(_full_name(name))
    return float(value) if type(value) is int and (kind is float or kind == float | None) else value


def _check(label: str, cell: Config) -> None:
    tune, budget = cell.optim.tune, cell.tune_trials
    way_out = f"name what to tune of {label}, as learning_rate 0.1 0.3 1"
    require("optim.tune", tune, bool(tune), "is empty", way_out, error=UsageError)
    twice = len({*map(_full_name, tune)}) < len(tune)
    rule = "must not name a setting twice, with and without optim.; leave one out"
    require("optim.tune", tune, not twice, rule, error=UsageError)
    for name, values in tune.items():
        if not is_setting(_full_name(name)):
            known = [one.removeprefix("optim.") for one in scalar_options() if one not in NOT_TUNED]
            raise unknown_name("optim.tune", name, known)
        if _full_name(name) in NOT_TUNED:
            raise UsageError(
                f"`optim.tune` (={name!r}) names what all trials share or what changes no accuracy; leave it out"
            )
        if IN_MEMORY.search(cell.data.name) and name in [f"data.{one}" for one in LOADED_BY]:
            raise UsageError(f"`optim.tune` (={name!r}) is for data on disk, not for arrays in memory; leave it out")
        values = _several(values)
        rule = "must have at least one value; leave it out"
        require("optim.tune", {name: values}, len(values) > 0, rule, error=UsageError)
        differ = all(value not in values[:place] for place, value in enumerate(values))
        require("optim.tune", {name: values}, differ, "must have values that differ; leave one out", error=UsageError)
        if _is_range(values):
            rule = "must be 0 < low < high where it has two numbers, or have three or more"
            require("optim.tune", {name: values}, 0 < values[0] < values[1], rule, error=UsageError)
        for value in values:
            _check_value(cell, {name: value})
    if _is_one_grid(tune):
        ((name, values),) = tune.items()
        rule = f"must be at least {len(values)}, for so many values of {name} are to be tried"
        require("tune_trials", budget, budget >= len(values), rule, error=UsageError)


def _check_value(cell: Config, setting: Settings) -> None:
    """Refuse a value with which the cell cannot run, whatever the other settings are."""
    others = {name: _several(values) for name, values in cell.optim.tune.items() if name not in setting}
    for values in itertools.product(*others.values()):
        try:
            validate(_with_settings(cell, dict(zip(others, values)) | setting))
            return
        except UsageError as found:
            error = found
    raise error


def next_trials(
    tune: Mapping[str, Any], tried: Tried, *, budget: int, allowed: Callable[[Settings], bool] = lambda _: True
) -> list[Settings]:
    """The trials to make after those that have been made, which can run at the same time; none when it is over.

    Args:
      tune: name -> values: two numbers are the ends of a range, on a logarithmic scale; three or more numbers a grid;
        words, or True and False, a choice.
      tried: in the order in which they were made.
      budget: trials in all.
      allowed: whether a trial can run; a grid does not go on past what is allowed.

    >>> tune = {"learning_rate": (0.1, 0.3, 1.0)}
    >>> next_trials(tune, [], budget=4)
    [{'learning_rate': 0.1}, {'learning_rate': 0.3}, {'learning_rate': 1.0}]
    >>> next_trials(tune, list(zip(_, (0.5, 0.6, 0.7))), budget=4)
    [{'learning_rate': 3.0}]
    """
    tune = {name: _several(values) for name, values in tune.items()}
    if not tried and _is_one_grid(tune):
        ((name, values),) = tune.items()
        return [{name: value} for value in values]
    seen = [settings for settings, _ in tried]
    known = {name: [*values, *(settings[name] for settings in seen)] for name, values in tune.items()}
    wanted = min(1, budget - len(tried)) if tried else -(-budget // 2)
    found: list[Settings] = []
    for number, point in list(enumerate(_points(len(tune))))[len(tried) :]:
        if len(found) == wanted:
            break
        shares = dict(zip(tune, point))
        if tried:
            best, name = best_of(tried), [*tune][number % len(tune)]
            settings = best | {name: _beside(best[name], tune[name], known[name], shares[name])}
        else:
            settings = {name: _anywhere(values, shares[name]) for name, values in tune.items()}
        if settings not in seen:
            seen.append(settings)
            found += [settings] if allowed(settings) else []
    return found


def best_of(tried: Tried) -> Settings:
    """The settings of the highest validation accuracy; of equal ones those that were tried first."""
    return max(tried, key=lambda trial: -1.0 if trial[1] is None else trial[1])[0]


def _points(dimensions: int) -> list[list[float]]:
    """In the unit cube, the same for each row with as many settings."""
    from scipy.stats import qmc

    return qmc.Sobol(dimensions, scramble=True, rng=TUNING_SEED).random(POINTS).tolist()


def _several(values: Any) -> tuple:
    """The values that a setting may have, NumPy's numbers as Python's."""
    several = values if isinstance(values, tuple | list | np.ndarray) else (values,)
    return tuple(map(plain_number, several))


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(type(value) in (int, float) for value in values)


def _is_range(values: Sequence[Any]) -> bool:
    return len(values) == 2 and _are_numbers(values)


def _is_grid(values: Sequence[Any]) -> bool:
    return len(values) > 2 and _are_numbers(values) and min(values) >= 0


def _is_one_grid(tune: Mapping[str, Any]) -> bool:
    return len(tune) == 1 and all(map(_is_grid, map(_several, tune.values())))


def _anywhere(values: tuple, share: float) -> Any:
    """The value at a share, in [0, 1), of all there are."""
    if _is_range(values):
        low, high = values
        return _rounded(low * (high / low) ** share, values, digits=3)
    return values[int(share * len(values))]


def _beside(best: Any, values: tuple, known: list, share: float) -> Any:
    """The value at a share of those beside the best.

    In a range a third of it to each side, past its ends as well; of a grid, with those that are known by now, the two
    neighbours; of a choice any other.
    """
    if _is_range(values):
        low, high = values
        return _rounded(best * (high / low) ** ((share - 0.5) / 1.5), values, digits=3)
    near = [value for value in values if value != best]
    if _is_grid(values):
        grid = _gone_on(sorted(set(known)))
        place = grid.index(best)
        near = [*grid[max(place - 1, 0) : place], *grid[place + 1 : place + 2]]
    return near[int(share * len(near))] if near else best


def _gone_on(grid: list) -> list:
    """A grid with one more value at each end, but none below 0, nor one that is rounded to a value of the grid.

    Each comes by the ratio before the last, by which 0.1, 0.3, 1 is followed by 3 and 1, 3, 10 comes after 0.3.
    """
    positive = [value for value in grid if value > 0]

    def past(edge, second, third=None):
        return [_rounded(edge * second / third if third else edge**2 / second, grid, digits=6)]

    below = [value for value in past(*positive[:3]) if value < grid[0]] if grid[0] > 0 else []
    return [*below, *grid, *(past(*positive[:-4:-1]) if len(positive) > 1 else [])]


def _rounded(value: float, like: Sequence[Any], *, digits: int) -> int | float:
    """A number that a person would write; a whole one where the others are."""
    return round(value) if all(type(one) is int for one in like) else float(f"{value:.{digits}g}")

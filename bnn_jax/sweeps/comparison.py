"""Comparisons and grids: every row with every seed, hyper-parameters chosen on the validation split."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bnn_jax.checks import plain_number, require
from bnn_jax.errors import UsageError
from bnn_jax.names import record_of
from bnn_jax.paths import local_path
from bnn_jax.sweeps.engine import Datasets, Run, dataset_of, run_all
from bnn_jax.sweeps.grid import grid_cells, recorded_value, with_overrides
from bnn_jax.sweeps.results import CELL, Results, Row
from bnn_jax.sweeps.tuning import TUNING_SEED, tune_cells
from bnn_jax.training.config import Config, flatten, to_dict, without_tuning
from bnn_jax.training.data_record import describe_dataset
from bnn_jax.training.input_pipeline import with_data
from bnn_jax.training.run_folder import has_begun
from bnn_jax.training.validation import validate


def compare(
    cells: Mapping[str, Config],
    workdir: str | Path,
    *,
    seeds: Sequence[int],
    tune: bool = False,
    data: Any | None = None,
    describe: Callable[[str, Config, dict[str, Any]], dict[str, Any]] | None = None,
    **options: Any,
) -> Results:
    """Train every cell with every seed; finished runs are not run again.

    Args:
      cells: label -> config, a row each, all on the same data.
      workdir: each run has its own folder in it, `<label>/seed<k>`; trials are in `tuning/<label>/`.
      seeds: of the runs.
      tune: choose the settings that `optim.tune` of each row names, see :func:`bnn_jax.sweeps.tuning.tune_cells`.
      data: of all rows in place of their own, as :func:`bnn_jax.training.loop.train` takes them.
      describe: (label, config as tuned, what :func:`bnn_jax.training.data_record.describe_dataset` says of its data) ->
        further attributes of the row.
      **options: as :func:`bnn_jax.sweeps.engine.run_all` takes them, but for `datasets`.

    Returns:
      The results, less name, command and provenance; the settings of a row are those in which rows differ.

    Raises:
      UsageError: for no rows or seeds, names or values that cannot run, rows on other data, settings that cannot be
        tuned, and tuning where runs without it lie, before anything runs.
    """
    workdir = local_path("workdir", workdir)
    require("cells", dict(cells), bool(cells), "must have at least one row", "add one", error=UsageError)
    seeds = _checked_seeds(seeds)
    cells, datasets = _on_data(cells, data)
    cells, options = {label: validate(cell) for label, cell in cells.items()}, options | {"datasets": datasets}
    for cell in cells.values():
        for seed in seeds:
            validate(replace(cell, seed=seed))
    if TUNING_SEED in seeds:
        raise UsageError(f"`seeds` (={list(seeds)}) must differ from {TUNING_SEED}, the trials' own; choose another")
    for name in ("name", "data_dir", "validation_examples", "split_seed"):
        each = {label: getattr(cell.data, name) for label, cell in cells.items()}
        rule = "must be the same for every row, or their accuracies are of other images"
        require(f"data.{name}", each, len(set(each.values())) == 1, rule, error=UsageError)
    tuning = None
    if tune:
        trials = workdir / "tuning"
        begun = [folder for label in cells for seed in seeds if has_begun(folder := _folder(workdir, label, seed))]
        if begun and not trials.exists():
            raise UsageError(
                f"`tune` (=True) is for runs whose settings trials have chosen, and {begun[0]} holds one without "
                "trials; choose another `workdir`, or leave `tune` out"
            )
        tuning, cells = tune_cells(cells, trials, **options)
    rows, described = _train_rows(cells, _differing_settings(cells), workdir, seeds, options, describe)
    return Results(rows=rows, datasets=described, config=to_dict(next(iter(cells.values()))), tuning=tuning)


def sweep(
    config: Config,
    axes: Mapping[str, Sequence[Any]],
    workdir: str | Path,
    *,
    seeds: Sequence[int],
    data: Any | None = None,
    overrides: Mapping[str, Any] | None = None,
    **options: Any,
) -> Results:
    """Train every combination of the axes' values with every seed; finished runs are not run again.

    Args:
      config: of which the options that are no axes are taken.
      axes: dotted name of an option -> its values; without axes there is one cell.
      workdir: each run has its own folder in it, `<label of the cell>/seed<k>`.
      seeds: of the runs.
      data: of all cells in place of their own, as :func:`bnn_jax.training.loop.train` takes them.
      overrides: values that hold in every cell, as :func:`bnn_jax.sweeps.grid.grid_cells` takes them.
      **options: as :func:`bnn_jax.sweeps.engine.run_all` takes them, but for `datasets`.

    Returns:
      The results, less name, command and provenance; of a thing among the values, as a class, its record.

    Raises:
      UsageError: for an option that is not known, no seeds, and values that cannot run, before anything runs.
    """
    seeds = _checked_seeds(seeds)
    workdir = local_path("workdir", workdir)
    grid, config = grid_cells(config, axes, overrides), with_overrides(config, overrides or {})
    cells, datasets = _on_data({label: cell for label, (cell, _) in grid.items()}, data)
    cells, options = {label: validate(cell) for label, cell in cells.items()}, options | {"datasets": datasets}
    settings = {label: values for label, (_, values) in grid.items()}
    rows, described = _train_rows(cells, settings, workdir, seeds, options)
    axes = {name: [recorded_value(value) for value in values] for name, values in axes.items()}
    if data is not None:
        config = replace(config, data=replace(config.data, name=next(iter(cells.values())).data.name))
    return Results(rows=rows, datasets=described, config=to_dict(config), compared=CELL, axes=axes)


def _checked_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds as Python's numbers."""
    seeds = list(map(plain_number, seeds))
    require("seeds", list(seeds), len(seeds) > 0, "must have at least one", "as 0 1 2", error=UsageError)
    differ = len(set(seeds)) == len(seeds)
    require("seeds", list(seeds), differ, "must differ from each other", "leave one out", error=UsageError)
    return seeds


def _on_data(cells: Mapping[str, Config], data: Any | None) -> tuple[dict[str, Config], Datasets]:
    """The cells on the data that were given, and these, by the name that they have in the cells."""
    named, datasets = {}, {}
    for cell in cells.values():
        if cell.data not in named:
            config, dataset = with_data(cell, data)
            named[cell.data] = config.data
            datasets |= {} if dataset is None else {config.data: dataset}
    return {label: replace(cell, data=named[cell.data]) for label, cell in cells.items()}, datasets


def _folder(workdir: Path, label: str, seed: int) -> Path:
    return workdir / label / f"seed{seed}"


def _train_rows(
    cells: Mapping[str, Config],
    settings: Mapping[str, dict[str, Any]],
    workdir: Path,
    seeds: Sequence[int],
    options: dict[str, Any],
    describe: Callable[[str, Config, dict[str, Any]], dict[str, Any]] | None = None,
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Train every cell with every seed in ``<workdir>/<label>/seed<k>``; the rows, and what their data sets are."""
    runs = [
        Run(f"{label} seed {seed}", replace(without_tuning(cell), seed=seed), _folder(workdir, label, seed))
        for label, cell in cells.items()
        for seed in seeds
    ]
    loaded = options["datasets"]
    found = iter(run_all(runs, **options))
    used = dict.fromkeys(cell.data for cell in cells.values())
    described = {data: describe_dataset(dataset_of(data, loaded)) for data in used}
    rows = [
        Row(
            label,
            _recorded_name(cell.optim.name),
            _recorded_name(cell.loss),
            [next(found) for _ in seeds],
            settings[label],
            steps=cell.epochs * (len(loaded[cell.data].train) // cell.batch_size),
            **(describe(label, cell, described[cell.data]) if describe else {}),
        )
        for label, cell in cells.items()
    ]
    sets = list(described.values())
    return rows, [one for number, one in enumerate(sets) if one not in sets[:number]]


def _recorded_name(named: Any) -> str:
    return named if isinstance(named, str) else record_of(named)


def _differing_settings(cells: Mapping[str, Config]) -> dict[str, dict[str, Any]]:
    """For each row the settings, by their last name, in which the rows are not all alike."""
    flat = {label: flatten(to_dict(without_tuning(cell))) for label, cell in cells.items()}
    keys = [
        key
        for key in dict.fromkeys(key for values in flat.values() for key in values)
        if key not in ("name", "loss", "optim.name")
        and (
            key == "optim.learning_rate"
            or any(values.get(key) != flat[next(iter(flat))].get(key) for values in flat.values())
        )
    ]
    return {
        label: {key.removeprefix("optim.").removeprefix("model."): values[key] for key in keys if key in values}
        for label, values in flat.items()
    }

"""Comparisons: every row with every seed, hyper-parameters chosen on the validation split."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bnn_jax.data import Dataset
from bnn_jax.errors import UsageError
from bnn_jax.losses import PIECEWISE_LINEAR
from bnn_jax.training.config import Config, OptimConfig, flatten, to_dict
from bnn_jax.training.feed import load_data
from bnn_jax.training.loop import Diverged, train
from bnn_jax.training.metrics import write_file
from bnn_jax.training.progress import progress_display
from bnn_jax.training.validation import validate

TUNING_SEED = 1000
"""No run of a comparison uses the seed of the trials."""


def optimizer_cells(config: Config, *, optimizers: Sequence[OptimConfig], losses: Sequence[str]) -> dict[str, Config]:
    """A cell for every optimizer and loss; Deep Frank-Wolfe only with a loss that is piecewise linear.

    A cell of the first loss is labelled by its optimizer, one of another loss by both.
    """
    losses = tuple(losses)
    cells = [
        replace(config, optim=optim, loss=loss)
        for loss in losses
        for optim in optimizers
        if loss == losses[0] or optim.name != "dfw" or loss in PIECEWISE_LINEAR
    ]
    return {cell.optim.name if cell.loss == losses[0] else f"{cell.optim.name}-{cell.loss}": cell for cell in cells}


def compare(
    cells: Mapping[str, Config], workdir: str | Path, *, seeds: Sequence[int], tune: bool = False
) -> dict[str, Any]:
    """Train every cell with every seed, one run after another; finished runs are not run again.

    Args:
      cells: label -> config, a row each, all on the same data.
      workdir: each run has its own folder in it, `<label>/seed<k>`; trials are in `tuning/<label>/`.
      seeds: of the runs.
      tune: choose each learning rate from `tune_learning_rates` by the best validation accuracy within
        `config.tune_epochs`, the same number of trials for each row, with a seed of its own.

    Returns:
      What `bnn_jax.analysis.report.write_report` writes, less name, command and provenance; the settings of a row are
      those in which rows differ.

    Raises:
      UsageError: for names or values that cannot run, before anything runs; for tuning grids of different sizes.
    """
    workdir, cells = Path(workdir), {label: validate(cell) for label, cell in cells.items()}
    for cell in cells.values():
        for seed in seeds:
            validate(replace(cell, seed=seed))
    if len(set(seeds)) != len(seeds) or TUNING_SEED in seeds:
        raise UsageError(
            f"`seeds` (={list(seeds)}) must differ from each other and from {TUNING_SEED}, the trials' own"
        )
    shared = next(iter(cells.values()))
    dataset = load_data(shared)
    tuning = None
    if tune:
        tuning, cells = _tune(cells, workdir / "tuning", dataset)
    settings = _differing_settings(cells)
    rows = [
        {
            "label": label,
            "optimizer": cell.optim.name,
            "loss": cell.loss,
            "settings": settings[label],
            "runs": [_run(replace(cell, seed=seed), workdir / label / f"seed{seed}", dataset, label) for seed in seeds],
        }
        for label, cell in cells.items()
    ]
    sizes = {name: len(getattr(dataset, name).labels) for name in ("train", "validation", "test")}
    images = {"shape": list(dataset.train.images.shape[1:]), "num_classes": dataset.num_classes}
    return {
        "dataset": {"name": dataset.name, "note": dataset.note, **images, **sizes},
        "config": to_dict(shared),
        "rows": rows,
        "tuning": tuning,
    }


def _differing_settings(cells: Mapping[str, Config]) -> dict[str, dict[str, Any]]:
    """For each row the settings, by their last name, in which the rows are not all alike."""
    flat = {label: flatten(to_dict(cell)) for label, cell in cells.items()}
    keys = [
        key
        for key in dict.fromkeys(key for values in flat.values() for key in values)
        if key not in ("name", "loss", "optim.name", "optim.tune_learning_rates")
        and (
            key == "optim.learning_rate"
            or any(values.get(key) != flat[next(iter(flat))].get(key) for values in flat.values())
        )
    ]
    return {
        label: {key.removeprefix("optim.").removeprefix("model."): values[key] for key in keys if key in values}
        for label, values in flat.items()
    }


def _run(config: Config, workdir: Path, dataset: Dataset, label: str) -> dict[str, Any]:
    """The result of one run; a diverged run has a sentence in place of accuracies, and is not run again either."""
    diverged = workdir / "diverged.json"
    if diverged.exists():
        return json.loads(diverged.read_text())
    try:
        with progress_display(f"{label} seed {config.seed}") as on_progress:
            return train(config, workdir, dataset=dataset, on_progress=on_progress)
    except Diverged as error:
        numbers = (
            "validation_accuracy_best",
            "test_accuracy_best",
            "test_accuracy_last",
            "train_loss_last",
            "step_time_ms",
        )
        empty = {"best_epoch": None, "max_abs_latent": None, "share_on_bounds": None, "gamma": None, "curve": None}
        result = {"seed": config.seed, "epochs": config.epochs, "diverged": str(error)} | dict.fromkeys(numbers) | empty
        write_file(diverged, json.dumps(result))
        return result


def _tune(cells: Mapping[str, Config], workdir: Path, dataset: Dataset) -> tuple[dict[str, Any], dict[str, Config]]:
    """The trials as a table, and the cells with the chosen learning rates."""
    budgets = {label: len(cell.optim.tune_learning_rates) for label, cell in cells.items()}
    if len(set(budgets.values())) != 1 or 0 in budgets.values():
        raise UsageError(
            f"`tune_learning_rates` must have the same number of values, one or more, for each optimizer; got {budgets}"
        )
    rows, chosen = [], {}
    for label, cell in cells.items():
        trials = []
        for rate in cell.optim.tune_learning_rates:
            trial = replace(
                cell, seed=TUNING_SEED, epochs=cell.tune_epochs, optim=replace(cell.optim, learning_rate=rate)
            )
            result = _run(trial, workdir / label / f"learning_rate_{rate:g}", dataset, f"tuning {label} {rate:g}")
            trials.append({"learning_rate": rate, "validation_accuracy": result["validation_accuracy_best"]})
        best = max(
            trials, key=lambda trial: -1.0 if trial["validation_accuracy"] is None else trial["validation_accuracy"]
        )
        rate = best["learning_rate"]
        rows.append({"label": label, "chosen": {"learning_rate": rate}, "trials": trials})
        chosen[label] = replace(cell, optim=replace(cell.optim, learning_rate=rate))
    epochs = next(iter(cells.values())).tune_epochs
    return {"seed": TUNING_SEED, "epochs": epochs, "budget": len(rows[0]["trials"]), "rows": rows}, chosen

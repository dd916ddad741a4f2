"""Comparisons: every optimizer with every seed, hyper-parameters chosen on the validation split."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bnn_jax.data import Dataset
from bnn_jax.errors import UsageError
from bnn_jax.losses import PIECEWISE_LINEAR
from bnn_jax.training.config import Config, OptimConfig, to_dict, validate
from bnn_jax.training.loop import Diverged, load_data, train
from bnn_jax.training.progress import progress_display

TUNING_SEED = 1000
"""No run of a comparison uses the seed of the trials."""


def compare(
    config: Config,
    workdir: str | Path,
    *,
    optimizers: Sequence[OptimConfig],
    seeds: Sequence[int],
    losses: Sequence[str],
    tune: bool = False,
) -> dict[str, Any]:
    """Train with each optimizer, loss and seed, one run after another; finished runs are not run again.

    Args:
      config: what all share.
      workdir: each run has its own folder in it, `<label>/seed<k>`; trials are in `tuning/<label>/`.
      optimizers: settings, one a row.
      seeds: of the runs.
      losses: the config's first, then others; each gives a row to every optimizer that can use it: Deep Frank-Wolfe
        needs a piecewise linear one.
      tune: choose each learning rate from `tune_learning_rates` by the best validation accuracy within
        `config.tune_epochs`, the same number of trials for each optimizer, with a seed of its own.

    Returns:
      What `bnn_jax.analysis.report.write_report` writes, less name, command and provenance.

    Raises:
      UsageError: for names or values that cannot run, before anything runs; for tuning grids of different sizes.
    """
    workdir, losses = Path(workdir), tuple(losses)
    cells = [
        replace(config, optim=optim, loss=loss)
        for loss in losses
        for optim in optimizers
        if loss == losses[0] or optim.name != "dfw" or loss in PIECEWISE_LINEAR
    ]
    for cell in cells:
        for seed in seeds:
            validate(replace(cell, seed=seed))
    if len(set(seeds)) != len(seeds) or TUNING_SEED in seeds:
        raise UsageError(
            f"`seeds` (={list(seeds)}) must differ from each other and from {TUNING_SEED}, the trials' own"
        )
    dataset = load_data(config)
    labels = [cell.optim.name if cell.loss == losses[0] else f"{cell.optim.name}-{cell.loss}" for cell in cells]
    tuning = None
    if tune:
        tuning, cells = _tune(cells, labels, workdir / "tuning", dataset)
    rows = []
    for label, cell in zip(labels, cells):
        runs = [_run(replace(cell, seed=seed), workdir / label / f"seed{seed}", dataset, label) for seed in seeds]
        settings = {k: v for k, v in to_dict(cell)["optim"].items() if k not in ("name", "tune_learning_rates")}
        rows.append(
            {"label": label, "optimizer": cell.optim.name, "loss": cell.loss, "settings": settings, "runs": runs}
        )
    sizes = {name: len(getattr(dataset, name).labels) for name in ("train", "validation", "test")}
    return {
        "dataset": {"name": dataset.name, "note": dataset.note, **sizes},
        "config": to_dict(config),
        "rows": rows,
        "tuning": tuning,
    }


def _run(config: Config, workdir: Path, dataset: Dataset, label: str) -> dict[str, Any]:
    """The result of one run; a diverged run has a sentence in place of accuracies."""
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
        return {"seed": config.seed, "epochs": config.epochs, "diverged": str(error)} | dict.fromkeys(numbers) | empty


def _tune(cells: list[Config], labels: list[str], workdir: Path, dataset: Dataset):
    """The trials as a table, and the cells with the chosen learning rates."""
    budgets = {label: len(cell.optim.tune_learning_rates) for label, cell in zip(labels, cells)}
    if len(set(budgets.values())) != 1 or 0 in budgets.values():
        raise UsageError(
            f"`tune_learning_rates` must have the same number of values, one or more, for each optimizer; got {budgets}"
        )
    rows, chosen = [], []
    for label, cell in zip(labels, cells):
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
        chosen.append(replace(cell, optim=replace(cell.optim, learning_rate=rate)))
    budget = len(rows[0]["trials"])
    return {"seed": TUNING_SEED, "epochs": cells[0].tune_epochs, "budget": budget, "rows": rows}, chosen

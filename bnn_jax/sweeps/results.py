"""What many runs found: rows of runs, and the numbers that a report says of them."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from bnn_jax.errors import UsageError
from bnn_jax.paths import local_path
from bnn_jax.training.step_size import share_below_1, when_it_did_not_act

ACCURACIES = ("validation_accuracy_best", "test_accuracy_best", "test_accuracy_last")
CELL = "cell"


@dataclass(frozen=True)
class Row:
    """A row of a comparison, or a cell of a grid: a run for each seed.

    Attributes:
      label: its name, and that of the folder that holds its runs.
      optimizer, loss: by their names.
      runs: the result of each, as of :func:`bnn_jax.training.loop.train`; a run that diverged has a sentence under
        "diverged".
      settings: those in which the rows differ; of a grid the value of each axis, by the dotted name of the option.
      steps: optimizer steps of a run; None where it is not known.
      columns: further cells of the table by their header.
      gradient_paths: place in the network -> "costs" and "lengths" of its smallest gradient paths.
    """

    label: str
    optimizer: str
    loss: str
    runs: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    columns: dict[str, str] = field(default_factory=dict)
    gradient_paths: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Results:
    """A comparison, or a grid of settings: the same seeds for every row.

    Attributes:
      name: title of the report.
      compared: what a row is: optimizer, estimator, architecture, or a cell of a grid.
      command: what made the results, and makes them again.
      provenance: as of :func:`bnn_jax.analysis.provenance.provenance`.
      notes: Markdown that follows the table.
      estimators: those that the rows use, to be drawn.
      datasets: of each set its name, note, and numbers of "train", "validation" and "test" examples.
      config: of the first row, as plain JSON; those of the others differ from it in their `settings`.
      axes: of a grid, dotted name of an option -> its values.
      tuning: seed, epochs (None are those of the runs), budget and trials of the choice of settings, if there was one.
      rows: in the order of the table.
    """

    name: str = ""
    compared: str = "optimizer"
    command: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: str = ""
    estimators: list[str] = field(default_factory=list)
    datasets: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, list[Any]] = field(default_factory=dict)
    tuning: dict[str, Any] | None = None
    rows: list[Row]

    @property
    def is_grid(self) -> bool:
        return self.compared == CELL

    @property
    def seeds(self) -> list[int]:
        return sorted({run["seed"] for row in self.rows for run in row.runs})

    @property
    def losses(self) -> list[str]:
        return sorted({row.loss for row in self.rows})

    @property
    def labels(self) -> list[str]:
        """The rows' labels, with the loss where there are several: "adam, cross_entropy"."""
        alone = len(self.losses) == 1
        return [row.label if alone or row.loss in row.label else f"{row.label}, {row.loss}" for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without what is empty."""
        values = asdict(self)
        values["rows"] = [{k: v for k, v in row.items() if v is not None and v != {}} for row in values["rows"]]
        return {name: value for name, value in values.items() if value not in (None, "", [], {})}


def read_results(path: str | Path) -> Results:
    """The results that a report's results.json holds.

    Raises:
      UsageError: if there is no such file, or it holds something else.
    """
    path = local_path("path", path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        # Reports of before had one set, under this name.
        values["datasets"] = values.pop("datasets", None) or [values.pop("dataset")]
        return Results(**values | {"rows": [Row(**row) for row in values["rows"]]})
    except OSError as error:
        raise UsageError(
            f"`path` (={path}) cannot be read ({error.strerror}); name the results.json of a report"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"`path` (={path}) must be the results.json of a report; it is not: {error}") from None


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float; None, NaN and infinities are not."""
    return isinstance(value, int | float) and math.isfinite(value)


def is_finished(run: dict[str, Any]) -> bool:
    """Whether a run ended with finite test accuracies and is not marked ``"diverged"``."""
    accuracies = (run.get("test_accuracy_best"), run.get("test_accuracy_last"))
    return not run.get("diverged") and all(is_number(accuracy) for accuracy in accuracies)


def unfinished(results: Results) -> list[str]:
    """A sentence for each run that is left out of the means."""
    return [
        f"{label}, seed {run['seed']}, is not in the means: {run.get('diverged') or 'no finite test accuracy'}"
        for label, row in zip(results.labels, results.rows)
        for run in row.runs
        if not is_finished(run)
    ]


def settings_at_edge(tuned: dict[str, Any]) -> dict[str, float]:
    """The chosen numbers of a tuned row beyond which none was tried: a better one may lie there.

    0 has nothing beyond it, and a setting of which one value was tried was not tuned.

    >>> trials = [{"learning_rate": rate, "weight_decay": 0.0} for rate in (0.1, 1.0, 10.0)]
    >>> settings_at_edge({"chosen": {"learning_rate": 10.0, "weight_decay": 0.0}, "trials": trials})
    {'learning_rate': 10.0}
    """
    at_edge = {}
    for name, value in tuned["chosen"].items():
        values = {trial[name] for trial in tuned["trials"] if type(trial[name]) in (int, float)}
        if len(values) > 1 and type(value) in (int, float) and value != 0 and value in (min(values), max(values)):
            at_edge[name] = value
    return at_edge


def did_not_act(results: Results) -> list[str]:
    """A sentence for each row in whose runs the step size of Deep Frank-Wolfe was 1 throughout, or nearly."""
    sentences = []
    for label, row, summary in zip(results.labels, results.rows, summarize(results)):
        if summary["gamma_below_1"] is not None:
            optim, gammas = _optim_of(results, row), [run["gamma"] for run in row.runs if is_finished(run)]
            projected = optim.get("latent_box") is not None
            if told := when_it_did_not_act(gammas, optim.get("learning_rate"), projected=projected):
                sentences.append(f"{label}: {told}")
    return sentences


def _optim_of(results: Results, row: Row) -> dict[str, Any]:
    """The settings of the optimizer of a row; in a grid over optimizers those that the config keeps for each."""
    optim = results.config.get("optim", {})
    if "optim.name" in results.axes:
        kept = {one["name"]: one for one in (*results.config.get("optimizers", ()), optim)}
        optim = kept.get(row.optimizer, optim)
    return optim | {name.removeprefix("optim."): value for name, value in row.settings.items()}


def at_edge(results: Results) -> list[str]:
    """A sentence for each setting that was chosen at the edge of those tried."""
    budget = (results.tuning or {}).get("budget")
    return [
        f"{tuned['label']}: {name}={value:g} is at the edge of what was tried with the budget of {budget} trials; "
        "a better value may lie beyond"
        for tuned in (results.tuning or {"rows": []})["rows"]
        for name, value in settings_at_edge(tuned).items()
    ]


def summarize(results: Results) -> list[dict[str, Any]]:
    """One dict a row, over the runs that finished.

    ``label``; ``runs`` (started) and ``n`` (finished); mean and sample standard deviation of each of the accuracies and
    of ``train_loss_last`` as ``*_mean`` and ``*_std``; ``step_time_ms``, the median; ``max_abs_latent``, the maximum;
    ``share_on_bounds``, ``never_flipped`` and ``gamma_below_1``, the share of the steps with gamma < 1, the means.  A
    number is None where a finished run lacks it or it is not finite, and a standard deviation also where n < 2.

    ``best`` is True for one row: of the highest mean validation accuracy among those whose runs all finished, or among
    all if there is none.

    Raises:
      ValueError: `results` has no rows.
    """
    if not results.rows:
        raise ValueError("`results` must have at least one row; got none: train at least one")
    summaries = [_summarize(row) for row in results.rows]
    rated = [summary for summary in summaries if summary["validation_accuracy_best_mean"] is not None]
    whole = [summary for summary in rated if summary["n"] == summary["runs"]] or rated
    best = max(whole, key=lambda summary: summary["validation_accuracy_best_mean"], default=None)
    return [summary | {"best": summary is best} for summary in summaries]


def _summarize(row: Row) -> dict[str, Any]:
    runs = [run for run in row.runs if is_finished(run)]

    def over_runs(name: str, statistic: Callable[[list[float]], float]) -> float | None:
        values = [run.get(name) for run in runs]
        return statistic(values) if values and all(is_number(value) for value in values) else None

    summary = {"label": row.label, "runs": len(row.runs), "n": len(runs)}
    for name in (*ACCURACIES, "train_loss_last"):
        summary[f"{name}_mean"] = over_runs(name, fmean)
        summary[f"{name}_std"] = over_runs(name, stdev) if len(runs) > 1 else None
    summary["step_time_ms"] = over_runs("step_time_ms", median)
    summary["max_abs_latent"] = over_runs("max_abs_latent", max)
    summary |= {name: over_runs(name, fmean) for name in ("share_on_bounds", "never_flipped")}
    gammas = [[gamma for gamma in (run.get("gamma") or {}).get("value", ()) if is_number(gamma)] for run in runs]
    summary["gamma_below_1"] = fmean(map(share_below_1, gammas)) if gammas and all(gammas) else None
    return summary


def tidy_rows(results: Results) -> list[dict[str, Any]]:
    """One flat dict a run: label of its row, the row's settings, seed, accuracies, epoch of the best, times.

    ``train_seconds`` is the median time of a training step times the number of steps, compilation left out; of runs
    that vmap mapped together, their share of the whole.  ``diverged`` is the sentence of a run that did, else None.
    """
    rows = []
    for row in results.rows:
        for run in row.runs:
            tidy = {results.compared: row.label, **row.settings, "seed": run["seed"]}
            tidy |= {name: run.get(name) for name in ("best_epoch", *ACCURACIES, "train_loss_last", "step_time_ms")}
            ms = run.get("step_time_ms")
            known = row.steps is not None and is_number(ms)
            tidy["train_seconds"] = round(1e-3 * row.steps * ms, 3) if known else None
            rows.append(tidy | {"diverged": run.get("diverged")})
    return rows

"""The report of a comparison: numbers, tables and the folder that holds them with their pictures."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from bnn_jax.analysis.plots import (
    has_gradient_paths,
    has_step_size,
    is_finished,
    is_number,
    plot_accuracy,
    plot_estimators,
    plot_paths,
    plot_step_size,
    row_labels,
)
from bnn_jax.errors import RunError, UsageError


def summarize(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One dict a row of the comparison, over the runs that finished.

    ``label, optimizer, loss, settings`` and ``columns``, further cells of the table by their header, as in the row;
    ``runs`` (started) and ``n`` (finished);
    mean and sample standard deviation of ``test_accuracy_best``, ``test_accuracy_last`` and ``train_loss_last`` as
    ``*_mean`` and ``*_std``;
    ``step_time_ms``, the median; ``max_abs_latent``, the maximum; ``share_on_bounds``, the mean.
    A number is None where a finished run lacks it or it is not finite, and a standard deviation also where n < 2.

    Raises:
      ValueError: `results` has no rows.
    """
    if not results.get("rows"):
        raise ValueError("`results` must have at least one row under 'rows'; got none: compare at least one optimizer.")
    return [_summarize_row(row) for row in results["rows"]]


def _summarize_row(row: dict[str, Any]) -> dict[str, Any]:
    runs = [run for run in row["runs"] if is_finished(run)]

    def over_runs(name: str, statistic: Callable[[list[float]], float]) -> float | None:
        values = [run.get(name) for run in runs]
        return statistic(values) if values and all(is_number(value) for value in values) else None

    summary = {name: row[name] for name in ("label", "optimizer", "loss", "settings")}
    summary["columns"] = row.get("columns", {})
    summary |= {"runs": len(row["runs"]), "n": len(runs)}
    for name in ("test_accuracy_best", "test_accuracy_last", "train_loss_last"):
        summary[f"{name}_mean"] = over_runs(name, fmean)
        summary[f"{name}_std"] = over_runs(name, stdev) if len(runs) > 1 else None
    summary["step_time_ms"] = over_runs("step_time_ms", median)
    summary["max_abs_latent"] = over_runs("max_abs_latent", max)
    summary["share_on_bounds"] = over_runs("share_on_bounds", fmean)
    return summary


def report_markdown(results: dict[str, Any]) -> str:
    """The comparison as Markdown: data, table, tuning, pictures, provenance and the command that remakes it.

    It embeds ``accuracy.png`` from its own folder; where a run recorded a step size ``step_size.png``, where the
    comparison names estimators ``estimators.png``, where its rows have gradient paths ``paths.png``.
    ``results["compared"]`` says what the rows are, "optimizer" if it is missing; ``results["notes"]`` is Markdown that
    follows the table.

    Raises:
      ValueError: `results` has no rows.
    """
    summaries = summarize(results)
    sections = [
        f"# {_inline(results['name'])}",
        _what_was_compared(results),
        _main_table(summaries, _compared(results)),
        _how_to_read(summaries),
        _unfinished_markdown(results),
        _latent_weights(results, summaries),
        results.get("notes", ""),
        _pictures(results),
        _tuning(results.get("tuning"), _compared(results)),
        _provenance(results["provenance"]),
        f"## Remake\n\n```sh\n{results['command']}\n```",
        "Every run, curve and setting is in [results.json](results.json).",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def print_table(results: dict[str, Any]) -> None:
    """Print the comparison's table to the terminal; it fits in 80 columns.

    Raises:
      ValueError: `results` has no rows.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    summaries = summarize(results)
    table = Table(box=box.SIMPLE, title=Text(f"{results['name']} on {results['dataset']['name']}"))
    table.add_column(_compared(results), overflow="fold")
    for header in ("test, best\n(%)", "test, last\n(%)", "train\nloss", "ms a\nstep", "n"):
        table.add_column(header, justify="right")
    for label, row in zip(row_labels(results), summaries):
        cells = [label, _accuracy(row, "best"), _accuracy(row, "last"), _number(row["train_loss_last_mean"], ".3g")]
        table.add_row(*map(Text, [*cells, _number(row["step_time_ms"], ".1f"), _n(row)]))
    console = Console()
    console.print(table)
    for line in ("best: at the epoch of the best validation accuracy; mean ± std over n seeds", *_unfinished(results)):
        console.print(Text(line))


def write_report(results: dict[str, Any], folder: str | Path) -> None:
    """Write results.json, report.md and its pictures, accuracy.png and those that apply, into `folder`.

    Each file is replaced as a whole, so a reader never meets half of one.  Numbers that are not finite become null in
    results.json; a step_size.png left by an earlier report is removed where this one has none.

    Raises:
      ValueError: `results` has no rows.
      UsageError: `folder` is, or lies below, a file.
      RunError: a file cannot be written.
    """
    folder, text = Path(folder), report_markdown(results)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "results.json", lambda path: path.write_text(to_json(results), encoding="utf-8"))
        _replace(folder / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
        _replace(folder / "accuracy.png", lambda path: plot_accuracy(results, path))
        if has_step_size(results):
            _replace(folder / "step_size.png", lambda path: plot_step_size(results, path))
        else:
            (folder / "step_size.png").unlink(missing_ok=True)
        if results.get("estimators"):
            _replace(folder / "estimators.png", lambda path: plot_estimators(results["estimators"], path))
        if has_gradient_paths(results):
            _replace(folder / "paths.png", lambda path: plot_paths(results, path))
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"`folder` (={folder}) must be a folder, but there is a file; name another one.") from error
    except OSError as error:
        reason = error.strerror or error
        raise RunError(
            f"The report in {folder} was not written ({reason}); free space or name another folder."
        ) from error


def to_json(results: dict[str, Any]) -> str:
    """Results as JSON text, lists of numbers on one line each; NaN and infinities become null.

    >>> print(to_json({"loss": [1.5, float("nan")], "seed": 0}))
    {
     "loss": [1.5, null],
     "seed": 0
    }
    """
    text = json.dumps(_finite_or_none(results), indent=1, ensure_ascii=False, allow_nan=False)
    # A line break inside brackets is always json's own: in a string it would be escaped.
    return re.sub(r"\[(\n[\s\d.,eE+\-nul]*)\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_none(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_none(inner) for inner in value]
    return None if isinstance(value, float) and not is_number(value) else value


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _what_was_compared(results: dict[str, Any]) -> str:
    rows, data = results["rows"], results["dataset"]
    runs = [run for row in rows for run in row["runs"]]
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in runs}))
    epochs = sorted({run["epochs"] for run in runs if is_finished(run)})
    losses = sorted({row["loss"] for row in rows})
    subjects = {"optimizer": "The same network trained by", "architecture": "The networks"}
    subject = subjects.get(_compared(results), "The same network with")
    length = f" for {epochs[-1]} epoch{'s' if epochs[-1] > 1 else ''}" if len(epochs) == 1 else ""
    loss = f" with the loss `{losses[0]}`" if len(losses) == 1 else ""
    return (
        f"{subject} {_enumerate([row['label'] for row in rows])} on **{_inline(data['name'])}**"
        f"{length}{loss}, seeds {seeds}. Data: {data['train']} training, {data['validation']} validation and "
        f"{data['test']} test examples. {_inline(data['note'])}"
    )


def _compared(results: dict[str, Any]) -> str:
    return results.get("compared", "optimizer")


def _main_table(summaries: list[dict[str, Any]], compared: str) -> str:
    with_loss = _more_than_one_loss(summaries)
    further = list(dict.fromkeys(header for row in summaries for header in row["columns"]))
    header = [compared, *(["loss"] if with_loss else []), "settings", *further, "test accuracy, best (%)"]
    header += ["test accuracy, last (%)", "train loss", "step time (ms)", "n"]
    rows = []
    for row in summaries:
        named = compared != "optimizer" or row["optimizer"] in row["label"]
        name = row["label"] if named else f"{row['label']} ({row['optimizer']})"
        loss = _plus_minus(row["train_loss_last_mean"], row["train_loss_last_std"], ".3g", ".2g")
        cells = [name, *([row["loss"]] if with_loss else []), _settings(row["settings"])]
        cells += [*(str(row["columns"].get(name, "-")) for name in further), _accuracy(row, "best")]
        rows.append([*cells, _accuracy(row, "last"), loss, _number(row["step_time_ms"], ".1f"), _n(row)])
    return _table(header, rows, numbers_from=header.index("settings") + 1)


def _how_to_read(summaries: list[dict[str, Any]]) -> str:
    losses = " Train losses of rows with different losses do not compare." if _more_than_one_loss(summaries) else ""
    return (
        "Mean ± sample standard deviation over the n seeds that finished. *Best* is the test accuracy at the epoch of "
        "the highest validation accuracy, so the test set has no part in the choice; *last* is at the last epoch. "
        f"Train loss is at the last epoch, step time the median over the runs.{losses}"
    )


def _unfinished(results: dict[str, Any]) -> list[str]:
    """A sentence for each run that is left out of the means."""
    return [
        f"{label}, seed {run['seed']}, is not in the means: {run.get('diverged') or 'no finite test accuracy'}"
        for label, row in zip(row_labels(results), results["rows"])
        for run in row["runs"]
        if not is_finished(run)
    ]


def _unfinished_markdown(results: dict[str, Any]) -> str:
    return "\n".join(f"- {_inline(line)}" for line in _unfinished(results))


def _latent_weights(results: dict[str, Any], summaries: list[dict[str, Any]]) -> str:
    parts = []
    for label, row in zip(row_labels(results), summaries):
        share = row["share_on_bounds"]
        if row["max_abs_latent"] is not None:
            bounds = "" if share is None else f" ({_percent(share, '.1f')} % on the bounds)"
            parts.append(f"{_inline(label)} {row['max_abs_latent']:.4g}{bounds}")
    return f"Largest magnitude of a latent binary weight: {'; '.join(parts)}." if parts else ""


def _tuning(tuning: dict[str, Any] | None, compared: str) -> str:
    if not tuning:
        return ""
    rows = []
    for row in tuning["rows"]:
        for trial in row["trials"]:
            tried = {name: value for name, value in trial.items() if name != "validation_accuracy"}
            chosen = "yes" if row["chosen"].items() <= tried.items() else ""
            rows.append([row["label"], _settings(tried), chosen, _percent(trial["validation_accuracy"])])
        if not row["trials"]:
            rows.append([row["label"], _settings(row["chosen"]), "not tuned", "-"])
    header = [compared, "settings tried", "chosen", "validation accuracy (%)"]
    epochs = f"{tuning['epochs']} epoch{'s' if tuning['epochs'] > 1 else ''}"
    return (
        f"## Tuning\n\nSettings were chosen by validation accuracy, with seed {tuning['seed']}, {epochs} and at most "
        f"{tuning['budget']} trials for each {compared}.\n\n{_table(header, rows, numbers_from=3)}"
    )


def _pictures(results: dict[str, Any]) -> str:
    pictures = "## Curves\n\n![Validation accuracy over epochs](accuracy.png)"
    if has_step_size(results):
        pictures += (
            "\n\n![Step size of Deep Frank-Wolfe over optimizer steps](step_size.png)\n\n"
            "Deep Frank-Wolfe finds its step size γ anew in every step: 1 takes the full learning rate, a smaller γ "
            "that part of it. Line: running median; band: quartiles; faint: single seeds."
        )
    if results.get("estimators"):
        pictures += (
            "\n\n![Forward value and chosen derivative of each estimator](estimators.png)\n\n"
            "Drawn from the functions that were run: forward value (grey), chosen derivative (blue) and its area A."
        )
    if has_gradient_paths(results):
        pictures += (
            "\n\n![Test error over the cost of the second cheapest gradient path](paths.png)\n\n"
            "N_2nd: multiply-accumulates of the binary convolutions on the second cheapest gradient path. Points: mean "
            "over the seeds at the best epoch; bars: sample standard deviation."
        )
    return pictures


def _provenance(provenance: dict[str, Any]) -> str:
    device, cpu, git = (provenance.get(name) or {} for name in ("device", "cpu", "git"))
    versions = ", ".join(f"{name} {number}" for name, number in (provenance.get("versions") or {}).items())
    changes = {True: ", with uncommitted changes", False: ""}.get(git.get("dirty"), ", state of the checkout unknown")
    devices = f"{device.get('count', 'unknown')} x {device.get('kind', 'unknown')}"
    cores = f"{cpu.get('cores', 'unknown')} cores" + (f" of {cpu['model']}" if cpu.get("model") else "")
    lines = [
        f"- date: {provenance.get('date', 'unknown')}",
        f"- code: commit {git.get('commit', 'unknown')}{changes}",
        f"- device: {devices} ({device.get('platform', 'unknown')})",
        f"- host: {cores}, {provenance.get('platform', 'unknown')}",
        f"- versions: Python {provenance.get('python', 'unknown')}, {versions or 'others unknown'}",
    ]
    return "\n".join(["## Provenance", "", *map(_inline, lines)])


def _more_than_one_loss(summaries: list[dict[str, Any]]) -> bool:
    return len({row["loss"] for row in summaries}) > 1


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in settings.items()
    )


def _accuracy(row: dict[str, Any], which: str) -> str:
    mean, std = row[f"test_accuracy_{which}_mean"], row[f"test_accuracy_{which}_std"]
    return _plus_minus(*(None if value is None else 100 * value for value in (mean, std)), ".2f", ".2f")


def _plus_minus(mean: float | None, std: float | None, style: str, std_style: str) -> str:
    return _number(mean, style) + (f" ± {std:{std_style}}" if std is not None else "")


def _percent(share: float | None, style: str = ".2f") -> str:
    return _number(100 * share if is_number(share) else None, style)


def _number(value: float | None, style: str) -> str:
    return format(value, style) if is_number(value) else "-"


def _n(row: dict[str, Any]) -> str:
    return str(row["n"]) if row["n"] == row["runs"] else f"{row['n']}/{row['runs']}"


def _enumerate(names: Sequence[str]) -> str:
    names = [f"**{_inline(name)}**" for name in dict.fromkeys(names)]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _inline(text: str) -> str:
    """Text that stays on its line and in its table cell, and is no HTML."""
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "\\|")


def _table(header: list[str], rows: list[list[str]], *, numbers_from: int) -> str:
    rule = ["---" if column < numbers_from else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(map(_inline, cells))} |" for cells in (header, rule, *rows))

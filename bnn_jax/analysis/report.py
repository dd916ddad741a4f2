"""The report of a comparison: numbers, tables and the folder that holds them with their pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from bnn_jax.analysis.documents import (
    inline,
    markdown_table,
    number,
    percent,
    plus_minus,
    provenance_section,
    replace_file,
    to_json,
    writing_into,
)
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
        f"# {inline(results['name'])}",
        _what_was_compared(results),
        _main_table(summaries, _compared(results)),
        _how_to_read(summaries),
        _unfinished_markdown(results),
        _latent_weights(results, summaries),
        results.get("notes", ""),
        _pictures(results),
        _tuning(results.get("tuning"), _compared(results)),
        provenance_section(results["provenance"]),
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
        cells = [label, _accuracy(row, "best"), _accuracy(row, "last"), number(row["train_loss_last_mean"], ".3g")]
        table.add_row(*map(Text, [*cells, number(row["step_time_ms"], ".1f"), _n(row)]))
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
    with writing_into(folder):
        replace_file(folder / "results.json", lambda path: path.write_text(to_json(results), encoding="utf-8"))
        replace_file(folder / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
        replace_file(folder / "accuracy.png", lambda path: plot_accuracy(results, path))
        if has_step_size(results):
            replace_file(folder / "step_size.png", lambda path: plot_step_size(results, path))
        else:
            (folder / "step_size.png").unlink(missing_ok=True)
        if results.get("estimators"):
            replace_file(folder / "estimators.png", lambda path: plot_estimators(results["estimators"], path))
        if has_gradient_paths(results):
            replace_file(folder / "paths.png", lambda path: plot_paths(results, path))


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
        f"{subject} {_enumerate([row['label'] for row in rows])} on **{inline(data['name'])}**"
        f"{length}{loss}, seeds {seeds}. Data: {data['train']} training, {data['validation']} validation and "
        f"{data['test']} test examples. {inline(data['note'])}"
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
        loss = plus_minus(row["train_loss_last_mean"], row["train_loss_last_std"], ".3g", ".2g")
        cells = [name, *([row["loss"]] if with_loss else []), _settings(row["settings"])]
        cells += [*(str(row["columns"].get(name, "-")) for name in further), _accuracy(row, "best")]
        rows.append([*cells, _accuracy(row, "last"), loss, number(row["step_time_ms"], ".1f"), _n(row)])
    return markdown_table(header, rows, numbers_from=header.index("settings") + 1)


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
    return "\n".join(f"- {inline(line)}" for line in _unfinished(results))


def _latent_weights(results: dict[str, Any], summaries: list[dict[str, Any]]) -> str:
    parts = []
    for label, row in zip(row_labels(results), summaries):
        share = row["share_on_bounds"]
        if row["max_abs_latent"] is not None:
            bounds = "" if share is None else f" ({percent(share, '.1f')} % on the bounds)"
            parts.append(f"{inline(label)} {row['max_abs_latent']:.4g}{bounds}")
    return f"Largest magnitude of a latent binary weight: {'; '.join(parts)}." if parts else ""


def _tuning(tuning: dict[str, Any] | None, compared: str) -> str:
    if not tuning:
        return ""
    rows = []
    for row in tuning["rows"]:
        for trial in row["trials"]:
            tried = {name: value for name, value in trial.items() if name != "validation_accuracy"}
            chosen = "yes" if row["chosen"].items() <= tried.items() else ""
            rows.append([row["label"], _settings(tried), chosen, percent(trial["validation_accuracy"])])
        if not row["trials"]:
            rows.append([row["label"], _settings(row["chosen"]), "not tuned", "-"])
    header = [compared, "settings tried", "chosen", "validation accuracy (%)"]
    epochs = f"{tuning['epochs']} epoch{'s' if tuning['epochs'] > 1 else ''}"
    return (
        f"## Tuning\n\nSettings were chosen by validation accuracy, with seed {tuning['seed']}, {epochs} and at most "
        f"{tuning['budget']} trials for each {compared}.\n\n{markdown_table(header, rows, numbers_from=3)}"
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


def _more_than_one_loss(summaries: list[dict[str, Any]]) -> bool:
    return len({row["loss"] for row in summaries}) > 1


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in settings.items()
    )


def _accuracy(row: dict[str, Any], which: str) -> str:
    mean, std = row[f"test_accuracy_{which}_mean"], row[f"test_accuracy_{which}_std"]
    return plus_minus(*(None if value is None else 100 * value for value in (mean, std)), ".2f", ".2f")


def _n(row: dict[str, Any]) -> str:
    return str(row["n"]) if row["n"] == row["runs"] else f"{row['n']}/{row['runs']}"


def _enumerate(names: Sequence[str]) -> str:
    names = [f"**{inline(name)}**" for name in dict.fromkeys(names)]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

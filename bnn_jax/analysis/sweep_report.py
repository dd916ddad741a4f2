"""The report of a sweep: a tidy table of its runs, mean and spread of its cells, the best cell by validation."""

import csv
import io
import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bnn_jax.analysis.documents import (
    inline,
    markdown_table,
    plus_minus,
    provenance_section,
    replace_file,
    to_json,
    writing_into,
)
from bnn_jax.analysis.plots import is_finished, is_number
from bnn_jax.analysis.sweep_plots import plot_sweep, value_text

ACCURACIES = ("validation_accuracy_best", "test_accuracy_best", "test_accuracy_last")
HOW_TO_READ = (
    "Mean ± sample standard deviation over the n seeds that finished. Accuracies are at the epoch of a run's highest "
    "validation accuracy, *last* at the last epoch. The best cell is the one of the highest mean validation accuracy "
    "among those in which every seed finished, so the test set has no part in the choice. The best of several "
    "validation accuracies is a little too high by chance: quote the test accuracy beside it."
)


def tidy_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat dict a run: label of the cell, each axis's value, seed, accuracies, epoch of the best, times.

    ``train_seconds`` is the median time of a training step times the number of steps, compilation left out; of runs
    that vmap mapped together, their share of the whole.  ``diverged`` is the sentence of a run that did, else None.
    """
    rows = []
    for cell in results["cells"]:
        for run in cell["runs"]:
            row = {"cell": cell["label"], **cell["values"], "seed": run["seed"]}
            row |= {name: run.get(name) for name in ("best_epoch", *ACCURACIES, "train_loss_last", "step_time_ms")}
            steps, ms = cell["steps"], run.get("step_time_ms")
            row["train_seconds"] = round(1e-3 * steps * ms, 3) if is_number(ms) else None
            rows.append(row | {"diverged": run.get("diverged")})
    return rows


def summarize_cells(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One dict a cell: ``label``, ``values``, ``runs`` (started), ``n`` (finished), means and standard deviations.

    ``<name>_mean`` and ``<name>_std``, the sample standard deviation, of each of the accuracies and
    ``train_loss_last``; None where no run finished, a deviation also where one did.  ``best`` is True for one cell: of
    the highest mean validation accuracy among those whose runs all finished, or among all if there is none.
    """
    cells = [_summarize_cell(cell) for cell in results["cells"]]
    whole = [cell for cell in cells if cell["n"] == cell["runs"]] or [cell for cell in cells if cell["n"]]
    best = max(whole, key=lambda cell: cell["validation_accuracy_best_mean"], default=None)
    return [cell | {"best": cell is best} for cell in cells]


def _summarize_cell(cell: dict[str, Any]) -> dict[str, Any]:
    runs = [run for run in cell["runs"] if is_finished(run)]
    summary = {"label": cell["label"], "values": cell["values"], "runs": len(cell["runs"]), "n": len(runs)}
    for name in (*ACCURACIES, "train_loss_last"):
        values = [run[name] for run in runs]
        summary[f"{name}_mean"] = fmean(values) if values else None
        summary[f"{name}_std"] = stdev(values) if len(values) > 1 else None
    return summary


def sweep_markdown(results: dict[str, Any]) -> str:
    """The sweep as Markdown: data, table, picture, provenance and the command that remakes it."""
    cells = summarize_cells(results)
    axes = list(results["axes"])
    header = [*(axes or ["cell"]), "validation (%)", "test (%)", "test, last (%)", "train loss", "n"]
    rows = []
    for cell in cells:
        values = [value_text(cell["values"][name]) for name in axes] or [cell["label"]]
        rows.append([f"**{text}**" if cell["best"] else text for text in [*values, *_numbers(cell)]])
    sections = [
        f"# {inline(results['name'])}",
        _what_was_swept(results),
        markdown_table(header, rows, numbers_from=len(axes) or 1),
        best_sentence(results),
        HOW_TO_READ,
        "\n".join(f"- {inline(line)}" for line in _diverged(results)),
        "![Accuracy of each cell](sweep.png)",
        provenance_section(results["provenance"]),
        f"## Remake\n\n```sh\n{results['command']}\n```",
        "A row for each run: [sweep.csv](sweep.csv), [sweep.jsonl](sweep.jsonl); cells and config: "
        "[summary.json](summary.json).",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _what_was_swept(results: dict[str, Any]) -> str:
    seeds = ", ".join(map(str, results["seeds"]))
    grid = " x ".join(f"{len(values)} `{name}`" for name, values in results["axes"].items()) or "one cell"
    data = "; ".join(
        f"{data['train']} training, {data['validation']} validation and {data['test']} test examples of "
        f"**{inline(data['name'])}** ({inline(data['note'])})"
        for data in results["datasets"]
    )
    config = results["config"]
    trained = f"`{config['model']['name']}` by `{config['optim']['name']}`, {config['epochs']} epochs"
    return f"{grid}, seeds {seeds}, each from {trained} but for what the table says. Data: {data}."


def best_sentence(results: dict[str, Any]) -> str:
    """The best cell with its accuracies, in words."""
    best = next((cell for cell in summarize_cells(results) if cell["best"]), None)
    if best is None:
        return "No run finished."
    validation, test = (_accuracy(best, name) for name in ("validation_accuracy_best", "test_accuracy_best"))
    return f"Best by validation: {inline(best['label'])}, validation {validation} %, test {test} %."


def _diverged(results: dict[str, Any]) -> list[str]:
    return [
        f"{cell['label']}, seed {run['seed']}, is not in the means: {run.get('diverged') or 'no finite accuracy'}"
        for cell in results["cells"]
        for run in cell["runs"]
        if not is_finished(run)
    ]


def print_sweep(results: dict[str, Any]) -> None:
    """Print a row for each cell, the best one marked, to the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    axes = list(results["axes"])
    data = ", ".join(data["name"] for data in results["datasets"])
    table = Table(box=box.SIMPLE, title=Text(f"{results['name']} on {data}"))
    for name in axes or ["cell"]:
        table.add_column(Text(name.replace(".", ".\n", 1)), overflow="fold")
    for header in ("validation\n(%)", "test\n(%)", "test, last\n(%)", "n"):
        table.add_column(header, justify="right")
    for cell in summarize_cells(results):
        validation, test, last, _, n = _numbers(cell)
        values = [value_text(cell["values"][name]) for name in axes] or [cell["label"]]
        style = "bold green" if cell["best"] else ""
        table.add_row(*map(Text, [*values, validation, test, last, n]), style=style)
    console = Console()
    console.print(table)
    for line in (best_sentence(results), "mean ± std over n seeds, at the best validation epoch", *_diverged(results)):
        console.print(Text(line))


def write_sweep(results: dict[str, Any], folder: str | Path) -> None:
    """Write sweep.csv, sweep.jsonl, summary.json, report.md and sweep.png into `folder`, each replaced as a whole.

    Raises:
      UsageError: `folder` is, or lies below, a file.
      RunError: a file cannot be written.
    """
    rows, folder = tidy_rows(results), Path(folder)
    summary = {name: value for name, value in results.items() if name != "cells"} | {"cells": summarize_cells(results)}
    best = next((cell["label"] for cell in summary["cells"] if cell["best"]), None)
    texts = {
        "sweep.csv": _csv(rows),
        "sweep.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "summary.json": to_json(summary) + "\n",
        "report.md": sweep_markdown(results),
    }
    with writing_into(folder):
        for name, text in texts.items():
            replace_file(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
        replace_file(folder / "sweep.png", lambda path: plot_sweep(results, path, best=best))


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _numbers(cell: dict[str, Any]) -> list[str]:
    """The cells of a table after the axes: accuracies, train loss, number of runs."""
    loss = plus_minus(cell["train_loss_last_mean"], cell["train_loss_last_std"], ".3g", ".2g")
    n = str(cell["n"]) if cell["n"] == cell["runs"] else f"{cell['n']}/{cell['runs']}"
    return [*(_accuracy(cell, name) for name in ACCURACIES), loss, n]


def _accuracy(cell: dict[str, Any], name: str) -> str:
    mean, std = (cell[f"{name}_{of}"] for of in ("mean", "std"))
    return plus_minus(*(None if value is None else 100 * value for value in (mean, std)), ".2f", ".2f")

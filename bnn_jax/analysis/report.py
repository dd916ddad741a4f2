"""The report of a comparison or a grid: tables, and the folder that holds them with their pictures.

``write_report(read_results(folder / "results.json"), folder)`` writes that of a comparison again.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bnn_jax.analysis.documents import (
    inline,
    markdown_table,
    number,
    percent,
    plus_minus,
    provenance_section,
    settings_text,
    to_json,
    value_text,
    writing_into,
)
from bnn_jax.analysis.paired import differences_section, print_differences
from bnn_jax.analysis.plots import pictures_of
from bnn_jax.analysis.tables import TEXT, Tables, print_text
from bnn_jax.analysis.web_page import web_page
from bnn_jax.files import replacing
from bnn_jax.paths import local_path
from bnn_jax.sweeps.results import (
    ACCURACIES,
    Results,
    at_edge,
    did_not_act,
    is_finished,
    settings_at_edge,
    summarize,
    tidy_rows,
    unfinished,
)

Summary = dict[str, Any]
"""Of a row, see :func:`bnn_jax.sweeps.results.summarize`."""


def _accuracy(name: str) -> Callable[[Summary], str]:
    def text(row: Summary) -> str:
        mean, std = (None if row[f"{name}_{of}"] is None else 100 * row[f"{name}_{of}"] for of in ("mean", "std"))
        return plus_minus(mean, std, ".2f", ".2f")

    return text


def _loss(row: Summary) -> str:
    return plus_minus(row["train_loss_last_mean"], row["train_loss_last_std"], ".3g", ".2g")


def _n(row: Summary) -> str:
    return str(row["n"]) if row["n"] == row["runs"] else f"{row['n']}/{row['runs']}"


def _gamma(row: Summary) -> str:
    share = row["gamma_below_1"]
    return percent(share, ".2g" if share is not None and 0 < share < 0.001 else ".1f")


GAMMA = ("γ below 1 (% of steps)", "γ < 1\n(%)", _gamma)
COLUMNS = (
    ("validation accuracy (%)", "validation\n(%)", _accuracy("validation_accuracy_best")),
    ("test accuracy, best (%)", "test, best\n(%)", _accuracy("test_accuracy_best")),
    ("test accuracy, last (%)", "test, last\n(%)", _accuracy("test_accuracy_last")),
    ("train loss", None, _loss),
    (None, "train\nloss", lambda row: number(row["train_loss_last_mean"], ".3g")),
    GAMMA,
    ("step time (ms)", "ms a\nstep", lambda row: number(row["step_time_ms"], ".1f")),
    ("n", "n", _n),
)
"""The numbers of a table: header in the report and in the terminal, None where it has no such column, and text."""


def report_markdown(results: Results) -> str:
    """The results as Markdown: data, table, tuning, pictures, provenance and the command that remakes them.

    It embeds the pictures of :func:`bnn_jax.analysis.plots.pictures_of` from its own folder.

    Raises:
      ValueError: `results` has no rows.
    """
    summaries, grid = summarize(results), results.is_grid
    data = "[sweep.csv](sweep.csv), [sweep.jsonl](sweep.jsonl); cells and config: [summary.json](summary.json)"
    sections = [
        f"# {inline(results.name)}",
        _what_was_run(results),
        _table(results, summaries),
        _best(summaries) if grid else "",
        _how_to_read(results),
        "\n".join(f"- {inline(line)}" for line in _remarks(results)),
        "" if grid else _latent_weights(results, summaries),
        "" if grid else differences_section(results),
        results.notes,
        _pictures(results),
        _tuning(results),
        provenance_section(results.provenance),
        f"## Remake\n\n```sh\n{results.command}\n```",
        f"A row for each run: {data}." if grid else "Every run, curve and setting is in [results.json](results.json).",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def print_report(results: Results, tables: Tables = TEXT) -> None:
    """Print the table, of a grid with the best cell marked, and what there is to say of it.

    Raises:
      ValueError: `results` has no rows.
    """
    summaries = summarize(results)
    columns = [(header, text) for _, header, text in _columns(results, summaries) if header]
    if results.is_grid:
        # The axes take the place of what a comparison shows of loss and time.
        columns = [*columns[: len(ACCURACIES)], columns[-1]]
    names = list(results.axes) or [results.compared]
    rows = [
        [*_names_of(results, index), *(text(summary) for _, text in columns)] for index, summary in enumerate(summaries)
    ]
    best = next((index for index, row in enumerate(summaries) if row["best"]), None)
    tables.print(
        [*(name.replace(".", ".\n", 1) for name in names), *(header for header, _ in columns)],
        rows,
        title=f"{results.name} on {', '.join(data['name'] for data in results.datasets)}",
        texts=range(len(names)),
        bold=best if results.is_grid else None,
    )
    print_text(
        *([_best(summaries)] if results.is_grid else []),
        "best: at the epoch of the best validation accuracy; mean ± std over n seeds",
    )
    if not results.is_grid:
        print_differences(results, tables)
    print_text(*_remarks(results))


def write_report(results: Results, folder: str | Path) -> list[str]:
    """Write report.md, the data, the pictures and report.html into `folder`; returns the names of the files.

    Of a comparison the data are results.json, of a grid sweep.csv, sweep.jsonl and summary.json.  report.html is
    report.md with its pictures as one page, see :func:`bnn_jax.analysis.web_page.web_page`.  Each file is replaced
    as a whole, so a reader never meets half of one.  Numbers that are not finite become null; a picture left by an
    earlier report is removed where this one has none.

    Raises:
      ValueError: `results` has no rows.
      UsageError: `folder` is, or lies below, a file.
      RunError: a file cannot be written.
    """
    folder, pictures = local_path("folder", folder), pictures_of(results)
    texts = {"report.md": report_markdown(results)}
    texts |= _grid_data(results) if results.is_grid else {"results.json": to_json(results.to_dict())}
    with writing_into(folder):
        for name, text in texts.items():
            _write_text(folder / name, text)
        for name, draw in pictures.items():
            draw(folder / name)
        for name in CAPTIONS.keys() - pictures.keys():
            (folder / name).unlink(missing_ok=True)
        _write_text(folder / "report.html", web_page(texts["report.md"], folder))
    return [*texts, *pictures, "report.html"]


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _grid_data(results: Results) -> dict[str, str]:
    """The files of a grid's data: name -> text."""
    rows, table = tidy_rows(results), io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    kept = ("name", "command", "provenance", "axes", "datasets", "config")
    summary = {name: getattr(results, name) for name in kept} | {"seeds": results.seeds}
    cells = [
        {"label": row.label, "values": row.settings} | summary for row, summary in zip(results.rows, summarize(results))
    ]
    return {
        "sweep.csv": table.getvalue(),
        "sweep.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "summary.json": to_json(summary | {"cells": cells}) + "\n",
    }


def _columns(results: Results, summaries: list[Summary]) -> list[tuple]:
    """Those of the results: a comparison is not ranked, so it has no column of what ranks; a step size where one is."""
    no_gamma = all(summary["gamma_below_1"] is None for summary in summaries)
    shown = COLUMNS if results.is_grid else COLUMNS[1:]
    return [column for column in shown if not (column is GAMMA and no_gamma)]


def _names_of(results: Results, index: int) -> list[str]:
    """What names a row: of a grid the values of its axes."""
    row = results.rows[index]
    return [value_text(row.settings[name]) for name in results.axes] or [results.labels[index]]


def _table(results: Results, summaries: list[Summary]) -> str:
    columns = [(header, text) for header, _, text in _columns(results, summaries) if header]
    loss = ["loss"] if len(results.losses) > 1 else []
    names = list(results.axes) or [results.compared, *([] if results.is_grid else [*loss, "settings"])]
    further = list(dict.fromkeys(header for row in results.rows for header in row.columns))
    rows = []
    for index, (row, summary) in enumerate(zip(results.rows, summaries)):
        cells = _names_of(results, index)
        if not results.is_grid:
            named = results.compared != "optimizer" or row.optimizer in row.label
            cells = [row.label if named else f"{row.label} ({row.optimizer})", *([row.loss] if loss else [])]
            cells.append(settings_text(row.settings))
        cells += [*(str(row.columns.get(name, "-")) for name in further), *(text(summary) for _, text in columns)]
        rows.append([f"**{cell}**" for cell in cells] if results.is_grid and summary["best"] else cells)
    return markdown_table([*names, *further, *(header for header, _ in columns)], rows, texts=range(len(names)))


def _what_was_run(results: Results) -> str:
    epochs = _epochs(results)
    subjects = {"optimizer": "The same network trained by", "architecture": "The networks"}
    subject = subjects.get(results.compared, "The same network with")
    rows = _enumerate([row.label for row in results.rows])
    if results.is_grid:
        network = "Networks" if "model.name" in results.axes else f"`{results.config['model']['name']}`"
        optimizer = "" if "optim.name" in results.axes else f" by `{results.config['optim']['name']}`"
        subject = f"{network} trained{optimizer} with"
        rows = " x ".join(f"{len(values)} `{name}`" for name, values in results.axes.items()) or "one setting"
    length = f" for {epochs[-1]} epoch{'s' if epochs[-1] > 1 else ''}" if len(epochs) == 1 else ""
    loss = f" with the loss `{results.losses[0]}`" if len(results.losses) == 1 else ""
    data = "; ".join(
        f"{data['train']} training, {data['validation']} validation and {data['test']} test examples. "
        f"{inline(data['note'])}"
        for data in results.datasets
    )
    return (
        f"{subject} {rows} on {_enumerate([data['name'] for data in results.datasets])}{length}{loss}, "
        f"seeds {', '.join(map(str, results.seeds))}. Data: {data}"
    )


def _epochs(results: Results) -> list[int]:
    return sorted({run["epochs"] for row in results.rows for run in row.runs if is_finished(run)})


def _how_to_read(results: Results) -> str:
    text = (
        "Mean ± sample standard deviation over the n seeds that finished. *Best* is the test accuracy at the epoch of "
        "the highest validation accuracy, so the test set has no part in the choice; *last* is at the last epoch. "
        "Train loss is at the last epoch. Step time is the median over the runs; it compares rows only where each run "
        "had the same machine to itself."
    )
    if len(results.losses) > 1:
        text += " Train losses of rows with different losses do not compare."
    if results.is_grid:
        text += (
            " The best cell is the one of the highest mean validation accuracy among those in which every seed "
            "finished. The best of several validation accuracies is a little too high by chance: quote the test "
            "accuracy beside it."
        )
    return text


def _remarks(results: Results) -> list[str]:
    """What a reader of the table must know of single rows, a sentence each."""
    return [*unfinished(results), *did_not_act(results), *at_edge(results)]


def _best(summaries: list[Summary]) -> str:
    """The best cell with its accuracies, in words."""
    best = next((row for row in summaries if row["best"]), None)
    if best is None:
        return "No run finished."
    validation, test, _ = (_accuracy(name)(best) for name in ACCURACIES)
    return f"Best by validation: {inline(best['label'])}, validation {validation} %, test {test} %."


def _latent_weights(results: Results, summaries: list[Summary]) -> str:
    parts = []
    for label, row in zip(results.labels, summaries):
        shares = ((row["share_on_bounds"], "on the bounds"), (row["never_flipped"], "never flipped"))
        told = ", ".join(f"{percent(share, '.1f')} % {what}" for share, what in shares if share is not None)
        if row["max_abs_latent"]:  # None where no run finished, 0 where no weight is latent
            parts.append(f"{inline(label)} {row['max_abs_latent']:.4g}{f' ({told})' if told else ''}")
    return f"Largest magnitude of a latent weight: {'; '.join(parts)}." if parts else ""


def _tuning(results: Results) -> str:
    tuning, compared = results.tuning, results.compared
    if not tuning:
        return ""
    rows = []
    for row in tuning["rows"]:
        edges = "".join(f", {name} at the edge" for name in settings_at_edge(row))
        for trial in row["trials"]:
            tried = {name: value for name, value in trial.items() if name != "validation_accuracy"}
            chosen = f"yes{edges}" if row["chosen"].items() <= tried.items() else ""
            rows.append([row["label"], settings_text(tried), chosen, percent(trial["validation_accuracy"])])
        if not row["trials"]:
            rows.append([row["label"], settings_text(row["chosen"]), "not tuned", "-"])
    header = [compared, "settings tried", "chosen", "validation accuracy (%)"]
    epochs, of_runs = tuning["epochs"], _epochs(results)
    length = f"{epochs} epoch{'s' if epochs > 1 else ''}" if epochs else "as long as the runs"
    if epochs and of_runs:
        length += ", as the runs" if of_runs == [epochs] else f", where the runs have {' or '.join(map(str, of_runs))}"
    return (
        f"## Tuning\n\nSettings were chosen by validation accuracy, in at most {tuning['budget']} trials for each "
        f"{compared}; a trial: seed {tuning['seed']}, {length}.\n\n{markdown_table(header, rows, texts=range(3))}"
    )


CAPTIONS = {
    "sweep.png": ("Accuracy of each cell", ""),
    "accuracy.png": ("Validation accuracy over epochs", ""),
    "step_size.png": (
        "Step size of Deep Frank-Wolfe over optimizer steps",
        "Deep Frank-Wolfe finds its step size γ anew in every step: 1 takes the full learning rate, a smaller γ "
        "that part of it. Line: running median; band: quartiles; faint: single seeds. Below: in how many steps γ was "
        "less than 1, the ones that the exact step size held back.",
    ),
    "estimators.png": (
        "Forward value and chosen derivative of each estimator",
        "Drawn from the functions that were run: forward value (grey), chosen derivative (blue) and its area A.",
    ),
    "paths.png": (
        "Test error over the cost of the second cheapest gradient path",
        "N_2nd: multiply-accumulates of the binary convolutions on the second cheapest gradient path. Points: mean "
        "over the seeds at the best epoch; bars: sample standard deviation.",
    ),
}
"""What a picture shows, and how to read it."""


def _pictures(results: Results) -> str:
    parts = [] if results.is_grid else ["## Curves"]
    for name in pictures_of(results):
        what, how_to_read = CAPTIONS[name]
        parts += [f"![{what}]({name})", how_to_read]
    return "\n\n".join(filter(None, parts))


def _enumerate(names: Sequence[str]) -> str:
    names = [f"**{inline(name)}**" for name in dict.fromkeys(names)]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

"""The numbers, tables and files of a comparison's report."""

import json
import re
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest
from made_up_results import PROVENANCE, a_comparison, a_grid, a_row, a_run, diverge

from bnn_jax.analysis.documents import to_json
from bnn_jax.analysis.report import print_report, report_markdown, write_report
from bnn_jax.errors import RunError, UsageError
from bnn_jax.sweeps.results import did_not_act, read_results, summarize, tidy_rows

COMMITTED = Path(__file__).parents[2] / "results"


@pytest.fixture
def results():
    gamma = {"step": [1, 2, 3], "value": [1.0, 1.0, 0.5]}
    dfw = [
        a_run(0, 0.9611, 0.9583, loss=0.04, time=12.0, gamma=gamma),
        a_run(1, 0.9722, 0.9500, loss=0.06, time=50.0, gamma=gamma),
        a_run(2, 0.9527, 0.9555, loss=0.11, time=13.0, gamma=gamma),
    ]
    adam = [a_run(seed, 0.93 + 0.013 * seed, 0.92 + 0.017 * seed) for seed in range(3)]
    return a_comparison(
        a_row("dfw", dfw, settings={"learning_rate": 1.0, "momentum": 0.9}),
        a_row("adam", adam, settings={"learning_rate": 0.001}),
        command="python scripts/compare_optimizers.py --name compare_digits",
        config={"model": {"width": 16}},
        provenance=json.loads(json.dumps(PROVENANCE)),
    )


def with_row(results, index, **changes):
    """The results with a row changed."""
    rows = list(results.rows)
    rows[index] = replace(rows[index], **changes)
    return replace(results, rows=rows)


def tables_of(markdown):
    """Every table of a Markdown text as a list of {header: cell}."""
    tables, lines = [], []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif lines:
            header, _, *rows = lines
            assert all(len(row) == len(header) for row in rows)
            tables.append([dict(zip(header, row)) for row in rows])
            lines = []
    return tables


def numbers_of(cell):
    return [float(number) for number in cell.split(" ± ")]


def test_summary_is_numpy_over_the_seeds(results):
    for summary, row in zip(summarize(results), results.rows):
        for name in ("test_accuracy_best", "test_accuracy_last", "train_loss_last"):
            values = np.array([run[name] for run in row.runs])
            assert summary[f"{name}_mean"] == pytest.approx(np.mean(values))
            assert summary[f"{name}_std"] == pytest.approx(np.std(values, ddof=1))
        assert (summary["n"], summary["runs"]) == (3, 3)
        assert summary["max_abs_latent"] == pytest.approx(1.2)
        assert summary["share_on_bounds"] == pytest.approx(0.2)
    assert summarize(results)[0]["step_time_ms"] == 13.0


def test_one_seed_has_no_standard_deviation(results):
    results = replace(results, rows=[replace(row, runs=row.runs[:1]) for row in results.rows])
    summary = summarize(results)[0]
    assert (summary["test_accuracy_best_mean"], summary["test_accuracy_best_std"]) == (0.9611, None)
    row = tables_of(report_markdown(results))[0][0]
    assert (row["test accuracy, best (%)"], row["n"]) == ("96.11", "1")


def test_a_diverged_run_is_counted_left_out_and_explained(results):
    diverge(results.rows[0].runs[1])
    summary = summarize(results)[0]
    assert (summary["n"], summary["runs"]) == (2, 3)
    assert summary["test_accuracy_best_mean"] == pytest.approx((0.9611 + 0.9527) / 2)
    assert summary["train_loss_last_mean"] == pytest.approx((0.04 + 0.11) / 2)
    text = report_markdown(results)
    assert tables_of(text)[0][0]["n"] == "2/3"
    assert "- dfw, seed 1, is not in the means: The loss became NaN in epoch 2." in text.splitlines()


def test_a_diverged_run_with_accuracies_is_left_out_too(results):
    results.rows[0].runs[1]["diverged"] = "The loss became NaN."
    assert summarize(results)[0]["test_accuracy_last_mean"] == pytest.approx((0.9583 + 0.9555) / 2)


def test_a_row_of_which_nothing_finished_shows_dashes(results):
    for run in results.rows[1].runs:
        diverge(run)
    row = tables_of(report_markdown(results))[0][1]
    assert {row[name] for name in ("test accuracy, best (%)", "test accuracy, last (%)", "train loss")} == {"-"}
    assert (row["step time (ms)"], row["n"]) == ("-", "0/3")


def test_a_number_that_is_not_finite_makes_its_mean_a_dash_and_no_other(results):
    results.rows[0].runs[2]["train_loss_last"] = float("inf")
    summary = summarize(results)[0]
    assert (summary["train_loss_last_mean"], summary["train_loss_last_std"], summary["n"]) == (None, None, 3)
    row = tables_of(report_markdown(results))[0][0]
    assert row["train loss"] == "-"
    assert numbers_of(row["test accuracy, best (%)"])[0] == pytest.approx(96.20)


def test_table_holds_the_numbers_in_per_cent(results):
    table, _ = tables_of(report_markdown(results))
    for cells, row in zip(table, results.rows):
        for which in ("best", "last"):
            values = 100 * np.array([run[f"test_accuracy_{which}"] for run in row.runs])
            shown = numbers_of(cells[f"test accuracy, {which} (%)"])
            np.testing.assert_allclose(shown, [values.mean(), values.std(ddof=1)], atol=0.00501)
        assert cells["optimizer"] == row.label
    assert numbers_of(table[0]["train loss"]) == pytest.approx([0.07, 0.036], abs=1e-3)
    assert table[0]["settings"] == "learning_rate=1, momentum=0.9"
    assert (table[0]["step time (ms)"], table[0]["n"]) == ("13.0", "3")
    assert "loss" not in table[0]


def test_loss_is_a_column_where_there_are_several(results):
    results = with_row(results, 1, loss="cross_entropy")
    text = report_markdown(results)
    assert [row["loss"] for row in tables_of(text)[0]] == ["multiclass_hinge", "cross_entropy"]
    assert "Train losses of rows with different losses do not compare." in text


def test_a_label_that_hides_the_optimizer_names_it(results):
    results = with_row(results, 1, label="baseline | <b>\nold")
    assert tables_of(report_markdown(results))[0][1]["optimizer"] == "baseline | &lt;b> old (adam)"


def test_report_says_data_choice_provenance_and_command(results):
    text = report_markdown(results)
    for part in (
        "# compare_digits",
        "1077 training, 360 validation and 361 test examples. Real 8x8 digits.",
        "for 2 epochs with the loss `multiclass_hinge`, seeds 0, 1, 2.",
        "at the epoch of the highest validation accuracy",
        "commit 0123456789abcdef, with uncommitted changes",
        "2 x Big GPU (gpu)",
        "Python 3.11.7, jax 0.10.2, optax 0.2.8",
        "2026-11-20T10:00:00+00:00",
        "```sh\npython scripts/compare_optimizers.py --name compare_digits\n```",
        "![Validation accuracy over epochs](accuracy.png)",
        "(step_size.png)",
    ):
        assert part in text


def test_no_step_size_picture_without_a_step_size(results):
    results = replace(results, rows=results.rows[1:])
    assert "step_size.png" not in report_markdown(results)


def test_clean_and_unknown_checkouts_differ(results):
    results.provenance["git"]["dirty"] = False
    assert "- code: commit 0123456789abcdef\n" in report_markdown(results)
    results.provenance["git"] = {"commit": "unknown", "dirty": "unknown"}
    assert "- code: commit unknown, state of the checkout unknown\n" in report_markdown(results)


def test_tuning_table(results, capsys):
    trials = [
        {"learning_rate": rate, "validation_accuracy": accuracy} for rate, accuracy in ((0.1, 0.912), (1.0, None))
    ]
    rows = [
        {"label": "dfw", "chosen": {"learning_rate": 0.1}, "trials": trials},
        {"label": "adam", "chosen": {"learning_rate": 0.001}, "trials": []},
    ]
    results = replace(results, tuning={"seed": 1000, "epochs": 5, "budget": 4, "rows": rows})
    text = report_markdown(results)
    assert "at most 4 trials for each optimizer; a trial: seed 1000, 5 epochs, where the runs have 2." in text
    edge = "dfw: learning_rate=0.1 is at the edge of what was tried with the budget of 4 trials; a better value may lie"
    assert f"- {edge} beyond" in text.splitlines()
    print_report(results)
    assert edge in " ".join(capsys.readouterr().out.split())
    assert [tuple(row.values()) for row in tables_of(text)[2]] == [
        ("dfw", "learning_rate=0.1", "yes, learning_rate at the edge", "91.20"),
        ("dfw", "learning_rate=1", "", "-"),
        ("adam", "learning_rate=0.001", "not tuned", "-"),
    ]
    for epochs, told in ((2, "a trial: seed 1000, 2 epochs, as the runs."), (None, "seed 1000, as long as the runs.")):
        assert told in report_markdown(replace(results, tuning=results.tuning | {"epochs": epochs}))


def test_differences_are_paired_by_seed_in_points(results, capsys, monkeypatch):
    diverge(results.rows[1].runs[1])
    results = replace(
        results, rows=[*results.rows, replace(results.rows[0], label="alone", runs=results.rows[0].runs[:1])]
    )
    (adam, alone) = tables_of(report_markdown(results))[1]
    differences = [100 * (0.93 - 0.9611), 100 * (0.93 + 0.026 - 0.9527)]
    mean, half = np.mean(differences), 12.7062047 * stdev(differences) / 2**0.5  # t of one degree of freedom
    assert adam["best: difference"] == f"{mean:+.2f}"
    assert adam["pairs"] == "2"
    assert adam["best: 95 % interval"] == f"{mean - half:+.2f} to {mean + half:+.2f}"
    assert tuple(alone.values()) == ("alone", "+0.00", "-", "-", "+0.00", "-", "-", "1")
    assert "## Differences from dfw" in report_markdown(results)
    monkeypatch.setenv("COLUMNS", "80")
    print_report(results)
    assert f"{mean - half:+.2f} to {mean + half:+.2f}" in capsys.readouterr().out
    assert "## Differences" not in report_markdown(replace(results, rows=results.rows[:1]))


def test_the_share_of_steps_that_gamma_held_back_is_told(results, capsys):
    first, second = tables_of(report_markdown(results))[0]
    assert (first["γ below 1 (% of steps)"], second["γ below 1 (% of steps)"]) == ("33.3", "-")
    assert "this run was" not in report_markdown(results)
    for run in results.rows[0].runs:
        run["gamma"] = {"step": [1, 2, 3], "value": [1.0, 1.0, 1.0]}
    sentence = (
        "dfw: gamma was 1 in all 3 steps: this run was SGD with rate 1, the exact step size never held it back; try"
    )
    assert f"- {sentence}" in report_markdown(results)
    boxed = replace(results, config={"optim": {"latent_box": [-1, 1]}})
    assert "this run was projected SGD with rate 1" in report_markdown(boxed)
    print_report(results)
    assert sentence in " ".join(capsys.readouterr().out.split())
    for run in results.rows[0].runs:
        run["gamma"] = {"step": range(1, 251), "value": [0.5, *[1.0] * 249]}
    told = "- dfw: gamma was below 1 in 0.4 % of 250 steps, none after step 1: there the exact step size held it back, "
    assert f"{told}elsewhere this run was SGD with rate 1; try" in report_markdown(results)
    for run in results.rows[0].runs:
        run["gamma"] = {"step": [1, 2, 3], "value": [1.0, 1.0, 1.0]}
    assert tables_of(report_markdown(results))[0][0]["γ below 1 (% of steps)"] == "0.0"
    assert "γ" not in str(tables_of(report_markdown(replace(results, rows=results.rows[1:]))))


def test_latent_weights_are_told_with_and_without_bounds(results):
    for run in results.rows[1].runs:
        run["share_on_bounds"] = None
    assert "dfw 1.2 (20.0 % on the bounds); adam 1.2." in report_markdown(results)
    for run in results.rows[0].runs:
        run["never_flipped"] = 0.25 + 0.1 * run["seed"]
    assert "dfw 1.2 (20.0 % on the bounds, 35.0 % never flipped); adam 1.2." in report_markdown(results)
    for run in results.rows[0].runs:
        run["max_abs_latent"] = 0.0  # a network in full precision
    assert "Largest magnitude of a latent weight: adam 1.2." in report_markdown(results)


def test_nothing_to_compare_is_refused(results):
    with pytest.raises(ValueError, match="`results` must have at least one row"):
        summarize(replace(results, rows=[]))


@pytest.mark.parametrize("losses", [("multiclass_hinge",) * 2, ("multiclass_hinge", "cross_entropy")])
def test_terminal_table_fits_in_80_columns(results, losses, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    results = with_row(results, 0, loss=losses[0])
    results = with_row(results, 1, loss=losses[1], label="adam with cosine decay [bold] and latent clipping")
    diverge(results.rows[1].runs[0])
    print_report(results)
    out = capsys.readouterr().out
    table = out.split("best:")[0]
    assert max(map(len, out.splitlines())) <= 80
    best = 100 * np.array([0.9611, 0.9722, 0.9527])
    assert f"{best.mean():.2f} ± {best.std(ddof=1):.2f}" in table
    assert "2/3" in table and "[bold]" in table
    assert "The loss became NaN in epoch 2." in " ".join(out.split())
    assert ("cross_entropy" in table) == (len(set(losses)) == 2)


def strictly(text):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_json_keeps_everything_but_what_is_not_finite():
    value = {
        "a [\n1,  2]": '[\n 1\n]"',
        "b": [1, 2.5, -3e-9, None, True, []],
        "c": [[1, 2], ["x", {"y": []}]],
        "d": "α [1,  2]",
    }
    assert strictly(to_json(value)) == value
    broken = {"a": float("nan"), "b": [float("inf"), 1.0, {"c": -float("inf")}]}
    assert strictly(to_json(broken)) == {"a": None, "b": [None, 1.0, {"c": None}]}
    assert len(to_json({"curve": list(range(1000))}).splitlines()) == 3


def test_report_is_the_same_from_its_json(results, tmp_path):
    diverge(results.rows[1].runs[0])["train_loss_last"] = float("nan")
    folder = tmp_path / "new" / "folder"
    names = ["report.md", "results.json", "accuracy.png", "step_size.png", "report.html"]
    assert write_report(results, folder) == names
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert strictly((folder / "results.json").read_text(encoding="utf-8"))["rows"][1]["runs"][0]["curve"] is None
    read = read_results(folder / "results.json")
    assert report_markdown(read) == (folder / "report.md").read_text(encoding="utf-8") == report_markdown(results)
    assert read.rows[1].runs[0]["train_loss_last"] is None
    assert read.rows[0] == results.rows[0]


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*/results.json")), ids=lambda path: path.parent.name)
def test_committed_results_give_their_reports_again(path):
    assert report_markdown(read_results(path)) == (path.parent / "report.md").read_text(encoding="utf-8")


def test_what_is_no_results_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"`path` \(=.*none.json\) cannot be read \(No such file or directory\); name"):
        read_results(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(UsageError, match=r"`path` \(=.*other.json\) must be the results.json of a report; it is not"):
        read_results(tmp_path / "other.json")


def test_an_earlier_step_size_picture_goes(results, tmp_path):
    write_report(results, tmp_path)
    results = replace(results, rows=results.rows[1:])
    write_report(results, tmp_path)
    names = ["accuracy.png", "report.html", "report.md", "results.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("below", ["", "further"])
def test_a_folder_that_is_a_file_is_refused(results, tmp_path, below):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(
        UsageError, match=r"`folder` \(=.*taken.*\) must be a folder, but there is a file; name another"
    ):
        write_report(results, tmp_path / "taken" / below)
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_failed_write_names_the_folder_and_leaves_no_draft(results, tmp_path):
    (tmp_path / "accuracy.png").mkdir()
    with pytest.raises(RunError, match=r"The report in .* was not written \(.+\); free space or name another folder"):
        write_report(results, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy.png", "report.md", "results.json"]


def test_a_draft_that_breaks_off_leaves_the_earlier_file(results, tmp_path, monkeypatch):
    write_report(results, tmp_path)
    whole = (tmp_path / "accuracy.png").read_bytes()

    def full_disk(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full_disk)
    with pytest.raises(RunError, match="No space left on device"):
        write_report(results, tmp_path)
    assert (tmp_path / "accuracy.png").read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 5


def test_a_cell_with_a_diverged_seed_is_not_the_best():
    results = a_grid({"optim.learning_rate": [0.1, 1.0]}, [(0.5, 0.7), (0.9, None)])
    whole, broken = summarize(results)
    assert whole["best"]
    assert not broken["best"]
    assert (whole["n"], whole["test_accuracy_best_mean"]) == (2, pytest.approx(0.6))
    assert whole["test_accuracy_best_std"] == pytest.approx(stdev((0.5, 0.7)))
    assert (broken["n"], broken["runs"], broken["test_accuracy_best_std"]) == (1, 2, None)
    report = report_markdown(results)
    assert "| 1 | 90.00 | 90.00 | 90.00 | 0.5 | 1.0 | 1/2 |" in report
    assert "- cell 1, seed 1, is not in the means: The loss became NaN in epoch 2." in report
    assert [row["diverged"] for row in tidy_rows(results)] == [None, None, None, "The loss became NaN in epoch 2."]
    assert [row["train_seconds"] for row in tidy_rows(results)] == [0.1, 0.1, 0.1, None]
    alone = summarize(a_grid({"optim.learning_rate": [0.1, 1.0]}, [(None, None), (0.9, None)]))
    assert [cell["best"] for cell in alone] == [False, True]


@pytest.mark.parametrize(
    ("axes", "sentences", "subject"),
    [
        (
            {"optim.learning_rate": [0.3, 3.0]},
            ["SGD with rate 0.3,", "SGD with rate 3,"],
            "`resnet6` trained by `adam`",
        ),
        ({"epochs": [1, 2]}, ["SGD with rate 7,", "SGD with rate 7,"], "`resnet6` trained by `adam` with"),
        ({"optim.name": ["adam", "dfw"]}, ["SGD with rate 7,", "projected SGD with rate 5,"], "`resnet6` trained with"),
        ({"model.name": ["vgg", "mlp"]}, ["SGD with rate 7,"] * 2, "Networks trained by `adam` with 2 `model.name`"),
    ],
)
def test_the_rate_of_a_cell_that_gamma_never_held_back_is_its_own(axes, sentences, subject):
    results = a_grid(axes, [(0.5,), (0.6,)])
    kept = {"optim": {"name": "adam", "learning_rate": 7.0}}
    kept |= {"optimizers": [{"name": "dfw", "learning_rate": 5.0, "latent_box": [-1, 1]}, {"name": "adam"}]}
    named = axes.get("optim.name", ["adam"] * 2)
    rows = [replace(row, optimizer=name) for row, name in zip(results.rows, named)]
    for run in (run for row in rows for run in row.runs):
        run["gamma"] = {"step": [1, 2], "value": [1.0, 1.0]}
    results = replace(results, rows=rows, config=results.config | kept)
    told = did_not_act(results)
    assert len(told) == 2 and all(f"this run was {end}" in one for one, end in zip(told, sentences))
    assert report_markdown(results).splitlines()[2].startswith(subject)


def test_a_sweep_in_which_all_diverged_is_still_written(tmp_path, capsys):
    results = a_grid({"optim.learning_rate": [0.1, 1.0]}, [(None,), (None,)])
    write_report(results, tmp_path)
    print_report(results)
    assert "No run finished." in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.html",
        "report.md",
        "summary.json",
        "sweep.csv",
        "sweep.jsonl",
        "sweep.png",
    }

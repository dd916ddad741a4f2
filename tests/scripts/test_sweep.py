"""scripts/sweep.py as a user runs it, and the report of a sweep from made-up runs."""

import csv
import json
from statistics import fmean, stdev

import numpy as np
import pytest

from bnn_jax.analysis.sweep_plots import plot_sweep
from bnn_jax.analysis.sweep_report import print_sweep, summarize_cells, sweep_markdown, tidy_rows, write_sweep

SMALL = ("--optimizer", "adam", "--epochs", "2", "--model.width", "4", "--batch-size", "256", "--seeds", "2")
AXES = ("--optim.learning_rate", "0.003", "0.03")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


def test_a_sweep_writes_a_row_for_each_run_and_mean_and_spread_of_each_cell(workdir, run_here):
    done = run_here("sweep", "--workdir", workdir, *SMALL, *AXES)
    assert done.returncode == 0, done.stderr
    assert "4 runs, sequential: on the CPU" in done.stdout
    with (workdir / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (workdir / "sweep.jsonl").read_text().splitlines()]
    assert [(float(row["optim.learning_rate"]), int(row["seed"])) for row in rows] == [
        (0.003, 0),
        (0.003, 1),
        (0.03, 0),
        (0.03, 1),
    ]
    found = {}
    for row, line in zip(rows, lines, strict=True):
        result = json.loads((workdir / row["cell"] / f"seed{row['seed']}" / "result.json").read_text())
        for name in ("validation_accuracy_best", "test_accuracy_best", "test_accuracy_last", "best_epoch"):
            assert float(row[name]) == line[name] == result[name]
        assert float(row["train_seconds"]) == pytest.approx(1e-3 * result["step_time_ms"] * 2 * 4, abs=1e-3)
        found.setdefault(row["cell"], []).append(result)
    report = (workdir / "report.md").read_text()
    for runs in found.values():
        best = np.array([100 * run["test_accuracy_best"] for run in runs])
        assert f"{best.mean():.2f} ± {best.std(ddof=1):.2f}" in report
        assert f"{best.mean():.2f} ± {best.std(ddof=1):.2f}" in done.stdout
    best = max(found, key=lambda cell: fmean(run["validation_accuracy_best"] for run in found[cell]))
    assert f"Best by validation: {best}" in report
    assert (workdir / "sweep.png").stat().st_size > 5000


def test_finished_cells_are_not_run_again(workdir, run_here):
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("*/seed*/result.json")}
    assert len(before) == 4
    assert run_here("sweep", "--workdir", workdir, *SMALL, *AXES).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in workdir.glob("*/seed*/result.json")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "0"), "error: `--seeds` (=0) must be at least 1"),
        (("--seed", "0", "1"), "error: `--seed` (=0 1) is the first seed"),
        (("--optim.learning_rate", "0.1", "-1"), "error: `optim.learning_rate` (=-1.0) must be positive"),
        (("--optim.momentum", "0", "half"), "could not convert string to float: 'half'"),
        (("--optim.learning_rat", "0.1", "1"), "--optim.learning-rate"),
        (("--optimizer", "adamm"), "error: `optimizer` (='adamm') is not known; did you mean 'adam'?"),
    ],
)
def test_usage_errors_exit_2_before_anything_runs(arguments, message, tmp_path, run_here):
    done = run_here("sweep", "--workdir", tmp_path / "sweep", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.glob("sweep/*"))


def a_run(seed, accuracy):
    run = {"seed": seed, "epochs": 2, "best_epoch": 1, "train_loss_last": 0.5, "step_time_ms": 1.0}
    names = ("validation_accuracy_best", "test_accuracy_best", "test_accuracy_last")
    if accuracy is None:
        return run | dict.fromkeys((*run.keys() - {"seed", "epochs"}, *names)) | {"diverged": "`loss` became nan"}
    return run | dict.fromkeys(names, accuracy)


def a_sweep(axes, accuracies):
    """A sweep whose cells have these accuracies of their seeds, None for one that diverged."""
    cells = [
        {
            "label": f"cell {index}",
            "values": {name: values[index % len(values)] for name, values in axes.items()},
            "steps": 100,
            "runs": [a_run(seed, accuracy) for seed, accuracy in enumerate(of_cell)],
        }
        for index, of_cell in enumerate(accuracies)
    ]
    data = {"name": "digits", "note": "8x8", "train": 10, "validation": 5, "test": 5}
    config = {"model": {"name": "resnet6"}, "optim": {"name": "adam"}, "epochs": 2}
    seeds = list(range(len(accuracies[0])))
    names = {"name": "sweep", "command": "python scripts/sweep.py", "provenance": {}}
    return names | {"axes": axes, "seeds": seeds, "datasets": [data], "config": config, "cells": cells}


def test_a_cell_with_a_diverged_seed_is_not_the_best():
    results = a_sweep({"optim.learning_rate": [0.1, 1.0]}, [(0.5, 0.7), (0.9, None)])
    whole, broken = summarize_cells(results)
    assert whole["best"]
    assert not broken["best"]
    assert (whole["n"], whole["test_accuracy_best_mean"]) == (2, pytest.approx(0.6))
    assert whole["test_accuracy_best_std"] == pytest.approx(stdev((0.5, 0.7)))
    assert (broken["n"], broken["runs"], broken["test_accuracy_best_std"]) == (1, 2, None)
    report = sweep_markdown(results)
    assert "| 1 | 90.00 | 90.00 | 90.00 | 0.5 | 1/2 |" in report
    assert "- cell 1, seed 1, is not in the means: `loss` became nan" in report
    assert [row["diverged"] for row in tidy_rows(results)] == [None, None, None, "`loss` became nan"]
    assert [row["train_seconds"] for row in tidy_rows(results)] == [0.1, 0.1, 0.1, None]
    alone = summarize_cells(a_sweep({"optim.learning_rate": [0.1, 1.0]}, [(None, None), (0.9, None)]))
    assert [cell["best"] for cell in alone] == [False, True]


def test_a_sweep_in_which_all_diverged_is_still_written(tmp_path, capsys):
    results = a_sweep({"optim.learning_rate": [0.1, 1.0]}, [(None,), (None,)])
    write_sweep(results, tmp_path)
    print_sweep(results)
    assert "No run finished." in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.md",
        "summary.json",
        "sweep.csv",
        "sweep.jsonl",
        "sweep.png",
    }


@pytest.mark.parametrize(
    ("axes", "scale", "ticks"),
    [
        ({"optim.learning_rate": [0.001, 0.1]}, "log", ["0.001", "0.1"]),
        ({"model.width": [4, 8]}, "linear", ["4", "8"]),
        ({"optim.weight_decay": [0.0, 1e-4, 0.1]}, "linear", ["0", "0.0001", "0.1"]),
        ({"loss": ["hinge", "cross_entropy"], "model.width": [4, 8]}, "linear", ["4", "8"]),
        ({"loss": ["hinge", "cross_entropy"]}, "linear", ["hinge", "cross_entropy"]),
        ({}, "linear", ["validation,\nbest epoch", "test,\nbest epoch", "test,\nlast epoch"]),
    ],
)
def test_the_picture_is_drawn_over_the_first_axis_of_numbers(tmp_path, monkeypatch, axes, scale, ticks):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    cells = max(map(len, axes.values()), default=1)
    plot_sweep(a_sweep(axes, [(0.5, 0.6)] * cells), tmp_path / "sweep.png", best="cell 0")
    panels = drawn[0].axes
    assert len(panels) == (2 if axes else 1)
    assert {panel.get_xscale() for panel in panels} == {scale}
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ticks
    assert any(np.isclose(np.asarray(line.get_ydata(), float), 55).any() for line in panels[0].lines)

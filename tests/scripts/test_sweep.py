"""scripts/sweep.py as a user runs it."""

import csv
import json
from statistics import fmean

import numpy as np
import pytest

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

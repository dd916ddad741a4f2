"""The scripts that train many runs: what they write and print, and that finished runs are not run again."""

import csv
import json
import re
from statistics import fmean

import numpy as np
import pytest
from run_script import run_script

pytestmark = pytest.mark.full

SMALL = ("--epochs", "2", "--model.width", "4", "--batch-size", "64")


def test_a_comparison_writes_its_four_files_and_prints_the_table(comparison):
    workdir, done = comparison
    for name in ("report.md", "results.json", "accuracy.png", "step_size.png"):
        assert (workdir / name).stat().st_size > 500
    results = json.loads((workdir / "results.json").read_text())
    rows = [(row["optimizer"], row["loss"], len(row["runs"])) for row in results["rows"]]
    hinge = "smoothed_multiclass_hinge"
    assert rows == [("dfw", hinge, 2), ("adam", hinge, 2), ("adam", "cross_entropy", 2)]
    report = (workdir / "report.md").read_text()
    for row in results["rows"]:
        best = 100 * np.array([r["test_accuracy_best"] for r in row["runs"]])
        assert f"{best.mean():.2f} ± {best.std(ddof=1):.2f}" in report
        assert f"{best.mean():.2f} ± {best.std(ddof=1):.2f}" in done.stdout
    for row in results["rows"]:
        assert all(r["max_abs_latent"] <= 1 for r in row["runs"])


@pytest.mark.full
def test_a_comparison_of_estimators_has_a_row_for_each_and_their_picture(tmp_path):
    arguments = ("--estimators", "ste_sign", "swish_sign", "--quantizes", "both", "--seeds", "0", "1")
    done = run_script("compare_estimators", "--workdir", tmp_path, *arguments, *SMALL)
    for name in ("report.md", "results.json", "accuracy.png", "estimators.png"):
        assert (tmp_path / name).stat().st_size > 500
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["label"] for row in results["rows"]] == results["estimators"] == ["ste_sign", "swish_sign"]
    # Width 4: 4 convolutions of 3x3 with 4*4, 4*4, 4*8 and 8*8 binary weights, and a real stem of 1*4.
    bits = 9 * (16 + 16 + 32 + 64) + 32 * 9 * 4
    assert [row["columns"]["weight bits"] for row in results["rows"]] == [f"{bits:,}"] * 2
    assert f"| {bits:,} |" in (tmp_path / "report.md").read_text()
    assert "swish_sign" in done.stdout


def test_finished_runs_are_not_run_again(comparison):
    workdir, _ = comparison
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("*/seed*/result.json")}
    arguments = ("--workdir", workdir, "--optimizers", "dfw", "--seeds", "0", "1", *SMALL)
    run_script("compare_optimizers", *arguments)
    assert before == {path: path.stat().st_mtime_ns for path in workdir.glob("*/seed*/result.json")}
    assert len(before) == 6


@pytest.mark.full
def test_tuning_gives_every_optimizer_the_same_budget(tmp_path):
    arguments = ("--workdir", tmp_path, "--optimizers", "dfw", "sgd", "--seeds", "0", "--tune", "--tune-trials", "5")
    run_script("compare_optimizers", *arguments, *SMALL)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [len(row["trials"]) for row in results["tuning"]["rows"]] == [5, 5]
    for tuned, row in zip(results["tuning"]["rows"], results["rows"]):
        best = max(tuned["trials"], key=lambda trial: trial["validation_accuracy"])
        assert tuned["chosen"]["learning_rate"] == best["learning_rate"] == row["settings"]["learning_rate"]


NETWORKS = """
from dataclasses import replace
from bnn_jax.training.config import Config, ModelConfig, OptimConfig

NOTES = "## Of what was found\\n\\nNothing."


def get_config():
    optim = OptimConfig("adam", 0.01)
    return Config("small", 1, 256, loss="cross_entropy", model=ModelConfig(width=4), optim=optim)


def get_rows(config):
    def row(name, *sizes):
        model = replace(config.model, name=name, options={"stage_sizes": sizes})
        return replace(config, model=model), {"paper": "-"}

    return {"XNOR": row("resnet20", 1), "Bi-Real": row("bireal_resnet20", 2)}
"""


@pytest.mark.full
def test_a_comparison_of_networks_has_their_costs_and_paths(tmp_path):
    (tmp_path / "small.py").write_text(NETWORKS)
    arguments = ("--config", tmp_path / "small.py", "--workdir", tmp_path / "run", "--seeds", "0", "1")
    done = run_script("compare_architectures", *arguments)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    xnor, bireal = results["rows"]
    # Two convolutions of 3x3 over 8x8 pixels, 4 channels to 4; a stem of 1 to 4 and 4 features to 10 classes.
    cost, bits, real = 9 * 64 * 16, 2 * 9 * 16 + 32 * (9 * 4 + 4 * 10 + 10), 9 * 64 * 4 + 40
    for row, costs, lengths in ((xnor, [0, 2 * cost], [0, 2]), (bireal, [0, cost, 2 * cost], [0, 1, 2])):
        assert set(row["gradient_paths"]) == {"whole network", "first stage"}
        assert all(paths == {"costs": costs, "lengths": lengths} for paths in row["gradient_paths"].values())
        assert row["columns"]["storage (kbit)"] == f"{bits / 1000:.1f}" == "3.0"
        assert row["columns"]["binary MACs (10^6)"] == f"{2 * cost / 1e6:.4g}"
        assert row["columns"]["FLOPs (10^6)"] == f"{(real + 2 * cost / 64) / 1e6:.4g}"
        assert row["columns"]["paper"] == "-"
        assert [run["seed"] for run in row["runs"]] == [0, 1]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "The networks **XNOR** and **Bi-Real** on **digits** for 1 epoch" in report
    assert "| 3.0 | 0.01843 | 0.002632 | 0, 0.00922, 0.0184 | 0, 1, 2 |" in report
    assert "## Of what was found" in report
    for picture in re.findall(r"\]\((\w+\.png)\)", report):
        assert (tmp_path / "run" / picture).stat().st_size > 5000
    assert "](paths.png)" in report
    assert "Bi-Real" in done.stdout


GRID = ("--optimizer", "adam", *SMALL, "--seeds", "2", "--optim.learning_rate", "0.003", "0.03")


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep")
    return workdir, run_script("sweep", "--workdir", workdir, *GRID)


def test_a_sweep_writes_a_row_for_each_run_and_mean_and_spread_of_each_cell(grid):
    workdir, done = grid
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
        assert float(row["train_seconds"]) == pytest.approx(1e-3 * result["step_time_ms"] * 2 * 16, abs=1e-3)
        found.setdefault(row["cell"], []).append(result)
    report = (workdir / "report.md").read_text()
    for runs in found.values():
        best = np.array([100 * run["test_accuracy_best"] for run in runs])
        assert f"{best.mean():.2f} ± {best.std(ddof=1):.2f}" in report
        assert f"{best.mean():.2f} ± {best.std(ddof=1):.2f}" in done.stdout
    best = max(found, key=lambda cell: fmean(run["validation_accuracy_best"] for run in found[cell]))
    assert f"Best by validation: {best}" in report
    assert (workdir / "sweep.png").stat().st_size > 5000


def test_finished_cells_are_not_run_again(grid):
    workdir, _ = grid
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("*/seed*/result.json")}
    assert len(before) == 4
    run_script("sweep", "--workdir", workdir, *GRID)
    assert before == {path: path.stat().st_mtime_ns for path in workdir.glob("*/seed*/result.json")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "0"), "error: `--seeds` (=0) must be at least 1"),
        (("--seed", "0", "1"), "error: `--seed` (=0 1) is the first seed"),
        (("--optim.learning_rate", "0.1", "-1"), "error: `--optim.learning-rate` (=-1.0) must be positive"),
        (("--optim.momentum", "0", "half"), "could not convert string to float: 'half'"),
        (("--optim.learning_rat", "0.1", "1"), "--optim.learning-rate"),
        (("--optimizer", "adamm"), "error: `--optimizer` (='adamm') is not known; did you mean 'adam'?"),
    ],
)
def test_usage_errors_exit_2_before_anything_runs(arguments, message, tmp_path):
    done = run_script("sweep", "--workdir", tmp_path / "sweep", *arguments, code=2)
    assert message in done.stderr
    assert not list(tmp_path.glob("sweep/*"))

"""Own runs, as users have them: second attempts, longer runs, logs, runs in a notebook, tables for other programs."""

import csv
import json
import re

import numpy as np
import pytest

COMMANDS = """
import sys
from bnn_jax.cli.main import main
for number, line in enumerate(open("lines.txt")):
    sys.argv = ["bnn-jax", *line.split()]
    print(f"# {number} begins", flush=True); print(f"# {number} begins", file=sys.stderr, flush=True)
    try:
        print("# code", main(), flush=True)
    except SystemExit as end:
        print("# code", end.code, flush=True)
"""

SMALL = "--model.name mnist_mlp --model.width 4 --model.options hidden_layers 1 --batch-size 256"
TRAIN = f"train {SMALL} --optim.schedule constant --epochs 1"


@pytest.fixture
def commands(wheel, tmp_path):
    """Runs lines of `bnn-jax` in one process of the installed wheel; of each its exit code, output and errors."""

    def run(*lines, columns="80"):
        (tmp_path / "lines.txt").write_text("\n".join(lines))
        wheel.env["COLUMNS"] = columns
        done = wheel.python("-c", COMMANDS, cwd=tmp_path)
        found = []
        for out, err in zip(*(re.split(r"# \d+ begins\n", text)[1:] for text in (done.stdout, done.stderr))):
            out, _, code = out.partition("# code ")
            found.append((int(code), out, err))
        assert len(found) == len(lines), done.stderr
        return found

    return run


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.full
def test_second_attempts_from_the_terminal(commands, tmp_path):
    diverges = f"{TRAIN} --optim.name sgd --optim.learning-rate 1e30 --optim.latent-box None"
    first, second, longer, other, cosine, extended, plotted, evaluated = commands(
        f"{diverges} --workdir runs/a",
        f"{TRAIN} --workdir runs/a --log csv tensorboard",
        f"{TRAIN} --workdir runs/a --epochs 2 --scan-steps 1 --checkpoint-every-epochs 9 --log csv",
        f"{TRAIN} --workdir runs/a --optim.name adam --overwrite",
        f"{TRAIN} --workdir runs/a --optim.name adam --optim.schedule cosine --overwrite",
        f"{TRAIN} --workdir runs/a --optim.name adam --optim.schedule cosine --epochs 2",
        "plot runs/a runs/a.replaced-1 --output pictures",
        "train --data.validation-examples 100000",
    )
    assert first[0] == 1 and "lower `--optim.learning-rate`" in first[2]
    assert second[0] == 0  # in the folder of the failed start
    shown = [line for line in second[2].splitlines() if line.startswith("digits dfw: ")]
    assert shown[0].endswith("epoch 1/1  compiling ...") and "\r" not in second[2] and "\x1b" not in second[2]
    assert re.search(r"epoch 1/1  loss \S+  validation \S+ %  best \S+ % \(epoch 1\)  \S+ images/s$", shown[-1])
    assert longer[0] == 0
    rows = list(csv.DictReader((tmp_path / "runs" / "a.replaced-1" / "epochs.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert list((tmp_path / "runs" / "a.replaced-1" / "tensorboard").iterdir())
    assert other[0] == 0 and "the run in runs/a is moved to runs/a.replaced-1" in other[2]
    records = lines_of(tmp_path / "runs" / "a.replaced-2" / "metrics.jsonl")
    config = json.loads((tmp_path / "runs" / "a.replaced-2" / "config.json").read_text())
    (adam,) = (optim for optim in config["optimizers"] if optim["name"] == "adam")
    rates = [record["learning_rate"] for record in records if record["kind"] == "train"]
    assert rates == pytest.approx([adam["learning_rate"]] * len(rates)) and adam["learning_rate"] < 0.5
    assert cosine[0] == 0
    assert (
        extended[0] == 2
        and "its learning rate follows a curve over the whole run, whose schedule is cosine" in extended[2]
    )
    assert "train with `--extend`" in extended[2] and len(extended[2].strip().splitlines()) == 1
    assert plotted[0] == 0 and (tmp_path / "pictures" / "overlay.png").exists()
    assert evaluated[0] == 2 and "`--data.validation-examples` (=100000)" in evaluated[2]


NOTEBOOK = """
import bnn_jax, numpy as np
from dataclasses import replace
from bnn_jax.training.callbacks import Callback
from bnn_jax.training.config import Config, ModelConfig, OptimConfig

class Losses(Callback):
    heard = []
    def on_record(self, record):
        if record["kind"] == "evaluation":
            self.heard.append(record["train_loss"])

model = ModelConfig("mnist_mlp", 4, options={"hidden_layers": 1})
config = Config("mine", 2, 256, loss="cross_entropy", model=model, optim=OptimConfig("adam", 0.01))
run = bnn_jax.train(config, "run", callbacks=[Losses()])
assert run.history["train_loss"] == Losses.heard and run.history["epoch"] == [1, 2]
loaded = bnn_jax.load_run("run")
assert loaded.result == run.result
assert run.evaluate("test")["accuracy"] == loaded.evaluate("test")["accuracy"]
images = run.dataset.test.images
assert (run.predict(images) == loaded.freeze().predict(images)).all()
assert np.mean(run.predict(images) == run.dataset.test.labels).round(4) == round(run.result["test_accuracy_best"], 4)
print(run, *run.plot("pictures"), sorted(run.paths), run.params.keys() == run.variables["params"].keys())
"""


@pytest.mark.full
def test_a_run_in_a_notebook(wheel, tmp_path):
    done = wheel.python("-c", NOTEBOOK, cwd=tmp_path)
    assert re.match(
        r"Run\(run: mnist_mlp, adam, test accuracy \S+ %\) pictures/curves.png "
        r"\['checkpoints', 'config', 'data', 'metrics', 'result'\] True$",
        done.stdout.strip(),
    )
    assert "mine adam: 10/10 epoch 2/2  loss" in done.stderr or "epoch 2/2  loss" in done.stderr


@pytest.mark.full
def test_tables_for_people_and_programs(commands, tmp_path):
    comparison = f"compare optimizers {SMALL} --epochs 1 --optimizers dfw adam --seeds 0 1 --optim.learning-rate 0.5"
    printed, piped, summary, listed = commands(
        f"{comparison} --workdir c",
        f"{comparison} --workdir c --format json",
        "summarize lenet --format csv",
        "list losses",
    )
    for code, out, _ in (printed, listed):
        assert code == 0 and "…" not in out and max(map(len, out.splitlines())) <= 80
    tables = [json.loads(line) for line in piped[1].splitlines()]
    rows = tables[0]["rows"]
    assert [row["optimizer"] for row in rows] == ["dfw", "adam"]
    for row in rows:
        assert f"{row['test, best (%)']:.2f} ± {row['test, best (%) ±']:.2f}" in printed[1]
    found = json.loads((tmp_path / "c" / "results.json").read_text())
    assert {row["settings"]["learning_rate"] for row in found["rows"]} == {0.5}  # of both rows
    layers = list(csv.DictReader(summary[1].split("\n\n")[0].splitlines()))
    assert np.sum([int(layer["weights"]) for layer in layers]) == 61770

"""What callbacks hear of a run, and what those that are shipped make of it."""

import csv
import struct
import sys
from types import SimpleNamespace

import pytest
from small_sets import brightness_set

from bnn_jax.errors import UsageError
from bnn_jax.training.callbacks import Callback, CSVLogger, TensorBoard, WandB
from bnn_jax.training.config import Config, ModelConfig, OptimConfig
from bnn_jax.training.loop import train
from bnn_jax.training.metrics import read_metrics

CONFIG = Config(
    "test", 2, 8, loss="cross_entropy", model=ModelConfig("mnist_mlp", 4), optim=OptimConfig("sgd", 0.1), scan_steps=2
)


@pytest.fixture(scope="module")
def dataset():
    return brightness_set(32, 10, 10)


class Stop(Exception):
    """Stands for a process that ends without a chance to save."""


class Notes(Callback):
    """Keeps what it hears, and stops the run where it is told to."""

    def __init__(self, stop=None):
        self.heard, self.stop = [], stop

    def on_start(self, config, workdir):
        self.heard.append((config.name, workdir.name))

    def on_record(self, record):
        self.heard.append(record)
        if record["kind"] == "train" and record["step"] == self.stop:
            raise Stop

    def on_end(self, result):
        self.heard.append(result)


def events(folder):
    """(step, tag, value) of every scalar in TensorBoard's files, and the steps from which on a run was begun anew.

    A record of such a file: its length in 8 bytes, 4 of a check sum, the message, 4 of a check sum.
    """
    from tensorboardX.proto.event_pb2 import Event

    scalars, anew = [], []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            anew += [event.step] * (event.session_log.status == 1)
    return scalars, anew


def test_callbacks_hear_start_records_and_end(tmp_path, dataset):
    notes = Notes()
    result = train(CONFIG, tmp_path / "run", data=dataset, callbacks=[notes])
    assert notes.heard == [("test", "run"), *read_metrics(tmp_path / "run" / "metrics.jsonl"), result]
    train(CONFIG, tmp_path / "run", data=dataset, callbacks=[notes])  # it is finished
    assert notes.heard[-1] == result
    for wrong in (Notes(), [Notes]):
        with pytest.raises(UsageError, match=r"^`callbacks` \(=.*Notes.*\) must be a list of callbacks; as \[CSV"):
            train(CONFIG, tmp_path / "other", data=dataset, callbacks=wrong)
    assert not (tmp_path / "other").exists()


def test_logs_of_a_run_that_was_interrupted_are_those_of_one_that_was_not(tmp_path, dataset):
    made = [CSVLogger(), TensorBoard(), CSVLogger(tmp_path / "mine.csv")]
    broken = Notes(stop=7)
    with pytest.raises(Stop):
        train(CONFIG, tmp_path, data=dataset, callbacks=[*made, broken])
    assert broken.heard[-1] is None
    train(CONFIG, tmp_path, data=dataset, callbacks=[CSVLogger(), TensorBoard(), made[2]])
    records = list(read_metrics(tmp_path / "metrics.jsonl"))
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    for path in (tmp_path / "epochs.csv", tmp_path / "mine.csv"):
        with path.open() as file:
            rows = list(csv.DictReader(file))
        assert [int(row["epoch"]) for row in rows] == [1, 2]
        assert [float(row["validation_accuracy"]) for row in rows] == [r["validation_accuracy"] for r in evaluations]
    scalars, anew = events(tmp_path / "tensorboard")
    losses = [(step, value) for step, tag, value in scalars if tag == "train/loss"]
    assert [step for step, _ in losses] == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        5,
        6,
        7,
        8,
    ]  # the second 5 takes the place of the first
    assert anew == [5]
    kept = [pytest.approx(record["loss"], rel=1e-6) for record in records if record["kind"] == "train"]
    assert [value for _, value in losses][:4] + [value for _, value in losses][8:] == kept
    assert (8, "evaluation/validation_accuracy", pytest.approx(evaluations[1]["validation_accuracy"])) in scalars


def test_weights_and_biases_are_told_config_numbers_and_result(tmp_path, dataset, monkeypatch):
    logged, told = [], {}
    made = SimpleNamespace(
        log=lambda numbers, step: logged.append((step, numbers)),
        summary=SimpleNamespace(update=lambda numbers: told.update(summary=numbers)),
        finish=lambda exit_code: told.update(exit_code=exit_code),
    )
    fake = SimpleNamespace(init=lambda **given: told.update(given) or made)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    result = train(CONFIG, tmp_path, data=dataset, callbacks=[WandB(project="mine", name="x")])
    assert (told["project"], told["name"], told["dir"]) == ("mine", "x", str(tmp_path))
    assert told["config"]["optim"]["learning_rate"] == 0.1
    assert [step for step, _ in logged] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert logged[0][1]["train/loss"] > 0 and "evaluation/validation_accuracy" in logged[4][1]
    assert told["summary"]["test_accuracy_best"] == result["test_accuracy_best"] and told["exit_code"] == 0


@pytest.mark.parametrize(("callback", "module"), [(TensorBoard, "tensorboardX"), (WandB, "wandb")])
def test_a_writer_that_is_not_installed_is_named(monkeypatch, callback, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UsageError, match=rf"^the callback {callback.__name__} needs the .* package {module}, .*pip install"
    ):
        callback()

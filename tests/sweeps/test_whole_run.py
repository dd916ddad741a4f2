"""A whole run as one program: what the loop computes, alone and mapped with others, stopped and gone on with."""

import json
import os
import signal
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from bnn_jax.errors import Preempted, UsageError
from bnn_jax.sweeps.whole_run import image_info, train_together, whole_run
from bnn_jax.training.checkpoint import checkpoint_steps, restore_checkpoint
from bnn_jax.training.config import Config, DiagnosticsConfig, ModelConfig, OptimConfig
from bnn_jax.training.experiment import hyper_parameters
from bnn_jax.training.input_pipeline import load_data
from bnn_jax.training.loop import evaluate_run, train
from bnn_jax.training.programs import programs_of, state_shapes
from bnn_jax.training.validation import validate

SPLITS = ("train", "validation", "test")

SGD = OptimConfig("sgd", learning_rate=0.1)
CONFIG = validate(
    Config("test", epochs=2, batch_size=256, loss="cross_entropy", model=ModelConfig("resnet6", width=4), optim=SGD)
)
OTHER = replace(CONFIG, seed=1, optim=replace(SGD, learning_rate=0.5, momentum=0.0))
DIVERGING = replace(CONFIG, optim=replace(SGD, learning_rate=1e30))


@pytest.fixture(scope="module")
def dataset():
    return load_data(CONFIG.data)


@pytest.fixture(scope="module")
def looped(tmp_path_factory, dataset):
    folders = [tmp_path_factory.mktemp("loop") for _ in range(2)]
    return folders, [train(config, folder, dataset=dataset) for config, folder in zip((CONFIG, OTHER), folders)]


@pytest.fixture(scope="module")
def mapped(tmp_path_factory, dataset):
    folders, calls = [tmp_path_factory.mktemp("mapped") for _ in range(3)], []
    results = train_together(
        (CONFIG, DIVERGING, OTHER), folders, dataset=dataset, on_progress=lambda *call: calls.append(call)
    )
    return folders, results, calls


def assert_same_run(folder, expected, dataset):
    """Records, results and final states of two folders, all but the times."""

    def records(path):
        return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]

    for found, wanted in zip(records(folder), records(expected), strict=True):
        assert found.keys() == wanted.keys()
        for name in found.keys() - {"step_time_ms"}:
            assert found[name] == (
                wanted[name] if isinstance(wanted[name], str) else pytest.approx(wanted[name], abs=2e-6)
            )
    results = [json.loads((path / "result.json").read_text()) for path in (folder, expected)]
    for name in ("best_epoch", "epochs", "seed"):
        assert results[0][name] == results[1][name]
    assert results[0].keys() == results[1].keys()
    assert results[0]["test_accuracy_best"] == pytest.approx(results[1]["test_accuracy_best"], abs=1e-6)
    like = state_shapes(programs_of(CONFIG, dataset))
    states = [restore_checkpoint(path / "checkpoints", like).state for path in (folder, expected)]
    jax.tree.map(lambda found, wanted: np.testing.assert_allclose(found, wanted, atol=2e-6), *states)


def test_one_run_in_one_jit_is_the_loop(tmp_path, looped, dataset):
    """Stopped after its first epoch it is saved, and goes on there."""

    def stop(done, total, text):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # until the main thread has heard

    with pytest.raises(Preempted, match="1 run saved after epoch 1 of 2; the same command resumes there"):
        train_together([CONFIG], [tmp_path], dataset=dataset, on_progress=stop)
    assert checkpoint_steps(tmp_path / "checkpoints") == [4]
    assert not (tmp_path / "result.json").exists()
    train_together([CONFIG], [tmp_path], dataset=dataset)
    assert_same_run(tmp_path, looped[0][0], dataset)
    expected = looped[1][0]["test_accuracy_best"]
    assert evaluate_run(tmp_path)["accuracy"] == pytest.approx(expected, abs=1e-6)


def test_the_pure_function_needs_no_host(looped, dataset):
    """Seed, hyper-parameters and data go in; the initialisation is part of the program."""
    info = image_info(dataset)
    data = {name: (getattr(dataset, name).images, getattr(dataset, name).labels) for name in SPLITS}
    run = jax.jit(whole_run(CONFIG, info, examples=len(dataset.train.labels)))
    outcome = run(np.uint32(CONFIG.seed), hyper_parameters(CONFIG), data)
    result = looped[1][0]
    assert outcome.steps["loss"].shape == (2, 4)
    np.testing.assert_allclose(outcome.evaluations["validation_loss"], result["curve"]["validation_loss"], atol=2e-6)
    assert int(outcome.run.best.epoch) == result["best_epoch"]
    for which in ("best", "last"):
        assert float(outcome.test[which]) == pytest.approx(result[f"test_accuracy_{which}"], abs=1e-6)


@pytest.mark.parametrize("member", [0, 1])
def test_runs_mapped_together_are_those_of_the_loop(mapped, looped, member, dataset):
    assert_same_run(mapped[0][2 * member], looped[0][member], dataset)


def test_a_diverged_member_is_told_and_spoils_no_other(mapped):
    folders, results, _ = mapped
    assert "`loss` became nan at step 2" in results[1]
    assert "lower `optim.learning_rate` (=1e+30)" in results[1]
    steps = [json.loads(line)["step"] for line in (folders[1] / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1]
    assert all(0 <= results[member]["test_accuracy_last"] <= 1 for member in (0, 2))


def test_progress_shows_once_an_epoch_for_all_members(mapped):
    assert [(done, total) for done, total, _ in mapped[2]] == [(3, 6), (6, 6)]
    assert "epoch 2/2  loss" in mapped[2][1][2]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(CONFIG, batch_size=128), "`configs` must differ only in `seed`, `optim.learning_rate`"),
        (
            replace(CONFIG, diagnostics=DiagnosticsConfig(every_steps=2)),
            r"`diagnostics.every_steps` \(=2\) needs the training loop",
        ),
    ],
)
def test_runs_that_are_not_one_program(tmp_path, dataset, other, message):
    with pytest.raises(UsageError, match=message):
        train_together([CONFIG, other], [tmp_path / "a", tmp_path / "b"], dataset=dataset)
    assert not (tmp_path / "a").exists()

"""Runs that train as one program, and a whole run in one jit: each is the run that trains alone."""

import json
import re
import signal
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from bnn_jax.errors import Preempted, UsageError
from bnn_jax.training.checkpoint import checkpoint_steps, restore_checkpoint
from bnn_jax.training.config import Config, DiagnosticsConfig, DistillationConfig, ModelConfig, OptimConfig
from bnn_jax.training.epoch import whole_run
from bnn_jax.training.evaluation import evaluate_run
from bnn_jax.training.experiment import hyper_parameters
from bnn_jax.training.input_pipeline import load_data
from bnn_jax.training.loop import train, train_together
from bnn_jax.training.members import Diverged
from bnn_jax.training.programs import image_info, programs_of, state_shapes
from bnn_jax.training.validation import validate

SPLITS = ("train", "validation", "test")

SGD = OptimConfig("sgd", learning_rate=0.1, ema_decay=0.5)
CONFIG = validate(
    Config("test", epochs=2, batch_size=256, loss="cross_entropy", model=ModelConfig("resnet6", width=4), optim=SGD)
)
OTHER = replace(CONFIG, seed=1, optim=replace(SGD, learning_rate=0.5, momentum=0.0, ema_decay=0.7))
DIVERGING = replace(CONFIG, optim=replace(SGD, learning_rate=1e15))


@pytest.fixture(scope="module")
def dataset():
    return load_data(CONFIG.data)


@pytest.fixture(scope="module")
def looped(tmp_path_factory, dataset):
    folders = [tmp_path_factory.mktemp("loop") for _ in range(2)]
    return folders, [train(config, folder, data=dataset) for config, folder in zip((CONFIG, OTHER), folders)]


def preempt(done, total, text):
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture(scope="module")
def mapped(tmp_path_factory, dataset):
    """Three runs as one program, which a SIGTERM stops within their first epoch, and which then go on."""
    folders, calls = [tmp_path_factory.mktemp("mapped") for _ in range(3)], []
    runs = ((CONFIG, DIVERGING, OTHER), folders)
    with pytest.raises(Preempted, match="saved at step 1; the same command resumes there"):
        train_together(*runs, data=dataset, on_progress=preempt)
    assert [checkpoint_steps(folder / "checkpoints") for folder in folders] == [[1], [1], [1]]
    assert not (folders[0] / "result.json").exists()
    results = train_together(*runs, data=dataset, on_progress=lambda *call: calls.append(call))
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
    chex.assert_trees_all_close(*states, rtol=1e-7, atol=2e-6)


@pytest.mark.parametrize("member", [0, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.full
def test_runs_mapped_together_are_those_that_train_alone(mapped, looped, member, dataset):
    folder, result = mapped[0][2 * member], mapped[1][2 * member]
    assert_same_run(folder, looped[0][member], dataset)
    assert evaluate_run(folder)["accuracy"] == pytest.approx(result["test_accuracy_best"], abs=1e-6)


@pytest.mark.full
def test_runs_saved_at_different_steps_do_not_go_on_together(tmp_path, dataset):
    with pytest.raises(Preempted):
        train(CONFIG, tmp_path / "first", data=dataset, on_progress=preempt)
    with pytest.raises(UsageError, match=r"different steps .* \(.*first at step 1, .*second at step 0\); start them"):
        train_together((CONFIG, OTHER), [tmp_path / "first", tmp_path / "second"], data=dataset)


@pytest.mark.full
def test_a_whole_run_in_one_jit_is_the_loop(looped, dataset):
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


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (
            {"distillation": DistillationConfig({"knowledge": 1.0})},
            r"`distillation.losses` \(=knowledge\) needs a teacher",
        ),
        ({"init_from": "runs/x"}, r"`init_from` \(='runs/x'\) is for `train`; whole runs start from random weights"),
    ],
)
def test_what_a_whole_run_does_not_read_is_refused(dataset, changes, rule):
    with pytest.raises(UsageError, match=rule):
        whole_run(replace(CONFIG, **changes), image_info(dataset), examples=64)


def test_as_many_folders_as_configs(tmp_path, dataset):
    for configs, folders in (((), ()), ((CONFIG, OTHER), (tmp_path,))):
        rule = rf"`len\(configs\)` \(={len(configs)}\) must be one config or more, and as many as .*, {len(folders)}$"
        with pytest.raises(UsageError, match=rule):
            train_together(configs, folders, data=dataset)


@pytest.mark.full
def test_a_diverged_member_is_told_and_spoils_no_other(mapped):
    folders, results, _ = mapped
    assert isinstance(results[1], Diverged)
    assert re.search(
        r"`loss` became \S+ \(above 2\^24\) at step 2 \(epoch 1\) of .*, first in the output of \w+", str(results[1])
    )
    assert "lower `optim.learning_rate` (=1000000000000000.0)" in str(results[1])
    steps = [json.loads(line)["step"] for line in (folders[1] / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1]
    assert all(0 <= results[member]["test_accuracy_last"] <= 1 for member in (0, 2))


@pytest.mark.full
def test_progress_counts_the_steps_of_all_members(mapped):
    steps = [done for done, total, _ in mapped[2]]
    assert steps == sorted(steps)
    assert mapped[2][-1][:2] == (24, 24)
    assert "epoch 2/2  loss" in mapped[2][-1][2]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(CONFIG, batch_size=128), "`configs` must differ only in `seed`, `optim.learning_rate`"),
        (
            replace(CONFIG, diagnostics=DiagnosticsConfig(every_steps=2)),
            r"`diagnostics.every_steps` \(=2\) cannot be mapped over several runs; train them one after another",
        ),
    ],
)
def test_runs_that_are_not_one_program(tmp_path, dataset, other, message):
    with pytest.raises(UsageError, match=message):
        train_together([CONFIG, other], [tmp_path / "a", tmp_path / "b"], data=dataset)
    assert not (tmp_path / "a").exists()

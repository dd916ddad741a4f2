"""A run from config to result: what it writes, how it resumes, how it ends."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from small_sets import brightness_set, write_npz

from bnn_jax.errors import Preempted, UsageError
from bnn_jax.training import loop
from bnn_jax.training.checkpoint import checkpoint_steps, restore_checkpoint
from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig
from bnn_jax.training.evaluation import evaluate_run
from bnn_jax.training.loop import Diverged, train
from bnn_jax.training.metrics import read_metrics, summarize
from bnn_jax.training.pace import Pace
from bnn_jax.training.programs import initial_state, programs_of
from bnn_jax.training.run_folder import DamagedFileWarning, has_begun
from bnn_jax.training.step_size import StepSizeWarning

CONFIG = Config(
    "test", epochs=3, batch_size=16, scan_steps=2, model=ModelConfig("resnet6", width=4), optim=OptimConfig("dfw", 0.3)
)


@pytest.fixture(scope="module")
def dataset():
    return brightness_set(88, 40, 50)


def leaves_of(workdir, dataset, config=CONFIG):
    programs = programs_of(config, dataset)
    restored = restore_checkpoint(workdir / "checkpoints", initial_state(programs, config.seed))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored.state)]


def assert_same_bits(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a.tobytes() == b.tobytes()


class Stop(Exception):
    """Stands for a process that ends without a chance to save."""


def test_a_run_writes_what_it_says(tmp_path, dataset):
    calls = []
    path = write_npz(dataset, tmp_path / "mine.npz")
    config = replace(CONFIG, data=DataConfig(path))
    result = train(config, tmp_path, on_progress=lambda *call: calls.append(call))
    assert [call[:2] for call in calls][-1] == (15, 15)
    written = json.loads((tmp_path / "result.json").read_text())
    assert written.pop("sha256")
    assert written == result
    records = list(read_metrics(tmp_path / "metrics.jsonl"))
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 16))
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    assert [r["epoch"] for r in evaluations] == [1, 2, 3]
    best = max(r["validation_accuracy"] for r in evaluations)
    assert result["validation_accuracy_best"] == pytest.approx(best)
    assert result["best_epoch"] == 1 + [r["validation_accuracy"] for r in evaluations].index(best)
    uneven = [r | {"search_iterations": r["step"]} if r["kind"] == "train" else r for r in records]
    assert summarize(uneven)["search_iterations_mean"] == np.mean(range(1, 16))
    assert result["max_abs_latent"] <= 1.0
    assert len(result["gamma"]["value"]) == 15
    losses = [r["loss"] for r in records if r["kind"] == "train" and r["epoch"] == 3]
    assert result["train_loss_last"] == pytest.approx(np.mean(losses))
    Path(path).unlink()
    again = train(config, tmp_path)  # finished: not even the data are needed
    assert again == result


@pytest.mark.full
def test_a_run_is_saved_every_few_epochs_and_at_its_end(tmp_path, dataset, monkeypatch):
    saved, save = [], loop.save
    monkeypatch.setattr(loop, "save", lambda members, run: (saved.append(int(run.train.step)), save(members, run)))
    result = train(replace(CONFIG, checkpoint_every_epochs=2), tmp_path, data=dataset)
    assert saved == [2 * 5, 3 * 5] and result["epochs"] == 3


def test_the_time_of_a_step_is_that_of_one_run_of_several():
    pace = Pace(10, members=4)
    pace.took(0.5, steps=5)
    assert pace.median == 25.0 and pace.told(32, steps=10, evaluations=0)[1] == "0:00:01 left"


def test_a_run_whose_step_size_was_1_throughout_says_what_it_was(tmp_path, dataset):
    config = replace(CONFIG, optim=replace(CONFIG.optim, learning_rate=1e-3))
    what = "this run was projected SGD with rate 0.001, the exact step size never held it back; try a schedule"
    with pytest.warns(StepSizeWarning, match=f"gamma was 1 in all 15 steps: {what}"):
        result = train(config, tmp_path, data=dataset)
    assert set(result["gamma"]["value"]) == {1.0}


def test_evaluate_run_agrees_with_the_result(tmp_path, dataset):
    config = replace(CONFIG, data=replace(CONFIG.data, name=write_npz(dataset, tmp_path / "data.npz")))
    result = train(config, tmp_path / "run")
    for which, key in (("best", "test_accuracy_best"), ("last", "test_accuracy_last")):
        found = evaluate_run(tmp_path / "run", split="test", which=which)
        assert found["accuracy"] == pytest.approx(result[key])
        assert found["examples"] == 50
    with pytest.raises(UsageError, match=r"`workdir` \(=.*\) holds no run: there is no .*config\.json"):
        evaluate_run(tmp_path)


@pytest.mark.parametrize("name", ["dfw", "adam"])
@pytest.mark.full
def test_stopping_anywhere_changes_no_bit(tmp_path, dataset, name):
    """Stop in the middle of an epoch again and again, without saving, and resume."""
    config = replace(CONFIG, optim=OptimConfig(name, 0.1))
    whole = train(config, tmp_path / "whole", data=dataset)

    for _ in range(20):
        try:
            broken = train(config, tmp_path / "broken", data=dataset, on_progress=stop_after_five_calls())
            break
        except Stop:
            pass
    else:
        pytest.fail("the run made no progress")
    assert_same_bits(leaves_of(tmp_path / "broken", dataset, config), leaves_of(tmp_path / "whole", dataset, config))
    timeless = lambda result: {k: v for k, v in result.items() if "time" not in k}
    assert timeless(broken) == timeless(whole)
    steps = [r["step"] for r in read_metrics(tmp_path / "broken" / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == list(range(1, 16))


def stop_after_five_calls():
    count = 0

    def on_progress(done, total, text):
        nonlocal count
        count += 1
        if count == 5:
            raise Stop

    return on_progress


def test_ctrl_c_saves_within_the_epoch_and_resumes(tmp_path, dataset):
    def press_once(done, total, text):
        if done == 7:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"saved at step 7; the same command resumes there"):
        train(CONFIG, tmp_path / "broken", data=dataset, on_progress=press_once)
    assert checkpoint_steps(tmp_path / "broken" / "checkpoints")[-1] == 7
    train(CONFIG, tmp_path / "broken", data=dataset)
    train(CONFIG, tmp_path / "whole", data=dataset)
    assert_same_bits(leaves_of(tmp_path / "broken", dataset), leaves_of(tmp_path / "whole", dataset))


def test_preemption_saves_and_resumes(tmp_path, dataset):
    def preempt(done, total, text):
        if done == 7:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Preempted, match=r"saved at step 7; the same command resumes there"):
        train(CONFIG, tmp_path, data=dataset, on_progress=preempt)
    assert checkpoint_steps(tmp_path / "checkpoints")[-1] == 7
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_state_that_is_not_finite_names_step_and_parameter(tmp_path, dataset):
    config = replace(CONFIG, optim=OptimConfig("sgd", 1e38, latent_box=None), loss="cross_entropy")
    with pytest.raises(
        Diverged,
        match=r"`state` became non-finite at step 1 \(epoch 1\) of .*, first in the parameter \w.* after the step "
        r"\(3 too large to square of 3\); lower `optim.learning_rate`",
    ):
        train(config, tmp_path, data=dataset)
    assert not list(read_metrics(tmp_path / "metrics.jsonl"))  # it was the first step


def test_another_config_in_the_same_folder_is_refused(tmp_path, dataset):
    train(replace(CONFIG, epochs=1), tmp_path, data=dataset)
    with pytest.raises(UsageError, match=r"`seed` is 2 now, but .* holds a run with 0; choose another `--work"):
        train(replace(CONFIG, epochs=2, seed=2), tmp_path, data=dataset)


@pytest.mark.parametrize("damage", ["config.json", "result.json", "metrics.jsonl"])
@pytest.mark.parametrize("how", ["deleted", "cut", "flipped"])
def test_a_damaged_file_of_a_finished_run_is_remade(tmp_path, dataset, damage, how):
    config = replace(CONFIG, epochs=1)
    result = train(config, tmp_path, data=dataset)
    path, whole = tmp_path / damage, (tmp_path / damage).read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    if damage == "metrics.jsonl":
        (tmp_path / "result.json").unlink()  # what the log is needed for
    if damage != "metrics.jsonl" and how != "deleted":
        with pytest.warns(DamagedFileWarning, match=f"skipped `{path}`: it is damaged or was changed by hand"):
            again = train(config, tmp_path, data=dataset)
    else:
        again = train(config, tmp_path, data=dataset)
    assert again == result
    assert path.read_bytes() == whole
    with pytest.raises(UsageError, match="`seed` is 2 now"):
        train(replace(config, seed=2), tmp_path, data=dataset)


def test_two_runs_in_one_workdir_refuse_each_other(tmp_path, dataset):
    def start_another(done, total, text):
        with pytest.raises(
            UsageError, match=r"`workdir` \(=.*\) is being trained in by process \d+ on .*; wait for its end"
        ):
            train(config, tmp_path, data=dataset)

    config = replace(CONFIG, epochs=1)
    train(config, tmp_path, data=dataset, on_progress=start_another)


def test_a_batch_larger_than_the_set_is_refused(tmp_path, dataset):
    with pytest.raises(UsageError, match=r"`batch_size` \(=89\) is larger than the 88 training examples"):
        train(replace(CONFIG, batch_size=89), tmp_path, data=dataset)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": DataConfig(lighting_std=0.1)},
            r"^`data.lighting_std` \(=0.1\) is for RGB images; those of .* \(8, 8, 1\); leave",
        ),
        ({"optim": OptimConfig("optax:lbfgs", 0.1)}, r"^the training step cannot be made: .*'value_fn'"),
    ],
)
def test_a_step_that_cannot_be_made_is_one_sentence_and_another_config_may_follow(changes, message, tmp_path, dataset):
    with pytest.raises(UsageError, match=message):
        train(replace(CONFIG, **changes), tmp_path, data=dataset)
    assert not has_begun(tmp_path)

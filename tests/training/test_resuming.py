"""What may change between two parts of a run, a run that goes on for longer, and one that takes another's place."""

import signal
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from small_sets import brightness_set

from bnn_jax.errors import RunError, UsageError
from bnn_jax.training.callbacks import Callback
from bnn_jax.training.config import Config, DiagnosticsConfig, ModelConfig, OptimConfig
from bnn_jax.training.loop import train
from bnn_jax.training.members import MovedAsideWarning
from bnn_jax.training.metrics import read_metrics
from bnn_jax.training.programs import programs_of, state_shapes
from bnn_jax.training.resuming import differing_key, what_spans_the_run
from bnn_jax.training.run_folder import (
    check_workdir,
    claim_workdir,
    move_aside,
    read_config,
    restore_run,
    write_checksummed,
)

SGD = OptimConfig("sgd", 0.1)
CONFIG = Config("test", 2, 8, loss="cross_entropy", model=ModelConfig("mnist_mlp", 4), optim=SGD, scan_steps=2)


@pytest.fixture(scope="module")
def dataset():
    return brightness_set(32, 10, 10)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dataset):
    """Folder and result of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train(CONFIG, folder, data=dataset)


def saved(folder, dataset):
    config = read_config(folder)
    state = restore_run(config, folder, state_shapes(programs_of(config, dataset))).state
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.replace(train=state.train.replace(flips=None)))]


def timeless(result):
    return {name: value for name, value in result.items() if "time" not in name and "flip" not in name}


@pytest.mark.parametrize("every_steps", [0, pytest.param(2, marks=pytest.mark.full)])
def test_a_longer_run_with_other_logs_is_the_run_that_was_longer(tmp_path, dataset, whole, every_steps):
    folder, expected = whole
    parts = (
        replace(CONFIG, epochs=1, name="other", checkpoint_every_epochs=5),
        replace(CONFIG, scan_steps=1, diagnostics=DiagnosticsConfig(every_steps)),
        replace(CONFIG, optimizers=(SGD,), tune_trials=2, optim=replace(SGD, tune={"learning_rate": (0.1, 1.0)})),
    )
    for part in parts:
        result = train(part, tmp_path / "run", data=dataset)
        assert result["epochs"] == part.epochs
    assert timeless(result) == timeless(expected)
    for a, b in zip(saved(tmp_path / "run", dataset), saved(folder, dataset), strict=True):
        assert a.tobytes() == b.tobytes()
    with pytest.raises(UsageError, match=r"`epochs` is 1 now, but .* holds a run with 2; choose another `--workdir`"):
        train(parts[0], tmp_path / "run", data=dataset)


@pytest.mark.full
def test_a_run_that_counts_flips_only_now_is_interrupted_before_its_first_step(tmp_path, dataset):
    def interrupt(done, total, text):
        if done == 1:
            signal.raise_signal(signal.SIGINT)

    class Interrupt(Callback):
        def on_start(self, config, workdir):
            signal.raise_signal(signal.SIGINT)

    told = "saved at step 1; the same command resumes there"
    with pytest.raises(KeyboardInterrupt, match=told):
        train(CONFIG, tmp_path, data=dataset, on_progress=interrupt)
    counting = replace(CONFIG, diagnostics=DiagnosticsConfig(2))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt, match=told):
            train(counting, tmp_path, data=dataset, callbacks=[Interrupt()])
    assert timeless(train(counting, tmp_path, data=dataset)) == timeless(train(CONFIG, tmp_path / "w", data=dataset))


def test_a_longer_run_does_not_end_before_it_is_finished(tmp_path, dataset):
    class Stop(Callback):
        def on_record(self, record):
            if record["epoch"] == 2:
                raise KeyboardInterrupt

    train(replace(CONFIG, epochs=1), tmp_path, data=dataset)
    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, tmp_path, data=dataset, callbacks=[Stop()])
    assert not (tmp_path / "result.json").exists()
    assert read_config(tmp_path).epochs == 2


COSINE = replace(CONFIG, epochs=1, optim=replace(SGD, schedule="cosine"))


def test_a_schedule_over_the_run_needs_the_word_to_extend_it(tmp_path):
    claim_workdir(COSINE, tmp_path)
    write_checksummed(tmp_path / "result.json", {"epochs": 1})
    with pytest.raises(
        UsageError,
        match=r"^`epochs` is 2 now, but .* holds a run with 1, and its learning rate follows a curve over the whole "
        r"run, whose schedule is cosine: after 1 epochs it is 0 on the curve over 1 and 0.05 on that over 2; train "
        r"with `--extend` to go on with that change, choose another `--workdir`, or move that folder away$",
    ):
        check_workdir(replace(COSINE, epochs=2), tmp_path)
    check_workdir(replace(COSINE, epochs=2), tmp_path, extend=True)
    check_workdir(replace(CONFIG, epochs=1), tmp_path / "other")


@pytest.mark.full
def test_an_extended_run_goes_on_along_the_longer_curve(tmp_path, dataset):
    train(COSINE, tmp_path, data=dataset)
    longer = replace(COSINE, epochs=2)
    with pytest.raises(UsageError, match="train with `--extend` to go on"):
        train(longer, tmp_path, data=dataset)
    assert train(longer, tmp_path, data=dataset, extend=True)["epochs"] == 2
    rates = [r["learning_rate"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "train"]
    assert rates[3] < rates[4] == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"optim": replace(SGD, warmup_share=0.5)}, "constant after a warm-up over 0.5 of the run: after 2 epochs it"),
        ({"regularizer": "manhattan", "regularizer_schedule": "linear"}, "its strength of the regularizer follows"),
        ({"regularizer_schedule": "linear"}, None),
        ({"optim": OptimConfig("bnew", 0.1)}, "bnew reaches the bounds at the end of them"),
        ({"model": ModelConfig("irnet_resnet20", 4)}, "`model.input_quantizer` "),
        ({"model": ModelConfig("mnist_mlp", 4, kernel_quantizer="inq")}, r"`model.kernel_quantizer` \(=inq\) follows"),
        ({"model": ModelConfig("resnet20", 4)}, None),
        ({"model": ModelConfig("resnet20", 4, quantizers={"stage3_*": "real"})}, None),
        (
            {"model": ModelConfig("resnet20", 4, quantizers={"stage3_*": (None, "inq")})},
            r"`model.quantizers` of stage3_",
        ),
        ({"optim": OptimConfig("optax:lion", 0.1)}, None),
        ({"model": ModelConfig("flax.linen:Dense")}, None),
        ({"model": ModelConfig("bnn_jax.layers:BinaryDense")}, r"`model.name` .*, for all that is known, follows the"),
    ],
)
def test_what_spans_the_run(changes, words):
    found = what_spans_the_run(replace(CONFIG, **changes), 4)
    if words is None:
        assert found is None
    else:
        with pytest.raises(UsageError, match=words):
            raise UsageError(found)


def test_settings_that_are_another_run():
    for name, value in {"batch_size": 4, "accumulate_steps": 2, "precision": "bfloat16"}.items():
        assert differing_key(CONFIG, replace(CONFIG, epochs=9, **{name: value})) == name
    assert differing_key(CONFIG, replace(CONFIG, optim=replace(SGD, options={"nesterov": True}))) == (
        "optim.options.nesterov"
    )


def test_a_run_is_overwritten_when_the_new_one_is_there(tmp_path, dataset, whole):
    folder, other = tmp_path / "run", replace(CONFIG, seed=1, epochs=1)
    result = train(other, folder, data=dataset)
    for fails in (replace(CONFIG, batch_size=1000), replace(CONFIG, model=ModelConfig("mnist_mlp", 0))):
        with pytest.raises(UsageError):
            train(fails, folder, data=dataset, overwrite=True)
    assert train(other, folder, data=dataset) == result
    with pytest.warns(MovedAsideWarning, match=rf"the run in {folder} is moved to {folder}.replaced-1"):
        anew = train(CONFIG, folder, data=dataset, overwrite=True)
    assert timeless(anew) == timeless(whole[1])
    assert train(other, tmp_path / "run.replaced-1", data=dataset) == result
    with pytest.warns(MovedAsideWarning, match="replaced-2"):
        train(other, folder, data=dataset, overwrite=True)
    with pytest.raises(UsageError, match=r"`extend` \(=True\) does not go with `overwrite`"):
        train(other, folder, data=dataset, overwrite=True, extend=True)


def test_the_current_folder_is_not_moved_aside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"`workdir` \(='.'\) is the current folder, which would take what is written"):
        move_aside(Path("."))


def test_a_folder_that_cannot_be_renamed_keeps_its_run(tmp_path, dataset, monkeypatch):
    config = replace(CONFIG, epochs=1)
    result = train(config, tmp_path, data=dataset)

    def fail(self, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "rename", fail)
    with pytest.raises(RunError, match=r"cannot rename .* \(Permission denied\); choose another `--workdir`"):
        train(config, tmp_path, data=dataset, overwrite=True)
    assert train(config, tmp_path, data=dataset) == result

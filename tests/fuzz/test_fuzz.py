"""Runs that are broken on purpose recover; `python tests/fuzz/fuzz_runs.py --faults 100` is the long version."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bnn_jax.errors import RunError
from bnn_jax.training.checkpoint import CheckpointWarning
from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig
from bnn_jax.training.loop import evaluate_run, train

SCRIPT = Path(__file__).parent / "fuzz_runs.py"
CONFIG = Config("test", epochs=2, batch_size=16, model=ModelConfig("resnet6", width=4), optim=OptimConfig("dfw", 0.3))


@pytest.mark.long
def test_runs_recover_from_random_faults(subprocess_env):
    command = [sys.executable, str(SCRIPT), "--faults", "5", "--at-once", "1"]
    done = subprocess.run(command, env=subprocess_env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "   5 faults,    5 recoveries" in done.stdout
    assert "0 wrong results, 0 tracebacks" in done.stdout


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    rng, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 88), ("validation", 40), ("test", 50)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 3, count).astype(np.int32)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, **arrays)
    return replace(CONFIG, data=DataConfig(str(path)))


def train_again(workdir, config):
    (workdir / "result.json").unlink()
    with pytest.warns(CheckpointWarning) as caught:
        result = train(config, workdir)
    return {name: value for name, value in result.items() if "time" not in name}, [str(w.message) for w in caught]


def test_a_run_without_any_checkpoint_of_its_own_begins_again(tmp_path, config):
    whole, other = tmp_path / "whole", tmp_path / "other"
    result = train(config, whole)
    result = {name: value for name, value in result.items() if "time" not in name}
    checkpoints = whole / "checkpoints"
    for step in (5, 10):
        os.truncate(checkpoints / f"{step}.json", 100)
    again, texts = train_again(whole, config)
    assert again == result
    assert texts == [
        f"skipped checkpoint `{checkpoints}/10`: its manifest is not JSON",
        f"skipped checkpoint `{checkpoints}/5`: its manifest is not JSON",
        f"moved what there was of step 10, 5 to `{checkpoints}/quarantine-1`",
    ]

    train(replace(config, seed=1), other)
    shutil.rmtree(checkpoints)
    shutil.copytree(other / "checkpoints", checkpoints)
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(RunError, match="step 10: it is of another run, whose `seed` is 1"),
    ):
        evaluate_run(whole)
    again, texts = train_again(whole, config)
    assert again == result
    assert texts == [
        f"skipped checkpoint `{checkpoints}/10`: it is of another run, whose `seed` is 1, not 0",
        f"skipped checkpoint `{checkpoints}/5`: it is of another run, whose `seed` is 1, not 0",
        f"moved what there was of step 10, 5 to `{checkpoints}/quarantine-1`",
    ]
    assert sorted(os.listdir(checkpoints)) == ["10", "10.json", "5", "5.json", "quarantine-1"]

"""Runs that are broken on purpose recover, and numbers that mean nothing are told.

The long versions: `fuzz_runs.py --faults 100` and `broken_states.py --mutations 200` in this folder.
"""

import os
import re
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
from bnn_jax.training.evaluation import evaluate_run
from bnn_jax.training.loop import train

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "fuzz_runs.py"
CONFIG = Config("test", epochs=2, batch_size=16, model=ModelConfig("resnet6", width=4), optim=OptimConfig("dfw", 0.3))


@pytest.mark.full
def test_runs_recover_from_random_faults(subprocess_env):
    command = [sys.executable, str(SCRIPT), "--faults", "20", "--at-once", "2"]
    done = subprocess.run(command, env=subprocess_env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  20 faults,   20 recoveries" in done.stdout
    assert "0 wrong results, 0 tracebacks" in done.stdout


@pytest.mark.full
def test_no_state_that_means_nothing_passes(subprocess_env):
    command = [sys.executable, str(SCRIPT.with_name("broken_states.py")), "--mutations", "20"]
    done = subprocess.run(command, env=subprocess_env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 mutations, 0 silent passes, 0 tracebacks" in done.stdout


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    rng, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 88), ("validation", 40), ("test", 50)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 3, count).astype(np.int32)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, **arrays)
    return replace(CONFIG, data=DataConfig(str(path)))


def timeless(result):
    return {name: value for name, value in result.items() if "time" not in name}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, config):
    """A finished run's folder and result."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, timeless(train(config, folder))


def train_again(workdir, config, reason):
    """The result of a run that begins again because nothing of what it saved can be used."""
    (workdir / "result.json").unlink()
    with pytest.warns(CheckpointWarning) as caught:
        result = train(config, workdir)
    checkpoints = workdir / "checkpoints"
    assert [str(warning.message) for warning in caught if warning.category is CheckpointWarning] == [
        f"skipped checkpoint `{checkpoints}/10`: {reason}",
        f"skipped checkpoint `{checkpoints}/5`: {reason}",
        f"moved what there was of step 10, 5 to `{checkpoints}/quarantine-1`",
    ]
    return timeless(result)


@pytest.mark.full
def test_a_run_without_any_checkpoint_of_its_own_begins_again(tmp_path, config, trained):
    whole, other = Path(shutil.copytree(trained[0], tmp_path / "whole")), tmp_path / "other"
    checkpoints = whole / "checkpoints"
    for step in (5, 10):
        os.truncate(checkpoints / f"{step}.json", 100)
    assert train_again(whole, config, "its manifest is not JSON") == trained[1]

    train(replace(config, seed=1), other)
    shutil.rmtree(checkpoints)
    shutil.copytree(other / "checkpoints", checkpoints)
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(RunError, match="step 10: it is of another run, whose `seed` is 1"),
    ):
        evaluate_run(whole)
    assert train_again(whole, config, "it is of another run, whose `seed` is 1, not 0") == trained[1]
    assert sorted(os.listdir(checkpoints)) == ["10", "10.json", "5", "5.json", "quarantine-1"]


@pytest.mark.full
def test_the_documentation_opens_a_run_with_orbax_alone(trained):
    page = (ROOT / "docs" / "guides" / "runs.md").read_text()
    (script,) = re.findall(r"```python\n([^`]*ocp\.load[^`]*)```", page)
    assert len([line for line in script.splitlines() if line]) == 9
    script = script.replace("runs/mine/checkpoints", str(trained[0] / "checkpoints"))
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("{'latent_kernel': (3, 3, 4, 4)}\n", "")

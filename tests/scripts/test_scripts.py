"""The scripts as a user runs them: what they write, how they end, what they say."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from run_script import run_script

ROOT = Path(__file__).parents[2]
SMALL = ("--epochs", "2", "--model.width", "4", "--batch-size", "64")


def run(script, *arguments, env, code=0):
    command = [sys.executable, f"scripts/{script}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.full
def test_evaluate_agrees_with_the_training_script(comparison):
    workdir, _ = comparison
    result = json.loads((workdir / "adam" / "seed0" / "result.json").read_text())
    done = run_script("evaluate", workdir / "adam" / "seed0", "--which", "last")
    assert f"test: accuracy {100 * result['test_accuracy_last']:.2f} %" in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("train", ("--optim.name", "sdg"), r"error: `--optim\.name` \(='sdg'\) is not known; did you mean 'sgd'\?"),
        (
            "train",
            ("--model.name", "resnet7"),
            r"error: `--model\.name` \(='resnet7'\) is not known; did you mean 'resnet",
        ),
        ("train", ("--optim.learning-rate", "0"), r"error: `--optim\.learning-rate` \(=0\.0\) must be positive"),
        (
            "train",
            ("--config", "configs/no.py"),
            r"error: `--config` \(=configs/no\.py\) does not exist; files in that",
        ),
        ("train", ("--data.name", "digitz"), r"error: .*'?digitz'?.*digits"),
        (
            "train",
            ("--data.name", "cifar10", "--data.data-dir", "/nowhere"),
            r"error: .*/nowhere.*bnn-jax prepare cifar10",
        ),
        ("train", ("--optim.lr", "1"), r"--optim\.l"),
        ("compare_optimizers", ("--seeds", "1", "1"), r"error: `--seeds` \(=\[1, 1\]\) must differ"),
        ("compare_optimizers", ("--optimizers", "dwf"), r"error: `--optimizers` \(='dwf'\) .* did you mean 'dfw'\?"),
        ("evaluate", ("/nowhere",), r"error: `workdir` \(=/nowhere\) is no folder of a run, no file"),
    ],
)
def test_usage_errors_are_one_sentence_and_exit_2(script, arguments, words, tmp_path):
    workdir = () if script == "evaluate" else ("--workdir", tmp_path)
    done = run_script(script, *arguments, *workdir, code=2)
    assert re.search(words, done.stderr)
    if "error: " in done.stderr:
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_usage_error_of_a_process_of_its_own(tmp_path, subprocess_env):
    done = run("train", "--optimizer", "adamm", "--workdir", tmp_path, env=subprocess_env, code=2)
    assert re.match(r"error: `--optimizer` \(='adamm'\) is not known; did you mean 'adam'\?.*\n$", done.stderr)


def test_labels_out_of_range_exit_1(tmp_path):
    images = np.zeros((200, 8, 8, 1), np.uint8)
    labels = np.full(200, 7)
    np.savez(
        tmp_path / "bad.npz",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
        num_classes=3,
    )
    done = run_script("train", "--data.name", tmp_path / "bad.npz", "--workdir", tmp_path, code=1)
    assert re.search(r"error: .*train_labels.*7", done.stderr)


@pytest.mark.full
def test_ctrl_c_exits_130_and_the_same_command_finishes(tmp_path, interrupted_env):
    command = [
        sys.executable,
        "scripts/train.py",
        "--workdir",
        str(tmp_path),
        "--scan-steps",
        "3",
        "--model.width",
        "4",
        "--epochs",
        "12",
        "--checkpoint-every-epochs",
        "1",
    ]
    with subprocess.Popen(command, cwd=ROOT, env=interrupted_env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while not (tmp_path / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert re.search(r"interrupted: saved at step \d+; the same command resumes there", errors)
    assert any((tmp_path / "checkpoints").glob("*.json"))
    run("train", *command[2:], env=interrupted_env)
    assert (tmp_path / "result.json").exists()


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.full
def test_a_full_disk_is_one_sentence_and_the_run_resumes(tmp_path, interrupted_env):
    """A file-size limit stands for the full disk: the checkpoint does not fit, later it does."""
    arguments = ["--workdir", str(tmp_path), "--optimizer", "adam", *SMALL]
    command = [sys.executable, "-c", LIMITED, "scripts/train.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=interrupted_env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr
    assert re.search(r"error: .*checkpoints.*File too large", done.stderr.strip().splitlines()[-1]), done.stderr
    run("train", *arguments, env=interrupted_env)
    assert (tmp_path / "result.json").exists()

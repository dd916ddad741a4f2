"""scripts/plot_run.py as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

from bnn_jax.training.config import Config, to_dict
from bnn_jax.training.run_folder import write_checksummed

ROOT = Path(__file__).parents[2]


def test_it_prints_the_pictures_that_it_wrote(tmp_path, subprocess_env):
    run, output = tmp_path / "run", tmp_path / "pictures"
    run.mkdir()
    write_checksummed(run / "config.json", to_dict(Config("made_up", epochs=1, batch_size=8)))
    record = {"kind": "train", "step": 1, "epoch": 1, "loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    command = [sys.executable, "scripts/plot_run.py", str(run), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=subprocess_env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(output / "curves.png")]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_no_run(tmp_path, run_here):
    done = run_here("plot_run", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: `workdir` (={tmp_path}) holds no run: there is no ")
    assert "Traceback" not in done.stderr

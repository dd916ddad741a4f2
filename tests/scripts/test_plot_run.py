"""scripts/plot_run.py as a user runs it."""

import json

from run_script import run_script

from bnn_jax.training.config import Config, to_dict
from bnn_jax.training.run_folder import write_checksummed


def test_it_prints_the_pictures_that_it_wrote(tmp_path):
    run, output = tmp_path / "run", tmp_path / "pictures"
    run.mkdir()
    write_checksummed(run / "config.json", to_dict(Config("made_up", epochs=1, batch_size=8)))
    record = {"kind": "train", "step": 1, "epoch": 1, "loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    done = run_script("plot_run", run, "--output", output)
    assert done.stdout.splitlines() == [str(output / "curves.png")]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_no_run(tmp_path):
    done = run_script("plot_run", tmp_path, code=2)
    assert done.stderr.startswith(f"error: `workdir` (={tmp_path}) holds no run: there is no ")
    assert "Traceback" not in done.stderr

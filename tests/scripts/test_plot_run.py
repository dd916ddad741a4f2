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


def test_several_runs_are_drawn_over_each_other(tmp_path):
    for name, epochs in (("a", 3), ("b", 2)):
        (tmp_path / name).mkdir()
        write_checksummed(tmp_path / name / "config.json", to_dict(Config(name, epochs=epochs, batch_size=8)))
        losses = {"train_loss": 0.5, "validation_loss": 0.5}
        numbers = ({"epoch": e, "step": e, "validation_accuracy": e / 4} | losses for e in range(1, epochs))
        records = [json.dumps({"kind": "evaluation"} | record) + "\n" for record in numbers]
        (tmp_path / name / "metrics.jsonl").write_text("".join(records))
    done = run_script("plot_run", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "new")
    assert done.stdout.splitlines() == [str(tmp_path / "new" / "overlay.png")]
    assert (tmp_path / "new" / "overlay.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "b" / "metrics.jsonl").write_text("")
    done = run_script("plot_run", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "none", code=2)
    assert f"`workdirs` (={tmp_path / 'b'}) holds no finished epoch yet; train it first" in done.stderr
    assert not (tmp_path / "none").exists()
    assert "`workdirs` must name the folder of a run" in run_script("plot_run", code=2).stderr

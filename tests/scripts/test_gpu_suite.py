"""What the suite for a GPU runs, and what it refuses before its minutes begin."""

import runpy
from pathlib import Path

from run_script import run_script

ROOT = Path(__file__).parents[2]
SUITE = runpy.run_path(str(ROOT / "scripts" / "gpu_suite.py"))


def tasks(**options):
    return {task.name: task for task in SUITE["tasks_of"](SUITE["Arguments"](**options))}


def test_the_comparison_has_what_the_others_leave():
    found = tasks()
    assert list(found) == ["equality", "training", "packed", "sweep", "comparison"]
    assert sum(task.share for name, task in found.items() if name != "comparison") < 0.75
    packed = found["packed"].arguments
    assert float(packed[packed.index("--minutes") + 1]) < 11 * found["packed"].share
    assert found["comparison"].resumes and "vmapped" in found["comparison"].arguments


def test_the_toy_is_small():
    found = tasks(toy=True)
    assert list(found) == ["equality", "training", "comparison"]
    words = " ".join(found["comparison"].arguments)
    assert "--seeds 0 1 --epochs 1" in words and "digits_xnor" in words


def test_programs_are_found_from_any_folder():
    programs = [Path(task.arguments[0]) for task in tasks().values() if task.arguments[0] != "-m"]
    assert len(programs) == 4 and all(path.is_absolute() and path.is_file() for path in programs)


def test_data_that_is_missing_is_told_before_the_minutes_begin(tmp_path):
    done = run_script("gpu_suite", "--data-dir", tmp_path, "--output", tmp_path / "gpu", code=2)
    assert f"(='cifar10') is not in the data folder {tmp_path}; prepare it with: bnn-jax prepare" in done.stderr
    assert not (tmp_path / "gpu").exists()


def test_no_time_at_all_is_refused():
    done = run_script("gpu_suite", "--minutes", "0", code=2)
    assert done.stderr == "error: `--minutes` (=0.0) must be positive; 11 are enough on one modern GPU\n"

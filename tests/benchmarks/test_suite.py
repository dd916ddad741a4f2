"""Programs one after another within their minutes."""

import json
import os
import signal
import sys
import time

import pytest

from bnn_jax.benchmarks.suite import Task, run_suite
from bnn_jax.errors import UsageError


def outcomes(tasks, output, **options):
    record = run_suite(tasks, output, **options)
    assert json.loads((output / "suite.json").read_text()) == record
    return {name: entry["outcome"] for name, entry in record.items()}


def test_each_program_has_its_log_and_its_outcome(tmp_path):
    tasks = [Task("good", ["-c", "print('seen')"]), Task("bad", ["-c", "raise SystemExit(3)"])]
    calls = []
    found = outcomes(tasks, tmp_path / "new" / "folder", minutes=1, on_progress=lambda *call: calls.append(call))
    assert found == {"good": "passed", "bad": "failed with exit code 3"}
    assert (tmp_path / "new" / "folder" / "good.log").read_text() == "seen\n"
    assert [call[:2] for call in calls] == [(1, 2), (2, 2)]


@pytest.mark.parametrize("text", ["{", "[]", '{"one": {"outcome": "passed"}}'])
def test_a_record_that_is_none_is_refused_and_kept(tmp_path, text):
    (tmp_path / "suite.json").write_text(text)
    with pytest.raises(UsageError, match=r"holds a suite\.json that is no record of a suite; remove"):
        run_suite([Task("one", ["-c", "pass"])], tmp_path, minutes=1)
    assert (tmp_path / "suite.json").read_text() == text


@pytest.mark.parametrize(("resumes", "outcome"), [(False, "out of time"), (True, "saved, to be resumed")])
@pytest.mark.full
def test_a_program_that_takes_too_long_is_asked_to_end(tmp_path, resumes, outcome):
    program = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(print('saved'))); time.sleep(60)"
    tasks = [Task("long", ["-c", program], share=0.5, resumes=resumes), Task("short", ["-c", ""])]
    assert outcomes(tasks, tmp_path, minutes=4 / 60) == {"long": outcome, "short": "passed"}
    assert (tmp_path / "long.log").read_text() == "saved\n"


@pytest.mark.full
def test_a_program_that_fails_when_it_is_asked_to_end_has_not_saved(tmp_path):
    program = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit('no room')); time.sleep(60)"
    found = outcomes([Task("long", ["-c", program], share=0.5, resumes=True)], tmp_path, minutes=4 / 60)
    assert found == {"long": "failed with exit code 1"}


def test_nothing_starts_after_the_time_is_over(tmp_path):
    assert outcomes([Task("late", ["-c", ""])], tmp_path, minutes=0) == {"late": "not started"}
    assert sys.executable not in (tmp_path / "suite.json").read_text()


def test_what_passed_is_kept_and_the_rest_is_run_again(tmp_path):
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"
    tasks = [Task("good", ["-c", count]), Task("bad", ["-c", "raise SystemExit(3)"])]
    outcomes(tasks, tmp_path, minutes=1)
    kept = (tmp_path / "suite.json").read_text()
    assert outcomes([tasks[0], Task("bad", ["-c", ""])], tmp_path, minutes=1) == {"good": "passed", "bad": "passed"}
    assert (tmp_path / "runs").read_text() == "x"
    assert json.loads((tmp_path / "suite.json").read_text())["good"] == json.loads(kept)["good"]
    outcomes([Task("good", ["-c", f"{count}; 0"]), Task("bad", ["-c", ""])], tmp_path, minutes=1)
    assert (tmp_path / "runs").read_text() == "xx"  # another command


CHILD = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {child!r}])
{rest}
"""


@pytest.mark.full
@pytest.mark.parametrize("rest", ["time.sleep(60)", "time.sleep(1)"])
def test_no_process_outlives_the_task_that_started_it(tmp_path, rest):
    beat = tmp_path / "beat"
    child = f"import time\nwhile True: open({str(beat)!r}, 'a').write('.'); time.sleep(0.05)"
    run_suite([Task("long", ["-c", CHILD.format(child=child, rest=rest)], share=0.5)], tmp_path, minutes=4 / 60)
    size = beat.stat().st_size
    time.sleep(0.5)
    assert 0 < size == beat.stat().st_size


@pytest.mark.full
def test_an_interrupted_suite_lets_its_program_save(tmp_path):
    program = f"""
import os, signal, sys, time
def save(*_):
    time.sleep(0.5)
    sys.exit(print("saved"))
signal.signal(signal.SIGTERM, save)
os.kill({os.getpid()}, signal.SIGINT)
time.sleep(60)
"""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_suite([Task("long", ["-c", program])], tmp_path, minutes=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "long.log").read_text() == "saved\n"

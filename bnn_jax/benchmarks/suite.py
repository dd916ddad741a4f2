"""Several programs one after another within so many minutes, each with its share, its log and its place in a record."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bnn_jax.files import write_atomically
from bnn_jax.training.progress import OnProgress, silent

SECONDS_TO_SAVE = 20.0
"""Between the polite end of a program, on which training saves, and its killing."""

ENDED = "ended when asked"
"""What a program does that saves, before its task says what that is."""


class Task(NamedTuple):
    """A program of a suite.

    Attributes:
      name: of its log and its entry in the record.
      arguments: what follows ``python``.
      share: the most it may take of the minutes that are left when it starts.
      resumes: whether running out of time is its normal end: it saves, and the next suite goes on with it.
    """

    name: str
    arguments: Sequence[str]
    share: float = 1.0
    resumes: bool = False


def run_suite(
    tasks: Sequence[Task], output: Path, *, minutes: float, on_progress: OnProgress = silent
) -> dict[str, dict[str, Any]]:
    """Run programs one after another; none starts after the time is over.

    Args:
      tasks: in this order.
      output: folder; of each program it gets ``<name>.log``, and ``suite.json`` after each.
      minutes: for all.
      on_progress: called after each.

    Returns:
      name -> ``{"command", "outcome", "seconds"}``; the outcome is passed, failed with its exit code or to end
      when asked, out of time, saved, to be resumed, or not started.
    """
    output.mkdir(parents=True, exist_ok=True)
    end, record = time.monotonic() + 60 * minutes, {}
    for number, task in enumerate(tasks):
        left = end - time.monotonic()
        command, began = [sys.executable, *task.arguments], time.monotonic()
        # What saves when it is ended is ended in time for that.
        seconds = task.share * left - (min(SECONDS_TO_SAVE, 0.5 * task.share * left) if task.resumes else 0)
        outcome = _run(command, output / f"{task.name}.log", seconds) if left > 0 else "not started"
        if outcome == ENDED:
            outcome = "saved, to be resumed" if task.resumes else "out of time"
        seconds = time.monotonic() - began
        record[task.name] = {"command": ["python", *task.arguments], "outcome": outcome, "seconds": round(seconds, 1)}
        write_atomically(output / "suite.json", json.dumps(record, indent=1).encode())
        on_progress(number + 1, len(tasks), f"{task.name}: {outcome} after {seconds:.0f} s")
    return record


def _run(command: Sequence[str], log: Path, seconds: float) -> str:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(SECONDS_TO_SAVE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return "failed to end when asked, and was killed"
            if code in (0, -signal.SIGTERM):
                return ENDED if code == 0 else "out of time"
            return f"failed with exit code {code}"
        except BaseException:
            process.kill()
            process.wait()
            raise
    return "passed" if code == 0 else f"failed with exit code {code}"

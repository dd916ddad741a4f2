"""Several programs one after another within so many minutes, each with its share, its log and its place in a record."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bnn_jax.errors import UsageError
from bnn_jax.files import write_atomically
from bnn_jax.training.progress import OnProgress, silent

SECONDS_TO_SAVE = 20.0
"""Between the polite end of a program, on which training saves, and its killing."""

PASSED = "passed"

ENDED = "ended when asked"
"""What a program does that saves, before its task says what that is."""


class Task(NamedTuple):
    """A program of a suite.

    Attributes:
      name: of its log and its entry in the record.
      arguments: what follows ``python``.
      share: the most it may take of all minutes, and of those that are left when it starts.
      resumes: whether running out of time is its normal end: it saves, and the next suite goes on with it.
    """

    name: str
    arguments: Sequence[str]
    share: float = 1.0
    resumes: bool = False


def run_suite(
    tasks: Sequence[Task], output: Path, *, minutes: float, on_progress: OnProgress = silent
) -> dict[str, dict[str, Any]]:
    """Run programs one after another; none starts after the time is over, none has passed by `suite.json` already.

    A program is asked to end by SIGTERM, and killed after 20 s more, with all processes that it has started.

    Args:
      tasks: in this order.
      output: folder; of each program it gets ``<name>.log``, and ``suite.json`` after each.  What passed there before,
        by the same command, is not run again.
      minutes: for all.
      on_progress: called after each.

    Returns:
      name -> ``{"command", "outcome", "seconds"}``; the outcome is passed, failed with its exit code or to end
      when asked, out of time, saved, to be resumed, or not started.

    Raises:
      UsageError: if there is a `suite.json` that is no such record.
    """
    output.mkdir(parents=True, exist_ok=True)
    path, end, record = output / "suite.json", time.monotonic() + 60 * minutes, {}
    before = _record_in(path) if path.exists() else {}
    for number, task in enumerate(tasks):
        command, began = ["python", *task.arguments], time.monotonic()
        left, entry = end - began, before.get(task.name, {})
        if entry.get("outcome") == PASSED and entry["command"] == command:
            record[task.name] = entry
        else:
            # What saves when it is ended is ended in time for that.
            seconds = min(60 * task.share * minutes, left)
            seconds -= min(SECONDS_TO_SAVE, 0.5 * seconds) if task.resumes else 0
            log = output / f"{task.name}.log"
            outcome = _run([sys.executable, *task.arguments], log, seconds) if left > 0 else "not started"
            if outcome == ENDED:
                outcome = "saved, to be resumed" if task.resumes else "out of time"
            taken = time.monotonic() - began
            record[task.name] = {"command": command, "outcome": outcome, "seconds": round(taken, 1)}
        write_atomically(path, json.dumps(before | record, indent=1).encode())
        entry = record[task.name]
        on_progress(number + 1, len(tasks), f"{task.name}: {entry['outcome']} after {entry['seconds']:.0f} s")
    return record


def _record_in(path: Path) -> dict[str, dict[str, Any]]:
    with suppress(ValueError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and all(
            isinstance(entry, dict) and {"command", "outcome", "seconds"} <= entry.keys() for entry in record.values()
        ):
            return record
    rule = "holds a suite.json that is no record of a suite; remove that file, or choose another folder"
    raise UsageError(f"`output` (={path.parent}) {rule}")


def _run(command: Sequence[str], log: Path, seconds: float) -> str:
    with log.open("wb") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        # A session of its own: Ctrl-C reaches this process alone, which asks politely, and nothing outlives its task.
        process = subprocess.Popen(command, **streams, env=os.environ, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = _ask_to_end(process)
            if code is None:
                return "failed to end when asked, and was killed"
            if code in (0, -signal.SIGTERM):
                return ENDED if code == 0 else "out of time"
            return f"failed with exit code {code}"
        except BaseException:
            _ask_to_end(process)
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return PASSED if code == 0 else f"failed with exit code {code}"


def _ask_to_end(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code of a process that has some time to save; None if that was too short."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(SECONDS_TO_SAVE)
    except subprocess.TimeoutExpired:
        return None

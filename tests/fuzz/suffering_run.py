"""A run that suffers: its process, what that may print, and the moments at which something can happen to it."""

import random
import re
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

LONGEST_PROCESS = 300.0
SECONDS_TO_START = 3.0
SPOKEN = (
    r"digits dfw: \d+/\d+ epoch .*",
    r"test accuracy .*",
    r"{workdir}: config\.json, metrics\.jsonl, checkpoints, result\.json",
    r"preempted: \S.*",
    r"error: \S.*",
    r"warning: skipped (checkpoint )?`{workdir}/[^`]+`: \S.*",
    r"warning: moved what there was of step .* to `{workdir}/checkpoints/quarantine-\d+`",
    r"warning: gamma was (1 in all|below 1 in) \S.*",
)
"""What a process may print, one of these a line."""


class Failure(Exception):
    """What must not be: its title, as "wrong result" or "traceback", and what was seen."""


@dataclass
class Run:
    """A run that suffers, what it has suffered, and how it ended: "recovered" or the title of a failure."""

    workdir: Path
    command: list[str]
    env: dict[str, str]
    chance: random.Random
    suffered: list[str] = field(default_factory=list)
    seconds_to_end: float = 0.0
    title: str = "recovered"
    seen: object = None

    def start(self) -> subprocess.Popen:
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*self.command, "--workdir", str(self.workdir)], env=self.env, **pipe)

    def finish(self) -> None:
        ended = wait(self, self.start())
        if ended.returncode != 0:
            raise Failure("not recovered", ended.stdout)

    def bits(self) -> np.random.Generator:
        """Chance for what is done to bytes."""
        return np.random.default_rng(self.chance.randrange(2**32))

    def saved(self) -> list[Path]:
        return [path for path in self.workdir.glob("checkpoints/*.json") if path.stem.isdigit()]


def wait(run: Run, process: subprocess.Popen) -> subprocess.CompletedProcess:
    """The end of `process`, if what it printed is what a user should read."""
    try:
        output, _ = process.communicate(timeout=LONGEST_PROCESS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise Failure("it hangs", process.communicate()[0]) from None
    if "Traceback" in output or "Exception ignored" in output:
        raise Failure("traceback", output)
    spoken = "|".join(SPOKEN).replace("{workdir}", re.escape(str(run.workdir)))
    for line in output.splitlines():
        if line.strip() and not re.fullmatch(spoken, line):
            raise Failure("unclear words", output)
    return subprocess.CompletedProcess("", process.returncode, output)


def listens(process: subprocess.Popen) -> bool:
    """Whether SIGTERM has a handler; the interpreter's first milliseconds and its last have none."""
    try:
        caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.M)
    except OSError:
        return False
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def reach_a_moment(run: Run, process: subprocess.Popen) -> bool:
    """Wait for a random moment of the start, of training or of a save; False if the process ends before."""

    def log_is_new():
        return log.exists() and log.stat().st_mtime_ns != was

    def saves():
        return any(run.workdir.glob("checkpoints/*.json.tmp")) or any(run.workdir.glob("checkpoints/*-tmp*"))

    log = run.workdir / "metrics.jsonl"
    was = log.stat().st_mtime_ns if log.exists() else 0
    begun, longest = run.chance.choice([(lambda: True, SECONDS_TO_START), (log_is_new, 0.5), (saves, 0.03)])
    leftover = begun is saves and saves()
    while not begun() or leftover:
        leftover = leftover and not log_is_new()
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    time.sleep(run.chance.uniform(0, longest))
    return process.poll() is None

"""Runs in several processes of this machine, each on its share of the cores, which train in the loop and save."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax

from bnn_jax.errors import RunError, UsageError
from bnn_jax.training.config import to_dict
from bnn_jax.training.interrupts import interrupts
from bnn_jax.training.progress import OnProgress, silent

ERRORS = {"usage": UsageError, "failed": RunError}
SECONDS_BETWEEN_LOOKS = 0.1


def run_in_processes(runs: Sequence[Any], *, processes: int | None = None, on_progress: OnProgress = silent) -> None:
    """Train `runs`, of :class:`bnn_jax.sweeps.engine.Run`, by :mod:`bnn_jax.sweeps.worker`; results lie in folders.

    Ctrl-C and SIGTERM let each process save and end.

    Args:
      processes: at most so many at a time; None takes one for each core that this process may use.
      on_progress: called with (runs finished, runs, what one of them does).

    Raises:
      UsageError: on another device than the CPU, which processes do not share; what a run raised.
      RunError: what a run raised; a process that ended by itself.
    """
    if jax.default_backend() != "cpu":
        raise UsageError(
            f"`execution` (='processes') is for the CPU, and this is {jax.default_backend()}; choose vmapped or "
            "sequential, or set JAX_PLATFORMS=cpu"
        )
    waiting = queue.SimpleQueue()
    for run in runs:
        waiting.put(run)
    crew = _Crew(waiting, len(runs), on_progress)
    shares = _shares_of_cores(min(processes or len(_cores()), len(runs)))
    threads = [threading.Thread(target=crew.work, args=(share,), daemon=True) for share in shares]
    with interrupts(lambda: "the same command goes on from what each run saved") as asked:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if asked() or crew.errors:
                crew.end()
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if asked():
            raise asked()(f"{crew.finished} of {len(runs)} runs are finished; the same command goes on with the others")
    if crew.errors:
        raise crew.errors[0]


class _Crew:
    """The processes of one sweep, and what the threads that speak with them share."""

    def __init__(self, waiting: queue.SimpleQueue, total: int, on_progress: OnProgress):
        self.waiting, self.total, self.on_progress = waiting, total, on_progress
        self.finished, self.ending = 0, False
        self.errors: list[Exception] = []
        self.workers: list[subprocess.Popen] = []
        self.lock = threading.Lock()

    def end(self) -> None:
        """Let every process save and end; no further run begins."""
        with self.lock:
            if not self.ending:
                self.ending = True
                for worker in self.workers:
                    worker.terminate()

    def work(self, cores: list[int]) -> None:
        """Start a process and give it one run after another."""
        with self.lock:
            if self.ending:
                return
            worker = _start_worker(cores)
            self.workers.append(worker)
        with worker:
            while not self.ending:
                try:
                    run = self.waiting.get_nowait()
                except queue.Empty:
                    break
                error = self._converse(worker, run)
                if error is not None and not self.ending:
                    self.errors.append(error)
                    break
            worker.stdin.close()

    def _converse(self, worker: subprocess.Popen, run: Any) -> Exception | None:
        job = {"config": to_dict(run.config), "workdir": str(run.workdir)}
        try:
            worker.stdin.write(json.dumps(job) + "\n")
            worker.stdin.flush()
        except BrokenPipeError:
            return RunError(f"the process for {run.title} ended before it began; its last words are above")
        for line in worker.stdout:
            message = json.loads(line)
            if "progress" in message:
                self.on_progress(self.finished, self.total, f"{run.title}: {message['progress'][2]}")
                continue
            if message["end"] == "finished":
                with self.lock:
                    self.finished += 1
                self.on_progress(self.finished, self.total, f"{run.title}: finished")
                return None
            return ERRORS[message["end"]](message["error"])
        code = worker.wait()
        return RunError(f"the process of {run.title} ended with code {code}; its last words are above")


def _start_worker(cores: list[int]) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if cache := jax.config.jax_compilation_cache_dir:
        seconds = str(jax.config.jax_persistent_cache_min_compile_time_secs)
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": seconds,
        }
    command = [sys.executable, "-m", "bnn_jax.sweeps.worker", ",".join(map(str, cores))]
    # In a session of its own, so that a terminal's Ctrl-C reaches the parent alone, which lets each process save.
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env=environment, **pipes)


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _shares_of_cores(processes: int) -> list[list[int]]:
    """The cores of each process: all of them dealt out, or one each where there are more processes than cores."""
    cores = _cores()
    return [cores[index::processes] or [cores[index % len(cores)]] for index in range(processes)]

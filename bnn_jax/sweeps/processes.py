"""Runs in several processes of this machine, each on its share of the cores."""

import json
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any

import jax

from bnn_jax.cores import usable_cores
from bnn_jax.errors import RunError, UsageError
from bnn_jax.training.config import to_dict
from bnn_jax.training.interrupts import interrupts
from bnn_jax.training.progress import OnProgress, silent

SECONDS_BETWEEN_LOOKS = 0.1


def run_in_processes(
    runs: Sequence[Any],
    *,
    processes: int | None = None,
    on_progress: OnProgress = silent,
    on_finished: Callable[[Any], None] = lambda run: None,
) -> None:
    """Train `runs`, of :class:`bnn_jax.sweeps.engine.Run`, by :mod:`bnn_jax.sweeps.worker`; results lie in folders.

    Ctrl-C and SIGTERM let each process save and end.

    Args:
      processes: at most so many at a time; None takes one for each core that this process may use.
      on_progress: called with (runs finished, runs, what one of them does).
      on_finished: called with a run that has ended, by the thread that waited for it.

    Raises:
      UsageError: on another device than the CPU, which processes do not share; what a run raised.
      RunError: what a run raised; a process that ended by itself.
    """
    if jax.default_backend() != "cpu":
        raise UsageError(
            f"`execution` (='processes') is for the CPU, and this is {jax.default_backend()}; choose vmapped or "
            "sequential, or set JAX_PLATFORMS=cpu"
        )
    cores = usable_cores()
    count = min(processes or len(cores), len(runs))
    shares = [cores[index::count] or [cores[index % len(cores)]] for index in range(count)]
    finished: list[Any] = []

    def train(run):
        def tell(text):
            on_progress(len(finished), len(runs), f"{run.title}: {text}")

        worker = idle.get()
        try:
            _train_in(worker, run, tell)
        finally:
            idle.put(worker)
        finished.append(run)
        tell("finished")
        on_finished(run)

    last_saved = "the same command goes on from what each run saved"
    with interrupts(lambda: last_saved) as asked, ThreadPoolExecutor(count) as pool, _started(shares) as idle:
        futures = [pool.submit(train, run) for run in runs]
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, SECONDS_BETWEEN_LOOKS, return_when=FIRST_EXCEPTION)
                if asked():
                    said = f"{len(finished)} of {len(runs)} runs are finished; the same command goes on with the others"
                    raise asked()(said)
                for future in sorted(done, key=futures.index):  # a process that ended fails later runs as well
                    future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _started(shares: Sequence[list[int]]) -> Iterator[queue.SimpleQueue]:
    """A process for each share of the cores, all idle; on the way out they end, after an error when they have saved."""
    workers, idle = [_start(cores) for cores in shares], queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)
    try:
        yield idle
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    finally:
        for worker in workers:
            with suppress(BrokenPipeError):
                worker.stdin.close()
            worker.wait()
            worker.stdout.close()


def _start(cores: list[int]) -> subprocess.Popen:
    # Modules are found where this process finds them, also those of a notebook's or a config's folder.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
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


def _train_in(worker: subprocess.Popen, run: Any, tell: Callable[[str], None]) -> None:
    """Let a process train a run; raise what the run raises there."""
    with suppress(BrokenPipeError):  # then there is no answer either
        worker.stdin.write(json.dumps({"config": to_dict(run.config), "workdir": str(run.workdir)}) + "\n")
        worker.stdin.flush()
    for line in worker.stdout:
        match json.loads(line):
            case {"progress": text}:
                tell(text)
            case {"finished": True}:
                return
            case {"usage": sentence}:
                raise UsageError(sentence)
            case {"failed": sentence}:
                raise RunError(sentence)
    raise RunError(f"the process of {run.title} ended with code {worker.wait()}; its last words are above")

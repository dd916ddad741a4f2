"""Benchmark of sweeps: what the engine costs over single runs, and what mapping runs together gains."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from bnn_jax.analysis.tables import TEXT, Tables
from bnn_jax.benchmarks.training import CIFAR10
from bnn_jax.errors import RunError
from bnn_jax.sweeps.comparison import sweep
from bnn_jax.sweeps.throughput import time_steps
from bnn_jax.training.config import Config, from_dict, to_dict
from bnn_jax.training.loop import train
from bnn_jax.training.progress import OnProgress, silent
from bnn_jax.training.validation import validate

COMPILING = "/jax/core/compile/backend_compile_duration"


def benchmark_engine(config: Config, *, seeds: int = 4, on_progress: OnProgress = silent) -> dict[str, Any]:
    """Seconds of single runs and of a sweep over the same seeds on the CPU, in new processes with empty caches.

    A process times what it does after its imports: loading data, compiling, training, checkpoints, results.  It notes
    the seconds that XLA compiled.  Tracing and lowering count as work.

    Args:
      config: the run; a few epochs are enough.
      seeds: how many single runs, and how many runs of the sweep.
      on_progress: called after each process.

    Returns:
      ``single``, a list, ``sequential`` and ``processes`` with the ``seconds`` and ``compile_seconds`` of each;
      ``over_limit``: seconds of the sequential sweep over those of all single runs less one compilation, their mean;
      ``over_single_without_compilation``: the same ratio with all compilation taken off both sides.
    """
    single = []
    for seed in range(seeds):
        single.append(_in_new_process(config, [seed], None))
        on_progress(seed + 1, seeds + 2, f"single run {seed + 1}: {single[-1]['seconds']:.1f} s")
    found = {"single": single}
    for done, execution in enumerate(("sequential", "processes"), start=seeds + 1):
        found[execution] = _in_new_process(config, list(range(seeds)), execution)
        on_progress(done, seeds + 2, f"{execution}: {found[execution]['seconds']:.1f} s")
    # Those of its own processes are not known.
    del found["processes"]["compile_seconds"]
    total, compiling = (sum(run[name] for run in single) for name in ("seconds", "compile_seconds"))
    whole = found["sequential"]
    return found | {
        "over_limit": whole["seconds"] / (total - compiling / seeds),
        "over_single_without_compilation": (whole["seconds"] - whole["compile_seconds"]) / (total - compiling),
    }


def _in_new_process(config: Config, seeds: Sequence[int], execution: str | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        job = {"config": to_dict(config), "seeds": seeds, "execution": execution, "folder": f"{folder}/runs"}
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "bnn_jax.benchmarks.sweep", json.dumps(job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RunError(f"a process of the benchmark failed: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _run_job(job: dict[str, Any]) -> dict[str, float]:
    compiling = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiling.append(seconds) if event == COMPILING else None
    )
    config, folder = validate(from_dict(job["config"])), Path(job["folder"])
    began = time.perf_counter()
    if job["execution"] is None:
        train(replace(config, seed=job["seeds"][0]), folder)
    else:
        sweep(config, {}, folder, seeds=job["seeds"], execution=job["execution"])
    return {"seconds": time.perf_counter() - began, "compile_seconds": sum(compiling)}


def benchmark_vmapped(config: Config, *, members: int = 8, repeats: int = 5) -> dict[str, Any]:
    """Training steps on random images of CIFAR-10's shape: runs one after another, and mapped together by vmap.

    Args:
      config: network, batch size and optimizer.
      members: how many runs.
      repeats: calls of 20 steps of each, in turn; on the CPU of 2 steps.

    Returns:
      Medians in images a second of all runs together, their ratio `vmapped_over_sequential`, and what
      :func:`bnn_jax.sweeps.throughput.time_steps` measured.
    """
    steps = 2 if jax.default_backend() == "cpu" else 20
    times = time_steps(validate(config), CIFAR10, members=members, steps=steps, repeats=repeats)
    sizes = {"model": config.model.name, "width": config.model.width, "batch_size": config.batch_size}
    per_second = {
        f"{execution}_images_per_second": 1e3 * config.batch_size / times[f"{execution}_ms"]
        for execution in ("sequential", "vmapped")
    }
    ratio = times["sequential_ms"] / times["vmapped_ms"]
    return sizes | {"members": members, **per_second, "vmapped_over_sequential": ratio, **times}


def benchmark_sweep(
    engine_config: Config, config: Config, *, repeats: int = 5, on_progress: OnProgress = silent
) -> dict[str, Any]:
    """:func:`benchmark_vmapped` of `config` and, on a CPU, :func:`benchmark_engine` of the other, by their names."""
    found = {"vmapped": benchmark_vmapped(config, repeats=repeats)}
    if jax.default_backend() == "cpu":
        found["engine"] = benchmark_engine(engine_config, on_progress=on_progress)
    return found


def print_sweep(found: dict[str, Any], tables: Tables = TEXT) -> None:
    """Print the numbers of :func:`benchmark_sweep`."""
    numbers = [item for part in found.values() for item in part.items() if isinstance(item[1], float)]
    tables.print(("measured", "value"), [(name, f"{value:.3f}") for name, value in numbers])


if __name__ == "__main__":
    print(json.dumps(_run_job(json.loads(sys.argv[1]))))

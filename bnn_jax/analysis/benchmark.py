"""Benchmarks: ratios to a peer measured in the same process, medians of interleaved repeats."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.training.config import Config, select_optimizer
from bnn_jax.training.step import ImageInfo, make_programs


def interleaved_seconds(functions: dict[str, Callable[[], Any]], *, repeats: int) -> dict[str, list[float]]:
    """Call each function once to warm it up, then all in turn `repeats` times; the seconds of every timed call."""
    for function in functions.values():
        jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - began)
    return seconds


def benchmark_training(config: Config, *, repeats: int = 20, scan_repeats: int = 5) -> dict[str, Any]:
    """Times of a training step on random images of CIFAR-10's shape, compilation left out.

    Args:
      config: model, batch size and optimizers; must have settings for dfw and adam.
      repeats: single jitted steps of each optimizer, one of each in turn.
      scan_repeats: rounds of 20 single steps and one scan of 20 steps.

    Returns:
      Medians in milliseconds a step and the two ratios, `dfw_over_adam` and `scan_over_single`, with all the times.
    """
    rng = np.random.default_rng(0)
    examples, steps = 2560, 20
    images = jnp.asarray(rng.integers(0, 256, (examples, 32, 32, 3), dtype=np.uint8))
    labels = jnp.asarray(rng.integers(0, 10, examples, dtype=np.int32))
    info = ImageInfo((32, 32, 3), 10, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
    order = jnp.asarray(rng.integers(0, examples, (steps, config.batch_size), dtype=np.int32))

    def stepper(name: str, rows) -> Callable[[], Any]:
        optim = select_optimizer(config, name)
        programs = make_programs(replace(config, optim=optim), info, examples=examples)
        state = programs.init(np.uint32(0))

        def run():
            nonlocal state
            for row in rows:
                state, metrics = programs.train(state, images, labels, row, np.float32(optim.learning_rate))
            return state, metrics

        return run

    single = interleaved_seconds({name: stepper(name, [order[:1]]) for name in ("dfw", "adam")}, repeats=repeats)
    rounds = {"single": stepper("dfw", [order[i : i + 1] for i in range(steps)]), "scan": stepper("dfw", [order])}
    loops = interleaved_seconds(rounds, repeats=scan_repeats)
    milliseconds = {
        "step_dfw_ms": 1e3 * float(np.median(single["dfw"])),
        "step_adam_ms": 1e3 * float(np.median(single["adam"])),
        "step_of_20_single_ms": 1e3 / steps * float(np.median(loops["single"])),
        "step_of_scan_20_ms": 1e3 / steps * float(np.median(loops["scan"])),
    }
    return milliseconds | {
        "dfw_over_adam": milliseconds["step_dfw_ms"] / milliseconds["step_adam_ms"],
        "scan_over_single": milliseconds["step_of_scan_20_ms"] / milliseconds["step_of_20_single_ms"],
        "seconds": {**{f"step_{name}": times for name, times in single.items()}, **loops},
    }

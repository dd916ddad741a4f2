"""Benchmark of training: a step of Deep Frank-Wolfe beside one of Adam, a scan of steps beside single ones."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnn_jax.timing import interleaved_seconds, median_ms
from bnn_jax.training.config import Config, select_optimizer
from bnn_jax.training.epoch import Batches
from bnn_jax.training.experiment import ImageInfo, hyper_parameters
from bnn_jax.training.programs import make_programs

CIFAR10 = ImageInfo((32, 32, 3), 10, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7))


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
    images = jnp.asarray(rng.integers(0, 256, (examples, *CIFAR10.shape), dtype=np.uint8))
    labels = jnp.asarray(rng.integers(0, 10, examples, dtype=np.int32))
    order = jnp.asarray(rng.integers(0, examples, (steps, config.batch_size), dtype=np.int32))

    def stepper(name: str, rows) -> Callable[[], Any]:
        settings = replace(config, optim=select_optimizer(config, name))
        programs = make_programs(settings, CIFAR10, examples=examples)
        state = programs.init(np.uint32(0))

        def run():
            nonlocal state
            for row in rows:
                state, metrics = programs.train(state, Batches(images, labels, row), hyper_parameters(settings))
            return state, metrics

        return run

    single = interleaved_seconds({name: stepper(name, [order[:1]]) for name in ("dfw", "adam")}, repeats=repeats)
    rounds = {"single": stepper("dfw", [order[i : i + 1] for i in range(steps)]), "scan": stepper("dfw", [order])}
    loops = interleaved_seconds(rounds, repeats=scan_repeats)
    milliseconds = {
        "step_dfw_ms": median_ms(single["dfw"]),
        "step_adam_ms": median_ms(single["adam"]),
        "step_of_20_single_ms": median_ms(loops["single"]) / steps,
        "step_of_scan_20_ms": median_ms(loops["scan"]) / steps,
    }
    return milliseconds | {
        "dfw_over_adam": milliseconds["step_dfw_ms"] / milliseconds["step_adam_ms"],
        "scan_over_single": milliseconds["step_of_scan_20_ms"] / milliseconds["step_of_20_single_ms"],
        "seconds": {**{f"step_{name}": times for name, times in single.items()}, **loops},
    }


def print_training(found: dict[str, Any]) -> None:
    """Print the medians and the ratios of :func:`benchmark_training`."""
    for name, value in found.items():
        if name != "seconds":
            print(f"{name:24} {value:10.3f}")

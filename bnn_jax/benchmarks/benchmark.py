"""Benchmarks: ratios to a peer measured in the same process, medians of interleaved repeats."""

import inspect
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnn_jax.estimators import ESTIMATOR_SCHEDULES, ESTIMATORS, STOCHASTIC
from bnn_jax.training.config import Config, select_optimizer
from bnn_jax.training.experiment import ImageInfo, hyper_parameters
from bnn_jax.training.programs import make_programs
from bnn_jax.training.progress import OnProgress, silent

PEER = "ste_sign"
WHOLE_TENSOR = frozenset({"dir_sign"})
"""Estimators whose derivative at one element depends on all of them."""


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
        settings = replace(config, optim=select_optimizer(config, name))
        programs = make_programs(settings, info, examples=examples)
        state = programs.init(np.uint32(0))

        def run():
            nonlocal state
            for row in rows:
                state, metrics = programs.train(state, images, labels, row, hyper_parameters(settings))
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


def value_and_pullback(estimator: Callable[..., Array], x: Array, g: Array, arguments: dict) -> tuple[Array, Array]:
    """The codes of `x` and the gradient that the cotangent `g` of them becomes."""
    codes, pullback = jax.vjp(lambda x: estimator(x, **arguments), x)
    return codes, pullback(g)[0]


def compiled_temporaries(program: jax.stages.Compiled, x: Array) -> float:
    """Memory that a compiled program takes beside its arguments and outputs, in units of the size of `x`."""
    return program.memory_analysis().temp_size_in_bytes / x.nbytes


def estimator_arguments(name: str) -> dict[str, Float[Array, ""]]:
    """Every number that an estimator takes: from its schedule half-way through training, else its default."""
    parameters = inspect.signature(ESTIMATORS[name]).parameters.values()
    numbers = {p.name: jnp.float32(p.default) for p in parameters if type(p.default) is float}
    return numbers | (ESTIMATOR_SCHEDULES[name](0.5) if name in ESTIMATOR_SCHEDULES else {})


def benchmark_estimators(
    *, values: int = 10_000_000, repeats: int = 20, on_progress: OnProgress = silent
) -> dict[str, Any]:
    """Time and memory of forward and backward of every estimator, next to the clipped straight-through one.

    A call takes standard normal inputs and cotangents in float32 and gives codes and input gradients, both written to
    memory, as one compiled program.  The numbers that an estimator takes are arguments of the program, so that none
    is folded into it.  Each estimator alternates with `ste_sign`; that one's own row shows the noise.

    Args:
      values: how many inputs.
      repeats: timed calls of each estimator, and as many of `ste_sign` beside it.
      on_progress: called after each estimator.

    Returns:
      ``{"values", "repeats", "elementwise": {name: row}, "other": {name: row}, "seconds": {name: all the times}}``.
      A row is ``{"ms", "ste_sign_ms", "ratio", "temporaries"}``: medians, their ratio, and the temporary memory in
      units of the input's size.  The others are those that need the whole tensor or random bits.
    """
    x, g = (jax.random.normal(key, (values,)) for key in jax.random.split(jax.random.key(0)))
    cases = {name: (name, estimator_arguments(name)) for name in ESTIMATORS}
    key = {"key": jax.random.key(1)}
    keyed = {f"{name} with key": (name, estimator_arguments(name) | key) for name in sorted(STOCHASTIC)}
    found = {"values": values, "repeats": repeats, "elementwise": {}, "other": {}, "seconds": {}}

    def compiled(name: str, arguments: dict) -> tuple[jax.stages.Compiled, Callable[[], Any]]:
        program = jax.jit(partial(value_and_pullback, ESTIMATORS[name])).lower(x, g, arguments).compile()
        return program, partial(program, x, g, arguments)

    _, peer = compiled(*cases[PEER])
    for done, (case, (name, arguments)) in enumerate((cases | keyed).items(), start=1):
        program, call = compiled(name, arguments)
        seconds = interleaved_seconds({PEER: peer, "estimator": call}, repeats=repeats)
        ms, peer_ms = (1e3 * float(np.median(seconds[which])) for which in ("estimator", PEER))
        row = {"ms": ms, f"{PEER}_ms": peer_ms, "ratio": ms / peer_ms}
        group = "other" if name in WHOLE_TENSOR or case in keyed else "elementwise"
        found[group][case] = row | {"temporaries": compiled_temporaries(program, x)}
        found["seconds"][case] = seconds
        on_progress(done, len(cases) + len(keyed), case)
    return found

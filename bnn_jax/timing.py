"""How long functions take: called in turn, so that what slows the machine down for a while slows all of them."""

import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any

import jax


def interleaved_seconds(functions: Mapping[str, Callable[[], Any]], *, repeats: int) -> dict[str, list[float]]:
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


def median_ms(seconds: Iterable[float]) -> float:
    """The median of some times, in milliseconds.

    >>> median_ms([0.25, 8.0, 0.5])
    500.0
    """
    return 1e3 * median(seconds)

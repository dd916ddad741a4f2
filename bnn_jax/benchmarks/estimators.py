"""Benchmark of the gradient estimators: forward and backward of each beside the clipped straight-through one."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.analysis.tables import TEXT, Tables
from bnn_jax.estimators import ESTIMATORS
from bnn_jax.timing import interleaved_seconds, median_ms
from bnn_jax.training.progress import OnProgress, silent

PEER = "ste_sign"
WHOLE_TENSOR = frozenset({"dir_sign"})
"""Estimators whose derivative at one element depends on all of them."""


def value_and_pullback(estimator: Callable[..., Array], x: Array, g: Array, arguments: dict) -> tuple[Array, Array]:
    """The codes of `x` and the gradient that the cotangent `g` of them becomes."""
    codes, pullback = jax.vjp(lambda x: estimator(x, **arguments), x)
    return codes, pullback(g)[0]


def compiled_temporaries(program: jax.stages.Compiled, x: Array) -> float:
    """Memory that a compiled program takes beside its arguments and outputs, in units of the size of `x`."""
    return program.memory_analysis().temp_size_in_bytes / x.nbytes


def estimator_arguments(name: str) -> dict[str, Float[Array, ""]]:
    """Every number that an estimator takes: from its schedule half-way through training, else its default."""
    estimator = ESTIMATORS[name]
    parameters = inspect.signature(estimator.apply).parameters.values()
    numbers = {p.name: jnp.float32(p.default) for p in parameters if type(p.default) is float}
    return numbers | (estimator.schedule(0.5) if estimator.schedule else {})


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
    stochastic = [name for name, estimator in ESTIMATORS.items() if estimator.stochastic]
    keyed = {f"{name} with key": (name, estimator_arguments(name) | key) for name in stochastic}
    found = {"values": values, "repeats": repeats, "elementwise": {}, "other": {}, "seconds": {}}

    def compiled(name: str, arguments: dict) -> tuple[jax.stages.Compiled, Callable[[], Any]]:
        program = jax.jit(partial(value_and_pullback, ESTIMATORS[name])).lower(x, g, arguments).compile()
        return program, partial(program, x, g, arguments)

    _, peer = compiled(*cases[PEER])
    for done, (case, (name, arguments)) in enumerate((cases | keyed).items(), start=1):
        program, call = compiled(name, arguments)
        seconds = interleaved_seconds({PEER: peer, "estimator": call}, repeats=repeats)
        ms, peer_ms = median_ms(seconds["estimator"]), median_ms(seconds[PEER])
        row = {"ms": ms, f"{PEER}_ms": peer_ms, "ratio": ms / peer_ms}
        group = "other" if name in WHOLE_TENSOR or case in keyed else "elementwise"
        found[group][case] = row | {"temporaries": compiled_temporaries(program, x)}
        found["seconds"][case] = seconds
        on_progress(done, len(cases) + len(keyed), case)
    return found


def print_estimators(found: dict[str, Any], tables: Tables = TEXT) -> None:
    """Print the table of :func:`benchmark_estimators`, those that need more than one element last."""
    rows = {name: row for group in ("elementwise", "other") for name, row in found[group].items()}
    lines = [
        (name, f"{row['ms']:.2f}", f"{row['ste_sign_ms']:.2f}", f"{row['ratio']:.2f}", f"{row['temporaries']:.3f}")
        for name, row in rows.items()
    ]
    title = f"forward and backward of {found['values']:,} values, medians of {found['repeats']}"
    tables.print(("estimator", "ms", "ste_sign\nms", "ratio", "temporaries\n(inputs)"), lines, title=title)
    largest = max(found["elementwise"], key=lambda name: found["elementwise"][name]["ratio"])
    print(f"elementwise: ratio at most {found['elementwise'][largest]['ratio']:.2f} ({largest})")
    print(f"{', '.join(found['other'])}: in need of the whole tensor or of random bits")

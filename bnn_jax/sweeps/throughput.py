"""Whether this device trains several runs faster when vmap maps them together, measured once and kept."""

import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.errors import UsageError
from bnn_jax.files import write_atomically
from bnn_jax.paths import cache_folder
from bnn_jax.timing import interleaved_seconds, median_ms
from bnn_jax.training.config import Config
from bnn_jax.training.epoch import Batches
from bnn_jax.training.experiment import ImageInfo, hyper_parameters
from bnn_jax.training.members import stack
from bnn_jax.training.programs import make_programs, over_members

MOST_MEMBERS = 8
"""As many runs as the measurement maps together."""


def choose_execution(config: Config, info: ImageInfo, *, members: int) -> tuple[str, str]:
    """How to train `members` runs that differ from `config` only in seed and hyper-parameters, and why.

    On the CPU one after another: there vmap turns the convolutions into grouped ones, which take several times as long.
    Elsewhere a few steps decide; the times are kept for this device, version of jax and network in
    ``sweep_times.json`` in bnn_jax's cache folder.

    Returns:
      "sequential" or "vmapped", and a sentence.
    """
    if members < 2:
        return "sequential", "there is nothing to map together"
    if jax.default_backend() == "cpu":
        return "sequential", "on the CPU mapped convolutions take several times as long"
    members = min(members, MOST_MEMBERS)
    key = json.dumps([jax.devices()[0].device_kind, jax.__version__, *_what_decides(config, info), members])
    kept = _read_times()
    measured = kept.get(key)
    if measured is None:
        measured = time_steps(config, info, members=members)
        _keep_times(kept | {key: measured})
    execution = "vmapped" if measured["vmapped_ms"] < measured["sequential_ms"] else "sequential"
    return (
        execution,
        f"{measured['sequential_ms']:.3g} ms a step, {measured['vmapped_ms']:.3g} ms with {members} runs mapped",
    )


def time_steps(
    config: Config, info: ImageInfo, *, members: int, steps: int = 20, repeats: int = 3
) -> dict[str, float | list[float]]:
    """Milliseconds of a training step of one run: alone, and as one of `members` under vmap; compilation left out.

    Args:
      config: validated.
      info: of the images, which are random.
      members: how many runs are mapped.
      steps: in one jitted call.
      repeats: calls of each, in turn; medians count.

    Returns:
      ``{"sequential_ms", "vmapped_ms", "seconds": {"sequential": all the times, "vmapped": all the times}}``.
    """
    rng = np.random.default_rng(0)
    examples = steps * config.batch_size
    programs = make_programs(config, info, examples=examples)
    images = jnp.asarray(rng.integers(0, 256, (examples, *info.shape), dtype=np.uint8))
    labels = jnp.asarray(rng.integers(0, info.num_classes, examples, dtype=np.int32))
    orders = jnp.asarray(np.stack([rng.permutation(examples).reshape(steps, -1) for _ in range(members)]), jnp.int32)
    hyper = hyper_parameters(config)
    states = [programs.init(np.uint32(seed)) for seed in range(members)]
    first, count = np.int32(0), np.int32(steps)
    alone = (states[0], Batches(images, labels, orders[0]), hyper, first, count)
    together = (stack(states), Batches(images, labels, orders), stack([hyper] * members), first, count)
    calls = {
        "sequential": partial(programs.train, *alone),
        "vmapped": partial(over_members(programs).train, *together),
    }
    seconds = interleaved_seconds(calls, repeats=repeats)
    return {
        "sequential_ms": median_ms(seconds["sequential"]) / steps,
        "vmapped_ms": median_ms(seconds["vmapped"]) / steps / members,
        "seconds": seconds,
    }


def _what_decides(config: Config, info: ImageInfo) -> tuple[Any, ...]:
    return repr(config.model), config.optim.name, config.loss, config.batch_size, info.shape, info.num_classes


def _times_path() -> Path:
    return cache_folder() / "sweep_times.json"


def _read_times() -> dict[str, Any]:
    with suppress(OSError, ValueError, UsageError):
        kept = json.loads(_times_path().read_text())
        return kept if isinstance(kept, dict) else {}
    return {}


def _keep_times(kept: dict[str, Any]) -> None:
    # A cache folder that is not there or cannot be written costs the next sweep a measurement, no more.
    with suppress(OSError, UsageError):
        _times_path().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_times_path(), json.dumps(kept, indent=1))

r"""Schedules: step -> value, for learning rates and for the sharpness of estimators alike."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bnn_jax.checks import check_options, look_up, require, require_positive
from bnn_jax.types import Schedule


def constant(value: float, total_steps: int) -> Schedule:
    """value at every step."""
    return optax.constant_schedule(value)


def cosine(value: float, total_steps: int) -> Schedule:
    r"""value (1 + cos(pi step / total_steps)) / 2: from value to 0 (Loshchilov and Hutter, SGDR, 2017).

    >>> print(f"{cosine(1.0, 100)(50):.4f}")
    0.5000
    """
    return _of_whole_steps(optax.cosine_decay_schedule(value, total_steps))


def linear(value: float, total_steps: int) -> Schedule:
    """value (1 - step / total_steps): from value to 0."""
    return _of_whole_steps(optax.linear_schedule(value, 0.0, total_steps))


def exponential(value: float, total_steps: int, *, final_share: float = 1e-3) -> Schedule:
    r"""value final_share^(step / total_steps): from value to value * final_share.

    BinaryConnect goes from 3e-3 to 2e-6, BinaryNet from 1e-3 to 3e-7.

    Raises:
      ValueError: if `final_share` is not positive.

    >>> print(f"{exponential(1.0, 100, final_share=0.01)(50):.4f}")
    0.1000

    Reference: Courbariaux, Bengio, David, BinaryConnect, 2015, arXiv:1511.00363.
    """
    require_positive("final_share", final_share, "1e-3 is usual")
    return lambda step: value * final_share ** (step / total_steps)


def staircase(value: float, total_steps: int, *, stages: int = 5, factor: float = 0.1) -> Schedule:
    r"""value factor^floor(stages step / total_steps): equal stages, each `factor` times the one before; the last stays.

    The defaults are BNN+'s for CIFAR-10: 50 epochs, divided by 10 after every 10.

    Raises:
      ValueError: if `stages` is less than 1 or `factor` not positive.

    >>> print([f"{staircase(1.0, 50)(step):.0e}" for step in (0, 9, 10, 49, 50)])
    ['1e+00', '1e+00', '1e-01', '1e-04', '1e-04']

    Reference: Darabi et al., BNN+: Improved Binary Network Training, 2018, arXiv:1812.11800.
    """
    require("stages", stages, stages >= 1, "must be at least 1", "5 is usual")
    require_positive("factor", factor, "0.1 is usual")
    return _of_whole_steps(lambda step: value * factor ** jnp.clip(step * stages // total_steps, 0, stages - 1))


def _of_whole_steps(schedule: Schedule) -> Schedule:
    """A schedule that mixes its numbers with the whole number of the step, also where dtypes are not promoted."""

    def at(step):
        with jax.numpy_dtype_promotion("standard"):
            return schedule(step)

    return at


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "exponential": exponential,
    "staircase": staircase,
}
"""name -> (value, total_steps, **options) -> schedule."""


def make_schedule(schedule: str | Callable[..., Schedule], value: float, total_steps: int, **options: Any) -> Schedule:
    """A schedule of the table.

    Args:
      schedule: name in SCHEDULES, or a function like those of the table.
      value: at the first step; may be traced.
      total_steps: of the training.
      **options: keyword arguments of the function.

    Raises:
      ValueError: for a name or an option that is not known (the nearest is named), or a value out of range.

    >>> print(f"{make_schedule('staircase', 1.0, 30, stages=3, factor=0.5)(20):.2f}")
    0.25
    """
    factory = look_up("schedule", schedule, SCHEDULES)
    check_options("options", factory, options)
    return factory(value, total_steps, **options)

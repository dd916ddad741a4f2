r"""Schedules: step -> value, for learning rates and for the sharpness of estimators alike."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnn_jax.checks import check_options, look_up, require, require_positive
from bnn_jax.types import Schedule


def constant(value: float, total_steps: int) -> Schedule:
    """value at every step."""
    return optax.constant_schedule(value)


def cosine(value: float, total_steps: int, *, final_share: float = 0.0, cycles: int = 1) -> Schedule:
    r"""value (f + (1 - f) (1 + cos(pi step / total_steps)) / 2): from value to its share f = final_share.

    With `cycles` it does so in each of as many equal parts of the run, from `value` anew: warm restarts.

    Raises:
      ValueError: if `final_share` is not in [0, 1], or `cycles` is less than 1.

    >>> print(f"{cosine(1.0, 100)(50):.4f} {cosine(1.0, 100, final_share=0.1)(100):.4f}")
    0.5000 0.1000
    >>> print([f"{cosine(1.0, 100, cycles=2)(step):.2f}" for step in (0, 25, 49, 50, 75, 100)])
    ['1.00', '0.50', '0.00', '1.00', '0.50', '0.00']

    Reference: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, arXiv:1608.03983.
    """
    _require_share("final_share", final_share)
    require("cycles", cycles, cycles >= 1, "must be at least 1", "1 has no restarts")
    begins = [_first_step(number / cycles, total_steps) for number in range(cycles)]
    lengths = [max(1, end - begin) for begin, end in zip(begins, [*begins[1:], total_steps])]
    parts = [optax.cosine_decay_schedule(value, length, final_share) for length in lengths]
    return _of_whole_steps(optax.join_schedules(parts, begins[1:]))


def linear(value: float, total_steps: int, *, final_share: float = 0.0) -> Schedule:
    """value (1 - (1 - f) step / total_steps): from value to its share f = final_share.

    Raises:
      ValueError: if `final_share` is not in [0, 1].
    """
    _require_share("final_share", final_share)
    return _of_whole_steps(optax.linear_schedule(value, final_share * value, total_steps))


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


def milestones(
    value: float,
    total_steps: int,
    *,
    at_shares: float | Sequence[float] = (0.5, 0.75),
    factor: float | Sequence[float] = (0.1,),
) -> Schedule:
    r"""value times the factors of the milestones passed: those k with step >= at_shares_k total_steps.

    Shares of the run, so that a recipe keeps its proportions at another length.  The defaults are those of ResNets on
    CIFAR-10: divided by 10 after half and three quarters of the steps.

    Args:
      value: before the first milestone.
      total_steps: of the training.
      at_shares: the milestones, rising, between 0 and 1.
      factor: of all of them, or one for each.

    Raises:
      ValueError: for shares that do not rise from above 0 to below 1, a factor that is not positive, or another number
        of factors.

    >>> steps = (0, 39, 40, 60, 70, 74)
    >>> schedule = milestones(1.0, 75, at_shares=(40 / 75, 60 / 75, 70 / 75), factor=0.3)
    >>> print([f"{schedule(step):.3f}" for step in steps])
    ['1.000', '1.000', '0.300', '0.090', '0.027', '0.027']

    Reference: He et al., Deep Residual Learning for Image Recognition, 2016, arXiv:1512.03385, section 4.2.
    """
    shares, factors = np.ravel(at_shares).tolist(), np.ravel(factor).tolist()
    rising = all(0 < share < 1 for share in shares) and shares == sorted(set(shares))
    require("at_shares", at_shares, rising, "must rise from above 0 to below 1", "they are shares of the run")
    require("factor", factor, lambda f: f > 0, "must be positive", "0.1 is usual")
    one_or_each = len(factors) in (1, len(shares))
    require("factor", factor, one_or_each, f"must be one number, or one for each of the {len(shares)} milestones")
    scales: dict[int, float] = {}
    for share, scale in zip(shares, factors * (len(shares) // len(factors))):
        step = _first_step(share, total_steps)
        scales[step] = scales.get(step, 1.0) * scale  # in a short run two of them may be one step
    return _of_whole_steps(optax.piecewise_constant_schedule(value, scales))


def _first_step(share: float, total_steps: int) -> int:
    """The first step at or after a share of the run; 40/75 of 375,000 steps is 200,000 in spite of rounding."""
    return math.ceil(round(share * total_steps, 6))


def _require_share(argument: str, value: float) -> None:
    require(
        argument, value, lambda share: (share >= 0) & (share <= 1), "must be in [0, 1]", "it is a share of the first"
    )


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
    "milestones": milestones,
}
"""name -> (value, total_steps, **options) -> schedule."""


def make_schedule(
    schedule: str | Callable[..., Schedule],
    value: float,
    total_steps: int,
    *,
    warmup_share: float = 0.0,
    warmup_start_share: float = 0.0,
    **options: Any,
) -> Schedule:
    r"""A schedule of the table, after a linear warm-up.

    With w = warmup_share total_steps:

        value (s + (1 - s) step / w)    up to step w, s = warmup_start_share
        the schedule                    from there on

    A curve, as cosine, begins at the end of the warm-up with `value` and takes the steps that are left; milestones stay
    at their shares of the whole run.

    Args:
      schedule: name in SCHEDULES, or a function like those of the table.
      value: at the end of the warm-up; may be traced.
      total_steps: of the training.
      warmup_share: of the run, in [0, 1); 0 leaves the warm-up out.
      warmup_start_share: of `value`, with which the warm-up begins.
      **options: keyword arguments of the function.

    Raises:
      ValueError: for a name or an option that is not known (the nearest is named), or a value out of range.

    >>> print(f"{make_schedule('milestones', 1.0, 30, at_shares=0.5, factor=0.2)(20):.2f}")
    0.20
    >>> warmed_up = make_schedule("linear", 1.0, 100, warmup_share=0.2)
    >>> print([f"{warmed_up(step):.2f}" for step in (0, 10, 20, 60, 100)])
    ['0.00', '0.50', '1.00', '0.50', '0.00']
    """
    factory = look_up("schedule", schedule, SCHEDULES)
    check_options("options", factory, options)
    require("warmup_share", warmup_share, 0 <= warmup_share < 1, "must be in [0, 1)", "0 leaves the warm-up out")
    _require_share("warmup_start_share", warmup_start_share)
    warmup_steps = _first_step(warmup_share, total_steps)
    if warmup_steps == 0:
        return factory(value, total_steps, **options)
    begin = 0 if factory is milestones else min(warmup_steps, total_steps - 1)
    later = factory(value, total_steps - begin, **options)
    rising = optax.linear_schedule(warmup_start_share * value, value, warmup_steps)
    return _of_whole_steps(lambda step: jnp.where(step < warmup_steps, rising(step), later(step - begin)))

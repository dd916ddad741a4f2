"""Whether the exact step size of Deep Frank-Wolfe acted in a run: in how many of its steps gamma was below 1."""

import warnings
from collections.abc import Sequence
from typing import Any

from bnn_jax.training.config import OptimConfig

NEGLIGIBLE = 0.01
"""The share of the steps with gamma < 1 below which it is told that the step size all but never acted."""


class StepSizeWarning(UserWarning):
    """A run of Deep Frank-Wolfe in which gamma was 1 in every step, or in all but less than 1 % of them."""


def share_below_1(gammas: Sequence[float]) -> float:
    """The share of the steps in which gamma was below 1: in the others the step size held nothing back.

    >>> share_below_1([1.0, 0.5, 1.0, 0.0])
    0.5
    """
    return sum(gamma < 1 for gamma in gammas) / len(gammas)


def when_it_did_not_act(share: float, learning_rate: float | None, steps: int, *, projected: bool = True) -> str:
    """What a run was whose gamma was 1 in (nearly) every step, and what may let the step size act; "" where it acted.

    >>> when_it_did_not_act(0.0, 3.0, 700)
    'gamma was 1 in all 700 steps: this run was projected SGD with rate 3, the exact step size never held it back; ...
    >>> when_it_did_not_act(0.0043, 3.0, 700)
    'gamma was below 1 in 0.43 % of 700 steps: this run was all but projected SGD with rate 3, the exact step size ...
    """
    if share >= NEGLIGIBLE:
        return ""
    where = f"below 1 in {100 * share:.2g} % of {steps} steps" if share else f"1 in all {steps} steps"
    what = f"{'all but ' if share else ''}{'projected ' if projected else ''}SGD"
    rate = "eta" if learning_rate is None else f"{learning_rate:g}"
    return (
        f"gamma was {where}: this run was {what} with rate {rate}, the exact step size "
        f"{'hardly ever' if share else 'never'} held it back; try a schedule of the rate (`optim.schedule`), a "
        "larger rate with `optim.warmup_share`, or a target loss (`optim.options` target_share 0.9)"
    )


def warn_if_it_did_not_act(optim: OptimConfig, result: dict[str, Any]) -> None:
    """Warn of a finished run that recorded gammas, all of them or nearly all 1."""
    if gammas := (result.get("gamma") or {}).get("value"):
        projected = optim.latent_box is not None
        if told := when_it_did_not_act(share_below_1(gammas), optim.learning_rate, len(gammas), projected=projected):
            warnings.warn(told, StepSizeWarning, stacklevel=2)

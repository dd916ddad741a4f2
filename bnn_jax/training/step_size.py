"""Whether the exact step size of Deep Frank-Wolfe acted in a run: in how many of its steps gamma was below 1."""

import warnings
from collections.abc import Sequence
from typing import Any

from bnn_jax.training.config import OptimConfig


class StepSizeWarning(UserWarning):
    """A run of Deep Frank-Wolfe in which gamma was 1 in every step."""


def share_below_1(gammas: Sequence[float]) -> float:
    """The share of the steps in which gamma was below 1: in the others the step size held nothing back.

    >>> share_below_1([1.0, 0.5, 1.0, 0.0])
    0.5
    """
    return sum(gamma < 1 for gamma in gammas) / len(gammas)


def never_held_back(learning_rate: float | None, steps: int, *, projected: bool = True) -> str:
    """What a run was whose gamma was 1 in every step, and what may let the step size act.

    >>> never_held_back(3.0, 700)
    'gamma was 1 in all 700 steps: this run was projected SGD with rate 3, ...
    """
    rate = "eta" if learning_rate is None else f"{learning_rate:g}"
    return (
        f"gamma was 1 in all {steps} steps: this run was {'projected ' if projected else ''}SGD with rate {rate}, "
        "the exact step size never held it back; try a schedule of the rate (`optim.schedule`), a "
        "larger rate with `optim.warmup_share`, or a target loss (`optim.options` target_share 0.9)"
    )


def warn_if_never_held_back(optim: OptimConfig, result: dict[str, Any]) -> None:
    """Warn of a finished run that recorded gammas, all of them 1."""
    gammas = (result.get("gamma") or {}).get("value")
    if gammas and share_below_1(gammas) == 0:
        sentence = never_held_back(optim.learning_rate, len(gammas), projected=optim.latent_box is not None)
        warnings.warn(sentence, StepSizeWarning, stacklevel=2)

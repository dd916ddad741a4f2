"""Whether the exact step size of Deep Frank-Wolfe acted in a run: in how many of its steps gamma was below 1."""

import warnings
from collections.abc import Mapping, Sequence
from statistics import fmean
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


def when_it_did_not_act(
    gammas: Sequence[Mapping[str, Sequence[float]]], learning_rate: float | None, *, projected: bool = True
) -> str:
    """What runs were whose gamma was 1 in (nearly) every step, and what may let the step size act; "" where it acted.

    Args:
      gammas: of each run, as its result has them under "gamma": the number of each step, from 1, and its value.
      learning_rate: eta of the runs; None where it is not known.
      projected: whether the latent weights have a box.

    >>> when_it_did_not_act([{"step": [1, 2], "value": [1.0, 1.0]}], 3.0)
    'gamma was 1 in all 2 steps: this run was projected SGD with rate 3, the exact step size never held it back; ...
    >>> when_it_did_not_act([{"step": range(1, 701), "value": [1.0, 0.5, 0.9] + 697 * [1.0]}], 3.0)
    'gamma was below 1 in 0.29 % of 700 steps, none after step 3: there the exact step size held it back, elsewhere ...
    """
    share = fmean(share_below_1(of_run["value"]) for of_run in gammas)
    if share >= NEGLIGIBLE:
        return ""
    steps = max(len(of_run["value"]) for of_run in gammas)
    rate = "eta" if learning_rate is None else f"{learning_rate:g}"
    what = f"this run was {'projected ' if projected else ''}SGD with rate {rate}"
    if share == 0:
        told = f"gamma was 1 in all {steps} steps: {what}, the exact step size never held it back"
    else:
        last = max(step for of_run in gammas for step, gamma in zip(of_run["step"], of_run["value"]) if gamma < 1)
        told = (
            f"gamma was below 1 in {100 * share:.2g} % of {steps} steps, none after step {last}: there the exact step "
            f"size held it back, elsewhere {what}"
        )
    return (
        f"{told}; try a schedule of the rate (`optim.schedule`), a larger rate with `optim.warmup_share`, or a target "
        "loss (`optim.options` target_share 0.9)"
    )


def warn_if_it_did_not_act(optim: OptimConfig, result: dict[str, Any]) -> None:
    """Warn of a finished run that recorded gammas, all of them or nearly all 1."""
    gammas, projected = result.get("gamma") or {}, optim.latent_box is not None
    told = when_it_did_not_act([gammas], optim.learning_rate, projected=projected) if gammas.get("value") else ""
    if told:
        warnings.warn(told, StepSizeWarning, stacklevel=2)

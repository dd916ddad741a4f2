r"""Schedules: step -> value, for learning rates and for the sharpness of estimators alike."""

from collections.abc import Callable

import optax

from bnn_jax.types import Schedule


def constant(value: float, total_steps: int) -> Schedule:
    """value at every step."""
    return optax.constant_schedule(value)


def cosine(value: float, total_steps: int) -> Schedule:
    r"""value (1 + cos(pi step / total_steps)) / 2: from value to 0 (Loshchilov and Hutter, SGDR, 2017).

    >>> print(f"{cosine(1.0, 100)(50):.4f}")
    0.5000
    """
    return optax.cosine_decay_schedule(value, total_steps)


def linear(value: float, total_steps: int) -> Schedule:
    """value (1 - step / total_steps): from value to 0."""
    return optax.linear_schedule(value, 0.0, total_steps)


SCHEDULES: dict[str, Callable[[float, int], Schedule]] = {"constant": constant, "cosine": cosine, "linear": linear}

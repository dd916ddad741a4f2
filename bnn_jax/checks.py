"""Checks of arguments: each refuses a value with one sentence that names it, the rule and the way out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def require(
    argument: str,
    value: Any,
    holds: bool | Callable[[np.ndarray], Any],
    rule: str,
    advice: str = "",
    *,
    error: type[Exception] = ValueError,
) -> None:
    """Refuse a `value` that breaks a rule.

    Args:
      argument: its name, as the user typed it.
      value: what the user gave.
      holds: whether it keeps the rule, or a function of the value as an array that tells so, for all of its elements.
        A traced value has nothing to check and passes the function by.
      rule: as "must be positive".
      advice: the way out.
      error: what is raised.

    >>> require("stages", 0, lambda n: n >= 1, "must be at least 1", "5 is usual")
    Traceback (most recent call last):
    ValueError: `stages` (=0) must be at least 1; 5 is usual
    """
    if callable(holds):
        holds = isinstance(value, jax.core.Tracer) or np.all(holds(np.asarray(value)))
    if not holds:
        shown = repr(value) if isinstance(value, str) else value
        raise error(f"`{argument}` (={shown}) {rule}{f'; {advice}' if advice else ''}")


def require_positive(argument: str, value: Any, advice: str = "") -> None:
    """Refuse a concrete `value` that is not above zero everywhere, NaN included.

    Raises:
      ValueError: naming the argument, its value, the rule and the way out.
    """
    require(argument, value, lambda v: v > 0, "must be positive", advice)


def require_floating(argument: str, x: Array) -> None:
    """Refuse an array that is not floating point.

    Raises:
      TypeError: naming the argument and its dtype.

    >>> require_floating("x", jnp.arange(3))
    Traceback (most recent call last):
    TypeError: `x` must be a floating-point array; got int32; convert it with `.astype`
    """
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`{argument}` must be a floating-point array; got {dtype}; convert it with `.astype`")

"""Checks of arguments: each refuses a value with one sentence that names it, the rule and the way out."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bnn_jax.errors import UsageError, unknown_name


class Rule(NamedTuple):
    """What a value must keep, as metadata of the type of a config's field.

    Attributes:
      holds: whether a value keeps it.
      sentence: as "must be positive".
    """

    holds: Callable[[Any], bool]
    sentence: str


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


def look_up(argument: str, named: Any, table: Mapping[str, Any]) -> Any:
    """The entry that a name stands for; what is no string is the thing itself.

    Raises:
      UsageError: for a name that is not in the table; the nearest is named.

    >>> look_up("loss", "hinge", {"hinge": max}), look_up("loss", min, {"hinge": max})
    (<built-in function max>, <built-in function min>)
    """
    if not isinstance(named, str):
        return named
    if named not in table:
        raise unknown_name(argument, named, table)
    return table[named]


def check_options(argument: str, function: Callable, options: Mapping[str, Any]) -> None:
    """Refuse options that a function does not take: its options are the arguments that have a default.

    A value must be a word, a whole number, a number or true or false where the default is one.

    Args:
      argument: under which the options were given.
      function: which takes them as keyword arguments.
      options: name -> value.

    Raises:
      UsageError: for an unknown option, the nearest is named; for a value of another kind.

    >>> check_options("schedule_options", lambda value, *, stages=5: value, {"stage": 3})
    Traceback (most recent call last):
    bnn_jax.errors.UsageError: `schedule_options` (='stage') is not known; did you mean 'stages'? Choose one of: stages
    """
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    for name, value in options.items():
        if not defaults:
            raise UsageError(f"`{argument}` (={name!r}) is not known; there is no option to set, leave it out")
        if name not in defaults:
            raise unknown_name(argument, name, defaults)
        for kinds, takes, rule in _KINDS:
            if isinstance(defaults[name], kinds):
                require(name, value, takes(value), rule, error=UsageError)
                break


_KINDS: tuple[tuple[type, Callable[[Any], bool], str], ...] = (
    (str, lambda value: isinstance(value, str), "must be a word"),
    (bool, lambda value: isinstance(value, (bool, np.bool_)), "must be True or False"),
    (int, lambda value: isinstance(value, (int, np.integer)) and not isinstance(value, bool), "must be a whole number"),
    (float, lambda value: not isinstance(value, (str, bool, tuple, list)), "must be a number"),
    (tuple, lambda value: not isinstance(value, (str, bool)), "must be a number or several"),
)
"""(type of the default, whether a value is of that kind, what it must be)."""

"""Checks of arguments: each refuses a value with one sentence that names it, the rule and the way out."""

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import AbstractArray, Array

from bnn_jax.errors import UsageError, unknown_name
from bnn_jax.names import import_named, is_import

Function = TypeVar("Function", bound=Callable)
Pair: TypeAlias = tuple[int, int]
Sizes: TypeAlias = tuple[int, ...]
"""One number for each spatial axis, as (height, width)."""

Pads: TypeAlias = tuple[Pair, ...]
"""(before, after) for each spatial axis, as ((top, bottom), (left, right))."""


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
      holds: whether it keeps the rule, or a function of the value as an array that tells so, for all of its elements;
        what it cannot compare, as None, does not.  A traced value has nothing to check and passes the function by.
      rule: as "must be positive".
      advice: the way out.
      error: what is raised.

    >>> require("stages", 0, lambda n: n >= 1, "must be at least 1", "5 is usual")
    Traceback (most recent call last):
    ValueError: `stages` (=0) must be at least 1; 5 is usual
    """
    if callable(holds):
        holds = isinstance(value, jax.core.Tracer) or _holds(value, holds)
    if not holds:
        shown = repr(value) if isinstance(value, str) else value
        raise error(f"`{argument}` (={shown}) {rule}{f'; {advice}' if advice else ''}")


def _holds(value: Any, rule: Callable[[np.ndarray], Any]) -> bool:
    """Whether all of a value keeps a rule of numbers, which words and None do not."""
    try:
        return bool(np.all(rule(np.asarray(value))))
    except TypeError:
        return False


def plain_number(value: Any) -> Any:
    """Python's number for one of NumPy's; anything else as it is.

    >>> plain_number(np.float64(0.5)), plain_number("0.5"), plain_number(None)
    (0.5, '0.5', None)
    """
    return value.item() if isinstance(value, np.generic) else value


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
    if not hasattr(x, "dtype") and not isinstance(x, float):
        raise TypeError(f"`{argument}` must be a floating-point array; got {type(x).__name__}; use `jnp.asarray`")
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"`{argument}` must be a floating-point array; got {dtype}; convert it with `.astype`")


def is_whole(value: Any, at_least: float = -math.inf) -> bool:
    """Whether a value is a whole number of at least so much; True and 2.0 are none.

    >>> is_whole(2), is_whole(0, 1), is_whole(True), is_whole(2.0)
    (True, False, False, False)
    """
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= at_least


def is_sizes(value: Any, rank: int, at_least: int) -> bool:
    """Whether a value is a tuple or list of so many whole numbers of at least so much."""
    return isinstance(value, tuple | list) and len(value) == rank and all(is_whole(n, at_least) for n in value)


def as_sizes(argument: str, value: int | Sizes, rank: int = 2) -> Sizes:
    """Return the sizes, one a spatial axis, that a tuple, or a number for all of them, stands for.

    Raises:
      ValueError: for anything else, and for numbers below 1.

    >>> as_sizes("strides", 3), as_sizes("strides", [1, 2]), as_sizes("strides", 2, 3)
    ((3, 3), (1, 2), (2, 2, 2))
    >>> as_sizes("strides", (2, 0))
    Traceback (most recent call last):
    ValueError: `strides` (=(2, 0)) must be a positive whole number or a pair (height, width) of them
    """
    sizes = (value,) * rank if is_whole(value, 1) else value
    require(argument, value, is_sizes(sizes, rank, 1), sizes_rule(rank))
    return tuple(int(size) for size in sizes)


def sizes_rule(rank: int = 2) -> str:
    """What :func:`as_sizes` takes.

    >>> sizes_rule()
    'must be a positive whole number or a pair (height, width) of them'
    """
    return f"must be a positive whole number or {_AXES[rank]} of them"


def as_pads(value: int | Sizes | Pads, rank: int = 2) -> Pads | None:
    """((top, bottom), (left, right)) of such pairs, of a pair (height, width), or of a number for all; None of others.

    >>> as_pads(1), as_pads((1, 2)), as_pads([(0, 1), (2, 3)]), as_pads(-1)
    (((1, 1), (1, 1)), ((1, 1), (2, 2)), ((0, 1), (2, 3)), None)
    """
    sides = (value,) * rank if is_whole(value, 0) else value
    pads = [(s, s) if is_whole(s, 0) else s for s in sides] if isinstance(sides, tuple | list) else []
    if len(pads) != rank or not all(is_sizes(side, 2, 0) for side in pads):
        return None
    return tuple((int(low), int(high)) for low, high in pads)


_AXES = {1: "a tuple (width,)", 2: "a pair (height, width)", 3: "a triple (depth, height, width)"}
_SIDES = ("(front, back)", "(top, bottom)", "(left, right)")


def pads_rule(rank: int = 2) -> str:
    """What :func:`as_pads` takes.

    >>> pads_rule()
    'must be a whole number from 0 on, a pair (height, width) of them or ((top, bottom), (left, right))'
    """
    sides = ", ".join(_SIDES[-rank:]) + "," * (rank == 1)
    return f"must be a whole number from 0 on, {_AXES[rank]} of them or ({sides})"


def check_arrays(function: Function) -> Function:
    """Refuse arrays of another dtype or shape than the annotations of a function's arguments say, when it is called.

    As in jaxtyping, a name stands for one size throughout a call, "..." and "*name" for any number of axes, and "#name"
    for that size or 1.  Arguments whose annotations name no array are passed by, and so is what is no array where the
    annotation allows something else too.  It costs microseconds a call, nothing in a compiled program.

    Raises:
      TypeError: if an array has another dtype, or what should be one is none.
      ValueError: if it has another shape.

    >>> from jaxtyping import Float, Integer
    >>> @check_arrays
    ... def loss(logits: Float[Array, "batch classes"], labels: Integer[Array, "batch"]): ...
    >>> loss(jnp.zeros((4, 10)), jnp.zeros((4, 1), jnp.int32))
    Traceback (most recent call last):
    ValueError: `labels` of `loss` (of shape (4, 1)) must be of shape (batch=4); `.reshape` or index it
    """
    parameters = inspect.signature(function).parameters
    wanted = {name: found for name, p in parameters.items() if (found := _array_of(p.annotation))}
    owner = function.__qualname__.rpartition("<locals>.")[2].removesuffix(".__call__")

    @functools.wraps(function)
    def checked(*args, **kwargs):
        sizes: dict[str, Any] = {}
        for name, value in (*zip(parameters, args), *kwargs.items()):
            if name in wanted:
                _check_array(f"`{name}` of `{owner}`", value, *wanted[name], sizes)
        return function(*args, **kwargs)

    return checked


def _array_of(annotation: Any) -> tuple[type, bool] | None:
    """The array that an annotation names, and whether it allows something else too."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if union else (annotation,)
    arrays = [member for member in members if isinstance(member, type) and issubclass(member, AbstractArray)]
    return (arrays[0], len(arrays) < len(members)) if arrays else None


def _check_array(named: str, value: Any, wanted: type, optional: bool, sizes: dict[str, Any]) -> None:
    name = wanted.dtype.__name__
    kind, advice = _KINDS_OF_ARRAYS.get(name, (f"a {name.lower()}", "convert it with `.astype`"))
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        if not optional:
            raise TypeError(f"{named} must be {kind} array; got {type(value).__name__}; use `jnp.asarray`")
        return
    if isinstance(wanted.dtypes, tuple) and getattr(value.dtype, "name", "") not in wanted.dtypes:
        advice = OF_BYTES if (name, value.dtype) == ("Float", "uint8") else advice
        raise TypeError(f"{named} must be {kind} array; got {value.dtype}; {advice}")
    axes = wanted.dim_str.split()
    if not _matches(axes, tuple(value.shape), sizes):
        known = {axis: f"={sizes[axis.lstrip('#')]}" for axis in axes if axis.lstrip("#") in sizes}
        rule = ", ".join(axis + known.get(axis, "") for axis in axes)
        raise ValueError(f"{named} (of shape {tuple(value.shape)}) must be of shape ({rule}); `.reshape` or index it")


def _matches(axes: list[str], shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Whether a shape has these axes; the sizes of those that a name is given for the first time are kept."""
    for i, axis in enumerate(axes):
        if axis == "..." or axis.startswith("*"):
            axes = [*axes[:i], *["_"] * (len(shape) - len(axes) + 1), *axes[i + 1 :]]
            break
    if len(axes) != len(shape):
        return False
    for axis, size in zip(axes, shape):
        name = axis.lstrip("#")
        known = int(name) if name.isdigit() else size if name == "_" else sizes.setdefault(name, size)
        if size != known and not (size == 1 and axis != name):
            return False
    return True


def look_up(argument: str, named: Any, table: Mapping[str, Any]) -> Any:
    """What a name stands for: an entry of the table, or ``package.module:Name``; what is no string is the thing itself.

    Raises:
      UsageError: for a name that is not in the table, the nearest is named, or cannot be imported.

    >>> look_up("loss", "hinge", {"hinge": max}), look_up("loss", min, {"hinge": max})
    (<built-in function max>, <built-in function min>)
    >>> look_up("loss", "math:hypot", {"hinge": max})
    <built-in function hypot>
    """
    if not isinstance(named, str):
        return named
    if named in table:
        return table[named]
    if is_import(named):
        return import_named(argument, named)
    raise UsageError(f"{unknown_name(argument, named, table)}, or package.module:Name of your own")


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

OF_BYTES = "images of 0..255 go through `bnn_jax.data.normalize` first"
"""The way out for images as files have them."""

_KINDS_OF_ARRAYS = {
    "Float": ("a floating-point", "convert it with `.astype`"),
    "Int": ("a signed integer", "convert it with `.astype`"),
    "Integer": ("an integer", "convert it with `.astype`"),
    "Num": ("a numerical", "convert it with `.astype`"),
    "Bool": ("a bool", "compare it with a threshold"),
    "UInt32": ("a uint32", "pack bits into words with `bnn_jax.bitops.bits.pack`"),
}
"""Name of a dtype in annotations -> (in sentences, the way out)."""

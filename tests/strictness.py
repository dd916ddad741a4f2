"""The type checker that conftest.py hangs on every function of the package."""

import operator
import types
import typing
from collections.abc import Callable
from functools import reduce

import jax
import numpy as np
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

CONF = BeartypeConf(is_pep484_tower=True)  # 3 is a number where a float is wanted.


def is_array(hint: object) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def holds_array(hint: object) -> bool:
    """Whether the value of an annotation is or holds an array of some shape, as `Float[Array, "classes"] | None`."""
    return is_array(hint) or (typing.get_origin(hint) is not Callable and any(map(holds_array, typing.get_args(hint))))


def with_numpy(hint: typing.Any) -> typing.Any:
    """The annotation that takes NumPy's arrays where it takes those of JAX, which converts them."""
    if is_array(hint):
        return hint.dtype[jax.Array | np.ndarray, hint.dim_str] if hint.array_type is jax.Array else hint
    if not holds_array(hint):
        return hint
    arguments = map(with_numpy, typing.get_args(hint))
    origin = typing.get_origin(hint)
    return reduce(operator.or_, arguments) if origin in (types.UnionType, typing.Union) else origin[tuple(arguments)]


def checked(function: Callable) -> Callable:
    """Check the arrays of a call against their annotations; all else is left to the argument checks.

    A constructor is not checked: JAX fills the fields of a pytree with whatever it maps the leaves to.
    """
    hints = {name: with_numpy(hint) for name, hint in function.__annotations__.items() if holds_array(hint)}
    if not hints or function.__name__ == "__init__":
        return function
    function.__annotations__ = hints
    return beartype(function, conf=CONF)

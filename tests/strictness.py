"""The checks of annotations that conftest.py hangs on the functions of the package."""

import inspect
import operator
import types
import typing
from collections.abc import Callable
from functools import reduce

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype

CONF = BeartypeConf(is_pep484_tower=True)  # 3 is a number where a float is wanted.


def check_arrays(package: str) -> None:
    """Check what the functions of a package, imported afterwards, take and return against the shapes they name.

    Functions that name none stay what they are: their frames count in warnings, and wrappers take a tenth of the time
    of all tests.  So do classes: JAX fills the fields of a pytree with whatever it maps the leaves to.
    """
    wrapped = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker: Callable) -> Callable:
        def decorate(found):
            hints = found.__annotations__.values() if inspect.isfunction(found) else ()
            return wrapped(found, typechecker=typechecker) if any(holds(has_shape, hint) for hint in hints) else found

        return decorate

    jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook(package, f"{__name__}.checked")


def is_array(hint: object) -> bool:
    """Whether an annotation is an array's, as `Float[Array, "batch classes"]`."""
    return isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)


def has_shape(hint: object) -> bool:
    """Whether it says more of the shape than "..."."""
    return is_array(hint) and hint.dim_str != "..."


def holds(kind: Callable[[object], bool], hint: object) -> bool:
    """Whether an annotation is of that kind or holds one that is; what functions take and return is not known."""
    inner = () if typing.get_origin(hint) is Callable else typing.get_args(hint)
    return kind(hint) or any(holds(kind, part) for part in inner)


def with_numpy(hint: typing.Any) -> typing.Any:
    """Take NumPy's arrays where those of JAX are taken, which converts them."""
    if is_array(hint):
        kinds = jax.Array | np.ndarray | np.generic
        return hint.dtype[kinds, hint.dim_str] if hint.array_type is jax.Array else hint
    if not holds(is_array, hint):
        return hint
    arguments = map(with_numpy, typing.get_args(hint))
    origin = typing.get_origin(hint)
    return reduce(operator.or_, arguments) if origin in (types.UnionType, typing.Union) else origin[tuple(arguments)]


def checked(function: Callable) -> Callable:
    """Check arrays alone; numbers, words and the rest are left to the package's own checks of arguments."""
    hints = {name: with_numpy(hint) for name, hint in function.__annotations__.items() if holds(is_array, hint)}
    function.__annotations__ = hints
    return beartype(function, conf=CONF)

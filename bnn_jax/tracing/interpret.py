"""A traced function run on other values than arrays, one operation after the other."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

Rule: TypeAlias = Callable[[JaxprEqn, list[Any], str], list[Any]]
"""(operation, values of its inputs, path of the modules around it) -> values of its results."""


class Unsupported(Exception):
    """An operation that a rule has no form for; the text describes it, as in "the operation 'sort' <text>"."""


# They call their functions on single numbers, or many times, or not at all.
_WHOLE = {"reduce", "reduce_window", "select_and_scatter", "scan", "while", "cond"}


def interpret(
    jaxpr: Jaxpr | ClosedJaxpr, inputs: Sequence[Any], rule: Rule, *, whole: Sequence[str] = (), path: str = ""
) -> list[Any]:
    """The results of a traced function whose inputs are `inputs`, each operation's by the `rule`.

    Args:
      jaxpr: of :func:`jax.make_jaxpr`.
      inputs: one value for each input, of any type; constants are NumPy arrays.
      rule: for one operation.
      whole: names of the jitted functions that are one operation; the insides of all others are run.
      path: of the modules around the function.
    """
    constants = jaxpr.consts if isinstance(jaxpr, ClosedJaxpr) else ()
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    values = dict(zip(jaxpr.constvars, map(_as_array, constants))) | dict(zip(jaxpr.invars, inputs))

    def read(atom):
        return _as_array(atom.val) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inside = "/".join(filter(None, (path, str(equation.source_info.name_stack))))
        given = [read(atom) for atom in equation.invars]
        function = None if equation.params.get("name") in whole else _called(equation, len(given))
        if equation.primitive.name == "platform_index":
            results = [np.int32(0)]
        elif function is None:
            results = rule(equation, given, inside)
        else:
            operands = given[1:] if equation.primitive.name == "cond" else given
            results = interpret(function, operands, rule, whole=whole, path=inside)
        values.update(zip(equation.outvars, results))
    return [read(atom) for atom in jaxpr.outvars]


def default_branch(equation: JaxprEqn) -> ClosedJaxpr | None:
    """The function of `jax.lax.platform_dependent` for all other platforms, where an operation is one."""
    platforms = equation.params.get("branches_platforms") or ()
    return equation.params["branches"][platforms.index(None)] if None in platforms else None


def evaluate(equation: JaxprEqn, inputs: list[Any]) -> list[Any]:
    """The results of one operation on arrays."""
    results = equation.primitive.bind(*inputs, **equation.params)
    return [_as_array(result) for result in (results if equation.primitive.multiple_results else [results])]


def is_array(value: Any) -> bool:
    """Whether a value is known: an array of NumPy, or a random key, which is one of JAX."""
    return isinstance(value, np.ndarray | jax.Array)


def _as_array(value: Any) -> np.ndarray | jax.Array:
    is_key = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return value if is_key else np.asarray(value)


def _called(equation: JaxprEqn, inputs: int) -> Jaxpr | ClosedJaxpr | None:
    """The function that a jit, a remat or a call with a chosen derivative calls."""
    if equation.primitive.name in _WHOLE:
        return default_branch(equation)
    functions = [value for value in equation.params.values() if isinstance(value, Jaxpr | ClosedJaxpr)]
    count = lambda f: len((f.jaxpr if isinstance(f, ClosedJaxpr) else f).invars)
    return next((function for function in functions if count(function) == inputs), None)

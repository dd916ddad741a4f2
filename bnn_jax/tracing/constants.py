"""What of a function's results its arguments do not decide."""

from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters.partial_eval import dce_jaxpr


def constants_of(function: Callable[..., Any], *arguments: Any) -> Any:
    """The results of `function` with None for each that depends on an argument, a number for the others."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    leaves, tree = jax.tree.flatten(shapes)
    found = []
    for position in range(len(leaves)):
        jaxpr, used = dce_jaxpr(closed.jaxpr, [i == position for i in range(len(leaves))])
        if any(used) or leaves[position].shape != ():
            found.append(None)
            continue
        with jax.ensure_compile_time_eval():
            found.append(float(jax.core.eval_jaxpr(jaxpr, closed.consts)[0]))
    return tree.unflatten(found)

"""Warm starts: functions from the variables of an earlier network to those that a new one starts from."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from flax.core.meta import unbox
from flax.traverse_util import flatten_dict, unflatten_dict

from bnn_jax.checks import require
from bnn_jax.errors import UsageError, unknown_name
from bnn_jax.models.binaryduo import decouple_variables
from bnn_jax.types import LATENT_KERNEL

Variables: TypeAlias = Mapping[str, Any]
"""Collections ("params", "batch_stats", ...) of nested dicts of arrays."""


class WarmStart(NamedTuple):
    """What a network starts from that takes over variables of an earlier one.

    Attributes:
      variables: those that are taken over, as collections of nested dicts.
      names: of these variables, as params/stem/kernel.
      initialised: name -> why it is not taken over, of the variables that are initialised as in any run.
      unused: names of the earlier network's variables that the new one has no place for.
    """

    variables: Variables
    names: tuple[str, ...]
    initialised: dict[str, str]
    unused: tuple[str, ...]


Transfer: TypeAlias = Callable[[Variables, Variables], WarmStart]
"""(variables of the earlier network, shapes of the new one's) -> what the new one starts from."""


def by_name(source: Variables, target: Variables, *, leave_out: Sequence[str] = ()) -> WarmStart:
    """Take over each variable that has the same name and shape in both networks.

    The `kernel` of a full-precision layer and the `latent_kernel` of a quantized one are the same name.

    Args:
      source: variables of the earlier network.
      target: variables of the new one, or their shapes.
      leave_out: layers, as params/head, or variables that start afresh.

    Raises:
      UsageError: for a name in `leave_out` that the new network does not have; the nearest is named.

    >>> source = {"params": {"conv": {"kernel": jnp.ones(2)}, "head": {"bias": jnp.ones(3)}}}
    >>> target = {"params": {"conv": {"latent_kernel": jnp.zeros(2)}, "head": {"bias": jnp.zeros(4)}}}
    >>> start = by_name(source, target)
    >>> print(start.names, start.initialised)
    ('params/conv/latent_kernel',) {'params/head/bias': 'of shape (3,), here (4,)'}
    """
    given, wanted = (
        {name: unbox(leaf) for name, leaf in flatten_dict(variables, sep="/").items()} for variables in (source, target)
    )
    inside = lambda name, layer: f"{name}/".startswith(f"{layer}/")
    several = not isinstance(leave_out, str)
    require("leave_out", leave_out, several, "must be a list", "as ('params/head',)", error=UsageError)
    for layer in leave_out:
        if not any(inside(name, layer) for name in wanted):
            raise unknown_name("leave_out", layer, {name.rpartition("/")[0] for name in wanted})
    found, initialised, used = {}, {}, set()
    for name, like in wanted.items():
        origin = next((n for n in (name, _other_kernel(name)) if n in given), None)
        if origin is None:
            initialised[name] = "not there"
        elif any(inside(name, layer) for layer in leave_out):
            initialised[name] = "left out"
        elif given[origin].shape != like.shape:
            initialised[name] = f"of shape {given[origin].shape}, here {like.shape}"
        else:
            found[name] = given[origin]
            used.add(origin)
    variables = unflatten_dict(found, sep="/")
    return WarmStart(variables, tuple(found), initialised, tuple(name for name in given if name not in used))


def _other_kernel(name: str) -> str:
    layer, _, last = name.rpartition("/")
    return f"{layer}/{ {'kernel': LATENT_KERNEL, LATENT_KERNEL: 'kernel'}.get(last, last) }"


def normalized(source: Variables, target: Variables) -> WarmStart:
    """Take over :func:`by_name`, every latent kernel divided by its largest magnitude, as TTQ starts.

    Reference: Zhu et al., Trained Ternary Quantization, 2017, arXiv:1612.01064.
    """
    start = by_name(source, target)
    flat = flatten_dict(start.variables, sep="/")
    for name, kernel in flat.items():
        if name.endswith(f"/{LATENT_KERNEL}"):
            flat[name] = kernel / jnp.maximum(jnp.abs(kernel).max(), jnp.finfo(kernel.dtype).tiny)
    return start._replace(variables=unflatten_dict(flat, sep="/"))


def decoupled(source: Variables, target: Variables) -> WarmStart:
    """Take over a coupled BinaryDuo network, decoupled: the new network computes what the old one did.

    Raises:
      UsageError: if a variable of the new network would have to be initialised.

    Reference: Kim et al., BinaryDuo, 2020, arXiv:2002.06517.
    """
    start = by_name(decouple_variables(source), target)
    if start.initialised:
        name, reason = next(iter(start.initialised.items()))
        raise UsageError(f"`transfer` (='decoupled') must take over every variable, but {name} is {reason}")
    return start


TRANSFERS: dict[str, Transfer] = {
    "by_name": by_name,
    "without_head": partial(by_name, leave_out=("params/head",)),
    "normalized": normalized,
    "decoupled": decoupled,
}
"""name -> how a stage takes over the variables of another one."""

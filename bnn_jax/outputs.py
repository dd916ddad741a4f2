"""How a network is called and what it returns: all that runs a network, one's own too, does it from here."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core.meta import unbox
from jaxtyping import Array, Float


class Outputs(NamedTuple):
    """What a network returns for a batch."""

    logits: Float[Array, "batch ... classes"]
    intermediates: Mapping[str, Array]


def outputs_of(returned: Any) -> Outputs:
    """The logits and the intermediates among what a network returned.

    Args:
      returned: the logits alone, or a pair (logits, intermediates), the intermediates being a mapping of names or None.
        Logits are a floating-point array with the batch first and the classes last.

    Raises:
      TypeError: for anything else.

    >>> outputs_of(jnp.zeros((5, 10))).logits.shape, outputs_of((jnp.zeros((5, 10)), {"stage1": 3.0})).logits.shape
    ((5, 10), (5, 10))
    >>> outputs_of({"logits": jnp.zeros((5, 10))})
    Traceback (most recent call last):
    TypeError: a network must return logits (batch, classes), or (logits, a mapping of intermediates); got a dict
    """
    pair = isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping | None)
    logits, intermediates = returned if pair else (returned, {})
    is_array = isinstance(logits, jax.Array | np.ndarray)
    if not is_array or len(logits.shape) < 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
        found = f"{logits.dtype} of shape {logits.shape}" if is_array else _described(returned)
        raise TypeError(
            f"a network must return logits (batch, classes), or (logits, a mapping of intermediates); got {found}"
        )
    return Outputs(logits, intermediates or {})


def logits_of(returned: Any) -> Float[Array, "batch ... classes"]:
    """The logits among what a network returned, see :func:`outputs_of`."""
    return outputs_of(returned).logits


def call_options(model: Any, *, train: bool = False, progress: Array | float = 1.0) -> dict[str, Any]:
    """The keyword arguments by which a network learns whether it trains and how far it is, of those that it takes.

    Args:
      model: a Flax module; its ``__call__`` may take `train`, or `training` or `deterministic` in its place, and
        `progress`, the share of the training done; or none of them.
      train, progress: their values.

    >>> from flax import linen as nn
    >>> call_options(nn.Dropout(0.5), train=True), call_options(nn.Dense(10), train=True)
    ({'deterministic': False}, {})
    """
    values = {"train": train, "training": train, "deterministic": not train, "progress": progress}
    parameters = inspect.signature(type(model).__call__).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    # Of (*args, **kwargs), as nn.Sequential has, nothing is known; (x, **kwargs) takes what the networks here take.
    if inspect.Parameter.VAR_KEYWORD in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        return {"train": train, "progress": progress}
    return {name: value for name, value in values.items() if name in parameters}


def init_network(model: Any, rngs: Any, images: Any) -> tuple[Any, Any]:
    """What a network returns for images, evaluated with new variables, and these, out of boxes as `nn.Partitioned`."""
    returned, variables = model.init_with_output(rngs, images, **call_options(model))
    return returned, unbox(variables)


def apply_network(
    model: Any, variables: Any, images: Any, *, train: bool = False, progress: Array | float = 1.0, **options: Any
) -> Any:
    """What a network returns for images, with what it updates where that is asked for.

    Args:
      model: a Flax module that takes images.
      variables: its variables, trained or packed.
      images: normalized.
      train, progress: see :func:`call_options`.
      **options: `mutable` and `rngs` of Flax.
    """
    return model.apply(variables, images, **call_options(model, train=train, progress=progress), **options)


def network_logits(model: Any, variables: Any, images: Any) -> Float[Array, "batch ... classes"]:
    """The logits of a network for images, evaluated."""
    return logits_of(apply_network(model, variables, images))


def _described(returned: Any) -> str:
    kind = lambda value: "array" if isinstance(value, jax.Array | np.ndarray) else type(value).__name__
    if not isinstance(returned, tuple):
        return f"a {kind(returned)}"
    return f"a tuple of {', '.join(map(kind, returned)) or 'nothing'}"

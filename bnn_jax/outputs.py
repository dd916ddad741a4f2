"""What a network returns, read in one place: all that runs a network takes its logits from here."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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


def _described(returned: Any) -> str:
    kind = lambda value: "array" if isinstance(value, jax.Array | np.ndarray) else type(value).__name__
    if not isinstance(returned, tuple):
        return f"a {kind(returned)}"
    return f"a tuple of {', '.join(map(kind, returned)) or 'nothing'}"

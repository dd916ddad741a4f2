"""The dtype of sums: float32 at least, whatever narrower dtype the operands have."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def promoted(*operands: Array | jnp.dtype) -> jnp.dtype:
    """The dtype to which all operands promote: asked for by name, it is told also where they may not mix unsaid."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*operands)


def sum_dtype(*operands: Float[Array, "..."]) -> jnp.dtype:
    """The dtype in which products of `operands` are summed: float32 at least."""
    return promoted(promoted(*operands), jnp.dtype(jnp.float32))


def widened(x: Num[Array, "..."]) -> Num[Array, "..."]:
    """Return x in float32 at least, in which it meets parameters and is averaged; integers stay as they are.

    >>> [widened(jnp.ones(2, dtype)).dtype.name for dtype in (jnp.bfloat16, jnp.float32, jnp.uint8)]
    ['float32', 'float32', 'uint8']
    """
    return x.astype(sum_dtype(x)) if jnp.issubdtype(x.dtype, jnp.floating) else x

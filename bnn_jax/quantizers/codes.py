r"""What a quantizer returns: integer codes and their scale, apart.

A layer computes on the codes and multiplies by the scale afterwards.  A sum of at most 2^24 products of codes -1/+1 is
exact in float32, int32 and on packed bits alike, so a packed network can be proved equal to the trained one.
"""

from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Array, Float


class Quantized(NamedTuple):
    """The tensor codes * scale.

    Invariants: `codes` holds integers in a floating dtype (gradients flow through them).  `scale` is a scalar or has
    the rank of `codes`; it varies over one axis alone: the last of a kernel, its output features, shape (1, ..., 1,
    features), or the first of activations, the examples, shape (batch, 1, ..., 1).
    """

    codes: Float[Array, "..."]
    scale: Float[Array, "..."]


Bases: TypeAlias = Quantized | tuple[Quantized, ...]
"""One quantized tensor, or several whose sum is meant, as the positive and the negative part of a ternary weight."""


def bases(quantized: Bases) -> tuple[Quantized, ...]:
    """`quantized` as a tuple, also when it is a single one."""
    return (quantized,) if isinstance(quantized, Quantized) else quantized


def dequantize(quantized: Bases) -> Float[Array, "..."]:
    """The real tensor: the sum over bases of codes * scale.

    >>> import jax.numpy as jnp
    >>> dequantize(Quantized(jnp.array([1.0, -1.0]), jnp.array(0.5)))
    Array([ 0.5, -0.5], dtype=float32)
    """
    return sum(base.codes * base.scale for base in bases(quantized))


def validate(quantized: Bases, code_set: tuple[int, ...]) -> None:
    """Check the invariants of concrete arrays.

    Raises:
      ValueError: naming the invariant that does not hold and a value that breaks it.
    """
    for base in bases(quantized):
        codes, scale = np.asarray(base.codes), np.asarray(base.scale)
        foreign = codes[~np.isin(codes, code_set)]
        if foreign.size:
            raise ValueError(f"`codes` must lie in {code_set}; got {foreign.flat[0]!s} among {codes.size} codes")
        per_feature = (1,) * (codes.ndim - 1) + codes.shape[-1:]
        per_example = codes.shape[:1] + (1,) * (codes.ndim - 1)
        if scale.shape not in ((), per_feature, per_example):
            raise ValueError(
                f"`scale` must be a scalar, or one value a feature, shape {per_feature}, "
                f"or an example, shape {per_example}; got {scale.shape}"
            )

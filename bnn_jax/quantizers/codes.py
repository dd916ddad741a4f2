r"""What a quantizer returns: integer codes and their scale, apart.

A layer computes on the codes and multiplies by the scale afterwards.  A sum of at most 2^24 products of codes -1/+1 is
exact in float32, int32 and on packed bits alike, so a packed network can be proved equal to the trained one.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Array, Float

from bnn_jax.types import Key


class Quantized(NamedTuple):
    """The tensor codes * scale.

    Invariants: `codes` holds integers in a floating dtype (gradients flow through them); `scale` is a scalar or has the
    rank of `codes` and varies over the last axis alone, the output features: shape (1, ..., 1, features).
    """

    codes: Float[Array, "..."]
    scale: Float[Array, "..."]


Bases: TypeAlias = Quantized | tuple[Quantized, ...]
"""One quantized tensor, or several whose sum is meant, as the positive and the negative part of a ternary weight."""


class Quantizer(NamedTuple):
    """A pair of functions, as in optax.

    Attributes:
      init: (key, x) -> dict of the quantizer's own learned parameters; None where it has none.
      apply: (x, **parameters) -> :class:`Quantized`, or a tuple of them.
    """

    init: Callable[[Key, Array], dict[str, Array]] | None
    apply: Callable[..., Bases]


def stateless(function: Callable[[Array], Bases]) -> Quantizer:
    """The quantizer of a plain function x -> :class:`Quantized` that has no parameters of its own."""
    return Quantizer(init=None, apply=function)


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
        if scale.shape not in ((), per_feature):
            raise ValueError(f"`scale` must be a scalar or one value a feature, shape {per_feature}; got {scale.shape}")

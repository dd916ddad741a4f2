r"""What a quantizer returns: integer codes and their scale, apart.

A layer computes on the codes and multiplies by the scale afterwards.  A sum of at most 2^24 products of codes -1/+1 is
exact in float32, int32 and on packed bits alike, so a packed network can be proved equal to the trained one.

A code of a number near zero is the same everywhere: a denormal number, which compiled code takes for zero on some
machines and NumPy on none, is zero, and so +1 by sign; see :func:`bnn_jax.estimators.is_negative`.
"""

import re
from typing import NamedTuple, TypeAlias

import numpy as np
from jax.ad_checkpoint import checkpoint_name
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


class Mark(NamedTuple):
    """What a traced array is to the layer that computes on it.

    Attributes:
      place: "input_quantizer" or "kernel_quantizer".
      values: how many values a code may take; None for a scale.
    """

    place: str
    values: int | None


_MARK = re.compile(r"(\w+) (?:codes: (\d+) values|scale)")


def mark(x: Float[Array, "..."], place: str, *, values: int | None = None) -> Float[Array, "..."]:
    """x itself, named in a traced computation as codes of `values` values, or as a scale without them.

    The name is there for those who read the jaxpr; it lowers to nothing.

    >>> import jax
    >>> print(jax.make_jaxpr(lambda x: mark(x, "kernel_quantizer", values=2))(1.0).eqns[0].params["name"])
    kernel_quantizer codes: 2 values
    """
    return checkpoint_name(x, f"{place} scale" if values is None else f"{place} codes: {values} values")


def read_mark(name: str) -> Mark | None:
    """The mark that :func:`mark` wrote as the `name` of a `checkpoint_name`; None for another name.

    >>> read_mark("kernel_quantizer codes: 2 values"), read_mark("input_quantizer scale"), read_mark("activations")
    (Mark(place='kernel_quantizer', values=2), Mark(place='input_quantizer', values=None), None)
    """
    found = _MARK.fullmatch(name)
    return Mark(found[1], int(found[2]) if found[2] else None) if found else None


def validate(quantized: Bases, code_set: tuple[int, ...]) -> None:
    """Check the invariants of concrete arrays.

    Raises:
      ValueError: naming the invariant that does not hold and a value that breaks it.
    """
    for base in bases(quantized):
        codes, scale = np.asarray(base.codes, np.float64), np.asarray(base.scale)
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

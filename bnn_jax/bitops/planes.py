r"""Codes of any set of integers as bit planes, and their products as weighted sums of XOR products.

A code set v, v + d, v + 2d, ... of at most 2^P values has P planes: code = v + d sum_p 2^p b_p, b_p in {0, 1}.  With
the signs s = 2 b - 1 of a plane this is code = (A + D sum_p 2^p s_p) / g with integers A, D and g, so that a product of
two tensors of codes is a sum of XOR products of their planes and, where an A is not zero, of the planes' row sums:

    g g' x.w = A A' K + A D' sum_k 2^k S_k(w) + A' D sum_m 2^m S_m(x) + D D' sum_mk 2^(m+k) (K - 2 popcount(x_m ^ w_k))

For codes -1/+1 on both sides that is K - 2 popcount(x ^ w); a ternary code needs two planes, k bits need k.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, Num, UInt32

from bnn_jax.bitops.bits import WORD_BITS, pack, unpack, word_count
from bnn_jax.bitops.conv import Geometry, border_sums, out_shape, outside, patch_words
from bnn_jax.bitops.matmul import Rows, add_rows, affine_counts
from bnn_jax.checks import Sizes, check_arrays

Values: TypeAlias = tuple[int, ...]
"""A code set, in increasing order."""

MOST_PLANE_PRODUCTS = 4
"""Above as many XOR products, m x k of m and k bits, the codes are unpacked and multiplied as numbers."""


@partial(jax.tree_util.register_dataclass, data_fields=["words", "scale"], meta_fields=["values", "constant"])
@dataclass(frozen=True)
class PackedBase:
    """One base of a packed kernel.

    Attributes:
      words: the planes of the codes' indices in `values`, each packed along the fan-in without gaps; None where there
        is a single value.
      scale: of the codes, as in :class:`bnn_jax.quantizers.Quantized`; None where it is a constant.
      values: the code set.
      constant: the scale where it is one; not stored.
    """

    words: UInt32[Array, "planes words features"] | None
    scale: Float[Array, "..."] | None
    values: Values
    constant: float = 1.0


_STATIC = ["shape", "integers", "input_scale", "path"]


@partial(jax.tree_util.register_dataclass, data_fields=["bases"], meta_fields=_STATIC)
@dataclass(frozen=True)
class PackedKernel:
    """A quantized kernel as its layer keeps it in the collection "packed".

    Attributes:
      bases: one or more, whose sum is meant.
      shape: of the kernel: (*spatial, channels of a group, features), or (inputs, features).
      integers: the layer returns the integer product alone, because a normalization with thresholds follows.
      input_scale: of inputs that come as packed words from such a normalization.
      path: one of PATHS; None is the one that :func:`bnn_jax.bitops.paths.chosen_path` chooses.  It is not stored.
    """

    bases: tuple[PackedBase, ...]
    shape: tuple[int, ...]
    integers: bool = False
    input_scale: float = 1.0
    path: str | None = None


class Affine(NamedTuple):
    """code = (constant + step sum_p 2^p s_p) / divisor, s_p = +-1 the signs of `planes` planes."""

    constant: int
    step: int
    divisor: int
    planes: int


def plane_count(values: Values) -> int:
    """Bits of an index into a code set: ceil(log2 n).

    >>> plane_count((-1, 1)), plane_count((-1, 0, 1)), plane_count(tuple(range(16)))
    (1, 2, 4)
    """
    return max(1, math.ceil(math.log2(len(values))))


def affine(values: Values) -> Affine | None:
    """A code set as signs of planes; None for values that are not equally far apart.

    >>> affine((-1, 1)), affine((0, 1)), affine((-2, 0, 1))
    (Affine(constant=0, step=1, divisor=1, planes=1), Affine(constant=1, step=1, divisor=2, planes=1), None)
    """
    if len(values) == 1:
        return Affine(values[0], 0, 1, 1)
    steps = set(np.diff(values).tolist())
    if len(steps) != 1:
        return None
    step, planes = steps.pop(), plane_count(values)
    constant = 2 * values[0] + step * (2**planes - 1)
    if constant % 2 == 0 and step % 2 == 0:
        return Affine(constant // 2, step // 2, 1, planes)
    return Affine(constant, step, 2, planes)


def bit_planes(codes: Float[Array, "..."], values: Values) -> list[Bool[Array, "..."]]:
    """The bits of each code's index in `values`, the lowest first.

    >>> [plane.tolist() for plane in bit_planes(jnp.array([-1.0, 0.0, 1.0]), (-1, 0, 1))]
    [[False, True, False], [False, False, True]]
    """
    if len(values) <= 2:
        return [codes > values[0]]
    if len(values) > 16 and affine(values) is not None:
        index = jnp.clip(jnp.nan_to_num((codes - values[0]) / (values[1] - values[0])), 0, len(values) - 1)
        index = index.astype(jnp.int32)
    else:
        index = sum((codes > value).astype(jnp.int32) for value in values[:-1])
    return [(index >> plane & 1).astype(bool) for plane in range(plane_count(values))]


def pack_codes(
    codes: Float[Array, "*fan_in features"], values: Values
) -> UInt32[Array, "planes words features"] | None:
    """The planes of a kernel's codes, packed along the flattened fan-in; None of codes that are all the same."""
    if len(values) == 1:
        return None
    rows = codes.reshape(math.prod(codes.shape[:-1]), codes.shape[-1])
    return jnp.stack([pack(plane, axis=0) for plane in bit_planes(rows, values)])


def unpack_codes(base: PackedBase, shape: tuple[int, ...], dtype=jnp.float32) -> Float[Array, "*fan_in features"]:
    """The codes of a packed kernel as numbers.

    >>> codes = jnp.array([[-1.0, 0.0], [1.0, 1.0], [0.0, -1.0]])
    >>> base = PackedBase(pack_codes(codes, (-1, 0, 1)), None, (-1, 0, 1))
    >>> bool((unpack_codes(base, (3, 2)) == codes).all())
    True
    """
    size = math.prod(shape[:-1])
    if base.words is None:
        return jnp.full(shape, base.values[0], dtype)
    planes = [unpack(words, size, axis=0).astype(jnp.int32) << p for p, words in enumerate(base.words)]
    if affine(base.values) is None:
        # A file may hold an index that no code has.
        index = jnp.minimum(sum(planes), len(base.values) - 1)
        return jnp.asarray(base.values, dtype)[index].reshape(shape)
    step = base.values[1] - base.values[0]
    return (base.values[0] + step * sum(planes)).astype(dtype).reshape(shape)


def _stored(base: PackedBase, shape: tuple[int, ...]) -> PackedBase:
    """`base` with a plane of zeros where it has none, which no result depends on."""
    if base.words is not None:
        return base
    return replace(base, words=jnp.zeros((1, word_count(math.prod(shape[:-1])), shape[-1]), jnp.uint32))


def multiplies_on_bits(values: Values, kernel_values: Values) -> bool:
    """Whether two code sets are multiplied on packed bits, and not as numbers."""
    sets = affine(values), affine(kernel_values)
    return None not in sets and sets[0].planes * sets[1].planes <= MOST_PLANE_PRODUCTS


def _checked(x: Array, channels: int) -> Array:
    """x, the inputs of a kernel of so many channels: in whole words a wrong number would not show."""
    if x.dtype != jnp.uint32 and x.shape[-1] != channels:
        raise ValueError(f"`x` (of shape {x.shape}) must have the {channels} channels of the kernel as its last axis")
    return x


def input_words(x: Array, values: Values) -> list[UInt32[Array, "... words"]]:
    """The planes of activations, packed along the channels; words that are packed already are their only plane."""
    return [x] if x.dtype == jnp.uint32 else [pack(plane) for plane in bit_planes(x, values)]


@check_arrays
def dense_product(
    x: Num[Array, "batch inputs"], base: PackedBase, *, values: Values, shape: tuple[int, int]
) -> Int32[Array, "batch features"]:
    """x @ codes of `base`, exact.

    Args:
      x: (batch, inputs) codes of `values`, or uint32 words of one plane.
      base: of a kernel of `shape`.

    Raises:
      ValueError: if x has another number of inputs than the kernel.
    """
    planes = input_words(_checked(x, shape[0]), values)
    return _product(planes, _stored(base, shape), values, shape[0])


@check_arrays
def conv_product(
    x: Num[Array, "batch *spatial channels"],
    base: PackedBase,
    *,
    values: Values,
    shape: tuple[int, ...],
    geometry: Geometry,
    pad_value: int,
) -> Int32[Array, "batch *out features"]:
    """Convolution of codes with the codes of `base`, exact at the borders and between spread pixels too.

    Args:
      x: codes of `values`, channels last, or uint32 words of one plane.
      base: of a kernel of `shape`: (*spatial, channels / groups, features).
      geometry: of the kernel's windows.
      pad_value: what the padding counts as.

    Raises:
      ValueError: if x has another number of channels than the kernel.
    """
    base, channels, groups = _stored(base, shape), shape[-2], geometry.groups
    x = _checked(x, channels * groups)
    if groups == 1:
        return _conv_product(input_words(x, values), base, values, shape, geometry, pad_value)
    # One group after the other, in a program of one.
    planes = [jnp.moveaxis(plane, -2, 0) for plane in _words_by_group(x, values, channels, groups)]
    words = jnp.moveaxis(base.words.reshape(*base.words.shape[:2], groups, -1), 2, 0)
    one_shape = (*shape[:-1], shape[-1] // groups)
    group = lambda operands: _conv_product(
        operands[0], replace(base, words=operands[1]), values, one_shape, geometry, pad_value
    )
    y = jnp.moveaxis(jax.lax.map(group, (planes, words)), 0, -2)
    return y.reshape(*y.shape[:-2], shape[-1])


def _words_by_group(x: Array, values: Values, channels: int, groups: int) -> list[UInt32[Array, "... groups words"]]:
    """The planes of activations, each group's channels packed for themselves."""
    if x.dtype != jnp.uint32:
        return input_words(x.reshape(*x.shape[:-1], groups, channels), values)
    if channels % WORD_BITS == 0:
        return [x.reshape(*x.shape[:-1], groups, channels // WORD_BITS)]
    return [pack(unpack(x, groups * channels).reshape(*x.shape[:-1], groups, channels))]


def _conv_product(
    planes: Sequence[Array],
    base: PackedBase,
    values: Values,
    shape: tuple[int, ...],
    geometry: Geometry,
    pad_value: int,
) -> Int32[Array, "batch *out features"]:
    *kernel_size, channels, features = shape
    (batch, *size, _), kernel_size = planes[0].shape, tuple(kernel_size)
    rows = [patch_words(plane, channels, kernel_size, geometry) for plane in planes]
    out = out_shape(size, kernel_size, geometry)
    added = None
    # Words outside are 0, the first code.
    for value, taps in zip((pad_value, 0), outside(size, kernel_size, geometry)):
        if value != values[0] and taps.any():
            sums = (value - values[0]) * _border_sums(base, kernel_size, channels, taps)
            added = sums if added is None else added + sums
    return _product(rows, base, values, math.prod(shape[:-1]), added).reshape(batch, *out, features)


def _border_sums(base: PackedBase, kernel_size: Sizes, channels: int, beyond: np.ndarray) -> Array:
    """For every pixel the sum of the codes of the kernel's taps that lie outside the image or between its pixels."""
    form = affine(base.values)
    signs = sum(2**k * border_sums(words, kernel_size, channels, beyond) for k, words in enumerate(base.words))
    constant = form.constant * channels * beyond.sum(1, dtype=np.int32)[:, None]
    return (constant + form.step * signs) // form.divisor


def _product(
    rows: Sequence[Rows], base: PackedBase, values: Values, size: int, added: Array | None = None
) -> Int32[Array, "M features"]:
    """The sum over the fan-in, by the formula at the head of this file; rows[m] are the words of plane m.

    Args:
      added: (rows, features), what is added to the sums, repeated along M.
    """
    x, w = affine(values), affine(base.values)
    step, divisor = x.step * w.step, x.divisor * w.divisor
    columns = [plane if isinstance(plane, Sequence) else plane.T for plane in rows]
    pairs = [(2 ** (m + k), a, b) for m, a in enumerate(columns) for k, b in enumerate(base.words)]
    if len(pairs) == divisor == 1 and not x.constant and not w.constant:
        ((_, a, b),) = pairs
        return affine_counts(a, b, added, constant=step * size, factor=-2 * step)
    y = step * sum(weight * affine_counts(a, b, constant=size, factor=-2) for weight, a, b in pairs)
    if w.constant:
        y = y + w.constant * x.step * sum(2**m * _signs(_columns(a), size) for m, a in enumerate(rows))[:, None]
    if x.constant:
        y = y + x.constant * w.step * sum(2**k * _signs(list(b), size) for k, b in enumerate(base.words))[None]
    y = y + x.constant * w.constant * size
    return add_rows(y // divisor if divisor > 1 else y, added)


def _columns(rows: Rows) -> list[Array]:
    return rows if isinstance(rows, Sequence) else list(rows.T)


def _signs(words: list[Array], size: int) -> Int32[Array, "..."]:
    """The sum of a plane's signs over the fan-in."""
    return 2 * sum(jax.lax.population_count(word).astype(jnp.int32) for word in words) - size

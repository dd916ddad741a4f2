r"""Matrix products of two-valued codes from their packed bits.

With bit 1 for +1 and bit 0 for -1, a dot product of n codes is n - 2 popcount(a xor b).  On CPU the counts come from
the bits themselves, by a schedule that :data:`RULES` chooses for the shape; on GPU and TPU from the exact product of
the codes as int8 on matrix units, a choice that rests on those units' known speed and was not measured.

On CPUs with AVX-512 the outermost `jax.jit` gains from ``compiler_options=WIDE_VECTORS``.
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, UInt32

from bnn_jax.bitops.bits import WORD_BITS, require_words, unpack, word_count

WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}
"""Compiler options with which most counts take 0.5 to 0.8 of the time on AVX-512; XLA's default is 256 bits."""

Rows: TypeAlias = UInt32[Array, "M words"] | Sequence[UInt32[Array, "M"]]
Columns: TypeAlias = UInt32[Array, "words M"] | Sequence[UInt32[Array, "M"]]


class Schedule(NamedTuple):
    """How the words are summed on CPU.

    Attributes:
      step: words summed in one expression, few enough for their rows to share the first-level cache; 0 is all words.
      tile: columns that are summed together when the words come in steps; 0 is all columns.
    """

    step: int
    tile: int


class Rule(NamedTuple):
    """The schedule of the products within its bounds."""

    most_words: float
    most_columns: float
    schedule: Schedule


ANY = float("inf")

# The first rule that fits.  results/benchmark_packed.json holds the measurements, on two cores with AVX-512.
RULES = (
    Rule(36, 256, Schedule(step=0, tile=0)),
    Rule(ANY, 512, Schedule(step=12, tile=0)),
    # Longer rows share cache sets, each of which keeps twelve lines.
    Rule(ANY, 1024, Schedule(step=8, tile=0)),
    Rule(ANY, ANY, Schedule(step=8, tile=128)),
)


def schedule_of(words: int, columns: int) -> Schedule:
    """What :data:`RULES` say of a product over `words` words with `columns` columns.

    >>> schedule_of(words=18, columns=64)
    Schedule(step=0, tile=0)
    """
    return next(r.schedule for r in RULES if words <= r.most_words and columns <= r.most_columns)


def _stacked(a: Columns) -> Array:
    return jnp.stack(a) if isinstance(a, Sequence) else a


def _expression(pairs: Iterable[tuple[Array, Array]]) -> Array:
    """The counts of a few words: x (M,) and y (N,) or in tiles (tiles, N) of each."""
    terms = (lax.population_count(x.reshape(*[1] * (y.ndim - 1), -1, 1) ^ y[..., None, :]) for x, y in pairs)
    return sum(terms).astype(jnp.int32)


def _loop(a: Array, b: Array, step: int) -> Array:
    """`step` words at a time, each sliced for itself: a slice of several would be copied."""
    first = len(a) % step or step
    counts = _expression(zip(a[:first], b[:first]))

    def add(i, counts):
        words = (first + i * step + t for t in range(step))
        return counts + _expression([lax.dynamic_index_in_dim(x, k, keepdims=False) for x in (a, b)] for k in words)

    return lax.fori_loop(0, (len(a) - first) // step, add, counts)


def scheduled_counts(a: Columns, b: UInt32[Array, "words N"], schedule: Schedule) -> Int32[Array, "M N"]:
    """The counts of :func:`xor_counts` from bits, by the schedule given."""
    step, tile = schedule
    if not step or len(a) <= step:
        return _expression(zip(a, b))
    a = _stacked(a)
    if not tile:
        return _loop(a, b, step)
    columns = b.shape[1]
    tiles = -(-columns // tile)
    b = lax.pad(b, jnp.uint32(0), ((0, 0, 0), (0, tiles * tile - columns, 0)))
    counts = _loop(a, b.reshape(len(b), tiles, tile), step)
    return counts.swapaxes(0, 1).reshape(-1, tiles * tile)[:, :columns]


def unit_counts(a: Columns, b: Array) -> Int32[Array, "M N"]:
    """The counts of :func:`xor_counts` from an exact product of int8 codes, for machines with matrix units."""
    size = b.shape[0] * WORD_BITS
    x, y = (unpack(words, size, 0).astype(jnp.int8) * 2 - 1 for words in (_stacked(a), b))
    product = lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return (size - product) // 2


def xor_counts(a: Rows, b: UInt32[Array, "words N"]) -> Int32[Array, "M N"]:
    r"""In how many bits every row of `a` differs from every column of `b`.

    counts[m,n] = sum_k popcount(a[m,k] xor b[k,n])

    Args:
      a: (M, words), or its columns as a sequence of at least one (M,) array.

    Raises:
      ValueError: if the words are not uint32, their numbers differ or there are none.
    """
    columns = a if isinstance(a, Sequence) else a.T
    for words in columns if isinstance(a, Sequence) else [a]:
        require_words("a", words)
    require_words("b", b)
    if len(columns) != b.shape[0]:
        raise ValueError(f"`a` ({len(columns)} words a row) must have as many words as `b` has rows (={b.shape[0]})")
    if not b.shape[0]:
        raise ValueError("`b` (no words) must have at least one row")
    schedule = schedule_of(*b.shape)
    return lax.platform_dependent(columns, b, cpu=lambda a, b: scheduled_counts(a, b, schedule), default=unit_counts)


def binary_dot_general(
    lhs: UInt32[Array, "..."],
    rhs: UInt32[Array, "..."],
    dimension_numbers: tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]],
    *,
    size: int,
) -> Int32[Array, "..."]:
    r"""`jax.lax.dot_general` of codes -1/+1 that are packed along the contracting axis.

    y = sum_i x_i w_i = size - 2 popcount(x xor w) over the contracting axis; exact

    Args:
      lhs, rhs: words; bits beyond `size` are 0 in both.
      dimension_numbers: as those of `lax.dot_general`, with one contracting axis each.
      size: how many codes are contracted.

    Returns:
      int32, the batch axes, then the free ones of `lhs`, then those of `rhs`.

    Raises:
      ValueError: if the words are not uint32, the contracting axes are not one each of ceil(size / 32) words, or the
        batch axes differ.

    >>> import jax.numpy as jnp
    >>> from bnn_jax.bitops.bits import pack
    >>> x = pack(jnp.array([[True, True, False]]))
    >>> binary_dot_general(x, x, (((1,), (1,)), ((), ())), size=3)
    Array([[3]], dtype=int32)
    """
    require_words("lhs", lhs)
    require_words("rhs", rhs)
    (left, right), (left_batch, right_batch) = dimension_numbers
    if len(left) != 1 or len(right) != 1:
        raise ValueError(f"`dimension_numbers` (={dimension_numbers}) must contract one axis, the packed one")
    count = word_count(size)
    if (lhs.shape[left[0]], rhs.shape[right[0]]) != (count, count):
        raise ValueError(
            f"`size` (={size}) takes {count} words along the contracting axes; "
            f"got {lhs.shape[left[0]]} in `lhs` and {rhs.shape[right[0]]} in `rhs`"
        )
    batch = [lhs.shape[i] for i in left_batch]
    if batch != [rhs.shape[i] for i in right_batch]:
        raise ValueError(f"`dimension_numbers` (={dimension_numbers}) must pair batch axes of equal sizes")
    left_free = [i for i in range(lhs.ndim) if i not in (*left_batch, *left)]
    right_free = [i for i in range(rhs.ndim) if i not in (*right_batch, *right)]
    rows, columns = [lhs.shape[i] for i in left_free], [rhs.shape[i] for i in right_free]
    a = lhs.transpose(*left_batch, *left_free, *left).reshape(prod(batch), prod(rows), count)
    b = rhs.transpose(*right_batch, *right, *right_free).reshape(prod(batch), count, prod(columns))
    counts = jax.vmap(xor_counts)(a, b) if batch else xor_counts(a[0], b[0])
    return (size - 2 * counts).reshape(*batch, *rows, *columns)

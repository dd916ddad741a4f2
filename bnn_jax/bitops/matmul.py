r"""Matrix products of two-valued codes from their packed bits.

With bit 1 for +1 and bit 0 for -1, a dot product of n codes is n - 2 popcount(a xor b).  On CPU the counts come from
the bits themselves, in blocks that :data:`TILINGS` chooses for the shape; on GPU and TPU from the exact product of
the codes as int8 on matrix units, a choice that rests on those units' known speed and was not measured.

On CPUs with AVX-512 the outermost `jax.jit` gains from ``compiler_options=bnn_jax.compilation.packed_options()``.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Int32, UInt32

from bnn_jax.bitops.bits import WORD_BITS, unpack
from bnn_jax.checks import check_arrays, require

Rows: TypeAlias = UInt32[Array, "M words"] | Sequence[UInt32[Array, "M"]]
Columns: TypeAlias = UInt32[Array, "words M"] | Sequence[UInt32[Array, "M"]]


class Tiling(NamedTuple):
    """How the CPU cuts a product of bits into blocks, and for which products.

    Attributes:
      max_words, max_columns: the largest product that is cut so.
      block_words: words summed in one expression, few enough for their rows to share the first-level cache; 0 is all.
      block_columns: columns summed together where the words come in blocks; 0 is all.
    """

    max_words: float
    max_columns: float
    block_words: int
    block_columns: int


ANY = float("inf")

# The first that is large enough.  results/benchmark_packed.json holds the measurements, on two cores with AVX-512.
TILINGS = (
    Tiling(36, 256, block_words=0, block_columns=0),
    Tiling(ANY, 512, block_words=12, block_columns=0),
    # Longer rows share cache sets, each of which keeps twelve lines.
    Tiling(ANY, 1024, block_words=8, block_columns=0),
    Tiling(ANY, ANY, block_words=8, block_columns=128),
)


def tiling_of(words: int, columns: int) -> Tiling:
    """The tiling of a product over `words` words with `columns` columns.

    >>> tiling_of(words=18, columns=512).block_words
    12
    """
    return next(tiling for tiling in TILINGS if words <= tiling.max_words and columns <= tiling.max_columns)


def _stacked(a: Columns) -> Array:
    return jnp.stack(a) if isinstance(a, Sequence) else a


def _sum_of_counts(pairs: Iterable[tuple[Array, Array]]) -> Array:
    """The counts of a few words: x (M,) and y (N,) or in tiles (tiles, N) of each."""
    terms = (lax.population_count(x.reshape(*[1] * (y.ndim - 1), -1, 1) ^ y[..., None, :]) for x, y in pairs)
    return sum(terms).astype(jnp.int32)


@partial(jax.jit, static_argnames=("constant", "factor"))
def _at_once(a: Columns, b: Array, added: Array | None, *, constant: int, factor: int) -> Array:
    return _affine(_sum_of_counts(zip(a, b)), added, constant=constant, factor=factor)


def _affine(counts: Array, added: Array | None, *, constant: int, factor: int) -> Array:
    return add_rows(constant + factor * counts, added)


def add_rows(y: Int32[Array, "M N"], added: Int32[Array, "rows N"] | None) -> Int32[Array, "M N"]:
    """y with `added` repeated along M, a multiple of its rows; y itself for None."""
    return y if added is None else (y.reshape(-1, *added.shape) + added[None]).reshape(y.shape)


def _counts_by_blocks(a: Array, b: Array, block: int) -> Array:
    """The counts from `block` words at a time, each sliced for itself: a slice of several would be copied."""
    first = len(a) % block or block
    counts = _sum_of_counts(zip(a[:first], b[:first]))

    def add(i, counts):
        words = (first + i * block + t for t in range(block))
        return counts + _sum_of_counts([lax.dynamic_index_in_dim(x, k, keepdims=False) for x in (a, b)] for k in words)

    return lax.fori_loop(0, (len(a) - first) // block, add, counts)


def tiled_counts(
    a: Columns,
    b: UInt32[Array, "words N"],
    added: Int32[Array, "rows N"] | None = None,
    *,
    constant: int = 0,
    factor: int = 1,
    block_words: int,
    block_columns: int,
) -> Int32[Array, "M N"]:
    """What :func:`affine_counts` returns, from bits, in the blocks of a :class:`Tiling`."""
    if not block_words or len(a) <= block_words:
        # A call that XLA leaves alone: fused into a pooling or packing that follows, every window would count again.
        with set_xla_metadata(inlineable="false"):
            return _at_once(a, b, added, constant=constant, factor=factor)
    a = _stacked(a)
    if not block_columns:
        return _affine(_counts_by_blocks(a, b, block_words), added, constant=constant, factor=factor)
    columns = b.shape[1]
    tiles = -(-columns // block_columns)
    b = lax.pad(b, jnp.uint32(0), ((0, 0, 0), (0, tiles * block_columns - columns, 0)))
    counts = _counts_by_blocks(a, b.reshape(len(b), tiles, block_columns), block_words)
    counts = counts.swapaxes(0, 1).reshape(-1, tiles * block_columns)[:, :columns]
    return _affine(counts, added, constant=constant, factor=factor)


def matrix_unit_counts(a: Columns, b: Array) -> Int32[Array, "M N"]:
    """The counts of :func:`xor_counts` from an exact product of int8 codes, for machines with matrix units."""
    size = b.shape[0] * WORD_BITS
    x, y = (unpack(words, size, 0).astype(jnp.int8) * 2 - 1 for words in (_stacked(a), b))
    product = lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return (size - product) // 2


@check_arrays
def xor_counts(a: Rows, b: UInt32[Array, "words N"]) -> Int32[Array, "M N"]:
    r"""In how many bits every row of `a` differs from every column of `b`.

    counts[m,n] = sum_k popcount(a[m,k] xor b[k,n])

    Args:
      a: (M, words), or its columns as a sequence of at least one (M,) array.

    Raises:
      TypeError: if the words are not uint32.
      ValueError: if they have another rank, their numbers differ or there are none.
    """
    columns = a if isinstance(a, Sequence) else a.T
    if isinstance(a, Sequence):
        dtypes = {words.dtype.name for words in a}
        require("a", sorted(dtypes), dtypes <= {"uint32"}, "must be columns of uint32")
    if len(columns) != b.shape[0]:
        raise ValueError(f"`a` ({len(columns)} words a row) must have as many words as `b` has rows (={b.shape[0]})")
    if not b.shape[0]:
        raise ValueError("`b` (no words) must have at least one row")
    return affine_counts(columns, b)


def affine_counts(
    a: Columns,
    b: UInt32[Array, "words N"],
    added: Int32[Array, "rows N"] | None = None,
    *,
    constant: int = 0,
    factor: int = 1,
) -> Int32[Array, "M N"]:
    """constant + factor * counts of :func:`xor_counts` + `added`, repeated along M; in one pass where that is faster.

    Args:
      a: the columns of the rows, as a sequence or an array (words, M).
    """
    tiling, numbers = tiling_of(*b.shape), {"constant": constant, "factor": factor}
    from_bits = partial(tiled_counts, block_words=tiling.block_words, block_columns=tiling.block_columns, **numbers)
    on_matrix_units = lambda a, b, added: _affine(matrix_unit_counts(a, b), added, **numbers)
    return lax.platform_dependent(a, b, added, cpu=from_bits, default=on_matrix_units)

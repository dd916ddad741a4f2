"""Counts of differing bits: equal for every tiling, on matrix units, exported; bad words are refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from bnn_jax.bitops import matmul
from bnn_jax.bitops.matmul import xor_counts


def counts_of(m, words, n):
    a, b = (np.random.default_rng(i).integers(0, 2**32, s, np.uint32) for i, s in enumerate([(m, words), (words, n)]))
    return jnp.asarray(a), jnp.asarray(b), np.bitwise_count(a[:, :, None] ^ b).sum(1)


def test_rows_may_come_as_a_sequence_of_columns():
    a, b, expected = counts_of(6, 3, 4)
    np.testing.assert_array_equal(jax.jit(xor_counts)(list(a.T), b), expected)
    np.testing.assert_array_equal(jax.jit(xor_counts)(a, b), expected)


# All words at once; blocks that leave none, one and two words over; that divide the columns and that do not.
TILINGS = [(0, 0), (9, 0), (3, 0), (5, 0), (4, 0), (3, 2), (4, 3), (5, 8)]


@pytest.mark.parametrize(("block_words", "block_columns"), TILINGS)
def test_every_tiling_counts_the_same(block_words, block_columns):
    a, b, expected = counts_of(5, 6, 4)
    count = partial(matmul.tiled_counts, block_words=block_words, block_columns=block_columns)
    np.testing.assert_array_equal(jax.jit(count)(a.T, b), expected)


def test_there_is_a_tiling_for_every_shape():
    for words in (1, 36, 37, 10**6):
        for columns in (1, 256, 257, 512, 513, 1024, 1025, 10**6):
            assert matmul.tiling_of(words, columns) in matmul.TILINGS


def test_the_product_on_matrix_units_counts_the_same():
    a, b, expected = counts_of(6, 3, 4)
    np.testing.assert_array_equal(jax.jit(matmul.matrix_unit_counts)(a.T, b), expected)
    np.testing.assert_array_equal(jax.jit(matmul.matrix_unit_counts)(list(a.T), b), expected)


def test_an_exported_product_takes_any_number_of_rows():
    rows = export.symbolic_shape("rows")[0]
    shapes = jax.ShapeDtypeStruct((rows, 40), jnp.uint32), jax.ShapeDtypeStruct((40, 5), jnp.uint32)
    exported = export.export(jax.jit(xor_counts), platforms=("cpu", "cuda"))(*shapes)
    a, b, expected = counts_of(3, 40, 5)
    np.testing.assert_array_equal(exported.call(a, b), expected)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices count on matrix units")
def test_what_pools_the_counts_does_not_count_again():
    words = 4
    a, b, expected = counts_of(64, words, 8)

    @jax.jit
    def pooled(a, b):
        counts = xor_counts(a, b).reshape(16, 4, 8)
        return counts.max(1), counts.sum(0)

    text = pooled.lower(a, b).compile().as_text()
    assert text.count(" popcnt(") == words
    most, total = pooled(a, b)
    np.testing.assert_array_equal(most, expected.reshape(16, 4, 8).max(1))
    np.testing.assert_array_equal(total, expected.reshape(16, 4, 8).sum(0))


def test_the_program_for_gpu_and_tpu_has_no_popcount():
    a, b = jax.ShapeDtypeStruct((64, 4), jnp.uint32), jax.ShapeDtypeStruct((4, 32), jnp.uint32)
    traced = jax.jit(xor_counts).trace(a, b)
    assert "popcnt" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "popcnt" in traced.lower(lowering_platforms=("cpu",)).as_text()


def words(*shape):
    return jnp.zeros(shape, jnp.uint32)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: xor_counts(words(2, 3), words(4, 5)), r"`b` .*\(of shape \(4, 5\)\) must be of shape \(words=3, N\)"),
        (lambda: xor_counts([*words(3, 2)], words(4, 5)), r"`a` \(3 words a row\) must have as many .* rows \(=4\)"),
        (lambda: xor_counts([jnp.zeros(2)], words(1, 5)), r"`a` \(=\['float32'\]\) must be columns of uint32"),
        (lambda: xor_counts(words(2, 0), words(0, 5)), r"`b` \(no words\) must have at least one row"),
        (lambda: xor_counts(jnp.zeros((2, 3)), words(3, 5)), r"`a` of `xor_counts` must be a uint32 array"),
        (lambda: xor_counts(words(2, 3), jnp.zeros((3, 5))), r"`b` of `xor_counts` must be a uint32 array"),
    ],
)
def test_bad_input_is_refused(call, text):
    with pytest.raises((TypeError, ValueError), match=text):
        call()

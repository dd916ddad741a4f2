"""Matrix products of packed codes: equal to the integer product for every schedule, shape and order of axes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from bnn_jax.bitops import matmul
from bnn_jax.bitops.matmul import binary_dot_general, xor_counts


def random_codes(*shape, seed=0):
    return np.random.default_rng(seed).choice([-1, 1], shape)


def packed(codes, axis=-1):
    """Words along the axis, by an independent packer."""
    bits = np.moveaxis(codes > 0, axis, -1)
    bits = np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, -bits.shape[-1] % 32)])
    words = np.packbits(np.ascontiguousarray(bits), axis=-1, bitorder="little").view(np.uint32)
    return jnp.asarray(np.moveaxis(words, -1, axis))


PLAIN = (((1,), (0,)), ((), ()))

# One word, one row, one column, no row, no column, and both sides of the rules' bounds.
SHAPES = [
    (3, 5, 4),
    (1, 1, 1),
    (1, 300, 7),
    (2, 33, 70),
    (1, 1152, 2),
    (7, 1185, 5),
    (3, 64, 1030),
    (0, 40, 3),
    (3, 40, 0),
]


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_the_product_is_that_of_the_integers(m, k, n):
    x, w = random_codes(m, k), random_codes(k, n, seed=1)
    y = jax.jit(partial(binary_dot_general, dimension_numbers=PLAIN, size=k))(packed(x), packed(w, 0))
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, x @ w)


@pytest.mark.parametrize(
    ("lhs", "rhs", "dimension_numbers"),
    [
        ((3, 40), (40, 5), (((1,), (0,)), ((), ()))),
        ((40, 3), (5, 40), (((0,), (1,)), ((), ()))),
        ((2, 3, 40), (40, 5), (((2,), (0,)), ((), ()))),
        ((2, 3, 40), (2, 40, 5), (((2,), (1,)), ((0,), (0,)))),
        ((3, 2, 40, 4), (2, 5, 4, 40), (((2,), (3,)), ((1, 3), (0, 2)))),
        ((40,), (40,), (((0,), (0,)), ((), ()))),
    ],
)
def test_axes_are_those_of_lax_dot_general(lhs, rhs, dimension_numbers):
    (left, right), _ = dimension_numbers
    x, w = random_codes(*lhs), random_codes(*rhs, seed=1)
    product = jax.jit(partial(binary_dot_general, dimension_numbers=dimension_numbers, size=40))
    y = product(packed(x, left[0]), packed(w, right[0]))
    expected = lax.dot_general(x.astype(np.float32), w.astype(np.float32), dimension_numbers)
    assert y.shape == expected.shape
    np.testing.assert_array_equal(y, expected)


def test_rows_may_come_as_a_sequence_of_columns():
    a, b = packed(random_codes(6, 90)), packed(random_codes(90, 4), 0)
    np.testing.assert_array_equal(jax.jit(xor_counts)(list(a.T), b), jax.jit(xor_counts)(a, b))


# All words at once; steps that leave none, one and two words over; tiles that divide the columns and that do not.
SCHEDULES = [(0, 0), (9, 0), (3, 0), (5, 0), (4, 0), (3, 2), (4, 3), (5, 8)]


def counts_of(m, words, n):
    a, b = (np.random.default_rng(i).integers(0, 2**32, s, np.uint32) for i, s in enumerate([(m, words), (words, n)]))
    return jnp.asarray(a), jnp.asarray(b), np.bitwise_count(a[:, :, None] ^ b).sum(1)


@pytest.mark.parametrize(("step", "tile"), SCHEDULES)
def test_every_schedule_counts_the_same(step, tile):
    a, b, expected = counts_of(5, 6, 4)
    counts = jax.jit(matmul.scheduled_counts, static_argnums=2)(a.T, b, matmul.Schedule(step, tile))
    np.testing.assert_array_equal(counts, expected)


def test_the_rules_cover_every_shape():
    for words in (1, 36, 37, 10**6):
        for columns in (1, 256, 257, 512, 513, 1024, 1025, 10**6):
            assert matmul.schedule_of(words, columns) in {rule.schedule for rule in matmul.RULES}


def test_the_product_on_matrix_units_counts_the_same():
    a, b, expected = counts_of(6, 3, 4)
    np.testing.assert_array_equal(jax.jit(matmul.unit_counts)(a.T, b), expected)
    np.testing.assert_array_equal(jax.jit(matmul.unit_counts)(list(a.T), b), expected)


def test_an_exported_product_takes_any_number_of_rows():
    rows = export.symbolic_shape("rows")[0]
    shapes = jax.ShapeDtypeStruct((rows, 40), jnp.uint32), jax.ShapeDtypeStruct((40, 5), jnp.uint32)
    exported = export.export(jax.jit(xor_counts), platforms=("cpu", "cuda"))(*shapes)
    a, b, expected = counts_of(3, 40, 5)
    np.testing.assert_array_equal(exported.call(a, b), expected)


def test_the_program_for_gpu_and_tpu_has_no_popcount():
    a, b = jax.ShapeDtypeStruct((64, 4), jnp.uint32), jax.ShapeDtypeStruct((4, 32), jnp.uint32)
    traced = jax.jit(xor_counts).trace(a, b)
    assert "popcnt" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "popcnt" in traced.lower(lowering_platforms=("cpu",)).as_text()


def words(*shape):
    return jnp.zeros(shape, jnp.uint32)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: xor_counts(words(2, 3), words(4, 5)), r"`a` \(3 words a row\) must have as many .* rows \(=4\)"),
        (lambda: xor_counts(words(2, 0), words(0, 5)), r"`b` \(no words\) must have at least one row"),
        (lambda: xor_counts(jnp.zeros((2, 3)), words(3, 5)), r"`a` \(dtype=float32\) must be packed words"),
        (lambda: xor_counts(words(2, 3), jnp.zeros((3, 5))), r"`b` \(dtype=float32\) must be packed words"),
        (
            lambda: binary_dot_general(words(2, 3), words(3, 5), PLAIN, size=97),
            r"`size` \(=97\) takes 4 words along the contracting axes; got 3 in `lhs` and 3 in `rhs`",
        ),
        (
            lambda: binary_dot_general(words(2, 3), words(2, 3), (((0, 1), (0, 1)), ((), ())), size=64),
            "must contract one axis, the packed one",
        ),
        (
            lambda: binary_dot_general(words(2, 1, 3), words(3, 3, 5), (((2,), (1,)), ((0,), (0,))), size=96),
            "must pair batch axes of equal sizes",
        ),
        (
            lambda: binary_dot_general(jnp.zeros((2, 3)), words(3, 5), PLAIN, size=96),
            r"`lhs` \(dtype=float32\) must be packed words",
        ),
    ],
)
def test_bad_input_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()

"""Packing: the layout bit by bit, round trips for every length, pooling against the maximum of codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.bitops import bits as packing
from bnn_jax.layers.pooling import max_pool as real_max_pool

pack = jax.jit(packing.pack, static_argnums=1)
unpack = jax.jit(packing.unpack, static_argnums=(1, 2))
max_pool = jax.jit(packing.max_pool, static_argnums=1, static_argnames=("strides", "padding"))


def random_bits(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2, shape).astype(bool)


def words_in_python(bits):
    """One row of bits by integer arithmetic, least significant first."""
    number = sum(1 << i for i, bit in enumerate(bits) if bit)
    return [number >> 32 * w & 0xFFFFFFFF for w in range((len(bits) + 31) // 32)]


@pytest.mark.parametrize("size", [*range(1, 34), 64, 65, 100])
def test_the_layout_is_least_significant_bit_first_and_unpack_inverts_it(size):
    bits = random_bits(3, size, seed=size)
    words = np.asarray(pack(bits))
    assert words.dtype == np.uint32
    assert words.tolist() == [words_in_python(row) for row in bits]
    np.testing.assert_array_equal(unpack(words, size), bits)


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_any_axis_can_be_packed(axis):
    shape = [2, 3, 4]
    shape[axis] = 33
    bits = random_bits(*shape)
    words = pack(bits, axis)
    shape[axis] = 2
    assert words.shape == tuple(shape)
    np.testing.assert_array_equal(np.moveaxis(words, axis, -1), pack(np.moveaxis(bits, axis, -1)))
    np.testing.assert_array_equal(unpack(words, 33, axis), bits)


def test_pack_of_an_axis_without_elements_has_no_words():
    assert pack(jnp.zeros((3, 0), bool)).shape == (3, 0)
    assert unpack(jnp.zeros((3, 0), jnp.uint32), 0).shape == (3, 0)


@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((2, 2), None, ((0, 0), (0, 0))),
        ((3, 2), (2, 1), ((0, 0), (0, 0))),
        ((3, 3), (2, 2), ((1, 1), (1, 1))),
        ((3, 3), (2, 2), ((0, 1), (1, 0))),
        ((2, 2), (3, 3), ((0, 0), (0, 0))),
    ],
)
def test_max_pool_is_the_maximum_of_the_codes(window, strides, padding):
    bits = random_bits(2, 7, 6, 40)
    pooled = max_pool(pack(bits), window, strides=strides, padding=padding)
    expected = real_max_pool(jnp.asarray(np.where(bits, 1.0, -1.0)), window, strides=strides, padding=padding)
    np.testing.assert_array_equal(unpack(pooled, 40), expected > 0)


def test_max_pool_counts_padding_as_the_smaller_code():
    pooled = max_pool(jnp.zeros((1, 1, 1, 1), jnp.uint32), (2, 2), padding=((1, 1), (1, 1)), strides=(1, 1))
    assert pooled.shape == (1, 2, 2, 1)
    assert not pooled.any()


def test_max_pool_of_an_image_smaller_than_its_window_is_empty():
    words = jnp.zeros((2, 1, 3, 1), jnp.uint32)
    assert max_pool(words).shape == (2, 0, 1, 1) == real_max_pool(words.astype(jnp.float32)).shape


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: pack(jnp.ones(3)), r"`bits` of `pack` must be a bool array; got float32; compare"),
        (lambda: unpack(jnp.ones(1, jnp.int32), 3), r"`words` of `unpack` must be a uint32 array; got int32; pack"),
        (lambda: unpack(jnp.ones(2, jnp.uint32), 3), r"`size` \(=3\) takes 1 words; got 2 along the axis"),
        (lambda: max_pool(jnp.ones((1, 2, 2, 1))), r"`words` of `max_pool` must be a uint32 array; got float32"),
    ],
)
def test_bad_input_is_refused(call, text):
    with pytest.raises((TypeError, ValueError), match=text):
        call()


def test_pack_is_the_same_without_jit_and_under_vmap():
    bits = jnp.asarray(random_bits(4, 5, 45))
    words = pack(bits, 1)
    np.testing.assert_array_equal(packing.pack(bits, 1), words)
    np.testing.assert_array_equal(jax.vmap(lambda row: pack(row, 0))(bits), words)

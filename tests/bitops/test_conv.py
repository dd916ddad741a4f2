"""The windows of packed convolutions: the bits of patches, the sums of taps, the borders."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.bitops.conv import Geometry, outside, patch_words, tap_sums


def random_codes(*shape):
    return np.random.default_rng(0).choice([-1.0, 1.0], shape)


def pack_in_numpy(bits):
    """Words of the last axis, by an independent packer."""
    bits = np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, -bits.shape[-1] % 32)])
    return np.packbits(np.ascontiguousarray(bits), axis=-1, bitorder="little").view(np.uint32)


@pytest.mark.parametrize("channels", [1, 3, 16, 33, 64])
def test_patch_words_join_the_pixels_without_gaps(channels):
    x = random_codes(2, 4, 5, channels) > 0
    geometry = Geometry((1, 2), ((1, 0), (0, 1)), (1, 1))
    patches_of = jax.jit(lambda words: patch_words(words, channels, (3, 2), geometry))
    words = patches_of(pack_in_numpy(x))
    padded = np.pad(x, ((0, 0), (1, 0), (0, 1), (0, 0)))
    patches = [padded[b, i : i + 3, j : j + 2].ravel() for b in range(2) for i in range(3) for j in range(0, 5, 2)]
    np.testing.assert_array_equal(np.stack(words, 1), pack_in_numpy(np.stack(patches)))


@pytest.mark.parametrize("channels", [1, 5, 32, 33, 96])
def test_tap_sums_are_the_sums_over_the_channels(channels):
    kernel = random_codes(2, 3, channels, 4)
    sums = jax.jit(partial(tap_sums, kernel_size=(2, 3), channels=channels))(
        pack_in_numpy(kernel.reshape(-1, 4).T > 0).T
    )
    np.testing.assert_array_equal(sums, kernel.sum(2).reshape(6, 4))


@pytest.mark.parametrize(
    ("strides", "padding", "dilation"), [((1, 1), ((1, 1), (1, 1)), (1, 1)), ((2, 1), ((3, 0), (-1, 2)), (1, 2))]
)
def test_outside_are_the_taps_of_pixels_that_the_image_has_not(strides, padding, dilation):
    taps, gaps = outside((6, 7), (3, 3), Geometry(strides, padding, dilation))
    assert not gaps.any()
    (top, bottom), (left, right) = padding
    rows = range(-top, 6 + bottom - 2 * dilation[0], strides[0])
    columns = range(-left, 7 + right - 2 * dilation[1], strides[1])
    expected = [
        [not (0 <= row + i * dilation[0] < 6 and 0 <= column + j * dilation[1] < 7) for i in range(3) for j in range(3)]
        for row in rows
        for column in columns
    ]
    np.testing.assert_array_equal(taps, expected)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (jnp.zeros((1, 4, 4, 2), jnp.uint32), r"`channels` \(=32\) take 1 words; got 2 in `lhs`"),
        (jnp.zeros((1, 4, 4, 1), jnp.int32), r"`lhs` of `patch_words` must be a uint32 array; got int32; pack"),
    ],
)
def test_bad_words_are_refused(words, text):
    with pytest.raises((TypeError, ValueError), match=text):
        patch_words(words, 32, (3, 3), Geometry((1, 1), ((1, 1), (1, 1)), (1, 1)))

"""Augmentation against loops over NumPy arrays, and the frequencies of what it draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.data import augment, mixup, normalize, random_area_crop, random_crop, random_flip

SHAPE = (6, 5, 7, 3)


def numbered(count=6, height=5, width=7, channels=3):
    """Images whose pixels all differ from each other and from 0, so that each can be traced."""
    return 1 + np.arange(count * height * width * channels, dtype=np.int32).reshape(count, height, width, channels)


def traced_offsets(images, cropped, padding):
    """The window of each cropped image, from where one of its pixels lay in the original."""
    offsets = []
    for original, result in zip(np.asarray(images), np.asarray(cropped)):
        i, j = np.argwhere(result[..., 0])[0]
        i0, j0 = np.argwhere(original[..., 0] == result[i, j, 0])[0]
        offsets.append((i0 - i + padding, j0 - j + padding))
    return np.array(offsets)


def test_normalize_equals_the_formula_in_double_precision():
    images = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
    mean, std = (125.3, 0.0, 255.0), (62.5, 1.0, 0.25)
    expected = np.empty(SHAPE)
    for c in range(3):
        expected[..., c] = (images[..., c].astype(np.float64) - mean[c]) / std[c]
    found = normalize(jnp.asarray(images), mean=mean, std=std)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_normalize_rounds_to_bfloat16_only_at_the_end():
    images = jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
    found = normalize(images, mean=(33.31,), std=(78.56,), dtype=jnp.bfloat16)
    expected = ((np.arange(256, dtype=np.float32) - np.float32(33.31)) / np.float32(78.56)).reshape(1, 16, 16, 1)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2.0**-8)


@pytest.mark.parametrize("wrong", ["mean", "std"])
def test_normalize_refuses_statistics_of_another_number_of_channels(wrong):
    statistics = {"mean": (1.0, 2.0, 3.0), "std": (1.0, 2.0, 3.0)} | {wrong: (1.0,)}
    with pytest.raises(ValueError, match=rf"`{wrong}` has shape \(1,\); it must be \(3,\), one for each channel"):
        normalize(jnp.zeros(SHAPE, jnp.uint8), **statistics)


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_a_crop_is_a_window_of_the_zero_padded_image(padding):
    images = numbered()
    cropped = random_crop(jax.random.key(padding), jnp.asarray(images), padding=padding)
    assert cropped.dtype == jnp.int32
    offsets = traced_offsets(images, cropped, padding)
    assert offsets.min() >= 0 and offsets.max() <= 2 * padding
    for image, found, (a, b) in zip(images, np.asarray(cropped), offsets):
        padded = np.zeros((5 + 2 * padding, 7 + 2 * padding, 3), np.int32)
        padded[padding : padding + 5, padding : padding + 7] = image
        np.testing.assert_array_equal(found, padded[a : a + 5, b : b + 7])


def test_crop_offsets_are_uniform_and_independent():
    """Each of the 81 windows within 5 standard deviations: a true uniform fails this with probability below 5e-5."""
    count, padding = 16200, 4
    image = numbered(1, 10, 10, 1)
    images = jnp.broadcast_to(jnp.asarray(image), (count, 10, 10, 1))
    cropped = np.asarray(random_crop(jax.random.key(0), images, padding=padding))
    # The pixel in the middle says which window it was.
    places = cropped[:, 5, 5, 0] - 1
    a, b = places // 10 - 5 + padding, places % 10 - 5 + padding
    cells = np.bincount(a * 9 + b, minlength=81)
    assert cells.shape == (81,)
    expected, deviation = count / 81, np.sqrt(count / 81 * (1 - 1 / 81))
    assert np.abs(cells - expected).max() < 5 * deviation


def test_a_flip_mirrors_whole_images_or_leaves_them():
    images = numbered(64)
    flipped = np.asarray(random_flip(jax.random.key(1), jnp.asarray(images)))
    kinds = set()
    for image, found in zip(images, flipped):
        mirrored = np.stack([image[:, 6 - j] for j in range(7)], axis=1)
        kinds.add("mirrored" if (found == mirrored).all() else "same" if (found == image).all() else "else")
    assert kinds == {"mirrored", "same"}


def test_half_of_the_images_are_flipped_independently():
    """Flips, and neighbours that agree, within 5 standard deviations of a half: probability below 2e-6 to fail."""
    count = 10_000
    images = jnp.broadcast_to(jnp.array([1, 2]).reshape(1, 1, 2, 1), (count, 1, 2, 1))
    mirrored = np.asarray(random_flip(jax.random.key(2), images))[:, 0, 0, 0] == 2
    assert abs(mirrored.sum() - count / 2) < 5 * np.sqrt(count) / 2
    assert abs((mirrored[1:] == mirrored[:-1]).sum() - count / 2) < 5 * np.sqrt(count) / 2


def test_augment_crops_and_flips_with_draws_of_their_own():
    """Each of 9 windows x 2 sides within 5 standard deviations: probability below 2e-5 to fail."""
    count = 3600
    image = numbered(1, 3, 3, 1)
    images = jnp.broadcast_to(jnp.asarray(image), (count, 3, 3, 1))
    found = np.asarray(augment(jax.random.key(3), images, padding=1, flip=True))[..., 0]
    padded = np.zeros((5, 5), np.int32)
    padded[1:4, 1:4] = image[0, :, :, 0]
    windows = [padded[a : a + 3, b : b + 3] for a in range(3) for b in range(3)]
    kinds = np.stack([view for window in windows for view in (window, window[:, ::-1])])
    counts = (found[:, None] == kinds[None]).all(axis=(2, 3)).sum(axis=0)
    assert counts.sum() == count
    assert np.abs(counts - count / 18).max() < 5 * np.sqrt(count / 18)


@pytest.mark.full
def test_an_area_crop_is_the_image_at_the_points_of_one_window():
    """On planes a i + b j, which bilinear resampling keeps: the window of each image follows from three pixels."""
    count, height, width = 400, 12, 16
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    images = jnp.asarray(np.stack([rows, columns], axis=-1)[None].repeat(count, axis=0), jnp.float32)
    found = np.asarray(random_area_crop(jax.random.key(0), images, smallest=0.25), np.float64)
    middle = found[:, height // 2, width // 2]
    scale = np.stack([found[:, 7, 8, 0] - middle[:, 0], found[:, 6, 9, 1] - middle[:, 1]], axis=1)
    begin = middle + 0.5 - scale * [height // 2 + 0.5, width // 2 + 0.5]
    for axis, (size, points) in enumerate(((height, rows), (width, columns))):
        at = begin[:, axis, None, None] + scale[:, axis, None, None] * (points + 0.5) - 0.5
        np.testing.assert_allclose(found[..., axis], np.clip(at, 0, size - 1), atol=1e-4)
        assert (begin[:, axis] > -1e-3).all()
        assert (begin[:, axis] + scale[:, axis] * size < size + 1e-3).all()
    area, shape = scale.prod(axis=1), scale[:, 1] / scale[:, 0]
    uncut = (scale < 0.999).all(axis=1)
    assert area[uncut].min() > 0.249
    assert 0.25 < area.min() < 0.3 < 0.9 < area.max() <= 1
    assert abs(area.mean() - 0.625) < 0.05
    assert 0.74 < shape[uncut].min() < 0.78 < 1.28 < shape[uncut].max() < 1.34
    assert abs(np.log(shape[uncut]).mean()) < 0.05


def test_each_image_is_mixed_with_another_by_one_share_of_the_batch():
    labels = jnp.arange(8)
    images = jnp.eye(8)[:, None, None, :]  # the mixture shows who is in it
    mixed, others, share = mixup(jax.random.key(0), images, labels, alpha=1.0)
    assert sorted(others.tolist()) == list(range(8)) != others.tolist()
    rows = np.eye(8)
    expected = float(share) * rows + (1 - float(share)) * rows[np.asarray(others)]
    np.testing.assert_allclose(mixed[:, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_of_mixing_have_the_moments_of_beta(alpha):
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)), within five standard errors of 4000 draws."""
    draw = lambda key: mixup(key, jnp.zeros((2, 1, 1, 1)), jnp.arange(2), alpha=alpha)[2]
    shares = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 4000)), np.float64)
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 5 * np.sqrt(variance / 4000)
    assert abs(((shares - 0.5) ** 2).mean() - variance) < 5 * 0.25 / np.sqrt(4000)
    assert ((shares >= 0) & (shares <= 1)).all()


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.bfloat16, jnp.float32])
def test_no_padding_and_no_flip_is_the_identity(dtype):
    images = jnp.asarray(numbered() % 200).astype(dtype)
    found = augment(jax.random.key(4), images, padding=0, flip=False)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, images)


def test_jit_and_vmap_change_nothing():
    images = jnp.asarray(numbered(12)).reshape(2, 6, 5, 7, 3)
    keys = jax.random.split(jax.random.key(5))
    one = lambda key, batch: augment(key, batch, padding=2, flip=True)
    expected = np.stack([one(key, batch) for key, batch in zip(keys, images)])
    np.testing.assert_array_equal(jax.vmap(one)(keys, images), expected)
    np.testing.assert_array_equal(jax.jit(one)(keys[0], images[0]), expected[0])
    assert not np.array_equal(expected[0] > 0, expected[1] > 0)


@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"`padding` \(=-1\) must not be negative; 0 switches the crop off"):
        augment(jax.random.key(0), jnp.zeros(SHAPE), padding=-1, flip=False)
    for function in (random_flip, lambda key, images: random_crop(key, images, padding=1)):
        with pytest.raises(ValueError, match=r"`images` .*\(of shape \(5, 7, 3\)\) must be of shape \(batch, h"):
            function(jax.random.key(0), jnp.zeros(SHAPE[1:]))
    with pytest.raises(ValueError, match=r"`smallest` \(=1\.5\) must be in \(0, 1\]; 1 takes the whole image"):
        augment(jax.random.key(0), jnp.zeros(SHAPE), padding=0, flip=False, smallest_area=1.5)
    with pytest.raises(ValueError, match=r"`alpha` \(=0\.0\) must be positive; 0\.2 is usual"):
        mixup(jax.random.key(0), jnp.zeros((2, 1, 1, 1)), jnp.arange(2), alpha=0.0)

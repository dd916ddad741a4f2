"""Preprocessing against Pillow's own calls and a scalar twin, random numbers against Philox written out, lighting."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from bnn_jax.data import PREPROCESSING, augment, lighting, normalize
from bnn_jax.data.augment import EIGENVALUES, EIGENVECTORS
from bnn_jax.data.imagenet import STD, random_box, uniform_draws


def picture(width, height, seed=0):
    """A smooth picture, so that a resized one depends on the filter."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def fixed(*values):
    """A stream of random numbers that are known."""
    values = iter(values)
    return lambda: next(values)


# -- random numbers


def philox_block(key, counter):
    """Philox 4x64 with ten rounds (Salmon et al., 2011), in Python's whole numbers."""
    mask, (k0, k1), (c0, c1, c2, c3) = 2**64 - 1, key, counter
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (second >> 64) ^ c1 ^ k0, second & mask, (first >> 64) ^ c3 ^ k1, first & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c0, c1, c2, c3


@pytest.mark.parametrize(("seed", "epoch", "index"), [(0, 0, 0), (7, 3, 1281166), (2**64 - 1, 2**63, 5)])
def test_draws_are_the_words_of_philox(seed, epoch, index):
    draw = uniform_draws(seed, epoch, index)
    # NumPy counts up before each block of four.
    words = [*philox_block((seed, 0), (1, epoch, index, 0)), *philox_block((seed, 0), (2, epoch, index, 0))]
    assert [draw() for _ in words] == [(word >> 11) / 2**53 for word in words]


def test_draws_of_examples_epochs_and_seeds_differ():
    streams = {uniform_draws(*which)() for which in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(streams) == 4


# -- crops


def test_a_box_is_computed_as_by_hand():
    # area 0.54 of 100 x 200, ratio 1: a square of side 103.9 -> 104 does not fit; then area 0.08, ratio 3/4.
    draw = fixed(0.5, 0.5, 0.0, 0.0, 0.5, 0.25)
    height, width = round(math.sqrt(1600 / 0.75)), round(math.sqrt(1600 * 0.75))
    assert (height, width) == (46, 35)
    assert random_box(100, 200, draw) == (int(0.5 * (100 - 46 + 1)), int(0.25 * (200 - 35 + 1)), 46, 35)


def test_boxes_lie_inside_and_are_distributed_as_said():
    """Each test fails for a true uniform with probability 1e-4."""
    height, width, count = 1000, 800, 4000
    boxes = np.array([random_box(height, width, uniform_draws(0, 0, i)) for i in range(count)])
    top, left, box_height, box_width = boxes.T
    assert top.min() >= 0 and left.min() >= 0 and box_height.min() >= 1 and box_width.min() >= 1
    assert (top + box_height).max() <= height and (left + box_width).max() <= width
    area, ratio = box_height * box_width / (height * width), box_width / box_height
    assert area.min() > 0.079 and ratio.min() > 0.74 and ratio.max() < 1.35
    small = area < 0.5  # Any shape of these fits, so that area and shape are uniform and independent.
    assert stats.kstest(area[small], stats.uniform(0.08, 0.42).cdf).pvalue > 1e-4
    logs = np.log(ratio[small])
    assert stats.kstest(logs, stats.uniform(math.log(3 / 4), 2 * math.log(4 / 3)).cdf).pvalue > 1e-4
    assert stats.kstest(top[small] / (height - box_height[small]), "uniform").pvalue > 1e-4
    assert stats.kstest(left[small] / (width - box_width[small]), "uniform").pvalue > 1e-4
    assert area.max() > 0.9


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (30, 300, (0, 130, 30, 40)),  # wider than 4/3
        (300, 30, (130, 0, 40, 30)),  # narrower than 3/4
        (1, 1, (0, 0, 1, 1)),
    ],
)
def test_what_no_box_fits_is_cropped_in_the_middle(height, width, box):
    assert random_box(height, width, fixed(*[1.0 - 2**-53] * 20)) == box


def test_random_resized_crop_is_crop_and_resize_of_pillow():
    image = picture(500, 375)
    draw, again = uniform_draws(1, 2, 3), uniform_draws(1, 2, 3)
    top, left, height, width = random_box(375, 500, again)
    expected = image.crop((left, top, left + width, top + height)).resize((224, 224), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(PREPROCESSING["random_resized_crop"].train(image, draw, 224), np.asarray(expected))


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [((500, 375), (341, 256), (58, 16)), ((375, 500), (256, 341), (16, 58)), ((100, 100), (256, 256), (16, 16))],
)
@pytest.mark.parametrize("name", ["short_side_crop", "random_resized_crop"])
def test_evaluation_takes_the_middle_of_the_shorter_side_at_256(name, size, resized, corner):
    image = picture(*size)
    left, top = corner
    whole = np.asarray(image.resize(resized, Image.Resampling.BILINEAR))
    found = PREPROCESSING[name].evaluate(image, 224)
    np.testing.assert_array_equal(found, whole[top : top + 224, left : left + 224])


def test_training_takes_a_window_at_a_random_place():
    image = picture(500, 375)
    whole = np.asarray(image.resize((341, 256), Image.Resampling.BILINEAR))
    found = PREPROCESSING["short_side_crop"].train(image, fixed(0.999, 0.5), 224)
    np.testing.assert_array_equal(found, whole[32:256, 59 : 59 + 224])
    square = np.asarray(image.resize((256, 256), Image.Resampling.BILINEAR))
    found = PREPROCESSING["resize_crop"].train(image, fixed(0.0, 0.999), 224)
    np.testing.assert_array_equal(found, square[:224, 32:])
    np.testing.assert_array_equal(PREPROCESSING["resize_crop"].evaluate(image, 224), square[16:240, 16:240])


@pytest.mark.parametrize("name", PREPROCESSING)
@pytest.mark.parametrize("size", [(1, 1), (3, 400), (37, 20)])
def test_every_preprocessing_gives_the_size_asked_for(name, size):
    image = picture(*size)
    train, evaluate, _ = PREPROCESSING[name]
    for pixels in (train(image, uniform_draws(0, 0, 0), 48), evaluate(image, 48)):
        assert pixels.shape == (48, 48, 3) and pixels.dtype == np.uint8


# -- lighting


def test_the_published_components_are_orthonormal():
    vectors = np.array(EIGENVECTORS)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=2e-4)


@pytest.mark.parametrize("scale", [(1.0, 1.0, 1.0), STD])
def test_lighting_adds_one_normal_colour_along_the_components(scale):
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4000, 2, 2, 3)).astype(np.float32))
    found = lighting(jax.random.key(0), images, std=0.1, pixel_std=scale)
    added = np.asarray(found - images, np.float64) * scale
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1], added.shape), atol=2e-4)
    weights = added[:, 0, 0] / 255 @ np.linalg.inv(np.array(EIGENVECTORS)).T / EIGENVALUES
    for k in range(3):
        assert stats.kstest(weights[:, k], stats.norm(0, 0.1).cdf).pvalue > 1e-4
    assert np.abs(np.corrcoef(weights.T) - np.eye(3)).max() < 0.08


def test_lighting_before_or_after_normalize_is_the_same():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3)).astype(np.float32)
    mean, key = (120.0, 110.0, 100.0), jax.random.key(1)
    before = normalize(lighting(key, jnp.asarray(images), std=0.5), mean=mean, std=STD)
    after = lighting(key, normalize(jnp.asarray(images), mean=mean, std=STD), std=0.5, pixel_std=STD)
    np.testing.assert_allclose(before, after, atol=1e-5)


def test_lighting_leaves_what_crop_and_flip_draw():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 6, 3)).astype(np.float32))
    key = jax.random.key(3)
    plain = augment(key, images, padding=2, flip=True)
    lit = augment(key, images, padding=2, flip=True, lighting_std=0.1, pixel_std=STD)
    added = np.asarray(lit - plain)
    np.testing.assert_allclose(added, np.broadcast_to(added[:, :1, :1], added.shape), atol=1e-5)
    assert np.abs(added).min() > 0


def test_lighting_refuses_what_it_cannot_do():
    grey = jnp.zeros((2, 4, 4, 1))
    with pytest.raises(ValueError, match=r"`images` has 1 channels and `pixel_std` shape \(3,\); lighting is for RGB"):
        lighting(jax.random.key(0), grey, std=0.1)
    with pytest.raises(ValueError, match=r"`std` \(=-0.1\) must not be negative"):
        lighting(jax.random.key(0), jnp.zeros((2, 4, 4, 3)), std=-0.1)
    with pytest.raises(ValueError, match=r"`pixel_std` \(=None\) must be the `std` of normalize where `lighting_std`"):
        augment(jax.random.key(0), jnp.zeros((2, 4, 4, 3)), padding=0, flip=False, lighting_std=0.1)

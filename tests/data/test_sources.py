"""Loading digits and .npz files: how they are divided, and what is refused."""

from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits
from small_sets import contents, same_splits

from bnn_jax.data import Split, load_dataset
from bnn_jax.data.arrays import SuspectDataWarning
from bnn_jax.data.sources import pixel_statistics
from bnn_jax.data.splits import permutation, stratified
from bnn_jax.errors import RunError, UsageError

# -- digits


def test_digits_are_those_of_scikit_learn_divided_60_20_20():
    digits, bunch = load_dataset("digits"), load_digits()
    expected = Counter()
    for image, target in zip(bunch.images, bunch.target):
        pixels = bytes(int(value * 255 / 16 + 0.5) for value in image.ravel())
        expected[pixels, int(target)] += 1
    splits = (digits.train, digits.validation, digits.test)
    assert contents(*splits) == expected
    assert [split.images.shape for split in splits] == [(n, 8, 8, 1) for n in (1079, 359, 359)]
    assert all(split.images.dtype == np.uint8 and split.labels.dtype == np.int32 for split in splits)
    assert (digits.train.images.min(), digits.train.images.max()) == (0, 255)
    for share, split in zip((0.6, 0.2, 0.2), splits):
        for label, total in Counter(bunch.target.tolist()).items():
            assert abs((split.labels == label).sum() - share * total) < 2


def test_digits_keep_their_test_split_whatever_the_validation_split():
    few, many = load_dataset("digits", validation_examples=50), load_dataset("digits", validation_examples=700)
    np.testing.assert_array_equal(few.test.images, many.test.images)
    assert (len(few.validation.labels), len(few.train.labels)) == (50, 1388)
    assert (len(many.validation.labels), len(many.train.labels)) == (700, 738)
    assert np.bincount(few.validation.labels).tolist() == [5] * 10


def test_the_split_depends_on_the_seed_alone():
    assert same_splits(load_dataset("digits", split_seed=3), load_dataset("digits", split_seed=3))
    assert not same_splits(load_dataset("digits", split_seed=3), load_dataset("digits", split_seed=4))


def pcg64(state, increment, count):
    """PCG XSL-RR 128/64 (O'Neill 2014) in Python's integers, one step before each output as NumPy has it."""
    outputs = []
    for _ in range(count):
        state = (state * 0x2360ED051FC65DA44385DF649FCCF645 + increment) % 2**128
        word, turn = (state >> 64) ^ (state % 2**64), state >> 122
        outputs.append((word >> turn | word << (64 - turn)) % 2**64)
    return outputs


def test_the_permutation_ranks_the_outputs_of_pcg64():
    # State and increment that SeedSequence gives for seed 0.
    outputs = pcg64(35399562948360463058890781895381311971, 87136372517582989555478159403783844777, 1000)
    expected = sorted(range(1000), key=outputs.__getitem__)
    assert permutation(1000, seed=0).tolist() == expected
    assert permutation(1000, seed=1).tolist() != expected


def test_stratified_gives_each_class_its_share():
    labels = np.repeat([0, 1, 2, 3], [50, 30, 15, 5])
    order = permutation(100, seed=0)
    chosen, rest = stratified(order, labels, 21)
    # Shares 10.5, 6.3, 3.15, 1.05: one is left over, for the largest remainder.
    assert np.bincount(labels[chosen]).tolist() == [11, 6, 3, 1]
    assert sorted([*chosen, *rest]) == list(range(100))
    assert [i for i in order if i in set(rest.tolist())] == rest.tolist()


# -- npz


def arrays(**changes):
    rng = np.random.default_rng(0)
    made = {
        "train_images": rng.integers(0, 256, (40, 4, 5, 3), dtype=np.uint8),
        "train_labels": rng.integers(0, 6, 40),
        "test_images": rng.integers(0, 256, (10, 4, 5, 3), dtype=np.uint8),
        "test_labels": np.arange(10, dtype=np.uint8) % 6,
    }
    return {key: value for key, value in (made | changes).items() if value is not None}


def npz(tmp_path, **changes):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays(**changes))
    return path


def test_npz_is_divided_without_loss_or_overlap(tmp_path):
    made = arrays()
    dataset = load_dataset(str(npz(tmp_path)))
    train = Split(made["train_images"], made["train_labels"])
    assert contents(dataset.train, dataset.validation) == contents(train)
    assert (len(dataset.train.labels), len(dataset.validation.labels)) == (36, 4)
    np.testing.assert_array_equal(dataset.test.images, made["test_images"])
    np.testing.assert_array_equal(dataset.test.labels, made["test_labels"])
    assert dataset.test.labels.dtype == np.int32
    assert (dataset.name, dataset.num_classes, dataset.note) == ("mine", 6, "mine.npz (.npz file)")


def test_mean_and_std_are_those_of_the_training_split(tmp_path):
    dataset = load_dataset(str(npz(tmp_path)), validation_examples=25)
    pixels = dataset.train.images.astype(np.float64)
    assert len(pixels) == 15
    np.testing.assert_allclose(dataset.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, pixels.std(axis=(0, 1, 2)), rtol=1e-12)


def test_statistics_of_many_blocks_are_those_of_all_pixels():
    images = np.random.default_rng(1).integers(0, 256, (9001, 3, 2, 2), dtype=np.uint8)
    images[5000:] //= 4
    mean, std = pixel_statistics(images)
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2), dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(std, images.std(axis=(0, 1, 2), dtype=np.float64), rtol=1e-12)


def test_npz_with_its_own_validation_split_classes_and_note(tmp_path):
    made = arrays()
    own = {
        "validation_images": made["test_images"][:3, :, :, 0],
        "validation_labels": made["test_labels"][:3],
        "train_images": made["train_images"][..., 0],
        "test_images": made["test_images"][..., 0],
        "num_classes": 11,
        "note": "drawn by hand",
    }
    path = npz(tmp_path, **own)
    with pytest.warns(SuspectDataWarning, match=r"`train_labels` of .* has 6 of 11 classes, none of 6, 7, 8, 9, 10"):
        dataset = load_dataset(str(path))
    np.testing.assert_array_equal(dataset.validation.images[..., 0], own["validation_images"])
    np.testing.assert_array_equal(dataset.train.images[..., 0], own["train_images"])
    assert dataset.train.images.shape == (40, 4, 5, 1)
    assert (dataset.num_classes, dataset.note) == (11, "drawn by hand")
    with (
        pytest.warns(SuspectDataWarning),
        pytest.raises(UsageError, match=r"`validation_examples` \(=5\) must be left out: .*mine.npz has its own"),
    ):
        load_dataset(str(path), validation_examples=5)


def test_names_of_classes_in_bytes_are_words(tmp_path):
    assert load_dataset(str(npz(tmp_path, class_names=np.array(list("abcdef"), "S")))).class_names == tuple("abcdef")


TEN = np.arange(10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, r"no array `test_labels`; it has test_images, train_images, train_labels"),
        ({"validation_labels": TEN}, r"no array `validation_images`; it has test_images"),
        (
            {"train_images": np.zeros((40, 4, 5, 3))},
            r"`train_images` of .* is float64 of shape \(40, 4, 5, 3\); images",
        ),
        (
            {"test_images": np.zeros((10, 60), np.uint8)},
            r"`test_images` of .* is uint8 of shape \(10, 60\); images are",
        ),
        ({"test_labels": TEN / 2}, r"`test_labels` of .* is float64 of shape \(10,\); labels are integers of"),
        ({"test_labels": np.ones((10, 2), int)}, r"`test_labels` of .* is int64 of shape \(10, 2\); labels are integ"),
        (
            {"test_labels": TEN[:9]},
            r"`test_images` of .* has shape \(10, 4, 5, 3\) and `test_labels` \(9,\); each image",
        ),
        (
            {"test_labels": TEN[:0], "test_images": np.zeros((0, 4, 5, 3), np.uint8)},
            r"`test_images` of .* has shape \(0, 4, 5, 3\) and `test_labels` \(0,\); each .* no split is empty",
        ),
        ({"test_labels": TEN, "num_classes": 6}, r"`test_labels` of .* has the label 6 at index 6; labels are 0 to 5"),
        ({"test_labels": TEN - 3}, r"`test_labels` of .* has the label -3 at index 0, which no"),
        ({"class_names": ["a", "b"]}, r"`class_names` of .* has 2 names for 6 classes; give one for each"),
        ({"class_names": "a"}, r"`class_names` of .* has shape \(\); give one name for each class, \[C\]"),
        ({"class_names": [["a"] * 6]}, r"`class_names` of .* has shape \(1, 6\); give one name for each class"),
        ({"num_classes": 0}, r"`num_classes` of .* is 0; it is one whole number, at least 1"),
        ({"num_classes": TEN[:2]}, r"`num_classes` of .* is \[0, 1\]; it is one whole number, at least 1"),
        (
            {"test_images": np.zeros((10, 5, 4, 3), np.uint8)},
            r"`test_images` of .* has images of shape \(5, 4, 3\), `train_images` of \(4, 5, 3\); all splits have one",
        ),
        (
            {"train_images": np.full((40, 4, 5, 3), 7, np.uint8)},
            r"every pixel of channel 0 of the training images of mine is 7, which cannot be normalised; leave that",
        ),
        ({"test_labels": np.array([object()] * 10)}, r"mine.npz holds Python objects, which are not loaded because"),
    ],
)
def test_arrays_that_break_a_rule_are_named(changes, message, tmp_path):
    with pytest.raises(RunError, match=message):
        load_dataset(str(npz(tmp_path, **changes)))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("validation_examples", 0, r"`validation_examples` \(=0\) must be a whole number, at least 1"),
        ("validation_examples", 2.0, r"`validation_examples` \(=2.0\) must be a whole number, at least 1"),
        ("validation_examples", 40, r"`validation_examples` \(=40\) must be 1 to 34, so that validation has examples"),
        ("split_seed", -1, r"`split_seed` \(=-1\) must be a whole number, at least 0"),
        ("split_seed", True, r"`split_seed` \(=True\) must be a whole number, at least 0"),
    ],
)
def test_numbers_that_cannot_be_served_are_named(argument, value, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        load_dataset(str(npz(tmp_path)), **{argument: value})


def test_a_damaged_npz_is_refused_or_harmless(tmp_path):
    """Each byte in turn is spoilt: what is loaded nevertheless is what was written."""
    path = npz(tmp_path)
    whole, expected = path.read_bytes(), load_dataset(str(path))
    refused = 0
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            assert same_splits(load_dataset(str(path)), expected)
        except RunError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 0.9 * len(whole) / 7
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        RunError, match=r"mine.npz is not an .npz file or was cut short; write it again with numpy.savez"
    ):
        load_dataset(str(path))


def test_a_missing_npz_is_the_users_error(tmp_path):
    with pytest.raises(UsageError, match=r"`name` \(='.*none.npz'\) is not a file; give 'digits', the path of an .npz"):
        load_dataset(str(tmp_path / "none.npz"))

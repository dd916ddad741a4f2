"""Data say what they are: what is not an image set as described is refused with the expression that mends it."""

import re

import numpy as np
import pytest
from small_sets import contents, write_mnist

from bnn_jax.data import Split, load_dataset, open_stream
from bnn_jax.data.arrays import ConvertedDataWarning, SuspectDataWarning, checked_arrays
from bnn_jax.data.splits import permutation, split_off_validation, stratified
from bnn_jax.errors import RunError, UsageError

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
GREY = RGB[..., 0]
THREE = np.arange(60) % 3
UNIT = RANDOM.random((60, 32, 32, 3), dtype=np.float32)
UNIT[0, 0, 0] = 0, 0.5, 1


def arrays(images=RGB, labels=THREE, **changes):
    """An .npz file's arrays: the first 40 are for training, the others for the test."""
    made = {"train_images": images[:40], "train_labels": labels[:40]}
    return made | {"test_images": images[40:], "test_labels": labels[40:]} | changes


def mended(broken):
    """The splits when the user types the expression of each message, until there is none; and what was typed."""
    found, typed = dict(broken), []
    while len(typed) < 9:
        try:
            return checked_arrays(found, "mine.npz")[0], typed
        except RunError as error:
            text = str(error)
        parts = re.fullmatch(r"`(\w+)` of .*?: give (.*?)(, likewise those of other splits)?(, or .*| where .*)?", text)
        assert parts, text
        values = dict(found)
        for expression in parts[2].split(" and "):
            key = parts[1] if expression.startswith(("np.", "255", "(")) else re.match(r"\w+", expression)[0]
            found[key] = eval(expression, {"np": np}, values)
            if parts[3]:
                # In np.unique(train_labels) the name stays.
                likewise = re.sub(r"(?<!unique\()train_", "test_", expression)
                found[key.replace("train", "test")] = eval(likewise, {"np": np}, values)
        typed.append(parts[2])
    raise AssertionError(typed)


MISTAKES = {
    "channels first": (arrays(RGB.transpose(0, 3, 1, 2)), RGB, THREE),
    "grey channels first": (arrays(GREY[:, None]), GREY[..., None], THREE),
    "examples last": (
        {name: value.transpose(1, 2, 3, 0) if "images" in name else value for name, value in arrays().items()},
        RGB,
        THREE,
    ),
    "grey, examples last": (
        {name: value.transpose(1, 2, 0) if "images" in name else value for name, value in arrays(GREY).items()},
        GREY,
        THREE,
    ),
    "rows of an archive": (arrays(RGB.transpose(0, 3, 1, 2).reshape(60, -1)), RGB, THREE),
    "rows of grey": (arrays(GREY.reshape(60, -1)), GREY, THREE),
    "rows of shares": (arrays(UNIT[..., 0].reshape(60, -1)), np.round(255 * UNIT[..., 0]), THREE),
    "shares of 1, channels first": (arrays(UNIT.transpose(0, 3, 1, 2)), np.round(255 * UNIT), THREE),
    "standardized": (arrays((UNIT - 0.5) * 4), np.round(255 * UNIT), THREE),
    "dark shares of 1": (arrays(UNIT / 4), np.round(255 * UNIT), THREE),
    "a pixel that is none": (
        arrays(np.where(np.arange(60).reshape(60, 1, 1, 1) == 5, np.nan, UNIT)),
        np.round(255 * UNIT)[np.arange(60) != 5],
        THREE[np.arange(60) != 5],
    ),
    "12 bits": (arrays(RGB.astype(np.uint16) << 4), RGB, THREE),
    "signed": (arrays(RGB.astype(np.int16) - 128), RGB, THREE),
    "gaps": (arrays(labels=np.array([0, 1, 5])[THREE]), RGB, THREE),
    "from 1": (arrays(labels=THREE + 1), RGB, THREE),
    "from 1, with num_classes": (arrays(labels=THREE + 1, num_classes=np.array(3)), RGB, THREE),
    "from -1": (arrays(labels=THREE - 1), RGB, THREE),
    "signs": (arrays(labels=2 * (np.arange(60) % 2) - 1), RGB, np.arange(60) % 2),
    "a column from 1": (arrays(labels=THREE[:, None].astype(np.uint8) + 1), RGB, THREE),
    "words": (arrays(labels=np.array(["cat", "dog", "emu"])[THREE]), RGB, THREE),
}


@pytest.mark.filterwarnings("ignore::bnn_jax.data.arrays.ConvertedDataWarning")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_refused_with_the_expression_that_mends_it(name):
    broken, images, labels = MISTAKES[name]
    found, typed = mended(broken)
    assert typed
    check_splits(found, images, labels)


def check_splits(found, images, labels):
    images = images[..., None] if images.ndim == 3 else images
    for split, part in (("train", slice(len(images) - 20)), ("test", slice(len(images) - 20, None))):
        assert found[split].images.dtype == np.uint8
        np.testing.assert_array_equal(found[split].images, images[part])
        np.testing.assert_array_equal(found[split].labels, labels[part])


IMAGES, LABELS = "train_images, test_images as ", "train_labels, test_labels as "
CLEAR = {
    "shares of 1": (
        arrays(UNIT),
        np.round(255 * UNIT),
        THREE,
        f"{IMAGES}np.round(255 * train_images).astype(np.uint8)",
    ),
    "-1 to 1": (arrays(2 * UNIT - 1), np.round(127.5 * (2 * UNIT)), THREE, "np.round(127.5 * (train_images + 1))"),
    "float pixels": (arrays(RGB.astype(np.float64)), RGB, THREE, f"{IMAGES}np.round(train_images).astype(np.uint8)"),
    "int64 pixels": (arrays(RGB.astype(np.int64)), RGB, THREE, f"{IMAGES}train_images.astype(np.uint8)"),
    "16 bits": (arrays(RGB.astype(np.uint16) * 257), RGB, THREE, f"{IMAGES}(train_images >> 8).astype(np.uint8)"),
    "masks": (arrays(RGB > 99), 255 * (RGB > 99), THREE, f"{IMAGES}255 * train_images.astype(np.uint8)"),
    "one-hot": (arrays(labels=np.eye(3)[THREE]), RGB, THREE, f"{LABELS}train_labels.argmax(1)"),
    "a column": (arrays(labels=THREE[:, None]), RGB, THREE, f"{LABELS}train_labels[:, 0]"),
    "floats": (arrays(labels=THREE.astype(np.float32)), RGB, THREE, f"{LABELS}train_labels.astype(np.int32)"),
    "booleans": (arrays(labels=THREE > 0), RGB, THREE > 0, f"{LABELS}train_labels.astype(np.int32)"),
}


@pytest.mark.parametrize("name", CLEAR)
def test_what_is_clear_is_taken_and_said_in_one_line(name):
    given, images, labels, said = CLEAR[name]
    with pytest.warns(ConvertedDataWarning, match=rf"^mine.npz is taken with .*{re.escape(said)}") as caught:
        found, _ = checked_arrays(given, "mine.npz")
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    check_splits(found, images, labels)
    # What is said is what was done.
    expression = re.search(r" as (.*)$", str(caught[0].message))[1]
    value = eval(expression, {"np": np}, given)
    np.testing.assert_array_equal(value, found["train"].images if "images" in expression else found["train"].labels)


def test_the_splits_are_read_alike():
    """A dark test split is not taken for images of another range."""
    dark = arrays(np.concatenate([UNIT[:40], UNIT[40:] / 4]))
    with pytest.warns(ConvertedDataWarning):
        found, _ = checked_arrays(dark, "mine.npz")
    np.testing.assert_array_equal(found["test"].images, np.round(255 * (UNIT[40:] / 4)))


def test_names_of_other_libraries():
    keras = {"x_train": RGB[:40], "y_train": THREE[:40], "x_test": RGB[40:], "y_test": THREE[40:]}
    check_splits(checked_arrays(keras, "mine.npz")[0], RGB, THREE)
    medmnist = {"val_images": RGB[40:], "val_labels": THREE[40:, None]}
    with pytest.warns(ConvertedDataWarning, match=r"with val_labels as val_labels\[:, 0\]$"):
        assert checked_arrays(arrays() | medmnist, "mine.npz")[0].keys() == {"train", "test", "validation"}
    assert checked_arrays({"images": RGB, "labels": THREE}, "mine.npz")[0].keys() == {"train"}
    with pytest.raises(RunError, match=r"`y_train` of mine.npz has the labels 1, 2, 3; .*: give y_train - 1, likewise"):
        checked_arrays(keras | {"y_train": THREE[:40] + 1}, "mine.npz")
    with pytest.raises(RunError, match=r"the same under two names, `train_images` and `x_train`; leave one out"):
        checked_arrays(arrays() | keras, "mine.npz")
    with pytest.raises(
        RunError, match=r"no array `train_images`; it has arr_0, arr_1; name them: np.savez\(path, images"
    ):
        checked_arrays({"arr_0": RGB, "arr_1": THREE}, "mine.npz")


def with_255(labels):
    return np.where(np.arange(60) % 7 == 0, 255, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": RGB.transpose(0, 3, 1, 2)},
            r"`train_images` of mine.npz has shape \(40, 3, 32, 32\), 3x32 pixels with 32 channels, as if the channels "
            r"came first: give train_images.transpose\(0, 2, 3, 1\), or if it is meant so layout='NHWC' beside it$",
        ),
        (
            {"labels": np.array([0, 1, 5])[THREE]},
            r"`train_labels` of mine.npz has the labels 0, 1, 5; classes are 0 to 2: give np.searchsorted\(np.unique\("
            r"train_labels\), train_labels\), likewise those of other splits, or give `num_classes`$",
        ),
        (
            {"labels": np.arange(60) % 10 + 1},
            r"has the labels 1, 2, 3, 4, 5, ..., 10; classes are 0 to 9: give train_labels - 1, likewise those of",
        ),
        (
            {"labels": with_255(THREE)},
            r"has the labels 0, 1, 2, 255; classes are 0 to 3: give train_images\[train_labels != 255\] and "
            r"train_labels\[train_labels != 255\] where 255 is no class, likewise those of other splits$",
        ),
        ({"labels": with_255(THREE).astype(np.uint8)}, r"has the labels 0, 1, 2, 255; classes are 0 to 3"),
        (
            {"test_labels": np.full(20, 3)},
            r"`test_labels` of mine.npz has the label 3 at index 0, which no training example has: give "
            r"test_images\[np.isin\(test_labels, train_labels\)\] and test_labels\[.*\], or give `num_classes`$",
        ),
        ({"train_labels": np.zeros(40, int)}, r"has the label 0 alone; a classification has two classes or more"),
        ({"labels": THREE + 0.5}, r"is float64 of shape \(40,\); labels are integers of shape \[N\]$"),
        ({"labels": np.full((60, 3), 1 / 3)}, r"is float64 of shape \(40, 3\); labels are integers of shape \[N\]$"),
        (
            {"images": (UNIT - 0.5) / 0.2},
            r"is float32 of shape .*; images are uint8, .*: give np.round\(255 \* np.clip\(\(train_images \+ 2.5\) / 5",
        ),
        (
            {"images": np.where(UNIT > 0.9, np.nan, UNIT)},
            r"is float32 .*; images are .*, and finite: give train_labels\[np.isfinite\(train_images\).all\(\(1, 2, 3",
        ),
        (
            {"test_images": RGB[40:].transpose(0, 3, 1, 2).repeat(2, 1)},
            r"`test_images` of mine.npz has images of shape \(6, 32, 32\), `train_images` of \(32, 32, 3\); all splits",
        ),
        (
            {"images": RGB[:, :30], "test_images": RGB[40:, :30].transpose(0, 2, 1, 3)},
            r"has images of shape \(32, 30, 3\), `train_images` of \(30, 32, 3\); all splits have one: give "
            r"test_images.transpose\(0, 2, 1, 3\)$",
        ),
    ],
)
def test_messages(changes, message):
    with pytest.raises(RunError, match=message):
        checked_arrays(arrays(**changes), "mine.npz")


@pytest.mark.filterwarnings("ignore::bnn_jax.data.arrays.ConvertedDataWarning")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_classes": np.array(5)},
            r"`train_labels` of mine.npz has 3 of 5 classes, none of 3, 4: if those are not",
        ),
        (
            {"labels": 2 * THREE, "num_classes": np.array(5)},
            r"has 3 of 5 classes, none of 1, 3: if those are not meant",
        ),
        (
            {"train_images": RGB[:40] // 255},
            r"`train_images` of mine.npz has no value above 1: give 255 \* train",
        ),
        (
            {"images": RANDOM.integers(0, 256, (60, 3, 3, 16), dtype=np.uint8)},
            r"has shape \(40, 3, 3, 16\), 3x3 pixels with 16 channels; if the channels came first give .*layout='NHWC'",
        ),
        (
            {"labels": np.eye(5)[THREE]},
            r"`train_labels` of mine.npz has 3 of 5 classes, none of 3, 4: .* give np.searchsorted\(np.unique\(tr",
        ),
        (
            {"test_images": RGB[:40], "test_labels": THREE[:40]},
            r"`test_images` of mine.npz are the training images, on which accuracy says little: give others, as",
        ),
    ],
)
def test_what_can_be_meant_so_is_warned_of(changes, message):
    with pytest.warns(SuspectDataWarning, match=message):
        checked_arrays(arrays(**changes), "mine.npz")


def test_what_is_meant_so_is_taken():
    windows = RANDOM.integers(0, 256, (60, 1, 128, 9), dtype=np.uint8)
    with pytest.raises(RunError, match="as if the channels came first"):
        checked_arrays(arrays(windows), "mine.npz")
    splits, num_classes = checked_arrays(arrays(windows, layout=np.array("NHWC")), "mine.npz")
    assert (splits["train"].images.shape, num_classes) == ((40, 1, 128, 9), 3)
    for shape in ((32, 32, 3), (32, 32, 4), (4, 5, 3), (3, 3, 9), (28, 28)):
        images = RANDOM.integers(0, 256, (60, *shape), dtype=np.uint8)
        assert checked_arrays(arrays(images), "mine.npz")[1] == 3
    vectors = RANDOM.integers(0, 256, (60, 1, 1, 7), dtype=np.uint8)
    assert checked_arrays(arrays(vectors, layout=np.array("NHWC")), "mine.npz")[1] == 3


# -- the validation split


SIZES = (470, 538, 500, 1, 2, 89)


def shuffled_labels(sizes, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


@pytest.mark.parametrize("count", [1, 7, 160, 800])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_class_has_its_share_of_the_validation_split(count, seed):
    labels = shuffled_labels(SIZES)
    kept, taken = split_off_validation(labels, count, seed)
    assert sorted([*kept, *taken]) == list(range(len(labels)))
    assert len(taken) == count and np.all(np.diff(taken) > 0) and np.all(np.diff(kept) > 0)
    counts, share = np.bincount(labels[taken], minlength=len(SIZES)), count / len(labels)
    assert np.all(np.abs(counts - share * np.array(SIZES)) < 1)
    assert np.bincount(labels[kept], minlength=len(SIZES)).min() >= 1


def test_ten_equal_classes_are_divided_exactly():
    labels = shuffled_labels([5000] * 10)
    kept, taken = split_off_validation(labels, 5000, 0)
    assert np.bincount(labels[taken]).tolist() == [500] * 10
    assert np.bincount(labels[kept]).tolist() == [4500] * 10


def test_the_seed_alone_decides():
    labels = shuffled_labels(SIZES)
    (_, first), (_, again), (_, other) = (split_off_validation(labels, None, seed) for seed in (3, 3, 4))
    assert first.tolist() == again.tolist() != other.tolist()
    assert len(first) == len(labels) // 10
    # The first of each class in the permutation, whose words every version of NumPy gives.
    order = permutation(len(labels), seed=3)
    for label in range(len(SIZES)):
        own = [index for index in order if labels[index] == label]
        assert sorted(own[: (labels[first] == label).sum()]) == [index for index in first if labels[index] == label]


def test_training_keeps_every_class():
    labels = np.array([0, 1, 2, 3, 4, 4, 4])
    chosen, rest = stratified(np.arange(7), labels, 2)
    assert labels[chosen].tolist() == [4, 4] and np.unique(labels[rest]).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(
        UsageError, match=r"`validation_examples` \(=3\) must be 1 to 2, so that validation has examples and"
    ):
        split_off_validation(labels, 3, 0)


def test_a_set_on_disk_is_divided_as_in_memory(tmp_path, caplog):
    caplog.set_level("INFO", "bnn_jax.data.stream")
    write_mnist(tmp_path / "data", train=95)
    where = {"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache", "validation_examples": 20}
    whole, stream = load_dataset("mnist", **where), open_stream("mnist", **where)
    for name in ("train", "validation"):
        records = getattr(stream, name)
        found = records.encoded(range(len(records)))
        assert [label for _, label in found] == getattr(whole, name).labels.tolist()
    assert np.bincount(whole.validation.labels).tolist() == [2] * 10
    kept = open_stream("mnist", **where, preprocessing="resize_crop")
    assert kept.validation.positions.tolist() == stream.validation.positions.tolist()
    assert [record.message for record in caplog.records if "labels" in record.message] == [
        "reading the labels of the 95 training images of mnist, once"
    ]


def test_npz_divides_without_loss(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays())
    dataset = load_dataset(str(tmp_path / "mine.npz"), validation_examples=7)
    assert contents(dataset.train, dataset.validation) == contents(Split(RGB[:40], THREE[:40].astype(np.int32)))
    assert sorted(np.bincount(dataset.validation.labels).tolist()) == [2, 2, 3]

"""Folders of images: splits and classes, formats and modes, sizes, the cache, and what is refused."""

import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from small_sets import contents, same_splits

from bnn_jax.data import Split, load_dataset, open_stream
from bnn_jax.data.arrays import SuspectDataWarning
from bnn_jax.data.records import read_batch
from bnn_jax.errors import RunError, UsageError

NAMES = ("ant", "bee", "cow")


def write(folder, count, *, first=0, shape=(6, 5, 3), ending="png", names=NAMES):
    """Images with a folder for each class; returns them with their labels, in the order in which they are read."""
    images = np.random.default_rng(first).integers(0, 256, (count, *shape), dtype=np.uint8)
    labels = np.sort(np.arange(count) % len(names)).astype(np.int32)
    for index, (image, label) in enumerate(zip(images, labels)):
        path = folder / names[label] / f"{first + index:03}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return Split(images if images.ndim == 4 else images[..., None], labels)


def load(folder, **options):
    return load_dataset(str(folder), cache_dir=folder.parent / "cache", **options)


def test_folders_of_splits_are_read_exactly(tmp_path):
    train, test = write(tmp_path / "pets" / "train", 40), write(tmp_path / "pets" / "test", 9, first=50)
    pets = load(tmp_path / "pets")
    assert contents(pets.train, pets.validation) == contents(train) and contents(pets.test) == contents(test)
    assert (len(pets.train), len(pets.validation)) == (36, 4)
    assert (pets.name, pets.class_names, pets.note) == ("pets", NAMES, "pets (folder of images, PNG)")
    assert same_splits(pets, load_dataset("pets", data_dir=tmp_path, cache_dir=tmp_path / "cache"))


def test_folders_of_classes_alone_are_divided_of_each_class(tmp_path):
    whole = write(tmp_path / "pets", 30)
    pets = load(tmp_path / "pets")
    splits = (pets.train, pets.validation, pets.test)
    assert contents(*splits) == contents(whole)
    assert [np.bincount(split.labels).tolist() for split in splits] == [[6] * 3, [2] * 3, [2] * 3]
    assert not same_splits(pets, load(tmp_path / "pets", split_seed=1))


def test_a_validation_folder_beside_a_test_folder_is_its_own_split(tmp_path):
    for number, name in enumerate(("Train", "val", "test")):
        write(tmp_path / "pets" / name, 9 + number, first=100 * number)
    pets = load(tmp_path / "pets")
    assert [len(split) for split in (pets.train, pets.validation, pets.test)] == [9, 10, 11]
    with pytest.raises(
        UsageError, match=r"`validation_examples` \(=3\) must be left out: .*pets has its own validation"
    ):
        load(tmp_path / "pets", validation_examples=3)
    with pytest.raises(UsageError, match=r"`split_seed` \(=3\) must be left out: .*pets has its own validation"):
        load(tmp_path / "pets", split_seed=3)
    with pytest.raises(UsageError, match=r"`split_seed` \(=3\) must be left out: .*pets has its own validation"):
        open_pets(tmp_path, split_seed=3)
    write(tmp_path / "pets" / "validation", 9, first=300)
    with pytest.raises(UsageError, match=r"pets has the same split twice, val and validation; leave one out"):
        load(tmp_path / "pets")


@pytest.mark.parametrize(
    ("kinds", "channels"),
    [
        ([("png", (6, 5)), ("bmp", (6, 5)), ("tif", (6, 5))], 1),
        ([("png", (6, 5)), ("ppm", (6, 5, 3)), ("webp", (6, 5, 3)), ("gif", (6, 5, 3)), ("png", (6, 5, 4))], 3),
    ],
    ids=["grey", "mixed"],
)
def test_any_format_and_mode(tmp_path, kinds, channels):
    for number, (ending, shape) in enumerate(kinds):
        write(tmp_path / "pets", 12, first=20 * number, shape=shape, ending=ending)
    deep = tmp_path / "pets" / "ant" / "more"
    deep.mkdir()
    Image.fromarray(np.arange(30, dtype=np.uint16).reshape(6, 5) << 11).save(deep / "deep.PNG")
    pets = load(tmp_path / "pets")
    assert pets.image_shape == (6, 5, channels)
    assert sum(map(len, (pets.train, pets.validation, pets.test))) == 12 * len(kinds) + 1
    ramp = np.repeat(np.arange(0, 240, 8, dtype=np.uint8).reshape(1, 6, 5, 1), channels, axis=3)
    everything = contents(pets.train, pets.validation, pets.test)
    assert everything[ramp[0].tobytes(), 0] == 1


def test_center_crop_is_the_middle_of_the_image_resized_by_its_shorter_side(tmp_path):
    write(tmp_path / "pets", 9, shape=(12, 8, 3))
    write(tmp_path / "pets", 9, first=20, shape=(5, 9, 3))
    with pytest.raises(
        UsageError, match=r"differ in size: .* choose `data.preprocessing` center_crop and a `data.image"
    ):
        load(tmp_path / "pets")
    pets = load(tmp_path / "pets", preprocessing="center_crop", image_size=4)
    assert pets.image_shape == (4, 4, 3)
    assert pets.note == "pets (folder of images, PNG; center_crop to 4x4); split 60/20/20 % by seed"
    with Image.open(tmp_path / "pets" / "cow" / "008.png") as image:
        expected = np.asarray(image.resize((4, 6), Image.Resampling.BILINEAR))[1:5]
    found = contents(pets.train, pets.validation, pets.test)
    assert found[expected.tobytes(), 2] == 1
    with pytest.raises(UsageError, match=r"`preprocessing` \(='resize_crop'\) crops at random as images are read: str"):
        load(tmp_path / "pets", preprocessing="resize_crop")
    with pytest.raises(UsageError, match=r"`preprocessing` is for image files, and 'digits' holds arrays of one size"):
        load_dataset("digits", preprocessing="center_crop")


def test_what_is_decoded_once_is_kept_until_a_file_changes(tmp_path, monkeypatch):
    write(tmp_path / "pets", 30)
    first = load(tmp_path / "pets")
    monkeypatch.setattr("bnn_jax.data.sources.decode_image_folder", lambda *_: pytest.fail("decoded again"))
    again = load(tmp_path / "pets")
    assert same_splits(first, again) and again.class_names == NAMES
    monkeypatch.undo()
    Image.fromarray(np.zeros((6, 5, 3), np.uint8)).save(tmp_path / "pets" / "ant" / "000.png")
    assert not same_splits(first, load(tmp_path / "pets"))
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("folders", [("train", "test"), ("train", "val"), ("train", "val", "test"), (".",)])
@pytest.mark.parametrize(
    "options", [{}, {"preprocessing": "center_crop", "image_size": 4}], ids=["as it is", "cropped"]
)
def test_what_is_streamed_is_what_is_loaded(tmp_path, folders, options):
    for number, name in enumerate(folders):
        write(tmp_path / "pets" / name, 30 - number, first=100 * number)
    whole, stream = load(tmp_path / "pets", **options), open_pets(tmp_path, **options)
    assert (stream.class_names, stream.image_shape, stream.num_classes) == (NAMES, whole.image_shape, 3)
    assert stream.note == whole.note
    if not options:
        np.testing.assert_allclose((stream.mean, stream.std), (whole.mean, whole.std), rtol=1e-12)
    for name in ("train", "validation", "test"):
        split, records = getattr(whole, name), getattr(stream, name)
        images, labels, skipped = read_batch(
            records, np.arange(len(records)), seed=0, epoch=0, training=name == "train"
        )
        assert len(records) == len(split) and skipped == []
        np.testing.assert_array_equal(images, split.images)
        np.testing.assert_array_equal(labels, split.labels)


def open_pets(tmp_path, **options):
    return open_stream("pets", data_dir=tmp_path, cache_dir=tmp_path / "cache", **options)


def test_a_damaged_file_of_a_streamed_folder_is_told_by_its_path(tmp_path):
    write(tmp_path / "pets" / "train", 30)
    write(tmp_path / "pets" / "test", 9, first=50)
    stream = open_pets(tmp_path)
    path = tmp_path / "pets" / "train" / "bee" / "012.png"
    index = [stream.train.source.paths[position] for position in stream.train.positions].index(str(path))
    path.write_bytes(path.read_bytes()[:60])
    _, labels, skipped = read_batch(stream.train, np.array([index]), seed=0, epoch=0, training=False)
    assert labels.tolist() == [-1] and f"{path} cannot be decoded: " in skipped[0][1]
    path.unlink()
    _, labels, skipped = read_batch(stream.train, np.array([index]), seed=0, epoch=0, training=True)
    assert labels.tolist() == [1] and f"{path} cannot be read: No such file" in skipped[0][1]


def without_classes(folder):
    for path in (folder / "train").iterdir():
        path.rename(folder / f".{path.name}")
    (folder / "train" / "a.png").touch()


def emptied(folder):
    for path in (folder / "test").rglob("*.png"):
        path.unlink()


def of_floats(folder):
    (folder / "train" / "ant" / "000.png").unlink()
    Image.fromarray(np.zeros((6, 5), np.float32)).save(folder / "train" / "ant" / "000.tif")


def damaged(folder):
    (folder / "train" / "ant" / "000.png").write_bytes(b"GIF89a, or so it says")


def of_12_bits(folder):
    for path in folder.rglob("*.png"):
        Image.fromarray(np.arange(0, 3000, 100, dtype=np.uint16).reshape(6, 5)).save(path)


def of_32_bits(folder):
    (folder / "train" / "ant" / "000.png").unlink()
    Image.fromarray(np.full((6, 5), 65536, np.int32)).save(folder / "train" / "ant" / "000.tif")


def dangling(folder):
    (folder / "test" / "ant" / "000.png").symlink_to(folder / "nowhere.png")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            without_classes,
            UsageError,
            r"train has no folder for each class; give the folder in which these, or train, lie",
        ),
        (
            lambda folder: (folder / "train" / "dog").mkdir(),
            UsageError,
            r"train/dog has no image; remove it if it is no",
        ),
        (
            lambda folder: (folder / "test" / "dog").mkdir(),
            UsageError,
            r"test has the class 'dog', which .*train has not",
        ),
        (emptied, UsageError, r"the test split of .*pets has no image; remove it, or put some in"),
        (of_floats, RunError, r"train/ant/000.tif cannot be decoded \(its pixels are floats; store 8 or 16 bits\)"),
        (damaged, RunError, r"train/ant/000.png cannot be decoded \(no image format is known\); remove or replace it"),
        (
            of_12_bits,
            RunError,
            r"the 16-bit images of .*pets have no value above 2900, and the upper 8 of 16 bits are taken; store 8 "
            r"bits, \(pixels >> 4\).astype\(np.uint8\)$",
        ),
        (of_32_bits, RunError, r"train/ant/000.tif cannot be decoded \(its pixels have more than 16 bits; store 8 or"),
        (dangling, RunError, r"test/ant/000.png cannot be read \(No such file or directory\); remove or replace it"),
    ],
)
def test_a_folder_that_cannot_serve_is_named(tmp_path, change, error, message):
    write(tmp_path / "pets" / "train", 9)
    write(tmp_path / "pets" / "test", 9, first=20)
    change(tmp_path / "pets")
    with pytest.raises(error, match=message):
        load(tmp_path / "pets")


def test_the_first_streamed_image_tells_that_16_bits_are_not_used(tmp_path):
    write(tmp_path / "pets", 30, shape=(6, 5))
    of_12_bits(tmp_path / "pets")
    first = r"pets/ant/000.png has no value above 2900, and the upper 8 of 16 bits are taken; .* if others are alike$"
    with pytest.warns(SuspectDataWarning, match=first):
        open_pets(tmp_path)


def test_16_bits_are_judged_over_all_splits(tmp_path):
    for number, name in enumerate(("train", "test")):
        write(tmp_path / "pets" / name, 30, first=100 * number, shape=(6, 5))
    of_12_bits(tmp_path / "pets" / "train")
    of_16_bits = np.arange(0, 60000, 2000, dtype=np.uint16).reshape(6, 5)
    Image.fromarray(of_16_bits).save(tmp_path / "pets" / "test" / "ant" / "100.png")
    np.testing.assert_array_equal(load(tmp_path / "pets").test.images[0, ..., 0], of_16_bits >> 8)


def test_a_file_that_goes_while_it_is_read_is_named(tmp_path, monkeypatch):
    write(tmp_path / "pets", 30)
    monkeypatch.setattr("bnn_jax.data.image_folder.mode_of", lambda _: (tmp_path / "pets/bee/010.png").unlink() or "L")
    with pytest.raises(RunError, match=r"bee/010.png cannot be read \(No such file or directory\); remove or replace"):
        load(tmp_path / "pets")


def test_links_to_folders_are_followed_once(tmp_path):
    write(tmp_path / "pets", 30)
    (tmp_path / "pets" / "ant").rename(tmp_path / "ants")
    (tmp_path / "pets" / "ant").mkdir()
    for name, target in (("more", tmp_path / "ants"), ("again", tmp_path / "ants"), ("up", tmp_path / "pets")):
        (tmp_path / "pets" / "ant" / name).symlink_to(target)
    (tmp_path / "ants" / "round").symlink_to(tmp_path / "ants")
    pets = load(tmp_path / "pets")
    assert sum(map(len, (pets.train, pets.validation, pets.test))) == 30


def test_names_need_not_be_utf_8(tmp_path):
    write(tmp_path / "pets", 30)
    os.rename(tmp_path / "pets" / "ant" / "000.png", os.fsencode(tmp_path / "pets" / "ant") + b"/b\xe4r.png")
    assert len(open_pets(tmp_path).digest) == 16


def test_statistics_of_grey_images_are_not_those_of_rgb(tmp_path):
    write(tmp_path / "pets" / "train", 30, shape=(6, 5))
    write(tmp_path / "pets" / "test", 9, first=50)
    coloured = open_pets(tmp_path)
    shutil.rmtree(tmp_path / "pets" / "test")
    write(tmp_path / "pets" / "test", 9, first=50, shape=(6, 5))
    assert (len(coloured.mean), len(open_pets(tmp_path).mean)) == (3, 1)


def test_a_class_may_be_called_train(tmp_path):
    write(tmp_path / "rides", 30, names=("car", "plane", "train"))
    assert load(tmp_path / "rides").class_names == ("car", "plane", "train")
    (tmp_path / "rides" / "plane").rename(tmp_path / "rides" / "test")
    with pytest.raises(UsageError, match=r"rides/train has no folder for each class; give the folder in which these"):
        load(tmp_path / "rides")


def test_training_and_testing_are_splits(tmp_path):
    for number, name in enumerate(("training", "testing")):
        write(tmp_path / "pets" / name, 9 + number, first=100 * number)
    assert len(load(tmp_path / "pets").test) == 10


def test_the_folder_in_which_one_is_has_its_name(tmp_path, monkeypatch):
    write(tmp_path / "pets", 30)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for folder, name in (("pets", "."), ("pets/ant", "..")):
        monkeypatch.chdir(tmp_path / folder)
        for pets in (load_dataset(name, cache_dir=tmp_path), open_stream(name, cache_dir=tmp_path)):
            assert (pets.name, pets.note[:23]) == ("pets", "pets (folder of images,")


def test_a_folder_called_as_a_published_set_is_given_with_a_dot(tmp_path):
    write(tmp_path / "cifar10", 30)
    options = {"data_dir": tmp_path, "cache_dir": tmp_path / "cache"}
    with pytest.raises(UsageError, match=r"; your own images in a folder of that name are given as ./cifar10; prepare"):
        load_dataset("cifar10", **options)
    assert load_dataset("./cifar10", **options).name == "cifar10"


def test_a_folder_too_high_is_named(tmp_path):
    write(tmp_path / "all" / "pets" / "train", 9)
    with pytest.raises(UsageError, match=r"all is a folder too high: give .*all/pets, in which train lies"):
        load(tmp_path / "all")


def test_other_files_are_left_out_with_a_warning(tmp_path):
    write(tmp_path / "pets", 30)
    for name in (".DS_Store", "Thumbs.db", "notes.txt"):
        (tmp_path / "pets" / "ant" / name).touch()
    with pytest.warns(SuspectDataWarning, match=r"no images, no split or in no class: 1, the first .*ant/notes.txt$"):
        load(tmp_path / "pets")


def test_other_folders_beside_those_of_splits_are_left_out_with_a_warning(tmp_path):
    for number, name in enumerate(("train", "test", "more")):
        write(tmp_path / "pets" / name, 30, first=100 * number)
    with pytest.warns(SuspectDataWarning, match=r"no images, no split or in no class: 1, the first .*pets/more$"):
        assert len(load(tmp_path / "pets").test) == 30


@pytest.mark.parametrize("place", ["", "train", "test"])
def test_images_in_no_class_are_left_out_with_a_warning(place, tmp_path):
    for number, name in enumerate(("train", "test")):
        write(tmp_path / "pets" / name, 30, first=100 * number)
    (tmp_path / "pets" / "README.md").touch()
    shutil.copy(tmp_path / "pets" / "train" / "ant" / "000.png", tmp_path / "pets" / place / "stray.png")
    stray = re.escape(str(tmp_path / "pets" / place / "stray.png"))
    with pytest.warns(SuspectDataWarning, match=rf"no images, no split or in no class: 1, the first {stray}$"):
        assert len(load(tmp_path / "pets").test) == 30


def test_a_streamed_set_of_other_images_has_another_digest(tmp_path):
    write(tmp_path / "pets", 30)
    first = open_pets(tmp_path).digest
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "pets", tmp_path / "other" / "pets")
    assert open_pets(tmp_path / "other").digest == first != open_pets(tmp_path, split_seed=1).digest
    (tmp_path / "pets" / "bee" / "010.png").rename(tmp_path / "pets" / "ant" / "010.png")
    assert open_pets(tmp_path).digest != first


def test_a_folder_of_one_class_is_no_classification(tmp_path):
    write(tmp_path / "pets", 9, names=("ant",))
    with pytest.raises(RunError, match=r"`train_labels` of .*pets has the label 0 alone"):
        load(tmp_path / "pets")

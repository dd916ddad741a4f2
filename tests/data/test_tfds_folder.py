"""TFDS folders, tiny ones written here: what is decoded, what is refused, and the cache in between."""

import io
import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from small_sets import contents, same_splits, write_mnist

from bnn_jax.data import load_dataset, prepare, sources
from bnn_jax.data.tfds_folder import find_tfds_folder
from bnn_jax.errors import RunError, UsageError


@pytest.fixture
def sets(tmp_path):
    """A data folder with a tiny MNIST."""
    write_mnist(tmp_path / "sets")
    return tmp_path / "sets"


def load_mnist(sets, **options):
    return load_dataset("mnist", data_dir=sets, cache_dir=sets.parent / "cache", **options)


def test_a_tfds_set_is_loaded_exactly(tmp_path):
    train, test = write_mnist(tmp_path / "sets")
    dataset = load_mnist(tmp_path / "sets")
    assert contents(dataset.train, dataset.validation) == contents(train)
    assert contents(dataset.test) == contents(test)
    assert dataset.train.images.shape == (86, 28, 28, 1) and dataset.validation.labels.shape == (9,)
    assert (dataset.name, dataset.num_classes, dataset.note) == ("mnist", 10, "MNIST (PNG; TFDS 3.0.1)")


def test_images_stored_as_jpeg_are_reported(tmp_path, monkeypatch):
    from PIL import Image

    def jpeg(image):
        encoded = io.BytesIO()
        Image.fromarray(image[..., 0]).save(encoded, "JPEG")
        return encoded.getvalue()

    monkeypatch.setattr(prepare, "_png", jpeg)
    write_mnist(tmp_path / "sets")
    assert load_mnist(tmp_path / "sets").note == "MNIST (JPEG copies, not the lossless originals; TFDS 3.0.1)"


def test_images_are_cropped_once_and_the_names_of_classes_known(tmp_path):
    _, test = write_mnist(tmp_path / "sets")
    dataset = load_mnist(tmp_path / "sets", preprocessing="center_crop", image_size=14)
    assert dataset.image_shape == (14, 14, 1) and dataset.class_names == tuple("0123456789")
    assert dataset.note == "MNIST (PNG; TFDS 3.0.1; center_crop to 14x14)"
    means = [np.sort(split.images.mean(axis=(1, 2, 3))) for split in (dataset.test, test)]
    np.testing.assert_allclose(*means, atol=1.5)
    assert (tmp_path / "cache" / "mnist-3.0.1-center_crop-14.npz").is_file()


def test_images_of_differing_sizes_are_refused(tmp_path, monkeypatch):
    png = prepare._png
    monkeypatch.setattr(prepare, "_png", lambda image: png(image[: 20 + image[0, 1, 0] % 8]))
    write_mnist(tmp_path / "sets")
    with pytest.raises(
        UsageError, match=r"train split of .*mnist/3.0.1 differ in size: \(2\d, 28\) at index 0, .* strea"
    ):
        load_mnist(tmp_path / "sets")


def test_the_second_load_reads_the_cache(sets, monkeypatch):
    first = load_mnist(sets, split_seed=1)
    assert [path.name for path in (sets.parent / "cache").iterdir()] == ["mnist-3.0.1.npz"]
    monkeypatch.setattr(sources, "decode_tfds_folder", lambda *_: pytest.fail("decoded again"))
    second = load_mnist(sets, split_seed=1)
    assert same_splits(first, second)
    assert (first.mean, first.std, first.num_classes, first.note) == (
        second.mean,
        second.std,
        second.num_classes,
        second.note,
    )
    assert not same_splits(first, load_mnist(sets, split_seed=2))


def test_the_cache_is_an_npz_that_can_be_given_by_path(sets):
    dataset = load_mnist(sets)
    carried = load_dataset(str(sets.parent / "cache" / "mnist-3.0.1.npz"))
    assert same_splits(dataset, carried)
    assert carried.note == dataset.note


def flip_a_pixel(cache):
    data = bytearray(cache.read_bytes())
    data[len(data) // 3] ^= 1
    cache.write_bytes(data)


def cut(cache):
    cache.write_bytes(cache.read_bytes()[:-1000])


def someone_elses(cache):
    np.savez(cache, weights=np.zeros(3))


def without_labels(cache):
    with np.load(cache) as file:
        kept = {key: file[key] for key in file.files if key != "test_labels"}
    np.savez(cache, **kept)


@pytest.mark.parametrize(
    ("spoil", "warning"),
    [
        (flip_a_pixel, "mnist-3.0.1.npz is damaged; making it anew"),
        (cut, "mnist-3.0.1.npz is damaged; making it anew"),
        (someone_elses, "mnist-3.0.1.npz was not made from the files in"),
        (without_labels, "mnist-3.0.1.npz was not made from the files in"),
    ],
)
def test_a_spoilt_cache_is_made_anew(spoil, warning, sets, caplog):
    expected = load_mnist(sets)
    cache = sets.parent / "cache" / "mnist-3.0.1.npz"
    spoil(cache)
    caplog.clear()
    assert same_splits(load_mnist(sets), expected)
    assert len(caplog.messages) == 1 and warning in caplog.messages[0]
    caplog.clear()
    assert same_splits(load_mnist(sets), expected)
    assert caplog.messages == []


def test_the_cache_follows_its_source(sets, caplog):
    load_mnist(sets)
    shutil.rmtree(sets / "mnist")
    _, test = write_mnist(sets, seed=1)
    assert contents(load_mnist(sets).test) == contents(test)
    assert "was not made from the files in" in caplog.text
    caplog.clear()
    shard = next((sets / "mnist" / "3.0.1").glob("*train*"))
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    load_mnist(sets)
    assert "was not made from the files in" in caplog.text


def test_a_cache_that_cannot_be_written_is_a_warning(sets, caplog):
    (sets.parent / "cache").write_text("a file where the folder should be")
    dataset = load_mnist(sets)
    assert len(dataset.test.labels) == 15
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "mnist/3.0.1 will be decoded anew each time" in caplog.messages[0]


def test_a_full_disk_leaves_neither_a_cache_nor_half_of_one(sets, monkeypatch, caplog):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    load_mnist(sets)
    assert "No space left on device" in caplog.text
    assert list((sets.parent / "cache").iterdir()) == []


def test_the_default_cache_follows_xdg(sets, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(sets))
    load_dataset("mnist")
    assert (tmp_path / "xdg" / "bnn_jax" / "mnist-3.0.1.npz").is_file()


def test_the_newest_version_is_taken(sets):
    for version in ("3.0.10", "3.0.9", "incomplete.3.0.11", "3.1"):
        shutil.copytree(sets / "mnist" / "3.0.1", sets / "mnist" / version)
    assert find_tfds_folder("mnist", sets) == sets / "mnist" / "3.0.10"


def replace_in(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_validation_split_alone_is_the_test_split(tmp_path, caplog):
    train, test = write_mnist(tmp_path / "sets")
    folder = tmp_path / "sets" / "mnist" / "3.0.1"
    replace_in(folder / "dataset_info.json", '"name": "test"', '"name": "validation"')
    for path in folder.glob("*-test.*"):
        path.rename(folder / path.name.replace("-test.", "-validation."))
    for _ in range(2):
        dataset = load_mnist(tmp_path / "sets")
        assert contents(dataset.train, dataset.validation) == contents(train)
        assert contents(dataset.test) == contents(test)
        assert dataset.note == "MNIST (PNG; TFDS 3.0.1); tested on the validation split"
    assert not caplog.messages


def test_a_set_is_found_in_a_home(sets, monkeypatch):
    monkeypatch.setenv("HOME", str(sets.parent))
    assert load_dataset("~/sets/mnist", cache_dir=sets.parent / "cache").image_shape == (28, 28, 1)


@pytest.mark.parametrize(
    ("file", "old", "new", "error", "message"),
    [
        ("dataset_info.json", '"array_record"', '"tfrecord"', UsageError, "stored as tfrecord, which needs TensorFlow"),
        ("dataset_info.json", '"name": "test"', '"name": "rest"', UsageError, "has no split 'test', only .*rest"),
        ("dataset_info.json", "{", "", RunError, "cannot be read as a TFDS folder"),
        ("dataset_info.json", '"95"', '"96"', RunError, "the train split of .* is damaged .*copy or prepare the set"),
        ("features.json", '"uint8"', '"uint16"', UsageError, "are uint16 of shape .* 8-bit grey or RGB is read"),
        (
            "features.json",
            '"label": {',
            '"mood": {',
            UsageError,
            "not a set of images with one label each: its features",
        ),
        ("features.json", ".ClassLabel", ".Unknown", RunError, "cannot be read as a TFDS folder"),
    ],
)
def test_a_folder_that_cannot_serve_is_named(file, old, new, error, message, sets):
    replace_in(sets / "mnist" / "3.0.1" / file, old, new)
    with pytest.raises(error, match=message) as caught:
        load_mnist(sets)
    assert str(sets / "mnist" / "3.0.1") in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_records_are_refused(sets):
    shard = next((sets / "mnist" / "3.0.1").glob("*test*"))
    data = bytearray(shard.read_bytes())
    position = data.index(b"\x89PNG") + 100
    data[position] ^= 1
    shard.write_bytes(data)
    with pytest.raises(
        RunError, match=r"the test split of .*mnist/3.0.1 is damaged \(.*; copy or prepare the set again"
    ):
        load_mnist(sets)


def test_an_image_that_is_none_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_png", lambda image: b"GIF89a, or so it says")
    write_mnist(tmp_path / "sets")
    with pytest.raises(
        RunError, match=r"image 0 of the train split of .*3.0.1 cannot be decoded \(no image format is known"
    ):
        load_mnist(tmp_path / "sets")


def test_a_missing_set_comes_with_its_command(sets, tmp_path):
    command = r"bnn-jax prepare cifar10 --data-dir {}$"
    with pytest.raises(
        UsageError, match=r"`name` \(='cifar10'\) is not in the data folder .*: " + command.format(sets)
    ):
        load_dataset("cifar10", data_dir=sets)
    with pytest.raises(UsageError, match=command.format(f"'{tmp_path}/my data'")):
        load_dataset("cifar10", data_dir=tmp_path / "my data")


@pytest.mark.parametrize(
    ("name", "nearest"), [("digit", "digits"), ("minst", "mnist"), ("cifra10", "cifar10"), ("flowers2", "flowers")]
)
def test_an_unknown_name_comes_with_the_nearest(name, nearest, sets):
    shutil.copytree(sets / "mnist", sets / "flowers")
    message = rf"`name` \(='{name}'\) is not 'digits', .*{sets} \(it has flowers, mnist\); did you mean '{nearest}'\?$"
    with pytest.raises(UsageError, match=message):
        load_dataset(name, data_dir=sets)


def test_a_path_that_is_not_there_is_no_misspelt_set(sets):
    with pytest.raises(
        UsageError, match=r"`name` \(='/pets'\) .* \(it has mnist\); what it can be: bnn-jax list data$"
    ):
        load_dataset("/pets", data_dir=sets)


def test_no_tensorflow_and_nothing_printed(sets, subprocess_env):
    program = (
        "import sys\n"
        "from bnn_jax.data import load_dataset\n"
        f"load_dataset('mnist', data_dir={str(sets)!r}, cache_dir={str(sets.parent / 'cache')!r})\n"
        "assert 'tensorflow' not in sys.modules and 'tensorflow_datasets' in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", program], env=subprocess_env, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")

"""Preparing official archives: tiny archives of the official layout, written here byte by byte, read back exactly."""

import gzip
import hashlib
import io
import re
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from run_script import run_script
from small_sets import contents, mnist_archives, write_idx

from bnn_jax.data import Split, load_dataset, prepare, prepare_dataset
from bnn_jax.data.prepare import ARCHIVES, CIFAR_ARCHIVES, MNIST_FILES, default_data_dir, fetch, write_array_record
from bnn_jax.errors import RunError, UsageError


def random_set(count, shape, num_classes, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    return Split(images, rng.integers(0, num_classes, count, dtype=np.uint8))


def cifar_records(images, *labels):
    records = b""
    for index, image in enumerate(images):
        records += bytes(int(values[index]) for values in labels)
        records += b"".join(bytes(image[row, :, channel]) for channel in range(3) for row in range(32))
    return records


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def cifar10_members(train, test):
    folder = "cifar-10-batches-bin"
    parts = [slice(i * len(train) // 5, (i + 1) * len(train) // 5) for i in range(5)]
    batches = {
        f"{folder}/data_batch_{i}.bin": cifar_records(train.images[part], train.labels[part])
        for i, part in enumerate(parts, start=1)
    }
    names = "\n".join(f"class {i}" for i in range(10)) + "\n\n"
    return batches | {
        f"{folder}/test_batch.bin": cifar_records(test.images, test.labels),
        f"{folder}/batches.meta.txt": names.encode(),
    }


def assert_holds(dataset, train, test):
    assert contents(dataset.train, dataset.validation) == contents(train)
    assert contents(dataset.test) == contents(test)


@pytest.mark.filterwarnings("ignore:.*classes, none of:bnn_jax.data.arrays.SuspectDataWarning")
def test_cifar10_comes_back_pixel_by_pixel(tmp_path):
    train, test = random_set(25, (32, 32, 3), 10, 0), random_set(6, (32, 32, 3), 10, 1)
    archive = write_tar(tmp_path / "cifar-10-binary.tar.gz", cifar10_members(train, test))
    folder = write_array_record("cifar10", [archive], data_dir=tmp_path / "sets")
    assert folder == tmp_path / "sets" / "cifar10" / "3.0.2"
    assert (folder / "label.labels.txt").read_text().split("\n")[:2] == ["class 0", "class 1"]
    dataset = load_dataset("cifar10", data_dir=tmp_path / "sets", cache_dir=tmp_path / "cache")
    assert_holds(dataset, train, test)
    assert (dataset.num_classes, dataset.note) == (10, "CIFAR-10 (PNG; TFDS 3.0.2)")


@pytest.mark.filterwarnings("ignore:.*classes, none of:bnn_jax.data.arrays.SuspectDataWarning")
def test_cifar100_keeps_the_fine_label(tmp_path):
    train, test = random_set(12, (32, 32, 3), 100, 2), random_set(5, (32, 32, 3), 100, 3)
    members = {
        "cifar-100-binary/train.bin": cifar_records(train.images, train.labels // 5, train.labels),
        "cifar-100-binary/test.bin": cifar_records(test.images, test.labels // 5, test.labels),
        "cifar-100-binary/coarse_label_names.txt": "\n".join(f"c{i}" for i in range(20)).encode(),
        "cifar-100-binary/fine_label_names.txt": "\n".join(f"f{i}" for i in range(100)).encode(),
    }
    archive = write_tar(tmp_path / "cifar-100-binary.tar.gz", members)
    write_array_record("cifar100", [archive], data_dir=tmp_path)
    dataset = load_dataset("cifar100", data_dir=tmp_path, cache_dir=tmp_path / "cache")
    assert_holds(dataset, train, test)
    assert dataset.num_classes == 100


def test_the_set_is_the_one_tfds_itself_reads(tmp_path):
    """`tfds.data_source` by name, with its own decoding, and the ids of the official builder."""
    import tensorflow_datasets as tfds

    train, test = random_set(10, (32, 32, 3), 10, 4), random_set(5, (32, 32, 3), 10, 5)
    archive = write_tar(tmp_path / "archive.tar.gz", cifar10_members(train, test))
    write_array_record("cifar10", [archive], data_dir=tmp_path)
    source = tfds.data_source(
        "cifar10",
        split="train",
        data_dir=tmp_path,
        download=False,
        builder_kwargs={"file_format": "array_record"},
    )
    assert len(source) == 10
    for example in source:
        index = int(re.fullmatch(rb"train_(\d{5})", example["id"]).group(1))
        np.testing.assert_array_equal(example["image"], train.images[index])
        assert example["label"] == train.labels[index]


@pytest.fixture
def mnist_server(tmp_path, monkeypatch):
    """Tiny archives under file:// addresses in place of the official ones, with their SHA-256."""
    import tensorflow_datasets as tfds

    train, test = random_set(20, (28, 28, 1), 10, 6), random_set(7, (28, 28, 1), 10, 7)
    paths = mnist_archives(tmp_path / "server", train, test)
    builder_class = tfds.builder_cls("mnist")
    info = next(iter(builder_class.url_infos.values()))
    infos = {}
    for path in paths:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        infos[path.as_uri()] = type(info)(size=path.stat().st_size, checksum=digest, filename=path.name)
    monkeypatch.setattr(builder_class, "url_infos", infos)
    return tmp_path / "server", train, test


@pytest.mark.filterwarnings("ignore:.*classes, none of:bnn_jax.data.arrays.SuspectDataWarning")
def test_prepare_downloads_verifies_and_writes(mnist_server, tmp_path):
    server, train, test = mnist_server
    lines = []
    folder = prepare_dataset("mnist", data_dir=tmp_path / "sets", report=lines.append)
    assert folder == tmp_path / "sets" / "mnist" / "3.0.1"
    downloads = [f"downloading {(server / name).as_uri()}" for name in MNIST_FILES]
    assert lines == [*downloads, f"writing {folder}"]
    dataset = load_dataset("mnist", data_dir=tmp_path / "sets", cache_dir=tmp_path / "cache")
    assert_holds(dataset, train, test)
    assert not list((tmp_path / "sets").rglob("*.tmp"))

    lines.clear()
    assert prepare_dataset("mnist", data_dir=tmp_path / "sets", report=lines.append) == folder
    assert lines == [f"mnist is already in {folder}"]


@pytest.mark.filterwarnings("ignore:.*classes, none of:bnn_jax.data.arrays.SuspectDataWarning")
def test_archives_put_there_by_hand_need_no_network(mnist_server, tmp_path):
    server, train, test = mnist_server
    (tmp_path / "sets" / "downloads").mkdir(parents=True)
    server.rename(tmp_path / "sets" / "downloads" / "mnist")
    lines = []
    folder = prepare_dataset("mnist", data_dir=tmp_path / "sets", report=lines.append)
    assert lines == [f"writing {folder}"]
    assert_holds(load_dataset("mnist", data_dir=tmp_path / "sets", cache_dir=tmp_path / "cache"), train, test)


def test_a_failed_download_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch):
    def refuse(url, timeout):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    path = tmp_path / "archive.gz"
    with pytest.raises(RunError) as caught:
        fetch("https://example.org/archive.gz", path, sha256="0", report=lambda line: None)
    assert str(caught.value) == (
        "downloading https://example.org/archive.gz failed (<urlopen error Name or service not known>); "
        f"fetch it on a machine with a network, put it at {path}, and run the same command again"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_another_sha256_is_refused(tmp_path):
    sent = tmp_path / "sent"
    sent.write_bytes(b"half")
    digest = hashlib.sha256(b"half").hexdigest()
    path = tmp_path / "archive.gz"
    with pytest.raises(RunError, match=rf"is not the official file \(SHA-256 {digest}, official 1234\); it was cut"):
        fetch(sent.as_uri(), path, sha256="1234", report=lambda line: None)
    assert list(tmp_path.iterdir()) == [sent]
    path.write_bytes(b"half")
    with pytest.raises(RunError, match=rf"{path} is not the official file .* delete it and run again"):
        fetch(sent.as_uri(), path, sha256="1234", report=lambda line: None)


def test_official_files_are_those_that_tfds_publishes():
    import tensorflow_datasets as tfds

    for name, filenames in ARCHIVES.items():
        published = [info.filename for info in tfds.builder_cls(name).url_infos.values()]
        assert sorted(published) == sorted(filenames)


@pytest.fixture
def mnist_paths(tmp_path):
    return mnist_archives(tmp_path / "files", random_set(6, (28, 28, 1), 10, 8), random_set(4, (28, 28, 1), 10, 9))


def cut_gzip(paths):
    paths[0].write_bytes(paths[0].read_bytes()[:-50])


def no_gzip(paths):
    paths[1].write_bytes(b"<html>moved</html>")


def no_idx(paths):
    paths[1].write_bytes(gzip.compress(b"\0\0\x0d\x01" + bytes(8)))


def short_idx(paths):
    write_idx(paths[1], np.zeros(5, np.uint8), shape=(6,))


def fewer_labels(paths):
    write_idx(paths[1], np.zeros(5, np.uint8))


def other_size(paths):
    write_idx(paths[0], np.zeros((6, 27, 28), np.uint8))


def label_ten(paths):
    write_idx(paths[3], np.array([0, 1, 10, 2], np.uint8))


def no_examples(paths):
    write_idx(paths[2], np.zeros((0, 28, 28), np.uint8))
    write_idx(paths[3], np.zeros(0, np.uint8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_gzip, r"train-images-idx3-ubyte.gz cannot be read as the official archive \(.*; delete it and run again"),
        (no_gzip, r"train-labels-idx1-ubyte.gz cannot be read as the official archive \(Not a gzipped file"),
        (no_idx, r"train-labels-idx1-ubyte.gz begins with 00000d01, not an idx header; delete it and run again"),
        (short_idx, r"train-labels-idx1-ubyte.gz says shape \(6,\) but holds 5 values; delete it and run again"),
        (fewer_labels, r"the train files of .* hold images of shape \(6, 28, 28\) and labels of shape \(5,\), not"),
        (other_size, r"the train images of .* have shape \(6, 27, 28, 1\), not \[N, 28, 28, 1\]; delete the download"),
        (label_ten, r"the test labels of .* have the `label` 10; labels are 0 to 9; delete the download and run again"),
        (no_examples, r"the test images of .* have shape \(0, 28, 28, 1\), not \[N, 28, 28, 1\]; delete the download"),
    ],
)
def test_damaged_mnist_files_are_refused(damage, message, mnist_paths, tmp_path):
    damage(mnist_paths)
    with pytest.raises(RunError, match=message):
        write_array_record("mnist", mnist_paths, data_dir=tmp_path / "sets")
    assert not (tmp_path / "sets" / "mnist" / "3.0.1").exists()


def test_damaged_cifar_archives_are_refused(tmp_path):
    members = cifar10_members(random_set(5, (32, 32, 3), 10, 10), random_set(1, (32, 32, 3), 10, 11))
    last = "cifar-10-batches-bin/data_batch_5.bin"
    path = tmp_path / "cifar.tar.gz"
    cases = {
        r"cannot be read as the official archive \(.*data_batch_5.bin.*not found": {
            name: data for name, data in members.items() if name != last
        },
        r"data_batch_5.bin in .* has 3072 bytes, not a multiple of 3073; delete it": members | {last: bytes(3072)},
        r"data_batch_5.bin in .* has 0 bytes, not a multiple of 3073; delete it": members | {last: b""},
        r"names 2 classes for `label`, not 10; delete the download": members
        | {"cifar-10-batches-bin/batches.meta.txt": b"cat\ndog\n"},
    }
    for message, changed in cases.items():
        with pytest.raises(RunError, match=message):
            write_array_record("cifar10", [write_tar(path, changed)], data_dir=tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"cifar.tar.gz cannot be read as the official archive \("):
        write_array_record("cifar10", [path], data_dir=tmp_path)


def test_a_set_is_never_written_over(mnist_paths, tmp_path):
    folder = write_array_record("mnist", mnist_paths, data_dir=tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match=rf"{folder} exists already; delete it to write it anew, or give another"):
        write_array_record("mnist", mnist_paths, data_dir=tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_disk_that_fails_leaves_no_set(mnist_paths, tmp_path, monkeypatch):
    def full(image):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "_png", full)
    with pytest.raises(
        RunError, match=r"mnist/3.0.1 cannot be written \(.*No space left on device.*free space or give"
    ):
        write_array_record("mnist", mnist_paths, data_dir=tmp_path)
    assert not list(tmp_path.glob("mnist/*"))


def test_arguments_of_the_user_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"`name` \(='cifar-10'\) must be one of cifar10, .*did you mean 'cifar10'\?"):
        prepare_dataset("cifar-10", data_dir=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"`data_dir` \(='.*file'\) cannot be written \(.*\); give another folder"):
        prepare_dataset("mnist", data_dir=tmp_path / "file")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_data_source", None)
    with pytest.raises(
        UsageError,
        match=r"needs the Python package array_record.*: pip install 'bnn_jax\[tfds\]'; or give",
    ):
        prepare_dataset("mnist", data_dir=tmp_path)


def test_the_default_folder_is_that_of_tfds(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/data/sets")
    assert default_data_dir() == Path("/data/sets")
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert default_data_dir() == Path.home() / "tensorflow_datasets"


def test_an_unknown_name_ends_the_script_with_one_sentence(tmp_path):
    found = run_script("prepare_data", "cifar1", "--data-dir", tmp_path, code=2)
    assert re.fullmatch(r"error: `name` \(='cifar1'\) must be one of .* did you mean 'cifar10'\?.*\n", found.stderr)


def test_a_failed_download_ends_the_script_with_one_sentence(tmp_path, monkeypatch):
    # Port 9 answers nobody: the script meets a machine without network wherever the test runs.
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(urllib.request, "_opener", None)  # It keeps the proxies that it found first.
    found = run_script("prepare_data", "cifar10", "--data-dir", tmp_path, code=1)
    assert found.returncode == 1
    message = r"error: downloading https://\S*/cifar-10-binary.tar.gz failed \(.*refused.*put it at.*\n"
    assert re.fullmatch(message, found.stderr)


def test_every_archive_has_a_parser():
    assert set(CIFAR_ARCHIVES) < set(ARCHIVES)
    assert {name for name, files in ARCHIVES.items() if files == MNIST_FILES} == set(ARCHIVES) - set(CIFAR_ARCHIVES)

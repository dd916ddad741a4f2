"""Small image sets for tests, in memory and on disk in the layout of TFDS, and what splits of them hold."""

import gzip
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from bnn_jax.data import Dataset, Split
from bnn_jax.data.prepare import MNIST_FILES, write_array_record


def brightness_set(train: int, validation: int = 20, test: int = 20) -> Dataset:
    """Grey images of 8x8 in three classes that differ in brightness, in noise."""
    rng = np.random.default_rng(0)

    def split(count):
        labels = rng.integers(0, 3, count).astype(np.int32)
        images = rng.integers(0, 120, (count, 8, 8, 1)) + 60 * labels[:, None, None, None]
        return Split(images.astype(np.uint8), labels)

    return Dataset("synthetic", split(train), split(validation), split(test), 3, (120.0,), (60.0,), "made for a test")


def write_npz(dataset: Dataset, path: Path) -> str:
    """Write a set as `data.name` takes it; returns the path."""
    arrays = {
        f"{name}_{kind}": getattr(getattr(dataset, name), kind)
        for name in ("train", "validation", "test")
        for kind in ("images", "labels")
    }
    np.savez(path, **arrays)
    return str(path)


def write_idx(path: Path, values: np.ndarray, *, shape: tuple[int, ...] | None = None) -> None:
    """A gzipped idx file of bytes, whose header says `shape`, by default the true one."""
    shape = values.shape if shape is None else shape
    header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


def mnist_archives(folder: Path, train: Split, test: Split) -> list[Path]:
    """The four files of an MNIST-like download in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in MNIST_FILES]
    for path, values in zip(paths, (train.images[..., 0], train.labels, test.images[..., 0], test.labels)):
        write_idx(path, values)
    return paths


def write_mnist(folder: Path, *, train: int = 95, test: int = 15, seed: int = 0) -> tuple[Split, Split]:
    """A tiny set in MNIST's layout; the first two pixels of an image tell its number."""
    made = []
    for count, first in ((train, 0), (test, 1000)):
        images = np.random.default_rng(first + seed).integers(0, 256, (count, 28, 28, 1), dtype=np.uint8)
        images[:, 0, 0, 0], images[:, 0, 1, 0] = divmod(first + np.arange(count), 256)
        made.append(Split(images, (np.arange(count) % 10).astype(np.uint8)))
    downloads = folder / "downloads"
    write_array_record("mnist", mnist_archives(downloads, *made), data_dir=folder)
    shutil.rmtree(downloads)
    return tuple(made)


def contents(*splits: Split) -> Counter:
    """How often each image with its label occurs."""
    return Counter(
        (image.tobytes(), int(label)) for split in splits for image, label in zip(split.images, split.labels)
    )


def same_splits(a: Dataset, b: Dataset) -> bool:
    """Whether two sets are divided alike, image by image."""
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("train", "validation", "test")]
    return all(np.array_equal(x.images, y.images) and np.array_equal(x.labels, y.labels) for x, y in pairs)

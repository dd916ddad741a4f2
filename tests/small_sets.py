"""Small image sets on disk for tests, in the layout of TFDS."""

import gzip
import shutil
from pathlib import Path

import numpy as np

from bnn_jax.data.prepare import MNIST_FILES, write_array_record


def write_mnist(folder: Path, *, train: int = 95, test: int = 15) -> None:
    """A tiny set in MNIST's layout; the first two pixels of an image tell its number."""
    made = []
    for count, first in ((train, 0), (test, 1000)):
        images = np.random.default_rng(first).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0], images[:, 0, 1] = divmod(first + np.arange(count), 256)
        made += [images, (np.arange(count) % 10).astype(np.uint8)]
    downloads = folder / "downloads"
    downloads.mkdir(parents=True)
    for name, values in zip(MNIST_FILES, made):
        sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
        (downloads / name).write_bytes(gzip.compress(bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()))
    write_array_record("mnist", [downloads / name for name in MNIST_FILES], data_dir=folder)
    shutil.rmtree(downloads)

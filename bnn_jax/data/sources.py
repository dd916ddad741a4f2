"""load_dataset: whole image sets as uint8 arrays, from scikit-learn's digits, an .npz file or a TFDS folder.

A TFDS folder is decoded once and kept as an .npz file, in the very format a user's own .npz file has.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from bnn_jax.checks import require
from bnn_jax.data.arguments import size_in_memory, whole_number
from bnn_jax.data.arrays import checked_arrays
from bnn_jax.data.image_folder import decode_image_folder, find_images, image_folder_named, name_of_folder
from bnn_jax.data.npz import read_npz, read_through_cache
from bnn_jax.data.prepare import default_data_dir
from bnn_jax.data.splits import check_own_validation, in_three, split_off_validation
from bnn_jax.data.text import BYTES, TOKENS, read_text, windows_of
from bnn_jax.data.tfds_folder import decode_tfds_folder, files_of, find_tfds_folder, split_names
from bnn_jax.errors import RunError, UsageError
from bnn_jax.paths import cache_folder, local_path

IN_MEMORY = re.compile(r" in memory, sha256 [0-9a-f]{16}$")
"""The end of the name of arrays that a run was given, in its config."""

DIVIDED = "split 60/20/20 % by seed"
TESTED_ON_VALIDATION = "tested on the validation split"
"""In the note of a set without splits, or without a test split."""


@dataclass(frozen=True)
class Split:
    """Images and their labels, in a fixed order."""

    images: UInt8[np.ndarray, "examples height width channels"]
    labels: Int32[np.ndarray, "examples *tokens"]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A whole classification set in memory.

    Attributes:
      name: for reports.
      train, validation, test: its splits.
      num_classes: labels are below it.
      mean, std: of the training split's pixels, one number for each channel, in units of 0..255.
      note: says where the images come from, for reports to quote.
      class_names: where they are known.
      identity: the fields of :class:`bnn_jax.training.config.DataConfig` that stand for the set in a run, set where
        it is loaded, or checked; None for one that was made by hand, or with `dataclasses.replace`.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    note: str = ""
    class_names: tuple[str, ...] | None = None
    identity: dict[str, Any] | None = field(default=None, init=False, repr=False, compare=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that the set is, as training takes it: 16 hexadecimal digits."""
        digest = hashlib.sha256(repr((self.num_classes, self.mean, self.std)).encode())
        for split in (self.train, self.validation, self.test):
            digest.update(f"{split.images.shape}\n".encode())
            digest.update(np.ascontiguousarray(split.images))
            digest.update(np.ascontiguousarray(split.labels))
        return digest.hexdigest()[:16]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)"""
        return self.train.images.shape[1:]


def load_dataset(
    name: str,
    *,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    validation_examples: int | None = None,
    split_seed: int = 0,
    preprocessing: str = "none",
    image_size: int | None = None,
    tokens: int | None = None,
) -> Dataset:
    """Load a whole image classification set, split into training, validation and test.

    The validation split is taken out of the training images, of every class the same share to one example, by a
    permutation that `split_seed` alone decides, on every platform and with every version of NumPy; test is the official
    one.

    Args:
      name: one of

        * `"digits"`: 1797 real 8x8 digits that come with scikit-learn, values 0..16 stretched to 0..255; there is no
          official split, so each class is divided 60/20/20 % by `split_seed`.
        * a path that ends in `.npz`, with the arrays `train_images`, `train_labels`, `test_images`, `test_labels`, or
          `x_train`, `y_train`, ...: images uint8 [N,H,W,C] or [N,H,W], labels 0 to C - 1 [N]; for what else is taken
          see :func:`bnn_jax.data.arrays.checked_arrays`.  Without a test split (`images`, `labels` alone) it is divided
          as digits are.  Optional: `validation_images` and `validation_labels`; `num_classes`, without which every
          class has a training example; `layout` "NHWC" for images that look as if the channels came first;
          `class_names`; `note`.
        * a path that ends in `.txt`, any text, or `"text"`, the docstrings of this package: bytes, of 256 classes.  An
          image is a column of `tokens` of them, (tokens, 1, 1), with the mean 0 and the deviation 1; its labels are the
          bytes behind each, (tokens,).  The last tenth is the test split.
        * a set in `data_dir` that TFDS stored as ArrayRecord, such as `"cifar10"`; read without TensorFlow.
        * a folder, by itself or in `data_dir`, with a folder of images for each class, either in the folders `train`,
          `test` and `val`, or alone, then divided as digits are; see :func:`bnn_jax.data.image_folder.find_images`.
          Images are grey if all are, else RGB; of those with 16 bits the upper 8 are taken, and they are refused if
          none reaches the upper half.
      data_dir: folder of such sets; default `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      cache_dir: where the decoded arrays of files are kept, as `<name>-<version>.npz`; default
        `$XDG_CACHE_HOME/bnn_jax`, else `~/.cache/bnn_jax`.
      validation_examples: size of the validation split; default a tenth of the training images, for digits a fifth
        of all.  Must be left out when the source has test and validation splits of its own.
      split_seed: seed of the division.
      preprocessing: "none" takes images as they are, which then have one size; "center_crop" resizes the shorter side
        of each to `image_size`, bilinearly, and cuts out the square in the middle.
      image_size: height and width after that; default 224.
      tokens: bytes of an example of a text; default 64.

    Returns:
      A :class:`Dataset`; images uint8 [N,H,W,C], labels int32 [N]; the arrays are read-only.

    Raises:
      UsageError: for a name, path or number that cannot be served; names it and the way out.
      RunError: for data that are damaged or break a rule above; names the array, the value, the rule and, for common
        mistakes, the NumPy expression that mends it.

    Warns:
      SuspectDataWarning: see :func:`bnn_jax.data.arrays.checked_arrays`.

    >>> digits = load_dataset("digits")
    >>> digits.train.images.shape, digits.validation.labels.shape, digits.num_classes
    ((1079, 8, 8, 1), (359,), 10)
    """
    name, seed = os.fspath(name), whole_number("split_seed", split_seed, at_least=0)
    if validation_examples is not None:
        validation_examples = whole_number("validation_examples", validation_examples, at_least=1)
    size = size_in_memory(preprocessing, image_size)
    path, split_by = local_path("name", name), (validation_examples, seed)
    is_text = name == "text" or name.endswith(".txt")
    require(
        "tokens", tokens, tokens is None or is_text, f"is for texts, not {name!r}", "leave it out", error=UsageError
    )
    if is_text:
        _check_arrays_alone(name, data_dir, size)
        rule = f"is for sets that are divided at random, and of {name!r} the last parts are taken"
        require("split_seed", seed, seed == 0, rule, "leave it out", error=UsageError)
        dataset = _load_text(name, path, validation_examples, tokens)
    elif name == "digits" or name.endswith(".npz"):
        _check_arrays_alone(name, data_dir, size)
        dataset = _load_digits(*split_by) if name == "digits" else _load_npz(name, path, *split_by)
    else:
        cache = local_path("cache_dir", cache_dir or cache_folder())
        dataset = _load_files(name, data_dir, cache, preprocessing, size, *split_by)
    for split in (dataset.train, dataset.validation, dataset.test):
        split.images.setflags(write=False)
        split.labels.setflags(write=False)
    where = {"name": name, "data_dir": None if data_dir is None else os.fspath(data_dir), "stream": False}
    where |= {"tokens": tokens} if is_text else {}
    return identified(
        dataset,
        **where,
        validation_examples=validation_examples,
        split_seed=seed,
        preprocessing=preprocessing,
        image_size=image_size,
    )


def identified(dataset: Any, **identity: Any) -> Any:
    """Set the `identity` of a set, in memory or on disk, and return it."""
    object.__setattr__(dataset, "identity", identity)
    return dataset


def _check_arrays_alone(name: str, data_dir: str | Path | None, size: int) -> None:
    if data_dir is not None:
        raise UsageError(f"`data_dir` (={str(data_dir)!r}) is for sets stored in folders, not {name!r}; leave it out")
    if size:
        raise UsageError(f"`preprocessing` is for image files, and {name!r} holds arrays of one size; leave it out")


def _load_files(
    name: str,
    data_dir: str | Path | None,
    cache: Path,
    preprocessing: str,
    size: int,
    validation_examples: int | None,
    seed: int,
) -> Dataset:
    """A set that TFDS stored, or a folder of images; decoded once and kept in the folder `cache`."""
    if IN_MEMORY.search(name):
        raise UsageError(
            f"`data.name` (={name!r}) stands for arrays that a run was given; give them again, as `data` in Python"
        )
    prepared = f"-{preprocessing}-{size}" if size else ""
    folder = image_folder_named(name, data_dir)
    if folder is not None:
        images = find_images(folder)
        place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        short = name_of_folder(folder)
        file = cache / f"{short}-{place}{prepared}.npz"
        decode = partial(decode_image_folder, images, preprocessing, size)
        arrays = read_through_cache(folder, images.version, file, decode, images.splits)
    else:
        folder = find_tfds_folder(name, local_path("data_dir", data_dir or default_data_dir()))
        file, short = cache / f"{name.replace('/', '-')}-{folder.name}{prepared}.npz", name
        decode = partial(decode_tfds_folder, name, folder, preprocessing, size)
        arrays = read_through_cache(folder, files_of(folder), file, decode, split_names(folder))
    return assemble(short, arrays, str(folder), "", validation_examples, seed)


# -- from arrays to a Dataset


def assemble(
    name: str,
    arrays: Mapping[str, np.ndarray],
    source: str,
    note: str,
    validation_examples: int | None,
    split_seed: int,
) -> Dataset:
    """Check arrays of the .npz format, divide them, and measure the pixels of the training split.

    Args:
      name: of the set.
      arrays: as :func:`load_dataset` describes those of an .npz file.
      source: where they come from, for messages.
      note: of the set, where there is none among the arrays.
      validation_examples, split_seed: as :func:`load_dataset`.

    Raises:
      RunError: as :func:`bnn_jax.data.arrays.checked_arrays`; for a channel that is the same everywhere.
      UsageError: for a number of validation examples that there cannot be.
    """
    found, num_classes = checked_arrays(arrays, source)
    splits = {prefix: Split(images, labels.astype(np.int32)) for prefix, (images, labels) in found.items()}
    whole, note = splits["train"], str(arrays.get("note", note))
    if "test" not in splits and "validation" in splits:
        splits["test"], note = splits.pop("validation"), f"{note}; {TESTED_ON_VALIDATION}"
    if "validation" in splits:
        check_own_validation(validation_examples, split_seed, source)
    elif "test" in splits:
        kept, taken = split_off_validation(whole.labels, validation_examples, split_seed)
        splits |= {"train": _take(whole, kept), "validation": _take(whole, taken)}
    else:
        note = f"{note}; {DIVIDED}"
        parts = in_three(whole.labels, validation_examples, split_seed)
        splits = {part: _take(whole, indices) for part, indices in parts.items()}
    names = _names_of_classes(arrays["class_names"], num_classes, source) if "class_names" in arrays else None
    return _with_statistics(name, splits, num_classes, note, names)


def _names_of_classes(names: np.ndarray, num_classes: int, source: str) -> tuple[str, ...]:
    if names.ndim != 1:
        raise RunError(f"`class_names` of {source} has shape {names.shape}; give one name for each class, [C]")
    if len(names) != num_classes:
        raise RunError(f"`class_names` of {source} has {len(names)} names for {num_classes} classes; give one for each")
    return tuple(name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names)


def _take(split: Split, indices: np.ndarray) -> Split:
    indices = np.sort(indices)
    return Split(split.images[indices], split.labels[indices])


def _with_statistics(
    name: str, splits: Mapping[str, Split], num_classes: int, note: str, class_names: tuple[str, ...] | None = None
) -> Dataset:
    mean, std = pixel_statistics(splits["train"].images)
    check_spread(name, mean, std)
    return Dataset(name, **splits, num_classes=num_classes, mean=mean, std=std, note=note, class_names=class_names)


def check_spread(name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Refuse a channel that is the same everywhere.

    Raises:
      RunError: for it, as it cannot be normalised.
    """
    if 0.0 in std:
        channel = std.index(0.0)
        raise RunError(
            f"every pixel of channel {channel} of the training images of {name} is {mean[channel]:g}, "
            "which cannot be normalised; leave that channel out"
        )


def pixel_statistics(
    images: UInt8[np.ndarray, "examples height width channels"],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels of all images, summed exactly in integers.

    >>> pixel_statistics(np.array([[[[1]], [[3]]]], np.uint8))
    ((2.0,), (1.0,))
    """
    return statistics_of(pixel_sums(images))


def pixel_sums(images: UInt8[np.ndarray, "examples height width channels"]) -> list[tuple[int, int, int]]:
    """(count, sum, sum of squares) of the pixels of each channel: sums of parts add up to those of the whole."""
    sums = []
    for channel in range(images.shape[-1]):
        values = images[..., channel]
        squares = sum(int(np.square(part, dtype=np.uint16).sum(dtype=np.uint64)) for part in _blocks(values))
        sums.append((values.size, int(values.sum(dtype=np.uint64)), squares))
    return sums


def statistics_of(sums: Sequence[tuple[int, int, int]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel from its :func:`pixel_sums`."""
    mean = tuple(total / count for count, total, _ in sums)
    std = tuple((count * squares - total * total) ** 0.5 / count for count, total, squares in sums)
    return mean, std


def _blocks(values: np.ndarray) -> list[np.ndarray]:
    """Views of a few thousand examples, so that a wider copy of them stays small."""
    return np.array_split(values, -(-len(values) // 4096))


# -- digits


def _load_digits(validation_examples: int | None, split_seed: int) -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    whole = Split(images, bunch.target.astype(np.int32))
    parts = in_three(whole.labels, validation_examples, split_seed)
    splits = {part: _take(whole, indices) for part, indices in parts.items()}
    note = f"digits (8x8, scikit-learn's copy of the UCI test set; {DIVIDED})"
    return _with_statistics("digits", splits, 10, note)


# -- texts


def _load_text(name: str, path: Path, validation_examples: int | None, tokens: int | None) -> Dataset:
    size = TOKENS if tokens is None else whole_number("tokens", tokens, at_least=1)
    text, note = read_text(name, path)
    splits = {key: Split(*arrays) for key, arrays in windows_of(text, size, validation_examples).items()}
    return Dataset(path.stem, **splits, num_classes=BYTES, mean=(0.0,), std=(1.0,), note=note)


# -- npz


def _load_npz(name: str, path: Path, validation_examples: int | None, split_seed: int) -> Dataset:
    if not path.is_file():
        raise UsageError(f"`name` (={name!r}) is not a file; give 'digits', the path of an .npz file or a TFDS set")
    note = f"{path.name} (.npz file)"
    return assemble(path.stem, read_npz(path), str(path), note, validation_examples, split_seed)

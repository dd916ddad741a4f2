"""open_stream: an image set that does not fit in memory, as the place of its examples on disk.

:func:`bnn_jax.data.batches` reads them while the training runs.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from bnn_jax.data.arguments import size_after, whole_number
from bnn_jax.data.batching import batches, padded_order
from bnn_jax.data.image_folder import find_images, image_folder_named, mode_of, name_of_folder, note_of_folder
from bnn_jax.data.imagenet import MEAN, STD
from bnn_jax.data.prepare import default_data_dir
from bnn_jax.data.records import CorruptExample, Records, first_image, read_batch
from bnn_jax.data.sources import (
    DIVIDED,
    TESTED_ON_VALIDATION,
    Split,
    check_spread,
    identified,
    pixel_sums,
    statistics_of,
)
from bnn_jax.data.splits import check_own_validation, in_three, split_off_validation
from bnn_jax.data.tfds_folder import files_of, find_tfds_folder, note_of, open_builder, what_to_decode
from bnn_jax.data.tfds_records import TfdsRecords
from bnn_jax.errors import RunError, UsageError
from bnn_jax.files import replacing
from bnn_jax.paths import cache_folder, local_path

logger = logging.getLogger(__name__)

EXAMPLES_AT_A_TIME = 1000
MANY = 200_000
"""Examples from which on a pass over a set takes so long that everybody is told."""


@dataclass(frozen=True)
class ImageStream:
    """A classification set on disk.

    `mean` and `std` are in units of 0..255, one for each channel: those of the training split's pixels, or with a
    preprocessing those published for ImageNet.  `note` says where the images come from, for reports to quote.
    `class_names` and `identity` are as those of :class:`bnn_jax.data.Dataset`.
    """

    name: str
    train: Records
    validation: Records
    test: Records
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    note: str
    class_names: tuple[str, ...] | None = None
    identity: dict[str, Any] | None = field(default=None, init=False, repr=False, compare=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of which images the splits have, not of their pixels: 16 hexadecimal digits."""
        digest = hashlib.sha256(repr((self.num_classes, self.mean, self.std)).encode())
        for split in (self.train, self.validation, self.test):
            digest.update(f"{split.source.contents}\n{len(split)}\n".encode())
            digest.update(np.ascontiguousarray(split.positions))
        return digest.hexdigest()[:16]


def open_stream(
    name: str,
    *,
    data_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    validation_examples: int | None = None,
    split_seed: int = 0,
    preprocessing: str = "none",
    image_size: int | None = None,
) -> ImageStream:
    """Open an image classification set on disk; what is read is read by :func:`batches`.

    The splits are those of :func:`bnn_jax.data.load_dataset`, in the same order.  Where the test split has no labels,
    as that of ImageNet, or there is none, the official validation split is the test split.  To take a validation split
    out of the training split, of every class the same share, all of its records are read once for their labels.

    Args:
      name: of a set in `data_dir` that TFDS stored as ArrayRecord, such as `"imagenet2012"`, or a folder of images, as
        :func:`bnn_jax.data.load_dataset` takes them.
      data_dir: folder of such sets; default `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      cache_dir: where the labels are kept, and the pixel statistics of a set without preprocessing, as JSON; default
        `$XDG_CACHE_HOME/bnn_jax`, else `~/.cache/bnn_jax`.
      validation_examples: size of the validation split taken out of the training split; default a tenth of it.  Must
        be left out when the set has a validation split beside its test split.
      split_seed: seed of that division.
      preprocessing: a name in PREPROCESSING; "none" takes images as they are, which then have one size.
      image_size: height and width after preprocessing; default 224.

    Raises:
      UsageError: for a set, name or number that cannot be served; names it and the way out.
      RunError: for damaged files.

    Warns:
      SuspectDataWarning: if the first training image has 16 bits, of which the upper 8 are taken, and does not reach
        the upper half.
    """
    name = os.fspath(name)
    local_path("name", name)
    if name in ("digits", "text") or name.endswith((".npz", ".txt")):
        raise UsageError(
            f"`name` (={name!r}) is loaded whole: turn streaming off, or name a folder of images or a TFDS set"
        )
    size = size_after(preprocessing, image_size)
    if validation_examples is not None:
        validation_examples = whole_number("validation_examples", validation_examples, at_least=1)
    cache = local_path("cache_dir", cache_dir or cache_folder())
    opened = _open_image_folder(name, data_dir, preprocessing, size) or _open_tfds(name, data_dir, preprocessing, size)
    files = f"{opened.name.replace('/', '-')}-{opened.version}"
    seed = whole_number("split_seed", split_seed, at_least=0)
    labels = lambda: _training_labels(opened.splits["train"], opened.name, cache / f"{files}-labels")
    splits = _divided(opened, labels if opened.labels is None else lambda: opened.labels, validation_examples, seed)
    encoding, shape = first_image(splits["train"])
    note = opened.note_of({encoding})
    if preprocessing == "none":
        splits = {split: replace(records, image_shape=shape) for split, records in splits.items()}
        mean, std = _pixel_statistics(splits["train"], opened.name, cache / f"{files}-pixels")
    else:
        shape, mean, std = (size, size, 3), MEAN, STD
        note = f"{note[:-1]}; {preprocessing} to {size}x{size})"
    if len(opened.splits) == 1:
        note = f"{note}; {DIVIDED}"
    elif "test" not in opened.splits:
        note = f"{note}; {TESTED_ON_VALIDATION}"
    ordered = [splits[split] for split in ("train", "validation", "test")]
    stream = ImageStream(opened.name, *ordered, ordered[0].num_classes, shape, mean, std, note, opened.class_names)
    where = {"name": name, "data_dir": None if data_dir is None else os.fspath(data_dir), "stream": True}
    split_by = {"validation_examples": validation_examples, "split_seed": split_seed}
    return identified(stream, **where, **split_by, preprocessing=preprocessing, image_size=image_size)


def in_batches(split: Split | Records, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and labels of a split in its order, `size` at a time, in memory or read from disk.

    What fills up the last batch, or stands for a corrupt image, has the label -1.

    >>> split = Split(np.zeros((3, 1, 1, 1), np.uint8), np.arange(3, dtype=np.int32))
    >>> [labels.tolist() for _, labels in in_batches(split, 2)]
    [[0, 1], [2, -1]]
    """
    order = padded_order(len(split), size)
    if isinstance(split, Records):
        with batches(split, order, seed=0, epoch=0, training=False) as found:
            yield from found
        return
    for row in order:
        labels = split.labels[row]
        labels[row < 0] = -1
        yield split.images[row], labels


def images_in_batches(split: Split | Records, size: int) -> Iterator[np.ndarray]:
    """The images of a split alone, without those that fill up."""
    for images, labels in in_batches(split, size):
        yield images[(labels >= 0).reshape(len(labels), -1).any(axis=1)]


class _Opened(NamedTuple):
    """A set on disk before it is divided.

    Attributes:
      name, version: of the set; files of the cache have them in their names.
      where: it lies, for messages.
      splits: those with labels, each whole.
      labels: of the training split, None where they must be read.
      class_names: of the labels.
      note_of: (encodings) -> provenance.
    """

    name: str
    version: str
    where: Path
    splits: dict[str, Records]
    labels: Int32[np.ndarray, "examples"] | None
    class_names: tuple[str, ...]
    note_of: Callable[[set[str]], str]


def _open_image_folder(name: str, data_dir: str | Path | None, preprocessing: str, size: int) -> _Opened | None:
    """A folder of images; None where the name is of something else."""
    folder = image_folder_named(name, data_dir)
    if folder is None:
        return None
    images = find_images(folder)
    classes = len(images.class_names)
    mode = "RGB" if preprocessing != "none" else mode_of(images)
    splits = {
        split: Records(split, files, np.arange(len(files.paths)), mode, classes, (size, size, 3), preprocessing)
        for split, files in images.splits.items()
    }
    labels, note = images.splits["train"].labels, partial(note_of_folder, folder)
    return _Opened(name_of_folder(folder), "folder", folder, splits, labels, images.class_names, note)


def _open_tfds(name: str, data_dir: str | Path | None, preprocessing: str, size: int) -> _Opened:
    """A set that TFDS stored: the training split, and of validation and test those with labels."""
    folder = find_tfds_folder(name, local_path("data_dir", data_dir or default_data_dir()))
    info = open_builder(folder).info
    image_key, label_key, mode = what_to_decode(info, folder, needed=("train",))
    mode = mode if preprocessing == "none" else "RGB"
    version = hashlib.sha256(files_of(folder).encode()).hexdigest()
    label = info.features[label_key]
    found = {}
    for split in ("train", "validation", "test"):
        if split not in info.splits:
            continue
        count = info.splits[split].num_examples
        if not count:
            raise RunError(f"the {split} split of {folder} is empty; copy or prepare the set again")
        source = TfdsRecords(os.fspath(folder), split, image_key, label_key, version)
        if source.has_labels(count):
            shape = (size, size, 3)
            found[split] = Records(split, source, np.arange(count), mode, label.num_classes, shape, preprocessing)
    if "train" not in found or len(found) == 1:
        raise UsageError(
            f"{folder} has labels in {', '.join(found) or 'none'} of its splits {', '.join(info.splits)}; "
            "a set needs them in train, and in validation or test"
        )
    return _Opened(name, folder.name, folder, found, None, tuple(label.names), partial(note_of, name, folder.name))


def _divided(
    opened: _Opened, labels: Callable[[], np.ndarray], validation_examples: int | None, seed: int
) -> dict[str, Records]:
    """The three splits, as :func:`bnn_jax.data.load_dataset` has them."""
    whole = opened.splits
    if "test" in whole and "validation" in whole:
        check_own_validation(validation_examples, seed, str(opened.where))
        return whole
    if len(whole) == 1:
        parts = in_three(labels(), validation_examples, seed)
    else:
        parts = dict(zip(("train", "validation"), split_off_validation(labels(), validation_examples, seed)))
    splits = {name: replace(whole["train"], name=name, positions=np.sort(part)) for name, part in parts.items()}
    return (
        {"test": replace(whole.get("test") or whole["validation"], name="test")} | splits if len(whole) > 1 else splits
    )


def _training_labels(train: Records, name: str, cache: Path) -> Int32[np.ndarray, "examples"]:
    """The label of every training example, -1 if it cannot be read, kept in a file whose path begins with `cache`."""

    def compute():
        level = logging.WARNING if len(train) >= MANY else logging.INFO
        logger.log(level, "reading the labels of the %d training images of %s, once", len(train), name)
        found = (train.encoded(row) for row in _rows(len(train)))
        return {"labels": [-1 if isinstance(one, CorruptExample) else one[1] for row in found for one in row]}

    path = Path(f"{cache}-{train.source.version[:16]}.json")
    return np.array(_through_cache(path, ("labels",), compute)["labels"], np.int32)


def _pixel_statistics(train: Records, name: str, cache: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation over the training split, kept in a file whose path begins with `cache`."""

    def compute():
        logger.info("computing the mean and standard deviation of the %d training images of %s", len(train), name)
        mean, std = _computed_statistics(train)
        check_spread(name, mean, std)
        return {"mean": mean, "std": std, "examples": len(train), "source": train.source.version}

    state = (train.source.version.encode(), train.mode.encode(), train.positions.tobytes())
    digest = hashlib.sha256(b"".join(state)).hexdigest()
    path = Path(f"{cache}-{digest[:16]}.json")
    kept = _through_cache(path, ("mean", "std"), compute)
    return tuple(kept["mean"]), tuple(kept["std"])


def _through_cache(path: Path, keys: tuple[str, ...], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The lists that the JSON file `path` holds under `keys`; where it does not, what is computed and kept there."""
    try:
        kept = json.loads(path.read_text())
        if all(isinstance(kept[key], list) for key in keys):
            return kept
        raise TypeError("it holds something else")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s); making it anew", path, error)
    values = compute()
    try:
        with replacing(path) as draft:
            draft.write_text(json.dumps(values))
    except OSError as error:
        logger.warning("%s cannot be written (%s); its values will be computed each time", path, error)
    return values


def _rows(count: int) -> Iterator[np.ndarray]:
    """The indices of all examples, EXAMPLES_AT_A_TIME at a time."""
    return (np.arange(start, min(start + EXAMPLES_AT_A_TIME, count)) for start in range(0, count, EXAMPLES_AT_A_TIME))


def _computed_statistics(train: Records) -> tuple[tuple[float, ...], tuple[float, ...]]:
    sums = np.zeros((train.image_shape[-1], 3), object)
    for row in _rows(len(train)):
        images, labels, _ = read_batch(train, row, seed=0, epoch=0, training=False)
        sums += np.array(pixel_sums(images[labels >= 0]), object)
    return statistics_of(sums.tolist())

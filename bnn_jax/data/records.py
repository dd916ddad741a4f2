"""Records: one split of a TFDS folder on disk, read and decoded batch by batch, without TensorFlow."""

import io
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, UInt8

from bnn_jax.data.decoding import decode_image, reason_of
from bnn_jax.data.imagenet import PREPROCESSING, Draw, uniform_draws
from bnn_jax.data.prepare import import_tfds
from bnn_jax.data.tfds_folder import open_builder
from bnn_jax.errors import RunError, UsageError

MOST_IN_A_ROW = 100
"""Examples without a usable one among them, after which a split counts as damaged."""


class CorruptExample(Exception):
    """An example that cannot be read or decoded; the text says why and where it lies."""


@dataclass(frozen=True, eq=False)
class Records:
    """The examples of one split, in a fixed order, opened where they are first read: in every process anew.

    Attributes:
      name: of the split, for messages: train, validation or test.
      folder: the TFDS folder.
      source: its split that holds the examples.
      positions: of the examples in `source`.
      image_key, label_key: of the features.
      mode: "L" or "RGB", to which every image is converted.
      num_classes: labels are below it.
      image_shape: of the images after `preprocessing`.
      preprocessing: a name in PREPROCESSING, or "none", which takes images of `image_shape` alone.
      version: changes when the files of the folder do.
    """

    name: str
    folder: str
    source: str
    positions: Int[np.ndarray, "examples"]
    image_key: str
    label_key: str
    mode: str
    num_classes: int
    image_shape: tuple[int, int, int]
    preprocessing: str
    version: str

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """The encoded image and the label of one example.

        Raises:
          CorruptExample: when the file is damaged there.
        """
        (found,) = self.encoded([index])
        if isinstance(found, CorruptExample):
            raise found
        return found

    def encoded(self, indices: Sequence[int]) -> list[tuple[bytes, int] | CorruptExample]:
        """The encoded image and the label of each example, read together; the error in place of one that is damaged.

        Raises:
          RunError: when a file cannot be opened, or a label is none of the classes.
        """
        positions = [int(self.positions[index]) for index in indices]
        source = self.open()
        try:
            found = source.__getitems__(positions)
        except (RuntimeError, OSError):
            found = [self.read_alone(source, position) for position in positions]
        return [
            record if isinstance(record, CorruptExample) else (record[self.image_key], self._label(record, position))
            for record, position in zip(found, positions)
        ]

    def open(self) -> Any:
        """The files, opened once in a process: a sequence of dicts of features."""
        return _open_source(self.folder, self.source, self.image_key, self.version)

    def read_alone(self, source: Any, position: int) -> dict[str, Any] | CorruptExample:
        """The features of one example of the opened files, or why it cannot be read."""
        try:
            return source[position]
        except (RuntimeError, OSError) as error:  # ArrayRecord verifies its checksums.
            number, path = self._place(position)
            _check_opens(path)
            return CorruptExample(f"record {number} of {path} cannot be read: {reason_of(error)}")

    def _label(self, record: dict[str, Any], position: int) -> int:
        label = int(record[self.label_key])
        if not 0 <= label < self.num_classes:
            number, path = self._place(position)
            rule = f"labels are 0 to {self.num_classes - 1}"
            raise RunError(f"record {number} of {path} has the label {label}; {rule}: prepare the set again")
        return label

    def _place(self, position: int) -> tuple[int, str]:
        """(number of the record in its file, path of the file)."""
        split = open_builder(self.folder).info.splits[self.source]
        ends = list(itertools.accumulate(split.shard_lengths))
        shard = int(np.searchsorted(ends, position, side="right"))
        return position - (ends[shard] - split.shard_lengths[shard]), os.fspath(split.filepaths[shard])

    def pixels(self, encoded: bytes, index: int, draw: Draw | None) -> UInt8[np.ndarray, "height width channels"]:
        """An image decoded and preprocessed: for training with random numbers, for evaluation without.

        Raises:
          CorruptExample: when it cannot be decoded.
          UsageError: when it has another size than the first one, and there is no preprocessing.
        """
        try:
            image = decode_image(encoded, self.mode)
        except Exception as error:  # Pillow lets errors of a dozen types out of its parsers.
            number, path = self._place(int(self.positions[index]))
            raise CorruptExample(f"record {number} of {path} cannot be decoded: {_decoding_reason(error)}") from error
        height, width, channels = self.image_shape
        if self.preprocessing != "none":
            chosen = PREPROCESSING[self.preprocessing]
            return chosen.evaluate(image, height) if draw is None else chosen.train(image, draw, height)
        if (image.height, image.width) != (height, width):
            raise UsageError(
                f"images of {self.folder} differ in size: {(height, width)} is the first of the training split, "
                f"{(image.height, image.width)} at index {index} of the {self.name} split; choose a "
                f"`preprocessing`: {', '.join(PREPROCESSING)}"
            )
        return np.asarray(image).reshape(height, width, channels)


def has_labels(records: Records) -> bool:
    """Whether the first example that can be read has a label: the test split of ImageNet has -1 in its place.

    Raises:
      RunError: if none can be read, or the files cannot be opened.
    """
    source = records.open()
    for position in records.positions[:MOST_IN_A_ROW].tolist():
        found = records.read_alone(source, position)
        if not isinstance(found, CorruptExample):
            return int(found[records.label_key]) >= 0
    raise RunError(f"no example of the {records.source} split of {records.folder} can be read; prepare the set again")


def first_image(records: Records) -> tuple[str, tuple[int, int, int]]:
    """(encoding, shape) of the first image that is not corrupt.

    Raises:
      RunError: if none is.
    """
    from PIL import Image

    for index in range(min(MOST_IN_A_ROW, len(records))):
        try:
            encoded, _ = records[index]
            image = decode_image(encoded, records.mode)
        except (RunError, UsageError):
            raise
        except Exception:  # Pillow lets errors of a dozen types out of its parsers.
            continue
        encoding = Image.open(io.BytesIO(encoded)).format
        return encoding, (image.height, image.width, len(image.getbands()))
    raise RunError(f"no image of the {records.source} split of {records.folder} can be decoded; prepare the set again")


def read_batch(
    records: Records,
    row: Int[np.ndarray, "batch"],
    *,
    seed: int,
    epoch: int,
    training: bool,
    strict: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[UInt8[np.ndarray, "batch height width channels"], Int32[np.ndarray, "batch"], list[tuple[int, str]]]:
    """Read the examples of one batch; what is random in them depends on (seed, epoch, index) alone.

    Args:
      records: of the split.
      row: indices of the examples; -1 leaves a place empty: zeros with the label -1.
      seed, epoch: of the random numbers, in training.
      training: crop at random, and put the next good example in the place of a corrupt one, which in evaluation stays
        empty.
      strict: refuse a corrupt example.
      stopped: asked before every example; once it says so, the rest stays empty.

    Returns:
      Images, labels, and of each corrupt example its index and the reason.

    Raises:
      RunError: when a file cannot be opened, too many examples in a row are corrupt, or one is and `strict` is set.
      UsageError: as :meth:`Records.pixels`.
    """
    images = np.zeros((len(row), *records.image_shape), np.uint8)
    labels = np.full(len(row), -1, np.int32)
    skipped: list[tuple[int, str]] = []
    places = np.flatnonzero(row >= 0)
    for place, found in zip(places, records.encoded(row[places])):
        if stopped():
            break
        index = int(row[place])
        try:
            images[place], labels[place] = _example(records, index, found, seed=seed, epoch=epoch, training=training)
        except CorruptExample as error:
            if strict:
                raise RunError(
                    f"example {index} of the {records.name} split is corrupt: {error}; copy or prepare the set again, "
                    "or leave out `strict` to skip and count such examples"
                ) from None
            skipped.append((index, str(error)))
            if training:
                images[place], labels[place] = _next_good(records, index, seed=seed, epoch=epoch)
    return images, labels, skipped


def _example(records, index, found, *, seed, epoch, training):
    if isinstance(found, CorruptExample):
        raise found
    encoded, label = found
    return records.pixels(encoded, index, uniform_draws(seed, epoch, index) if training else None), label


def _next_good(records, index, *, seed, epoch):
    """The first example after `index`, and from the start again, that is not corrupt."""
    for step in range(1, min(MOST_IN_A_ROW, len(records))):
        following = (index + step) % len(records)
        (found,) = records.encoded([following])
        try:
            return _example(records, following, found, seed=seed, epoch=epoch, training=True)
        except CorruptExample as error:
            last = error
    raise RunError(
        f"no example from {index} to {following} of the {records.name} split can be used, the last because {last}; "
        "copy or prepare the set again"
    )


@lru_cache(maxsize=16)
def _open_source(folder: str, source: str, image_key: str, version: str) -> Any:
    builder = open_builder(folder)
    _allow_open_files(sum(len(split.shard_lengths) for split in builder.info.splits.values()))
    return builder.as_data_source(source, decoders={image_key: import_tfds().decode.SkipDecoding()})


def _allow_open_files(count: int) -> None:
    """Every file of a split stays open, for ImageNet a thousand, which is what a process often may open at most."""
    try:
        import resource
    except ImportError:  # There are no such limits where it is missing, on Windows.
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1024 if hard == resource.RLIM_INFINITY else min(count + 1024, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _check_opens(path: str) -> None:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        ArrayRecordReader(path).close()
    except (RuntimeError, OSError) as error:
        raise RunError(f"{path} cannot be opened ({reason_of(error)}); copy or prepare the set again") from None


def _decoding_reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    # Pillow's own words name an object by its address.
    return "no image format is known" if isinstance(error, UnidentifiedImageError) else reason_of(error)

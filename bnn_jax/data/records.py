"""Records: one split of a set on disk, read and decoded batch by batch."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32, UInt8

from bnn_jax.data.arrays import SuspectDataWarning
from bnn_jax.data.decoding import Depth, decode_image, decoding_reason, in_mode, open_image
from bnn_jax.data.imagenet import PREPROCESSING, Draw, uniform_draws
from bnn_jax.errors import RunError, UsageError

MOST_IN_A_ROW = 100
"""Examples without a usable one among them, after which a split counts as damaged."""


class CorruptExample(Exception):
    """An example that cannot be read or decoded; the text says why and where it lies."""


Encoded: TypeAlias = tuple[bytes, int]
"""An encoded image and its label."""


@runtime_checkable
class Source(Protocol):
    """Where encoded images lie: opened where they are first read, in every process anew.

    Attributes:
      where: the split, for messages.
      version: changes when the files do, or their times.
      contents: changes with the number, names or labels of the examples, wherever the files lie.
    """

    where: str
    version: str
    contents: str

    def encoded(self, positions: Sequence[int]) -> list[Encoded | CorruptExample]:
        """The encoded image and the label of each example, read together; the error in place of one that is damaged.

        Raises:
          RunError: when a file cannot be opened.
        """

    def place(self, position: int) -> str:
        """An example, for messages."""


@dataclass(frozen=True, eq=False)
class Records:
    """The examples of one split, in a fixed order.

    Attributes:
      name: of the split, for messages: train, validation or test.
      source: of the examples.
      positions: of the examples in `source`.
      mode: "L" or "RGB", to which every image is converted.
      num_classes: labels are below it.
      image_shape: of the images after `preprocessing`.
      preprocessing: a name in PREPROCESSING, or "none", which takes images of `image_shape` alone.
    """

    name: str
    source: Source
    positions: Int[np.ndarray, "examples"]
    mode: str
    num_classes: int
    image_shape: tuple[int, int, int]
    preprocessing: str

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Encoded:
        """The encoded image and the label of one example.

        Raises:
          CorruptExample: when the file is damaged there.
        """
        (found,) = self.encoded([index])
        if isinstance(found, CorruptExample):
            raise found
        return found

    def encoded(self, indices: Sequence[int]) -> list[Encoded | CorruptExample]:
        """Those of several examples, see :meth:`Source.encoded`.

        Raises:
          RunError: also when a label is none of the classes.
        """
        positions = [int(self.positions[index]) for index in indices]
        found = self.source.encoded(positions)
        for one, position in zip(found, positions):
            if not isinstance(one, CorruptExample) and not 0 <= one[1] < self.num_classes:
                rule = f"labels are 0 to {self.num_classes - 1}"
                raise RunError(f"{self.source.place(position)} has the label {one[1]}; {rule}: prepare the set again")
        return found

    def pixels(self, encoded: bytes, index: int, draw: Draw | None) -> UInt8[np.ndarray, "height width channels"]:
        """An image decoded and preprocessed: for training with random numbers, for evaluation without.

        Raises:
          CorruptExample: when it cannot be decoded.
          UsageError: when it has another size than the first one, and there is no preprocessing.
        """
        try:
            image = decode_image(encoded, self.mode)
        except Exception as error:  # Pillow lets errors of a dozen types out of its parsers.
            place = self.source.place(int(self.positions[index]))
            raise CorruptExample(f"{place} cannot be decoded: {decoding_reason(error)}") from error
        height, width, channels = self.image_shape
        if self.preprocessing != "none":
            chosen = PREPROCESSING[self.preprocessing]
            pixels = chosen.evaluate(image, height) if draw is None else chosen.train(image, draw, height)
            return pixels.reshape(height, width, channels)
        if (image.height, image.width) != (height, width):
            raise UsageError(
                f"images of {self.source.where} differ in size: {(height, width)} is the first of the training split, "
                f"{(image.height, image.width)} at index {index} of the {self.name} split; choose a "
                f"`data.preprocessing`: {', '.join(PREPROCESSING)}"
            )
        return np.asarray(image).reshape(height, width, channels)


def first_image(records: Records) -> tuple[str, tuple[int, int, int]]:
    """(encoding, shape) of the first image that is not corrupt.

    Raises:
      RunError: if none is.

    Warns:
      SuspectDataWarning: if it has 16 bits and uses fewer; the others are not looked at.
    """
    for index in range(min(MOST_IN_A_ROW, len(records))):
        try:
            encoded, _ = records[index]
            stored = open_image(encoded)
            image = in_mode(stored, records.mode)
        except (RunError, UsageError):
            raise
        except Exception:  # Pillow lets errors of a dozen types out of its parsers.
            continue
        depth = Depth()
        depth.see(stored)
        if depth.suspicion:
            place = records.source.place(int(records.positions[index]))
            warnings.warn(f"{place} has {depth.suspicion}, if others are alike", SuspectDataWarning, stacklevel=3)
        return stored.format, (image.height, image.width, len(image.getbands()))
    raise RunError(f"no image of {records.source.where} can be decoded; prepare the set again")


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

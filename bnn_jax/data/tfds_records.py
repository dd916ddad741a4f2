"""One split of a TFDS folder on disk, whose records are read without TensorFlow."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from bnn_jax.data.decoding import reason_of
from bnn_jax.data.prepare import import_tfds
from bnn_jax.data.records import MOST_IN_A_ROW, CorruptExample, Encoded
from bnn_jax.data.tfds_folder import open_builder
from bnn_jax.errors import RunError


@dataclass(frozen=True)
class TfdsRecords:
    """The records of a split, as :class:`bnn_jax.data.records.Source` describes it.

    Attributes:
      folder: the TFDS folder.
      split: its name there.
      image_key, label_key: of the features.
      version: changes when the files of the folder do.
    """

    folder: str
    split: str
    image_key: str
    label_key: str
    version: str

    @property
    def where(self) -> str:
        """The split, for messages."""
        return f"the {self.split} split of {self.folder}"

    @property
    def contents(self) -> str:
        """As :class:`bnn_jax.data.records.Source` has it, but for labels: they are in the records."""
        return self.split

    def encoded(self, positions: Sequence[int]) -> list[Encoded | CorruptExample]:
        """As :meth:`bnn_jax.data.records.Source.encoded`."""
        source = self._open()
        try:
            found = source.__getitems__(list(positions))
        except (RuntimeError, OSError):
            found = [self._read_alone(source, position) for position in positions]
        return [
            record if isinstance(record, CorruptExample) else (record[self.image_key], int(record[self.label_key]))
            for record in found
        ]

    def place(self, position: int) -> str:
        """As :meth:`bnn_jax.data.records.Source.place`."""
        number, path = self._place(position)
        return f"record {number} of {path}"

    def has_labels(self, count: int) -> bool:
        """Whether the first example that can be read has a label: the test split of ImageNet has -1 in its place.

        Raises:
          RunError: if none can be read, or the files cannot be opened.
        """
        source = self._open()
        for position in range(min(MOST_IN_A_ROW, count)):
            found = self._read_alone(source, position)
            if not isinstance(found, CorruptExample):
                return int(found[self.label_key]) >= 0
        raise RunError(f"no example of {self.where} can be read; prepare the set again")

    def _open(self) -> Any:
        """The files, opened once in a process: a sequence of dicts of features."""
        return _open_source(self.folder, self.split, self.image_key, self.version)

    def _read_alone(self, source: Any, position: int) -> dict[str, Any] | CorruptExample:
        """The features of one example of the opened files, or why it cannot be read."""
        try:
            return source[position]
        except (RuntimeError, OSError) as error:  # ArrayRecord verifies its checksums.
            number, path = self._place(position)
            _check_opens(path)
            return CorruptExample(f"record {number} of {path} cannot be read: {reason_of(error)}")

    def _place(self, position: int) -> tuple[int, str]:
        """(number of the record in its file, path of the file)."""
        split = open_builder(self.folder).info.splits[self.split]
        ends = list(itertools.accumulate(split.shard_lengths))
        shard = int(np.searchsorted(ends, position, side="right"))
        return position - (ends[shard] - split.shard_lengths[shard]), os.fspath(split.filepaths[shard])


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

"""The header of a packed network's file: how it is written, and what is checked of one that is read.

Nothing of a file is used before its size and its hash are proved right.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from bnn_jax.errors import UsageError

FORMAT = "bnn_jax packed network"
FORMAT_VERSION = "1"
MOST_HEADER_BYTES = 4096
MOST_TENSOR_BYTES = 2**32
TENSORS = {"uint32": "words", "int32": "thresholds", "float32": "numbers"}
"""dtype of a variable -> name of the tensor that holds it; the tensor of another dtype has the dtype's name."""
DTYPES = {"U32": "uint32", "I32": "int32", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8"}
DTYPES |= {"BOOL": "bool"}
"""safetensors' names of the dtypes."""
VALUES = ("versions", "model", "num_classes", "image_shape", "mean", "std", "accounting", "tested")
"""The metadata that are JSON texts."""
KEYS = ("format", "format_version", *VALUES, "leaves", "structure", "sha256")
EXPORT = "export the run again: bnn-jax export RUN -o model.bnn.safetensors"

Table: TypeAlias = dict[str, dict[str, Any]]  # name -> dtype, shape and data_offsets of a tensor, as in the header


class Damaged(Exception):
    """A file that cannot be what :func:`bnn_jax.packed.save` wrote; the text says why."""


def parse_json(text: str) -> Any:
    """Read JSON that repeats no key.

    Raises:
      ValueError: for a repeated key, or what is no JSON, as NaN.
    """

    def number(text):
        raise ValueError(f"{text} is no JSON")

    def unique(pairs):
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique, parse_constant=number)


def header_bytes(metadata: Mapping[str, str], table: Table) -> bytes:
    """The length and the JSON, filled up with spaces so that the tensors start at a multiple of 8 bytes."""
    text = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":"))
    text += " " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text.encode("ascii")


def table_of(counts: Mapping[str, tuple[str, int]]) -> Table:
    """The entries of tensors that follow each other, from their dtypes and sizes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    table, start = {}, 0
    for name, (dtype, count) in counts.items():
        end = start + count * np.dtype(dtype).itemsize
        table[name] = {"dtype": names[dtype], "shape": [count], "data_offsets": [start, end]}
        start = end
    return table


def read_header(file: BinaryIO, size: int) -> tuple[bytes, dict[str, str], Table]:
    """Read the header.

    Returns:
      Its bytes, the metadata and the table of the tensors.

    Raises:
      Damaged: if it is too long, or no JSON of the right form.
    """
    if size < 8:
        raise Damaged(f"it has {size} bytes, too few for a header")
    prefix = file.read(8)
    length, most = int.from_bytes(prefix, "little"), min(MOST_HEADER_BYTES, size) - 8
    if length > most:
        raise Damaged(f"it claims a header of {length} bytes, but at most {most} are possible")
    text = file.read(length)
    try:
        table = parse_json(text.decode("ascii"))
        metadata = table.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("its metadata are not text")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"its header is not that of a safetensors file ({error})") from None
    return prefix + text, metadata, table


def check_format(metadata: Mapping[str, str], path: Path) -> None:
    """Refuse a file of another kind or version, or without some of the metadata.

    Raises:
      UsageError: for another kind or version.
      Damaged: for other metadata than those of this version.
    """
    if metadata.get("format") != FORMAT:
        raise UsageError(f"`path` (={path}) is a safetensors file, but holds no packed network of bnn_jax; {EXPORT}")
    found = metadata.get("format_version", "")
    if found != FORMAT_VERSION:
        newer = found.isdecimal() and int(found) > int(FORMAT_VERSION)
        way_out = "newer than the installed bnn_jax reads; update it" if newer else f"not {FORMAT_VERSION!r}; {EXPORT}"
        raise UsageError(f"`path` (={path}) has the format version {found!r}, {way_out}")
    if metadata.keys() != set(KEYS):
        raise Damaged(f"its metadata are {sorted(metadata)}, and not {sorted(KEYS)}")


def check_size(table: Table, follow: int) -> None:
    """Refuse tensors that claim another size than that of the bytes which follow the header.

    Raises:
      Damaged: with both sizes.
    """
    try:
        claimed = max(0, *(entry["data_offsets"][1] for entry in table.values()))
    except (LookupError, TypeError):
        claimed = None
    if claimed != follow or follow > MOST_TENSOR_BYTES:
        raise Damaged(f"its tensors claim {claimed!r} bytes, {follow} follow, and {MOST_TENSOR_BYTES} are possible")


def check_digest(file: BinaryIO, header: bytes, metadata: Mapping[str, str], table: Table) -> None:
    """Read the rest of the file and refuse it if its hash is not the one in the metadata.

    Raises:
      Damaged: for another hash, or another writing of the same header.
    """
    if header != header_bytes(metadata, table):
        raise Damaged("its header is not written as bnn_jax writes it")
    digest = hashlib.sha256(header_bytes({**metadata, "sha256": "0" * 64}, table))
    while chunk := file.read(2**20):
        digest.update(chunk)
    if digest.hexdigest() != metadata["sha256"]:
        raise Damaged("its bytes are not those that were written, by their SHA-256")

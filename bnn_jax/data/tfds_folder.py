"""Folders that TFDS stored as ArrayRecord: find the one of a set, and decode it whole, without TensorFlow."""

import difflib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from bnn_jax.data.decoding import Depth, decode_all, evaluation_of, reason_of
from bnn_jax.data.prepare import ARCHIVES, import_tfds
from bnn_jax.errors import RunError, UsageError
from bnn_jax.paths import local_path

TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}
SPLITS = ("train", "validation", "test")
RECORDS_AT_A_TIME = 1000


def find_tfds_folder(name: str, data_dir: Path) -> Path:
    """The newest version of the set `name` in `data_dir`."""
    named = data_dir / local_path("name", name)
    if versions := versions_of(named):
        return versions[-1]
    missing = f"`name` (={name!r}) is not in the data folder {data_dir}"
    if named.is_dir() or Path(name).is_dir():
        missing += f"; your own images in a folder of that name are given as ./{name}"
    if name in ARCHIVES:
        raise UsageError(f"{missing}; prepare it with: bnn-jax prepare {name} --data-dir {shlex.quote(str(data_dir))}")
    if name == "imagenet2012":
        raise UsageError(
            f"{missing}; prepare it from the official archives where TensorFlow is installed: "
            "tfds build imagenet2012 --file_format array_record; or write one of made-up "
            f"images: bnn-jax synthesize --data-dir {shlex.quote(str(data_dir))}"
        )
    present = sorted(folder.name for folder in data_dir.glob("*") if versions_of(folder))
    nearest = difflib.get_close_matches(name, ["digits", *present, *ARCHIVES], n=1)
    way_out = f"did you mean {nearest[0]!r}?" if nearest else "what it can be: bnn-jax list data"
    raise UsageError(
        f"`name` (={name!r}) is not 'digits', not a path that ends in .npz, not a folder of images, and not a set in "
        f"the data folder {data_dir} (it has {', '.join(present) or 'none'}); {way_out}"
    )


def versions_of(folder: Path) -> list[Path]:
    """The folders of the versions of a set that TFDS stored, the newest last; none if it stored none there."""
    numbered = [path for path in folder.glob("*/dataset_info.json") if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)]
    return sorted((path.parent for path in numbered), key=lambda path: [int(part) for part in path.name.split(".")])


def split_names(folder: Path) -> list[str]:
    """The splits of a TFDS folder that are loaded; none where its description is damaged, see :func:`open_builder`."""
    try:
        found = {split["name"] for split in json.loads((folder / "dataset_info.json").read_text())["splits"]}
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [split for split in SPLITS if split in found]


def files_of(folder: Path) -> str:
    """Name, size and time of every file in `folder`: what is made from them is out of date when these differ."""
    return json.dumps(sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()))


def open_builder(folder: str | Path) -> Any:
    """The TFDS builder of a folder, for its `info` and `as_data_source`.

    Raises:
      RunError: if the folder is damaged.
    """
    try:
        return import_tfds().builder_from_directory(local_path("folder", folder))
    except UsageError:
        raise
    except Exception as error:  # TFDS parses JSON and protobufs here, and lets every error of theirs out.
        raise RunError(
            f"{folder} cannot be read as a TFDS folder ({reason_of(error)}); copy or prepare the set again"
        ) from error


def decode_tfds_folder(name: str, folder: Path, preprocessing: str, size: int) -> dict[str, np.ndarray]:
    """Decode the splits of a TFDS folder into the arrays of the .npz format."""
    tfds = import_tfds()
    builder = open_builder(folder)
    tested = "validation" if "test" not in builder.info.splits and "validation" in builder.info.splits else "test"
    image_key, label_key, mode = what_to_decode(builder.info, folder, needed=("train", tested))
    decoders = {image_key: tfds.decode.SkipDecoding()}
    arrays, encodings, depth = {}, set(), Depth()
    for split in SPLITS:
        if split in builder.info.splits:
            where = f"the {split} split of {folder}"
            records = _read_records(builder, split, decoders, where)
            arrays[f"{split}_labels"] = np.array([record[label_key] for record in records], np.int32)
            encoded = ((f"image {index} of {where}", record[image_key]) for index, record in enumerate(records))
            preprocess = evaluation_of(preprocessing, size)
            arrays[f"{split}_images"], found = decode_all(encoded, len(records), mode, preprocess, where, depth)
            encodings |= found
    depth.check(str(folder))
    label = builder.info.features[label_key]
    arrays["num_classes"], arrays["class_names"] = np.array(label.num_classes), np.array(label.names)
    prepared = "" if preprocessing == "none" else f"; {preprocessing} to {size}x{size}"
    arrays["note"] = np.array(f"{note_of(name, folder.name, encodings)[:-1]}{prepared})")
    return arrays


def what_to_decode(info: Any, folder: Path, *, needed: tuple[str, ...]) -> tuple[str, str, str]:
    """The keys of image and label, and the Pillow mode of a set of uint8 images with one label each.

    Raises:
      UsageError: for any other set, one without the splits `needed`, or one that needs TensorFlow.
    """
    tfds = import_tfds()
    keys, features = info.supervised_keys or ("image", "label"), dict(info.features.items())
    image, label = features.get(keys[0]), features.get(keys[1])
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UsageError(f"{folder} is not a set of images with one label each: its features are {', '.join(features)}")
    modes = {1: "L", 3: "RGB"}
    if image.shape[-1] not in modes or image.np_dtype != np.uint8:
        raise UsageError(
            f"the images of {folder} are {image.np_dtype} of shape {image.shape}; 8-bit grey or RGB is read"
        )
    missing = [split for split in needed if split not in info.splits]
    if missing:
        raise UsageError(
            f"{folder} has no split {missing[0]!r}, only {', '.join(info.splits)}; it can be given as .npz"
        )
    if info.file_format.value != "array_record":
        raise UsageError(
            f"{folder} is stored as {info.file_format.value}, which needs TensorFlow to read; "
            "prepare it with file_format='array_record' in another data folder"
        )
    return keys[0], keys[1], modes[image.shape[-1]]


def _read_records(builder: Any, split: str, decoders: Any, where: str) -> list[dict[str, Any]]:
    try:
        source = builder.as_data_source(split, decoders=decoders)
        starts = range(0, len(source), RECORDS_AT_A_TIME)
        blocks = [source.__getitems__(range(i, min(i + RECORDS_AT_A_TIME, len(source)))) for i in starts]
    except (RuntimeError, OSError) as error:  # ArrayRecord verifies its checksums; a file may be missing.
        raise RunError(f"{where} is damaged ({reason_of(error)}); copy or prepare the set again") from error
    if not blocks:
        raise RunError(f"{where} is empty; copy or prepare the set again")
    return [record for block in blocks for record in block]


def note_of(name: str, version: str, encodings: set[str]) -> str:
    """Provenance, judged by the encoded bytes: all sets of TITLES were published lossless."""
    copies = "JPEG copies, not the lossless originals" if name in TITLES and "JPEG" in encodings else None
    return f"{TITLES.get(name, name)} ({copies or '/'.join(sorted(encodings))}; TFDS {version})"

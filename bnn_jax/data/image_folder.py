"""A folder of images with a folder for each class: its splits and classes, and all images decoded."""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from bnn_jax.data.arrays import SPLITS, SuspectDataWarning
from bnn_jax.data.decoding import Depth, decode_all, decoding_reason, evaluation_of, is_grey
from bnn_jax.data.prepare import ARCHIVES, default_data_dir
from bnn_jax.data.records import CorruptExample, Encoded
from bnn_jax.data.tfds_folder import versions_of
from bnn_jax.errors import RunError, UsageError
from bnn_jax.paths import local_path


@dataclass(frozen=True, eq=False)
class FileSplit:
    """The files of a split, class by class, and their labels; a :class:`bnn_jax.data.records.Source`.

    Attributes:
      where: the split, for messages.
      version: changes with the name, size or time of a file of it.
      paths: of the images.
      labels: of the images.
    """

    where: str
    version: str
    paths: tuple[str, ...]
    labels: Int32[np.ndarray, "examples"]

    @property
    def contents(self) -> str:
        """As :class:`bnn_jax.data.records.Source` has it."""
        names = "\n".join(os.path.basename(path) for path in self.paths)
        return hashlib.sha256(names.encode(errors="surrogateescape") + self.labels.tobytes()).hexdigest()

    def encoded(self, positions: Sequence[int]) -> list[Encoded | CorruptExample]:
        """As :meth:`bnn_jax.data.records.Source.encoded`."""
        return [self._encoded(position) for position in positions]

    def _encoded(self, position: int) -> Encoded | CorruptExample:
        try:
            return Path(self.paths[position]).read_bytes(), int(self.labels[position])
        except OSError as error:
            return CorruptExample(f"{self.paths[position]} cannot be read: {error.strerror}")

    def place(self, position: int) -> str:
        """As :meth:`bnn_jax.data.records.Source.place`."""
        return self.paths[position]


@dataclass(frozen=True)
class ImageFolder:
    """What is in a folder of images.

    Attributes:
      folder: itself.
      splits: train, and test and validation where they are there.
      class_names: the names of the folders of the classes, sorted; a label is an index into them.
    """

    folder: Path
    splits: dict[str, FileSplit]
    class_names: tuple[str, ...]

    @property
    def version(self) -> str:
        """Changes with the name, size or time of a file."""
        return json.dumps({name: split.version for name, split in self.splits.items()})


def image_folder_named(name: str, data_dir: str | Path | None) -> Path | None:
    """The folder of that name in `data_dir`, or without one the folder itself; None where TFDS stored the set."""
    inside = local_path("data_dir", data_dir or default_data_dir()) / local_path("name", name)
    if name in (*ARCHIVES, "imagenet2012") or versions_of(inside):
        return None
    here = local_path("name", name)
    places = [inside] if data_dir is not None else [inside, here] if _is_named(here) else [here]
    return next((place for place in places if place.is_dir()), None)


def name_of_folder(folder: Path) -> str:
    """What a folder is called, `.` and `..` too."""
    return folder.name if _is_named(folder) else folder.resolve().name


def _is_named(path: Path) -> bool:
    return path.name not in ("", "..")


def find_images(folder: Path) -> ImageFolder:
    """Look through a folder that has a folder for each split (train, test, val), or for each class.

    A class is a folder, at any depth of which its images lie, in any format that Pillow reads; so is one called train,
    without folders of its own, beside two others or more and no test or val.  Hidden files are passed
    over; other files in it, and images that lie in no class or split, are left out with a warning.

    Raises:
      UsageError: if there are no such folders, or one of a class of training is without an image; if a split has a
        class that training has not.

    Warns:
      SuspectDataWarning: for files that are left out.
    """
    roots, left_out = {}, []
    for name in _folders_in(folder):
        split = SPLITS.get(name.lower())
        if split in roots:
            raise UsageError(f"{folder} has the same split twice, {roots[split].name} and {name}; leave one out")
        if split is None:
            left_out.append(str(folder / name))
        else:
            roots[split] = folder / name
    train_is_class = len(roots) == 1 and len(left_out) > 1 and "train" in roots and not _folders_in(roots["train"])
    if "train" not in roots or train_is_class:
        roots, left_out = {"train": folder}, []
    class_names = _folders_in(roots["train"])
    if not class_names:
        raise UsageError(
            f"{roots['train']} has no folder for each class; give the folder in which these, or train, lie"
        )
    for name in class_names:
        if "train" in _folders_in(roots["train"] / name):
            raise UsageError(f"{folder} is a folder too high: give {roots['train'] / name}, in which train lies")
    for root in sorted({folder, *roots.values()}):
        left_out += _images_among(root, [path.name for path in root.iterdir() if path.is_file()])[0]
    found = {}
    for split, root in sorted(roots.items(), key=lambda item: item[0] != "train"):
        for name in _folders_in(root):
            if name not in class_names:
                raise UsageError(f"{root} has the class {name!r}, which {roots['train']} has not; remove it")
        paths, labels = [], []
        for label, name in enumerate(class_names):
            images, others = _images_in(root / name) if (root / name).is_dir() else ([], [])
            if not images and split == "train":
                raise UsageError(f"{root / name} has no image; remove it if it is no class")
            paths += images
            labels += [label] * len(images)
            left_out += others
        where = f"the {split} split of {folder}"
        if not paths:
            raise UsageError(f"{where} has no image; remove it, or put some in")
        found[split] = FileSplit(where, _version(folder, paths), tuple(paths), np.array(labels, np.int32))
    _warn_of_left_out(folder, left_out)
    return ImageFolder(folder, found, class_names)


def _folders_in(folder: Path) -> tuple[str, ...]:
    """The names of the folders in a folder, sorted, without hidden ones."""
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _images_in(folder: Path) -> tuple[list[str], list[str]]:
    """The paths of the images under a folder, each real folder once, and of the files that are none, sorted."""
    images, others = [], []
    real = folder.resolve()
    seen = {real, *real.parents}  # A link to one of them would lead round in a circle.
    for root, folders, names in os.walk(folder, followlinks=True):
        places = {name: Path(root, name).resolve() for name in sorted(folders)}
        folders[:] = [name for name, place in places.items() if place not in seen and not seen.add(place)]
        for found, kind in zip(_images_among(root, names), (images, others)):
            kind += found
    return sorted(images), sorted(others)


def _images_among(folder: str | Path, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The paths of the files of a folder that are images by their ending, and of those that are none, sorted."""
    from PIL import Image

    endings = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
    images, others = [], []
    for name in sorted(names):
        if name[0] != "." and name not in ("Thumbs.db", "desktop.ini"):
            kind = images if os.path.splitext(name)[1].lower() in endings else others
            kind.append(os.path.join(folder, name))
    return images, others


def _version(folder: Path, paths: list[str]) -> str:
    state = []
    for path in paths:
        try:
            found = os.stat(path)
        except OSError as error:
            raise _unreadable(path, error) from None
        state.append((os.path.relpath(path, folder), found.st_size, found.st_mtime_ns))
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _unreadable(path: str, error: Exception) -> RunError:
    reason = f"read ({error.strerror})" if getattr(error, "strerror", None) else f"decoded ({decoding_reason(error)})"
    return RunError(f"{path} cannot be {reason}; remove or replace it")


def _warn_of_left_out(folder: Path, left_out: list[str]) -> None:
    if left_out:
        text = f"{folder} has files or folders that are left out, for they are no images, no split or in no class: "
        text += f"{len(left_out)}, the first {left_out[0]}"
        warnings.warn(text, SuspectDataWarning, stacklevel=4)


def mode_of(images: ImageFolder) -> str:
    """ "L" if all images are grey, else "RGB"."""
    from PIL import Image

    for split in images.splits.values():
        for path in split.paths:
            try:
                with Image.open(path) as image:
                    if not is_grey(image):
                        return "RGB"
            except Exception as error:  # Pillow lets errors of a dozen types out of its parsers.
                raise _unreadable(path, error) from None
    return "L"


def decode_image_folder(images: ImageFolder, preprocessing: str, size: int) -> dict[str, np.ndarray]:
    """Decode all images into the arrays of the .npz format.

    Raises:
      RunError: if an image cannot be read or decoded; if there are some of 16 bits, of which the upper 8 are taken, and
        none reaches the upper half.
      UsageError: if they differ in size, and there is no preprocessing.
    """
    mode, arrays, encodings, depth = mode_of(images), {}, set(), Depth()
    for name, split in images.splits.items():
        encoded = ((path, _read(path)) for path in split.paths)
        preprocess, count = evaluation_of(preprocessing, size), len(split.paths)
        arrays[f"{name}_images"], found = decode_all(encoded, count, mode, preprocess, split.where, depth)
        arrays[f"{name}_labels"] = split.labels
        encodings |= found
    depth.check(str(images.folder))
    arrays["class_names"] = np.array(images.class_names)
    prepared = "" if preprocessing == "none" else f"; {preprocessing} to {size}x{size}"
    arrays["note"] = np.array(f"{note_of_folder(images.folder, encodings)[:-1]}{prepared})")
    return arrays


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def note_of_folder(folder: Path, encodings: set[str]) -> str:
    """Provenance: what the folder is called, and how its images are encoded."""
    return f"{name_of_folder(folder)} (folder of images, {'/'.join(sorted(encodings))})"

"""as_dataset: arrays that a program has in memory as a set, checked as those of a file are."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bnn_jax.checks import require
from bnn_jax.data.arrays import SPLITS, checked_arrays
from bnn_jax.data.sources import Dataset, Split, assemble, identified
from bnn_jax.data.stream import ImageStream
from bnn_jax.errors import UsageError, unknown_name

FORMS = (
    "(images, labels), ((x_train, y_train), (x_test, y_test)), a dict of splits, or a Dataset: see "
    "bnn_jax.data.as_dataset"
)


def as_dataset(data: Any, *, validation_examples: int | None = None, split_seed: int = 0) -> Dataset | ImageStream:
    """Arrays in memory as a set: checked, divided, and with an identity that other arrays do not have.

    Args:
      data: one of

        * ``(images, labels)``: of each class 60 % are for training, 20 % for validation, 20 % for the test;
        * ``((x_train, y_train), (x_test, y_test))``, as Keras's `load_data` returns, or three pairs with validation in
          the middle;
        * a dict of such pairs or rows by "train", "test" and "validation", or of the arrays of an .npz file, see
          :func:`bnn_jax.data.load_dataset`;
        * rows as Hugging Face's sets have them: a sequence of ``{"image": ..., "label": ...}``;
        * a :class:`Dataset`, or an :class:`ImageStream`.
      validation_examples, split_seed: as :func:`bnn_jax.data.load_dataset` takes them.

    Returns:
      The set; one that was loaded or checked before as it is.

    Raises:
      UsageError: for anything else; for a number of validation examples that there cannot be.
      RunError: for arrays that are no image set, as :func:`bnn_jax.data.arrays.checked_arrays`.

    >>> images, labels = np.arange(80).reshape(20, 2, 2), np.arange(20) % 2
    >>> import warnings; warnings.simplefilter("ignore")
    >>> found = as_dataset((images, labels))
    >>> found.identity["name"], len(found.train), len(found.test)
    ('arrays in memory, sha256 ...', 12, 4)
    """
    if isinstance(data, Dataset | ImageStream) and data.identity is not None:
        return data
    if isinstance(data, Dataset):
        dataset, split_by = _checked(data), {"validation_examples": None, "split_seed": 0}
    else:
        split_by = {"validation_examples": validation_examples, "split_seed": split_seed}
        dataset = assemble("arrays", _arrays_of(data), "`data`", "arrays in memory", *split_by.values())
    name = f"{dataset.name} in memory, sha256 {_digest(dataset)}"
    return identified(
        dataset, name=name, data_dir=None, stream=False, **split_by, preprocessing="none", image_size=None
    )


def _checked(dataset: Dataset) -> Dataset:
    """A set that was made by hand, if it is one."""
    splits = ("train", "validation", "test")
    arrays = _arrays_of({name: getattr(dataset, name) for name in splits})
    found, _ = checked_arrays(arrays | {"num_classes": np.asarray(dataset.num_classes)}, f"`data` ({dataset.name})")
    channels = found["train"].images.shape[-1]
    for name, holds in (("mean", np.isfinite), ("std", lambda std: np.isfinite(std) & (std > 0))):
        value = getattr(dataset, name)
        rule = f"of `data` must be {channels} numbers, one for each channel, std above 0"
        require(
            name, value, np.shape(value) == (channels,) and bool(holds(np.asarray(value)).all()), rule, error=UsageError
        )
    checked = {name: Split(images, labels.astype(np.int32)) for name, (images, labels) in found.items()}
    return replace(dataset, **checked)


def _arrays_of(data: Any) -> dict[str, np.ndarray]:
    """The arrays of an .npz file."""
    if isinstance(data, Mapping):
        arrays = {}
        for name, part in data.items():
            if not isinstance(part, Split | tuple) and not _are_rows(part):
                arrays[name] = _array(name, part)
            elif name in SPLITS:
                arrays |= _pair(f"{SPLITS[name]}_", part)
            else:
                raise unknown_name("data", name, SPLITS)
        return arrays
    if isinstance(data, tuple | list) and data and all(isinstance(part, tuple) for part in data):
        names = {2: ("train", "test"), 3: ("train", "validation", "test")}.get(len(data), ())
        return {key: array for name, part in zip(names, data) for key, array in _pair(f"{name}_", part).items()}
    return _pair("", data)


def _pair(prefix: str, part: Any) -> dict[str, np.ndarray]:
    """The images and labels of a split."""
    if isinstance(part, Split):
        part = (part.images, part.labels)
    elif _are_rows(part):
        key = next((key for key in ("image", "img") if key in part[0]), "image")
        try:
            part = [row[key] for row in part], [row["label"] for row in part]
        except KeyError as error:
            raise UsageError(f"`data` has a row without {error}; rows have an image and a label") from None
    if not isinstance(part, tuple | list) or len(part) != 2:
        raise UsageError(f"`data` (a {type(part).__name__}) must be {FORMS}")
    images, labels = part
    return {f"{prefix}images": _array("images", images), f"{prefix}labels": _array("labels", labels)}


def _are_rows(part: Any) -> bool:
    return (
        hasattr(part, "__len__")
        and hasattr(part, "__getitem__")
        and not isinstance(part, Mapping | str | np.ndarray)
        and len(part) > 0
        and isinstance(part[0], Mapping)
    )


def _array(name: str, values: Any) -> np.ndarray:
    try:
        images = isinstance(values, Sequence) and len(values) > 0 and hasattr(values[0], "getbands")
        return np.stack([np.asarray(image) for image in values]) if images else np.asarray(values)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"`{name}` of `data` cannot be one array ({reason}); give arrays of one shape") from None


def _digest(dataset: Dataset) -> str:
    """Of all that a set is, as training takes it."""
    digest = hashlib.sha256(repr((dataset.num_classes, dataset.mean, dataset.std)).encode())
    for split in (dataset.train, dataset.validation, dataset.test):
        digest.update(f"{split.images.shape}\n".encode())
        digest.update(np.ascontiguousarray(split.images))
        digest.update(np.ascontiguousarray(split.labels))
    return digest.hexdigest()[:16]

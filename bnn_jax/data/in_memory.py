"""as_dataset: arrays that a program has in memory as a set, checked as those of a file are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, TypeAlias

import numpy as np

from bnn_jax.checks import require
from bnn_jax.data.arguments import size_in_memory, whole_number
from bnn_jax.data.arrays import SPLITS, checked_arrays
from bnn_jax.data.decoding import Depth, evaluation_of, in_mode, is_grey
from bnn_jax.data.sources import Dataset, Split, assemble, identified
from bnn_jax.data.stream import ImageStream
from bnn_jax.errors import UsageError, unknown_name

Preprocess: TypeAlias = Callable[[Any], np.ndarray]
"""An image of Pillow -> its pixels."""

FORMS = (
    "(images, labels), ((x_train, y_train), (x_test, y_test)), a dict of splits, or a Dataset: see "
    "bnn_jax.data.as_dataset"
)


def as_dataset(
    data: Any,
    *,
    validation_examples: int | None = None,
    split_seed: int = 0,
    preprocessing: str = "none",
    image_size: int | None = None,
) -> Dataset | ImageStream:
    """Arrays in memory as a set: checked, divided, and with an identity that other arrays do not have.

    Args:
      data: one of

        * ``(images, labels)``: of each class 60 % are for training, 20 % for validation, 20 % for the test;
        * ``((x_train, y_train), (x_test, y_test))``, as Keras's `load_data` returns, or three pairs with validation in
          the middle;
        * a dict of such pairs or rows by "train", "test" and "validation", or of the arrays of an .npz file, see
          :func:`bnn_jax.data.load_dataset`;
        * rows as Hugging Face's sets have them, ``{"image": ..., "label": ...}``, or those of PyTorch, ``(image,
          label)``; the images of Pillow or arrays;
        * a :class:`Dataset`, or an :class:`ImageStream`.
      validation_examples, split_seed: as :func:`bnn_jax.data.load_dataset` takes them.
      preprocessing, image_size: likewise, for images of Pillow; of those with 16 bits the upper 8 are taken, and they
        are refused if none of the set reaches the upper half.

    Returns:
      The set; one that was loaded or checked before as it is.

    Raises:
      UsageError: for anything else; for a number of validation examples that there cannot be.
      RunError: for arrays that are no image set, as :func:`bnn_jax.data.arrays.checked_arrays`.

    >>> images, labels = np.arange(80, dtype=np.uint8).reshape(20, 2, 2), np.arange(20) % 2
    >>> found = as_dataset((images, labels))
    >>> found.identity["name"], len(found.train), len(found.test)
    ('arrays in memory, sha256 ...', 12, 4)
    """
    if isinstance(data, Dataset | ImageStream) and data.identity is not None:
        return data
    split_seed = whole_number("split_seed", split_seed, at_least=0)
    if validation_examples is not None:
        validation_examples = whole_number("validation_examples", validation_examples, at_least=1)
    made_by = {"validation_examples": None, "split_seed": 0, "preprocessing": "none", "image_size": None}
    if isinstance(data, Dataset):
        dataset = _checked(data)
    else:
        preprocess = evaluation_of(preprocessing, size_in_memory(preprocessing, image_size))
        arrays = _arrays_of(data, None if preprocessing == "none" else preprocess)
        dataset = assemble("arrays", arrays, "`data`", "arrays in memory", validation_examples, split_seed)
        made_by = {"validation_examples": validation_examples, "split_seed": split_seed}
        made_by |= {"preprocessing": preprocessing, "image_size": image_size}
    name = f"{dataset.name} in memory, sha256 {dataset.digest}"
    return identified(dataset, name=name, data_dir=None, stream=False, **made_by)


def _checked(dataset: Dataset) -> Dataset:
    """A set that was made by hand, if it is one; of tokens, with a label each, one of numbers that are classes."""
    splits = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    if all(split.labels.ndim == 2 and split.images.shape == (*split.labels.shape, 1, 1) for split in splits.values()):
        for name, split in splits.items():
            low, high = split.labels.min(initial=0), split.labels.max(initial=0)
            if low < 0 or high >= dataset.num_classes:
                raise UsageError(
                    f"`{name}_labels` of `data` ({dataset.name}) has labels from {low} to {high}; they are 0 to "
                    f"{dataset.num_classes - 1}"
                )
        return dataset
    arrays = _arrays_of(splits)
    found, _ = checked_arrays(arrays | {"num_classes": np.asarray(dataset.num_classes)}, f"`data` ({dataset.name})")
    for name, (images, _) in found.items():
        given = arrays[f"{name}_images"]
        if not np.array_equal(images, given.reshape(images.shape)):
            raise UsageError(
                f"`{name}_images` of `data` ({dataset.name}) is {given.dtype}, and `mean` and `std` are those of "
                "0..255: give uint8 images, or the arrays without a Dataset"
            )
    channels = found["train"].images.shape[-1]
    for name, holds in (("mean", np.isfinite), ("std", lambda std: np.isfinite(std) & (std > 0))):
        value = getattr(dataset, name)
        rule = f"of `data` must be {channels} numbers, one for each channel, std above 0"
        require(
            name, value, np.shape(value) == (channels,) and bool(holds(np.asarray(value)).all()), rule, error=UsageError
        )
    checked = {name: Split(images, labels.astype(np.int32)) for name, (images, labels) in found.items()}
    mean, std = (tuple(map(float, values)) for values in (dataset.mean, dataset.std))
    return replace(dataset, **checked, mean=mean, std=std)


def _arrays_of(data: Any, preprocess: Preprocess | None = None) -> dict[str, np.ndarray]:
    """The arrays of an .npz file."""
    if isinstance(data, Mapping):
        arrays, parts = {}, {}
        for name, part in data.items():
            if not isinstance(part, Split | tuple) and not _are_rows(part):
                arrays[name] = _array(name, part)
            elif name in SPLITS:
                typed = next((other for other in parts if SPLITS[other] == SPLITS[name]), None)
                if typed is not None:
                    raise UsageError(f"`data` has the same under two names, `{typed}` and `{name}`; leave one out")
                parts[name] = part
            else:
                raise unknown_name("data", name, SPLITS)
        return _arrays_of_splits(parts, preprocess) | arrays
    if (
        isinstance(data, tuple | list)
        and data
        and all(isinstance(part, tuple) for part in data)
        and not _are_rows(data)
    ):
        if len(data) not in (2, 3):
            raise UsageError(f"`data` (a {type(data).__name__} of {len(data)} tuples) must be {FORMS}")
        names = {2: ("train", "test"), 3: ("train", "validation", "test")}[len(data)]
        return _arrays_of_splits(dict(zip(names, data)), preprocess)
    return _arrays_of_splits({"": data}, preprocess)


def _arrays_of_splits(parts: Mapping[str, Any], preprocess: Preprocess | None) -> dict[str, np.ndarray]:
    """Those of splits by name, "" the whole set; rows that name their classes number them alike."""
    arrays, of_classes, depth = {}, {}, Depth()
    for name, part in parts.items():
        found = _pair(f"{SPLITS[name]}_" if name else "", part, preprocess, depth)
        if "class_names" in found:
            of_classes[name] = found["class_names"].tolist()
        arrays |= found
    first = next(iter(of_classes), None)
    for name, classes in of_classes.items():
        if classes != of_classes[first]:
            pairs = enumerate(zip_longest(classes, of_classes[first]))
            start = next(number for number, (one, other) in pairs if one != other)
            one, other = (_shown(names, start) for names in (classes, of_classes[first]))
            raise UsageError(f"`{name}` of `data` has the classes {one}, `{first}` {other}; number them alike")
    depth.check("`data`")
    return arrays


def _shown(names: list[Any], start: int) -> str:
    """Up to ten names; of more those from `start` on."""
    start = start if len(names) > 10 else 0
    shown = [*["..."] * (start > 0), *names[start : start + 10], *["..."] * (start + 10 < len(names))]
    return ", ".join(map(str, shown)) or "none"


def _pair(prefix: str, part: Any, preprocess: Preprocess | None, depth: Depth) -> dict[str, np.ndarray]:
    """The images and labels of a split, and the names of the classes where rows know them."""
    known = {}
    if isinstance(part, Split):
        part = (part.images, part.labels)
    elif _are_rows(part):
        names = getattr((getattr(part, "features", None) or {}).get("label"), "names", getattr(part, "classes", None))
        known = {} if names is None else {"class_names": np.array(names), "num_classes": np.array(len(names))}
        part = list(zip(*[_image_and_label(part[index]) for index in range(len(part))]))
    if not isinstance(part, tuple | list) or len(part) != 2:
        raise UsageError(f"`data` (a {type(part).__name__}) must be {FORMS}")
    images, labels = part
    if isinstance(images, Sequence) and len(images) > 0 and hasattr(images[0], "getbands"):
        images = _pixels(images, preprocess, depth)
    elif preprocess is not None:
        raise UsageError("`preprocessing` is for image files and images of Pillow; arrays have one size, leave it out")
    return {f"{prefix}images": _array("images", images), f"{prefix}labels": _array("labels", labels)} | known


def _pixels(images: Sequence[Any], preprocess: Preprocess | None, depth: Depth) -> list[np.ndarray]:
    """The pixels of images of Pillow, grey if all are."""
    for index, image in enumerate(images):
        if not hasattr(image, "getbands"):
            kind = type(image).__name__
            raise UsageError(f"`images` of `data` has a {kind} at index {index}, others are images of Pillow; give one")
    mode, found = "L" if all(map(is_grey, images)) else "RGB", []
    for index, image in enumerate(images):
        try:
            decoded = in_mode(image, mode)
        except ValueError as error:
            raise UsageError(f"image {index} of `data` cannot be taken: {error}") from None
        depth.see(image)
        found.append(np.asarray((preprocess or np.asarray)(decoded)))
    return found


def _are_rows(part: Any) -> bool:
    is_sequence = hasattr(part, "__len__") and hasattr(part, "__getitem__") and not isinstance(part, str | np.ndarray)
    if not is_sequence or isinstance(part, Mapping) or len(part) == 0:
        return False
    if not isinstance(part[0], tuple):
        return isinstance(part[0], Mapping)
    # A list of tuples may be one of splits too, (images, labels) each.
    is_row = lambda row: isinstance(row, tuple) and len(row) == 2 and np.ndim(row[1]) == 0
    return not isinstance(part, tuple | list) or all(map(is_row, part))


def _image_and_label(row: Any) -> tuple[Any, Any]:
    if not isinstance(row, Mapping):
        return row
    try:
        return row["img" if "image" not in row and "img" in row else "image"], row["label"]
    except KeyError as error:
        raise UsageError(f"`data` has a row without {error}; rows have an image and a label") from None


def _array(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"`{name}` of `data` cannot be one array ({reason}); give arrays of one shape, or images of Pillow with "
            "`data.preprocessing` center_crop"
        ) from None

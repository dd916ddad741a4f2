"""The arrays of an image set: what each must be, how others are read, and for mistakes the expression that mends them.

An array of another kind whose meaning is clear is converted, and one warning says how.  Any other is refused.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from bnn_jax.errors import RunError

CHANNELS = (1, 2, 3, 4)
"""Of images as they are stored: grey, with alpha, RGB."""

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("val", "valid", "validation"), "validation")
KINDS = dict.fromkeys(("images", "image", "x"), "images")
KINDS |= dict.fromkeys(("labels", "label", "y", "targets"), "labels")
"""Words of names -> those of this module: MedMNIST has val_images, Keras x_train."""

NUMBERED = "np.searchsorted(np.unique({}), {})"
"""Labels of any kind as 0, 1, 2, ... in the order of their values."""
LIKEWISE = "likewise those of other splits"


class SuspectDataWarning(UserWarning):
    """Data that can be meant so, but most often are a mistake; the text names the array and what would mend it."""


class ConvertedDataWarning(UserWarning):
    """Arrays of another kind than uint8 images and whole labels; the text says as what they are taken."""


class Arrays(NamedTuple):
    """One split: uint8 images [N,H,W,C] and whole labels [N]."""

    images: np.ndarray
    labels: np.ndarray


def checked_arrays(arrays: Mapping[str, np.ndarray], source: str) -> tuple[dict[str, Arrays], int]:
    """The splits of an image set by name, and the number of classes.

    Args:
      arrays: as :func:`bnn_jax.data.load_dataset` describes them.
      source: where they come from, for messages.

    Returns:
      train, and test and validation where they are there; a channel axis is added where it is missing.

    Raises:
      RunError: for an array that breaks a rule; names it, its value and, where known, the expression that mends it.

    Warns:
      ConvertedDataWarning: for images of shares of 1, of -1 to 1, of 16 bits or of masks, and labels that are one-hot,
        in a column, whole floats or bools.
      SuspectDataWarning: for classes without a training example, test images that are the training images, images of 0
        and 1 alone, and images of up to 4 rows with more channels than pixels.
    """
    given = _Given(*_by_known_names(arrays, source), source)
    present = [name for name in ("train", "test", "validation") if name == "train" or given.has(name)]
    for key in (f"{name}_{kind}" for name in present for kind in ("images", "labels")):
        if key not in given.arrays:
            raise RunError(
                f"{source} has no array `{key}`; it has {', '.join(sorted(arrays)) or 'none'}{_unnamed(arrays)}"
            )
    splits = {name: _split(given, name, present) for name in present}
    shape = splits["train"].images.shape[1:]
    for name, split in splits.items():
        if split.images.shape[1:] != shape:
            raise RunError(_of_another_shape(given, name, split.images, shape))
    given.tell_converted()
    num_classes = _given_classes(given)
    if num_classes is None:
        num_classes = _counted_classes(given, splits)
    else:
        _check_classes(given, splits, num_classes)
    _warn_of_copies(given, splits)
    return splits, num_classes


@dataclass
class _Given:
    """What was given.

    Attributes:
      arrays: by the names of this module, as train_images.
      typed: the names that they were given under.
      source: where they come from.
      spelled: expressions of the labels as they are read.
      converted: an expression, with {} for the array -> the names of the arrays that were read with it.
      columns: of one-hot labels of training.
    """

    arrays: dict[str, np.ndarray]
    typed: dict[str, str]
    source: str
    spelled: dict[str, str] = field(default_factory=dict)
    converted: dict[str, list[str]] = field(default_factory=dict)
    columns: int | None = None

    def has(self, split: str) -> bool:
        """Whether one of the arrays of a split is there."""
        return not self.arrays.keys().isdisjoint({f"{split}_images", f"{split}_labels"})

    def of(self, key: str) -> str:
        """An array as messages name it."""
        return f"`{self.typed[key]}` of {self.source}"

    def shown(self, key: str) -> str:
        """An array and its kind."""
        array = self.arrays[key]
        return f"{self.of(key)} is {array.dtype} of shape {array.shape}"

    def tell_converted(self) -> None:
        """Say in one line how arrays were read."""
        if self.converted:
            each = (f"{', '.join(names)} as {how.format(names[0])}" for how, names in self.converted.items())
            text = f"{self.source} is taken with {'; '.join(each)}"
            warnings.warn(text, ConvertedDataWarning, stacklevel=3)


def _by_known_names(arrays: Mapping[str, np.ndarray], source: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays by the names of this module, and the names that they have in `arrays`."""
    known, typed = {}, {}
    for name, array in arrays.items():
        key = known_name(name)
        if key in known:
            raise RunError(f"{source} has the same under two names, `{typed[key]}` and `{name}`; leave one out")
        known[key], typed[key] = array, name
    return known, typed


def known_name(name: str) -> str:
    """The name in this module of an array that others name otherwise; arrays of no split are the training ones.

    >>> [known_name(name) for name in ("x_train", "val_images", "labels", "note")]
    ['train_images', 'validation_images', 'train_labels', 'note']
    """
    words = name.lower().split("_")
    kinds = [KINDS[word] for word in words if word in KINDS]
    splits = [SPLITS[word] for word in words if word in SPLITS]
    if len(kinds) != 1 or len(splits) != len(words) - 1 or len(words) > 2:
        return name
    return f"{splits[0] if splits else 'train'}_{kinds[0]}"


def _unnamed(arrays: Mapping[str, np.ndarray]) -> str:
    names = "name them: np.savez(path, images=arr_0, labels=arr_1)"
    return f"; {names}" if arrays.keys() == {"arr_0", "arr_1"} else ""


def _split(given: _Given, name: str, present: list[str]) -> Arrays:
    images_key, labels_key = f"{name}_images", f"{name}_labels"
    labels = _whole_labels(given, labels_key)
    images = _pixels(given, images_key, [f"{split}_images" for split in present])
    typed = given.typed[images_key]
    if len(images) != len(labels) or len(labels) == 0 or images.size == 0:
        last = images.shape[-1] == len(labels) > 0
        order = (images.ndim - 1, *range(images.ndim - 1))
        raise RunError(
            f"{given.of(images_key)} has shape {images.shape} and `{given.typed[labels_key]}` {labels.shape}; each "
            f"image has one label, and no split is empty{f': give {typed}.transpose{order}' if last else ''}"
        )
    if name == "train" and images.ndim == 4 and str(given.arrays.get("layout")) != "NHWC":
        _check_channels(given, images_key, images.shape)
    if images.max() == 1:
        warnings.warn(
            f"{given.of(images_key)} has no value above 1: give 255 * {typed}, or if a cast has cut off "
            f"shares of 1, np.round(255 * {typed}).astype(np.uint8) of what was there before",
            SuspectDataWarning,
            stacklevel=4,
        )
    return Arrays(images if images.ndim == 4 else images[..., None], labels)


def _check_channels(given: _Given, key: str, shape: tuple[int, ...]) -> None:
    """Refuse images that look as if the channels came first, warn of others with more channels than pixels."""
    _, height, width, channels = shape
    meant = f"give {given.typed[key]}.transpose(0, 2, 3, 1), or if it is meant so layout='NHWC' beside it"
    text = f"{given.of(key)} has shape {shape}, {height}x{width} pixels with {channels} channels"
    if height in CHANNELS and channels not in CHANNELS and height < width:
        raise RunError(f"{text}, as if the channels came first: {meant}")
    if height in CHANNELS and channels > height * width:
        warnings.warn(f"{text}; if the channels came first {meant}", SuspectDataWarning, stacklevel=5)


# -- labels


def _whole_labels(given: _Given, key: str) -> np.ndarray:
    """Labels as whole numbers [N]."""
    labels, how = given.arrays[key], "{}"
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels, how = labels[:, 0], "{}[:, 0]"
    elif _is_one_hot(labels):
        given.columns = labels.shape[1] if key == "train_labels" else given.columns
        labels, how = labels.argmax(1), "{}.argmax(1)"
    if labels.dtype.kind == "b" or (labels.dtype.kind == "f" and labels.ndim == 1 and np.all(labels % 1 == 0)):
        labels, how = labels.astype(np.int32), f"{how}.astype(np.int32)"
    given.spelled[key] = spelled = how.format(given.typed[key])
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        words = labels.ndim == 1 and labels.dtype.kind in "SU"
        numbered = NUMBERED.format(given.typed["train_labels"], spelled)
        mended = f": give {numbered}, {LIKEWISE}" if words else ""
        raise RunError(f"{given.shown(key)}; labels are integers of shape [N]{mended}")
    if how != "{}":
        given.converted.setdefault(how, []).append(given.typed[key])
    return labels


def _is_one_hot(labels: np.ndarray) -> bool:
    if labels.ndim != 2 or labels.shape[1] < 2 or labels.dtype.kind not in "biuf":
        return False
    return bool(np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all())


# -- pixels


class Reading(NamedTuple):
    """What pixel values stand for.

    Attributes:
      expression: of the uint8 pixels, with {} for the array; None where none is known.
      convert: what it computes, but for the cast; None where the meaning is not clear enough to do so unasked.
    """

    expression: str | None
    convert: Callable[[np.ndarray], np.ndarray] | None = None


def _pixels(given: _Given, key: str, of_all_splits: list[str]) -> np.ndarray:
    """Images as uint8 [N,H,W,C] or [N,H,W]; those of all splits are read in the same way."""
    images, typed = given.arrays[key], given.typed[key]
    same = [given.arrays[name] for name in of_all_splits if given.arrays[name].dtype == images.dtype]
    reading = Reading("{}", lambda x: x) if images.dtype == np.uint8 else _reading(images.dtype, same)
    if images.ndim in (3, 4) and reading.convert is not None:
        if images.dtype != np.uint8:
            given.converted.setdefault(reading.expression, []).append(typed)
        return reading.convert(images).astype(np.uint8, copy=False)
    mended = None if reading.expression is None else reading.expression.format(typed)
    if images.ndim == 2 and mended is not None:
        mended = _unflattened(mended, images.shape[1])
    elif images.ndim not in (3, 4):
        mended = None
    rule = "images are uint8, [N,H,W,C] or [N,H,W]"
    if images.dtype.kind == "f" and images.ndim in (3, 4) and not np.isfinite(images).all():
        kept, labels = f"[np.isfinite({typed}).all({tuple(range(1, images.ndim))})]", key.replace("images", "labels")
        rule, mended = f"{rule}, and finite", f"{given.typed[labels]}{kept} and {typed}{kept}"
    likewise = f", {LIKEWISE}" if len(same) > 1 else ""
    raise RunError(f"{given.shown(key)}; {rule}{f': give {mended}{likewise}' if mended else ''}")


def _reading(dtype: np.dtype, arrays: list[np.ndarray]) -> Reading:
    """How arrays of one dtype, other than uint8, are read."""
    if dtype.kind == "b":
        return Reading("255 * {}.astype(np.uint8)", lambda x: 255 * x.astype(np.uint8))
    if dtype.kind not in "iuf" or not all(array.size and np.isfinite(array).all() for array in arrays):
        return Reading(None)
    low, high = min(float(array.min()) for array in arrays), max(float(array.max()) for array in arrays)
    if dtype.kind in "iu" and low >= 0:
        if high <= 255:
            return Reading("{}.astype(np.uint8)", lambda x: x)
        bits = int(high).bit_length()
        clear = (lambda x: x >> 8) if bits == 16 else None
        return Reading(f"({{}} >> {bits - 8}).astype(np.uint8)", clear)
    for least, most, expression, convert in RANGES:
        # What does not reach over half of a range stands more likely for something else.
        if dtype.kind == "f" and least <= low and high <= most and max(high, -low) > most / 2:
            return Reading(f"{expression}.astype(np.uint8)", convert)
    share = f"({{}} {'-' if low >= 0 else '+'} {abs(low):.6g}) / {high - low:.6g}"
    return Reading(f"np.round(255 * np.clip({share}, 0, 1)).astype(np.uint8)" if low < high else None)


RANGES = (
    (0, 1, "np.round(255 * {})", lambda x: np.round(255 * x)),
    (-1, 1, "np.round(127.5 * ({} + 1))", lambda x: np.round(127.5 * (x + 1))),
    (0, 255, "np.round({})", np.round),
)
"""(least value, largest, the expression of pixels of 0..255, what it computes)."""


def _unflattened(expression: str, values: int) -> str | None:
    """Rows of values as images: square, grey, or RGB with the channels first, as CIFAR's archive has them."""
    for channels in (1, 3):
        side = math.isqrt(values // channels)
        if channels * side * side == values:
            first = f"{expression}.reshape(-1, {channels}, {side}, {side}).transpose(0, 2, 3, 1)"
            return f"{expression}.reshape(-1, {side}, {side})" if channels == 1 else first
    return None


def _of_another_shape(given: _Given, name: str, images: np.ndarray, shape: tuple[int, ...]) -> str:
    key, training = f"{name}_images", given.typed["train_images"]
    text = f"{given.of(key)} has images of shape {images.shape[1:]}, `{training}` of {shape}; all splits have one"
    for order in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 3, 1, 2)):
        if tuple(images.shape[axis] for axis in order[1:]) == shape:
            return f"{text}: give {given.typed[key]}.transpose{order}"
    return text


# -- classes


def _given_classes(given: _Given) -> int | None:
    if "num_classes" not in given.arrays:
        return given.columns
    value = given.arrays["num_classes"]
    if value.dtype.kind not in "iu" or value.ndim != 0 or value < 1:
        raise RunError(f"`num_classes` of {given.source} is {value.tolist()!r}; it is one whole number, at least 1")
    return int(value)


def _counted_classes(given: _Given, splits: Mapping[str, Arrays]) -> int:
    """How many classes there are where the labels alone say it: those of train are 0, 1, 2, ... without a gap."""
    present = np.unique(splits["train"].labels)
    if len(present) < 2:
        raise RunError(
            f"{given.of('train_labels')} has the label {present[0]} alone; a classification has two classes or more"
        )
    if not np.array_equal(present, np.arange(len(present))):
        raise RunError(_of_other_numbers(given, present, several=len(splits) > 1))
    for name, split in splits.items():
        unknown = np.flatnonzero(~np.isin(split.labels, present))
        if len(unknown):
            label, labels = split.labels[unknown[0]], given.spelled[f"{name}_labels"]
            known = f"[np.isin({labels}, {given.spelled['train_labels']})]"
            meant = ", or give `num_classes`" if label >= 0 else ""
            raise RunError(
                f"{given.of(f'{name}_labels')} has the label {label} at index {unknown[0]}, which no training example "
                f"has: give {given.typed[f'{name}_images']}{known} and {labels}{known}{meant}"
            )
    return len(present)


def _of_other_numbers(given: _Given, present: np.ndarray, *, several: bool) -> str:
    shown = ", ".join(map(str, present[:5])) + (f", ..., {present[-1]}" if len(present) > 5 else "")
    first, last, count = int(present[0]), int(present[-1]), len(present)
    labels, likewise = given.spelled["train_labels"], f", {LIKEWISE}" if several else ""
    if last - first == count - 1:
        mended = f"{labels} {'-' if first > 0 else '+'} {abs(first)}{likewise}"
    elif last == 255 and present[-2] == count - 2:
        kept = f"[{labels} != 255]"
        mended = f"{given.typed['train_images']}{kept} and {labels}{kept} where 255 is no class{likewise}"
    else:
        mended = f"{NUMBERED.format(labels, labels)}{likewise}, or give `num_classes`"
    return f"{given.of('train_labels')} has the labels {shown}; classes are 0 to {count - 1}: give {mended}"


def _check_classes(given: _Given, splits: Mapping[str, Arrays], num_classes: int) -> None:
    for name, split in splits.items():
        outside = np.flatnonzero((split.labels < 0) | (split.labels >= num_classes))
        if len(outside):
            shifted = split.labels.min() > 0 and split.labels.max() == num_classes
            mended = f": give {given.spelled[f'{name}_labels']} - 1" if shifted else ""
            raise RunError(
                f"{given.of(f'{name}_labels')} has the label {split.labels[outside[0]]} at index {outside[0]}; labels "
                f"are 0 to {num_classes - 1}{mended}"
            )
    missing = np.setdiff1d(np.arange(num_classes), splits["train"].labels)
    if len(missing):
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        labels = given.spelled["train_labels"]
        warnings.warn(
            f"{given.of('train_labels')} has {num_classes - len(missing)} of {num_classes} classes, none of {shown}: "
            f"if those are not meant to be there, leave `num_classes` out and give {NUMBERED.format(labels, labels)}",
            SuspectDataWarning,
            stacklevel=3,
        )


def _warn_of_copies(given: _Given, splits: Mapping[str, Arrays]) -> None:
    for name, split in splits.items():
        if name != "train" and np.array_equal(split.images, splits["train"].images):
            training = given.typed["train_images"]
            warnings.warn(
                f"{given.of(f'{name}_images')} are the training images, on which accuracy says little: give others, "
                f"as {training}[::5], and without them np.delete({training}, np.s_[::5], 0), labels likewise",
                SuspectDataWarning,
                stacklevel=3,
            )

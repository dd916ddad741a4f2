"""The arrays of an image set: what each must be, and for common mistakes the NumPy expression that mends it."""

import math
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from bnn_jax.errors import RunError

CHANNELS = (1, 2, 3, 4)
"""Of images as they are stored: grey, with alpha, RGB."""

NUMBERED = "np.searchsorted(np.unique(train_labels), {})"
"""Labels of any kind as 0, 1, 2, ... in the order of their values."""
LIKEWISE = "likewise those of other splits"


class SuspectDataWarning(UserWarning):
    """Data that can be meant so, but most often are a mistake; the text names the array and what would mend it."""


class Arrays(NamedTuple):
    """One split: uint8 images [N,H,W,C] and whole labels [N]."""

    images: np.ndarray
    labels: np.ndarray


def checked_arrays(arrays: Mapping[str, np.ndarray], source: str) -> tuple[dict[str, Arrays], int]:
    """The splits of an .npz file by name, and the number of classes.

    Args:
      arrays: as :func:`bnn_jax.data.load_dataset` describes them.
      source: where they come from, for messages.

    Returns:
      train, test, and validation where there is one; a channel axis is added where it is missing.

    Raises:
      RunError: for an array that breaks a rule; names it, its value and, where known, the expression that mends it.

    Warns:
      SuspectDataWarning: for classes without a training example, test images that are the training images, and images
        of 0 and 1 alone.
    """
    own = arrays.keys() & {"validation_images", "validation_labels"}
    splits = {name: _split(arrays, name, source) for name in ("train", "test", *(["validation"] if own else []))}
    shape = splits["train"].images.shape[1:]
    for name, split in splits.items():
        if split.images.shape[1:] != shape:
            raise RunError(_of_another_shape(f"{name}_images", split.images, shape, source))
    num_classes = _given_classes(arrays, source)
    if num_classes is None:
        num_classes = _counted_classes(splits, source)
    else:
        _check_classes(splits, num_classes, source)
    _warn_of_copies(splits, source)
    return splits, num_classes


def _split(arrays: Mapping[str, np.ndarray], name: str, source: str) -> Arrays:
    for key in (f"{name}_images", f"{name}_labels"):
        if key not in arrays:
            raise RunError(f"{source} has no array `{key}`; it has {', '.join(sorted(arrays)) or 'none'}")
    images, labels = arrays[f"{name}_images"], arrays[f"{name}_labels"]
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        rule = "labels are integers of shape [N]"
        raise RunError(_refused(f"{name}_labels", labels, source, rule, _mended_labels(f"{name}_labels", labels)))
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        rule = "images are uint8, [N,H,W,C] or [N,H,W]"
        raise RunError(_refused(f"{name}_images", images, source, rule, _mended_images(f"{name}_images", images)))
    if len(images) != len(labels) or len(labels) == 0 or images.size == 0:
        last = images.shape[-1] == len(labels) > 0
        order = (images.ndim - 1, *range(images.ndim - 1))
        raise RunError(
            f"`{name}_images` of {source} has shape {images.shape} and `{name}_labels` {labels.shape}; each image has "
            f"one label, and no split is empty{f': store {name}_images.transpose{order}' if last else ''}"
        )
    if images.ndim == 4 and str(arrays.get("layout")) != "NHWC" and _is_channels_first(images.shape):
        _, channels, height, width = images.shape
        raise RunError(
            f"`{name}_images` of {source} has shape {images.shape}, {channels}x{height} pixels with {width} channels, "
            f"as if the channels came first: store {name}_images.transpose(0, 2, 3, 1), or if it is meant so "
            "layout='NHWC' beside it"
        )
    if images.max() == 1:
        warnings.warn(
            f"`{name}_images` of {source} has no value above 1: store 255 * {name}_images, or if a cast has cut off "
            f"shares of 1, np.round(255 * {name}_images).astype(np.uint8) of what was there before",
            SuspectDataWarning,
            stacklevel=2,
        )
    return Arrays(images if images.ndim == 4 else images[..., None], labels)


def _is_channels_first(shape: tuple[int, ...]) -> bool:
    _, first, height, last = shape
    return first in CHANNELS and last not in CHANNELS and first < height


def _refused(name: str, array: np.ndarray, source: str, rule: str, mended: str | None) -> str:
    text = f"`{name}` of {source} is {array.dtype} of shape {array.shape}; {rule}"
    return text if mended is None else f"{text}: store {mended}"


def _mended_labels(name: str, labels: np.ndarray) -> str | None:
    """The expression that makes labels of what is there, None where none is known."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        return f"{name}[:, 0]"
    if (
        labels.ndim == 2
        and labels.dtype.kind in "biuf"
        and np.isin(labels, (0, 1)).all()
        and (labels.sum(1) == 1).all()
    ):
        return f"{name}.argmax(1)"
    if labels.ndim == 1 and labels.dtype.kind in "SU":
        return f"{NUMBERED.format(name)}, {LIKEWISE}"
    if labels.ndim == 1 and (labels.dtype.kind == "b" or (labels.dtype.kind == "f" and np.all(labels % 1 == 0))):
        return f"{name}.astype(np.int32)"
    return None


def _mended_images(name: str, images: np.ndarray) -> str | None:
    """The expression that makes uint8 images of what is there, None where none is known."""
    pixels = _mended_pixels(name, images)
    if images.ndim == 2 and (pixels or images.dtype == np.uint8):
        return _unflattened(pixels or name, images.shape[1])
    return pixels


def _mended_pixels(name: str, images: np.ndarray) -> str | None:
    if images.dtype.kind == "b":
        return f"255 * {name}.astype(np.uint8)"
    if images.dtype.kind not in "iuf" or images.dtype == np.uint8 or not images.size or not np.isfinite(images).all():
        return None
    low, high = float(images.min()), float(images.max())
    if images.dtype.kind in "iu":
        fits = f"{name}.astype(np.uint8)" if low >= 0 and high <= 255 else None
        return f"({name} >> 8).astype(np.uint8)" if low >= 0 and 255 < high < 2**16 else fits
    for least, most, expression in (
        (0, 1, f"np.round(255 * {name})"),
        (-1, 1, f"np.round(127.5 * ({name} + 1))"),
        (0, 255, f"np.round({name})"),
    ):
        if least <= low and high <= most:
            return f"{expression}.astype(np.uint8)"
    return None


def _unflattened(expression: str, values: int) -> str | None:
    """Rows of values as images: square, grey, or RGB with the channels first, as CIFAR's archive has them."""
    for channels in (1, 3):
        side = math.isqrt(values // channels)
        if channels * side * side == values:
            first = f"{expression}.reshape(-1, {channels}, {side}, {side}).transpose(0, 2, 3, 1)"
            return f"{expression}.reshape(-1, {side}, {side})" if channels == 1 else first
    return None


def _of_another_shape(name: str, images: np.ndarray, shape: tuple[int, ...], source: str) -> str:
    text = (
        f"`{name}` of {source} has images of shape {images.shape[1:]}, `train_images` of {shape}; all splits have one"
    )
    for order in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 3, 1, 2)):
        if tuple(images.shape[axis] for axis in order[1:]) == shape:
            return f"{text}: store {name}.transpose{order}"
    return text


def _given_classes(arrays: Mapping[str, np.ndarray], source: str) -> int | None:
    if "num_classes" not in arrays:
        return None
    value = arrays["num_classes"]
    if value.dtype.kind not in "iu" or value.ndim != 0 or value < 1:
        raise RunError(f"`num_classes` of {source} is {value.tolist()!r}; it is one whole number, at least 1")
    return int(value)


def _counted_classes(splits: Mapping[str, Arrays], source: str) -> int:
    """How many classes there are where the labels alone say it: those of train are 0, 1, 2, ... without a gap."""
    present = np.unique(splits["train"].labels)
    if len(present) < 2:
        raise RunError(
            f"`train_labels` of {source} has the label {present[0]} alone; a classification has two classes or more"
        )
    if not np.array_equal(present, np.arange(len(present))):
        raise RunError(_of_other_numbers(present, source))
    for name, split in splits.items():
        unknown = np.flatnonzero(~np.isin(split.labels, present))
        if len(unknown):
            label, known = split.labels[unknown[0]], f"[np.isin({name}_labels, train_labels)]"
            meant = ", or give `num_classes`" if label >= 0 else ""
            raise RunError(
                f"`{name}_labels` of {source} has the label {label} at index {unknown[0]}, which no training example "
                f"has: store {name}_images{known} and {name}_labels{known}{meant}"
            )
    return len(present)


def _of_other_numbers(present: np.ndarray, source: str) -> str:
    shown = ", ".join(map(str, present[:5])) + (f", ..., {present[-1]}" if len(present) > 5 else "")
    first, last, count = int(present[0]), int(present[-1]), len(present)
    if last - first == count - 1:
        mended = f"train_labels {'-' if first > 0 else '+'} {abs(first)}, {LIKEWISE}"
    elif last == 255 and present[-2] == count - 2:
        kept = "[train_labels != 255]"
        mended = f"train_images{kept} and train_labels{kept} where 255 is no class, {LIKEWISE}"
    else:
        mended = f"{NUMBERED.format('train_labels')}, {LIKEWISE}, or give `num_classes`"
    return f"`train_labels` of {source} has the labels {shown}; classes are 0 to {count - 1}: store {mended}"


def _check_classes(splits: Mapping[str, Arrays], num_classes: int, source: str) -> None:
    for name, split in splits.items():
        outside = np.flatnonzero((split.labels < 0) | (split.labels >= num_classes))
        if len(outside):
            shifted = split.labels.min() > 0 and split.labels.max() == num_classes
            raise RunError(
                f"`{name}_labels` of {source} has the label {split.labels[outside[0]]} at index {outside[0]}; labels "
                f"are 0 to {num_classes - 1}{f': store {name}_labels - 1' if shifted else ''}"
            )
    missing = np.setdiff1d(np.arange(num_classes), splits["train"].labels)
    if len(missing):
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        warnings.warn(
            f"`train_labels` of {source} has {num_classes - len(missing)} of {num_classes} classes, none of {shown}: "
            f"if those are not meant to be there, leave `num_classes` out and store {NUMBERED.format('train_labels')}",
            SuspectDataWarning,
            stacklevel=2,
        )


def _warn_of_copies(splits: Mapping[str, Arrays], source: str) -> None:
    for name, split in splits.items():
        if name != "train" and np.array_equal(split.images, splits["train"].images):
            warnings.warn(
                f"`{name}_images` of {source} are the training images, on which accuracy says little: store others, as "
                "train_images[::5], and without them np.delete(train_images, np.s_[::5], 0), labels likewise",
                SuspectDataWarning,
                stacklevel=2,
            )

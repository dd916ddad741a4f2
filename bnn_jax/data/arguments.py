"""Checks of what a set is asked for by: whole numbers, and a preprocessing with its image size."""

import operator
from typing import Any

from bnn_jax.checks import require
from bnn_jax.data.imagenet import IMAGE_SIZE, PREPROCESSING
from bnn_jax.errors import UsageError, unknown_name


def whole_number(argument: str, value: Any, *, at_least: int) -> int:
    """`value` as an int.

    Raises:
      UsageError: if it is not a whole number or too small; names the argument.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    holds = number is not None and not isinstance(value, bool) and number >= at_least
    require(argument, value, holds, f"must be a whole number, at least {at_least}", error=UsageError)
    return number


def size_in_memory(preprocessing: str, image_size: int | None) -> int:
    """:func:`size_after` a preprocessing of images that are kept in memory.

    Raises:
      UsageError: also for one that crops at random.
    """
    size = size_after(preprocessing, image_size)
    if size and PREPROCESSING[preprocessing].is_random:
        raise UsageError(
            f"`preprocessing` (={preprocessing!r}) crops at random as images are read: stream them, or give center_crop"
        )
    return size


def size_after(preprocessing: str, image_size: int | None) -> int:
    """Height and width of images after a preprocessing; 0 for "none", which leaves them as they are.

    Raises:
      UsageError: for an unknown preprocessing, or an `image_size` without one.
    """
    if preprocessing != "none":
        if preprocessing not in PREPROCESSING:
            raise unknown_name("preprocessing", preprocessing, ("none", *PREPROCESSING))
        return IMAGE_SIZE if image_size is None else whole_number("image_size", image_size, at_least=1)
    if image_size is not None:
        raise UsageError(f"`image_size` (={image_size}) needs a `preprocessing`: {', '.join(PREPROCESSING)}")
    return 0

"""Batch norm over one value, which is its own mean: the output does not depend on the input, and nothing is learnt."""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn


class OneValueWarning(UserWarning):
    """A batch norm of Flax over one value of each channel; the text names it.  That of this package refuses."""


def told_of_one_value() -> AbstractContextManager:
    """Around the call of a network that trains: warn of each `nn.BatchNorm` with one value of each channel.

    Where the call is traced, it is warned of once.
    """
    return nn.intercept_methods(_intercept)


def _intercept(call: Callable, arguments: tuple, options: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
    if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
        _warn_if_one_value(context.module, *arguments, **options)
    return call(*arguments, **options)


def _warn_if_one_value(norm: nn.BatchNorm, x: Any, use_running_average: bool | None = None, **_: Any) -> None:
    average = norm.use_running_average if use_running_average is None else use_running_average
    axes = norm.axis if isinstance(norm.axis, tuple | list) else (norm.axis,)
    if not average and x.size == math.prod(x.shape[axis] for axis in axes):
        warnings.warn(
            f"{'/'.join(norm.path) or 'BatchNorm'}, of inputs of shape {x.shape}, normalizes over one value of each "
            "channel in training, so that its output does not depend on its input: train on larger batches or images, "
            "or leave it out there",
            OneValueWarning,
            stacklevel=2,
        )

"""Arguments of layers: what stands for what, and the sentence that refuses one."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from bnn_jax.checks import require
from bnn_jax.layers.convolution import Pair
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, GRADIENT_QUANTIZERS, WEIGHT_QUANTIZERS, make_quantizer

QUANTIZERS = {
    "input_quantizer": ACTIVATION_QUANTIZERS,
    "kernel_quantizer": WEIGHT_QUANTIZERS,
    "gradient_quantizer": GRADIENT_QUANTIZERS,
}
"""Argument of a layer -> the table whose names it takes."""


def pair(value: int | Pair) -> Pair:
    """A pair (height, width), of which a number gives both.

    >>> pair(3), pair((1, 2))
    ((3, 3), (1, 2))
    """
    return (value, value) if isinstance(value, int) else tuple(value)


def make_quantizers(layer: nn.Module) -> None:
    """Put quantizers in the place of the names, estimators and factories that a layer was given.

    Raises:
      ValueError: for an unknown name; the nearest is named.
    """
    for argument, table in QUANTIZERS.items():
        setattr(layer, argument, make_quantizer(table, getattr(layer, argument), argument=argument))


def require_of_layer(
    layer: nn.Module, argument: str, value: Any, holds: bool | Callable[..., Any], rule: str, advice: str = ""
) -> None:
    """Refuse an argument of a layer as :func:`bnn_jax.checks.require` does, with the name of the layer behind the rule.

    >>> require_of_layer(nn.Dense(0, name="head"), "features", 0, lambda n: n >= 1, "must be positive")
    Traceback (most recent call last):
    ValueError: `features` (=0) must be positive in layer 'head'
    """
    path = () if layer.scope is None else layer.path
    require(argument, value, holds, f"{rule} in layer {('/'.join(path) or layer.name)!r}", advice)

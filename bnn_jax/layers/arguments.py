"""Arguments of layers: what stands for what, and the sentence that refuses one."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from bnn_jax.checks import require
from bnn_jax.layers.convolution import Pair


def pair(value: int | Pair) -> Pair:
    """A pair (height, width), of which a number gives both.

    >>> pair(3), pair((1, 2))
    ((3, 3), (1, 2))
    """
    return (value, value) if isinstance(value, int) else tuple(value)


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

"""Arguments of layers: what stands for what, and the sentence that refuses one."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from bnn_jax.checks import OF_BYTES, is_whole, require
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, GRADIENT_QUANTIZERS, WEIGHT_QUANTIZERS, make_quantizer

QUANTIZERS = {
    "input_quantizer": ACTIVATION_QUANTIZERS,
    "kernel_quantizer": WEIGHT_QUANTIZERS,
    "gradient_quantizer": GRADIENT_QUANTIZERS,
}
"""Argument of a layer -> the table whose names it takes."""

WHOLE = "must be a positive whole number"


def require_features(layer: nn.Module) -> None:
    """Refuse `features` that are no positive whole number."""
    require_of_layer(layer, "features", layer.features, is_whole(layer.features, 1), WHOLE)


def require_floats(layer: nn.Module, x: Array) -> None:
    """Refuse inputs that are not floating-point.

    Raises:
      TypeError: naming the layer.
    """
    rule, advice = "must be floating-point", OF_BYTES
    holds = jnp.issubdtype(x.dtype, jnp.floating)
    require_of_layer(layer, "x.dtype", x.dtype.name, holds, rule, advice, error=TypeError)


def make_quantizers(layer: nn.Module) -> None:
    """Put quantizers in the place of the names, estimators and factories that a layer was given.

    Raises:
      ValueError: for an unknown name; the nearest is named.
    """
    for argument, table in QUANTIZERS.items():
        setattr(layer, argument, make_quantizer(table, getattr(layer, argument), argument=argument))


def require_of_layer(
    layer: nn.Module,
    argument: str,
    value: Any,
    holds: bool | Callable[..., Any],
    rule: str,
    advice: str = "",
    error: type[Exception] = ValueError,
) -> None:
    """Refuse an argument of a layer as :func:`bnn_jax.checks.require` does, with the name of the layer behind the rule.

    >>> require_of_layer(nn.Dense(0, name="head"), "features", 0, lambda n: n >= 1, "must be positive")
    Traceback (most recent call last):
    ValueError: `features` (=0) must be positive in layer 'head'
    """
    path = () if layer.scope is None else layer.path
    name = "/".join(path) or layer.name or type(layer).__name__
    require(argument, value, holds, f"{rule} in layer {name!r}", advice, error=error)

"""Quantizers: pure functions from a real tensor to integer codes and a scale, and the tables that name them."""

from functools import partial

from bnn_jax.estimators import ESTIMATORS
from bnn_jax.quantizers.binary import binary, xnor
from bnn_jax.quantizers.codes import Bases, Quantized, Quantizer, bases, dequantize, stateless, validate
from bnn_jax.quantizers.ternary import trained_ternary, ttq

WEIGHT_QUANTIZERS: dict[str, Quantizer | None] = {
    "full_precision": None,
    "binary": stateless(binary),
    "xnor": stateless(xnor),
    "ttq": ttq(),
}

ACTIVATION_QUANTIZERS: dict[str, Quantizer | None] = {
    "full_precision": None,
    **{name: stateless(partial(binary, estimator=estimator)) for name, estimator in ESTIMATORS.items()},
}

__all__ = [
    "ACTIVATION_QUANTIZERS",
    "WEIGHT_QUANTIZERS",
    "Bases",
    "Quantized",
    "Quantizer",
    "bases",
    "binary",
    "dequantize",
    "stateless",
    "trained_ternary",
    "ttq",
    "validate",
    "xnor",
]

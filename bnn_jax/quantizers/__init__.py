"""Quantizers: pure functions from a real tensor to integer codes and a scale, and the tables that name them."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

from bnn_jax.checks import look_up, require
from bnn_jax.estimators import ESTIMATORS, EstimatorLike
from bnn_jax.quantizers.activations import coupled, decouple, decoupled, rsign, sparse, unbalanced
from bnn_jax.quantizers.adaptive import adabin, adabin_activations
from bnn_jax.quantizers.binary import binary, binary_connect, full_latent, magnitude_aware, post_training, xnor
from bnn_jax.quantizers.bitnet import bitnet_activations, bitnet_b158_weights, bitnet_weights
from bnn_jax.quantizers.certainty import c_sign
from bnn_jax.quantizers.codes import Bases, Mark, Quantized, bases, dequantize, mark, read_mark, validate
from bnn_jax.quantizers.elastic import elastic
from bnn_jax.quantizers.fourier import fda, fda_activations
from bnn_jax.quantizers.gradients import GRADIENT_QUANTIZERS, GradientQuantizer, dorefa_gradient
from bnn_jax.quantizers.incremental import inq
from bnn_jax.quantizers.learned_levels import lq_net, lq_net_activations
from bnn_jax.quantizers.learned_scale import learned_scale, proxy, state_aware
from bnn_jax.quantizers.learned_step import dsq, lsq_activations, lsq_weights
from bnn_jax.quantizers.multibase import abc_net, abc_net_activations, residual_binary
from bnn_jax.quantizers.multibit import (
    dorefa_activations,
    dorefa_weights,
    hwgq,
    odd_codes,
    pact,
    signed_codes,
    unsigned_codes,
    wrpn_activations,
    wrpn_weights,
)
from bnn_jax.quantizers.periodic import biper
from bnn_jax.quantizers.progressive import progressive
from bnn_jax.quantizers.quantizer import (
    Quantizer,
    check_option_names,
    full_precision,
    of_bits,
    stateless,
    takes_array,
    with_estimator,
    with_input_estimator,
)
from bnn_jax.quantizers.silent_weights import ovsw, recu, scaled_inputs
from bnn_jax.quantizers.standardized import bn_free, libra_pb, rbnn, rbnn_inputs
from bnn_jax.quantizers.ternary import tbn, tbn_v2, trained_ternary, ttq, twn

QuantizerTable: TypeAlias = Mapping[str, Callable[..., Quantizer | GradientQuantizer | None]]
"""name -> factory, a function of keyword options that makes the quantizer; None is full precision."""

QuantizerLike: TypeAlias = EstimatorLike | Quantizer | GradientQuantizer | Callable[..., Quantizer] | None
"""What stands for a quantizer, see :func:`make_quantizer`."""

WEIGHT_QUANTIZERS: QuantizerTable = {
    "full_precision": full_precision,
    "binary": partial(with_estimator, binary),
    "binary_connect": binary_connect,
    "post_training": post_training,
    "xnor": partial(with_estimator, xnor),
    "magnitude_aware": partial(with_estimator, magnitude_aware),
    "learned_scale": learned_scale,
    "bnn_plus": partial(learned_scale, estimator="swish_sign", initial="median"),
    "state_aware": state_aware,
    "proxy": proxy,
    "c_sign": c_sign,
    "libra_pb": partial(with_estimator, libra_pb, estimator="ede_sign"),
    "dir_net": partial(with_estimator, libra_pb, estimator="dir_sign", shift=False),
    "rbnn": rbnn,
    "bn_free": bn_free,
    "recu": recu,
    "adabin": adabin,
    "biper": biper,
    "progressive": progressive,
    "fda": fda,
    "ovsw": partial(with_estimator, ovsw, estimator="identity_sign"),
    "abc_net": partial(stateless, abc_net),
    "ttq": ttq,
    "twn": partial(stateless, twn, code_set=(-1, 0, 1)),
    "dorefa": partial(of_bits, dorefa_weights, odd_codes),
    "wrpn": partial(of_bits, wrpn_weights, signed_codes),
    "lq_net": lq_net,
    "lsq": lsq_weights,
    "dsq": dsq,
    "inq": inq,
    "bitnet": partial(stateless, bitnet_weights),
    "bitnet_b158": partial(stateless, bitnet_b158_weights, code_set=(-1, 0, 1)),
}

ACTIVATION_QUANTIZERS: QuantizerTable = {
    "full_precision": full_precision,
    **{
        name: partial(with_input_estimator, binary, record)
        for name, record in ESTIMATORS.items()
        if record.code_set == (-1, 1)
    },
    "rbnn": partial(with_input_estimator, rbnn_inputs, estimator="rbnn_sign"),
    "recu": partial(with_input_estimator, scaled_inputs, estimator="approx_sign", wants=("train",)),
    "adabin": adabin_activations,
    "fda": fda_activations,
    "progressive": progressive,
    "rsign": rsign,
    "unbalanced": unbalanced,
    "sparse": sparse,
    "coupled": partial(stateless, coupled, code_set=(0, 1, 2)),
    "decoupled": partial(stateless, decoupled, code_set=(0, 1)),
    "tbn": tbn,
    "tbn_v2": tbn_v2,
    "abc_net": abc_net_activations,
    "residual": partial(with_input_estimator, residual_binary),
    "dorefa": partial(of_bits, dorefa_activations, unsigned_codes),
    "wrpn": partial(of_bits, wrpn_activations, unsigned_codes),
    "pact": pact,
    "hwgq": partial(of_bits, hwgq, unsigned_codes),
    "lq_net": lq_net_activations,
    "lsq": lsq_activations,
    "dsq": partial(dsq, of_weights=False),
    "bitnet": partial(of_bits, bitnet_activations, signed_codes, bits=8),
    "elastic": elastic,
}


def make_quantizer(
    table: QuantizerTable, quantizer: QuantizerLike, *, argument: str = "quantizer", **options: Any
) -> Quantizer | GradientQuantizer | None:
    """Return the quantizer that a name, or what the name would stand for, means.

    Args:
      table: WEIGHT_QUANTIZERS, ACTIVATION_QUANTIZERS or GRADIENT_QUANTIZERS.
      quantizer: a name in `table`, or ``package.module:Name`` of what follows; a factory, a function of options alone;
        a quantizer; None for full precision.  An estimator, a name in ESTIMATORS, a record or a function x -> codes,
        stands for :func:`binary` with it; of a function x -> :class:`Quantized` :func:`stateless` makes a quantizer,
        which knows its codes.
      argument: what the user calls it, for errors.
      **options: of the factory or the estimator.

    Raises:
      ValueError: for an unknown name or option (the nearest is named), or what is none of these.

    >>> import jax.numpy as jnp
    >>> quantizer = make_quantizer(ACTIVATION_QUANTIZERS, "ste_sign", clip_value=1.25)
    >>> quantizer.apply(jnp.array([-0.5, 0.5])).codes
    Array([-1.,  1.], dtype=float32)
    >>> [make_quantizer(WEIGHT_QUANTIZERS, name).code_set for name in ("approx_sign", "heaviside")]
    [(-1, 1), (0, 1)]
    """
    factory = _factory_of(table, quantizer, argument)
    check_option_names(factory, options)
    return factory(**options)


def has_option(table: QuantizerTable, quantizer: QuantizerLike, option: str, *, argument: str = "quantizer") -> bool:
    """Whether what :func:`make_quantizer` takes has an option of its own of this name.

    >>> has_option(WEIGHT_QUANTIZERS, "rbnn", "period_steps"), has_option(WEIGHT_QUANTIZERS, "xnor", "period_steps")
    (True, False)
    """
    return option in inspect.signature(_factory_of(table, quantizer, argument)).parameters


def named_quantizer(table: QuantizerTable, quantizer: QuantizerLike, *, argument: str = "quantizer") -> Any:
    """What the name of a quantizer, or of an estimator in its place, stands for; what is no string is the thing itself.

    Raises:
      UsageError: for a name that is not known, the nearest is named, or cannot be imported.
    """
    return look_up(argument, quantizer, table if table is GRADIENT_QUANTIZERS else {**ESTIMATORS, **table})


def _factory_of(table: QuantizerTable, quantizer: QuantizerLike, argument: str) -> Callable[..., Any]:
    quantizer = named_quantizer(table, quantizer, argument=argument)
    if quantizer is None or isinstance(quantizer, Quantizer):
        return lambda: quantizer
    rule = "must be a name, a quantizer, an estimator, or a function of options that makes a quantizer"
    require(argument, quantizer, callable(quantizer), rule)
    if not takes_array(quantizer):
        return quantizer
    if table is GRADIENT_QUANTIZERS:
        return lambda: quantizer
    return partial(with_input_estimator if table is ACTIVATION_QUANTIZERS else with_estimator, binary, quantizer)


__all__ = [
    "ACTIVATION_QUANTIZERS",
    "GRADIENT_QUANTIZERS",
    "WEIGHT_QUANTIZERS",
    "Bases",
    "Mark",
    "Quantized",
    "Quantizer",
    "QuantizerLike",
    "bases",
    "binary",
    "decouple",
    "dequantize",
    "dorefa_gradient",
    "full_latent",
    "has_option",
    "make_quantizer",
    "mark",
    "named_quantizer",
    "read_mark",
    "stateless",
    "trained_ternary",
    "ttq",
    "validate",
    "with_estimator",
    "xnor",
]

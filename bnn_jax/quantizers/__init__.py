"""Quantizers: pure functions from a real tensor to integer codes and a scale, and the tables that name them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from bnn_jax.errors import unknown_name
from bnn_jax.estimators import CODE_SETS, ESTIMATORS
from bnn_jax.quantizers.activations import coupled, decouple, decoupled, rsign, sparse, unbalanced
from bnn_jax.quantizers.binary import binary, binary_connect, full_latent, magnitude_aware, post_training, xnor
from bnn_jax.quantizers.certainty import c_sign
from bnn_jax.quantizers.codes import Bases, Mark, Quantized, bases, dequantize, mark, read_mark, validate
from bnn_jax.quantizers.gradients import GRADIENT_QUANTIZERS, dorefa_gradient
from bnn_jax.quantizers.incremental import inq
from bnn_jax.quantizers.learned_levels import lq_net, lq_net_activations
from bnn_jax.quantizers.learned_scale import learned_scale, proxy, state_aware
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
from bnn_jax.quantizers.quantizer import Quantizer, check_options, of_bits, stateless, with_estimator
from bnn_jax.quantizers.standardized import bn_free, libra_pb, rbnn
from bnn_jax.quantizers.ternary import tbn, tbn_v2, trained_ternary, ttq, twn

QuantizerTable = Mapping[str, Callable[..., Quantizer | None]]
"""name -> function of keyword options that makes the quantizer; None is full precision."""

WEIGHT_QUANTIZERS: QuantizerTable = {
    "full_precision": lambda: None,
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
    "abc_net": partial(stateless, abc_net),
    "ttq": ttq,
    "twn": partial(stateless, twn, code_set=(-1, 0, 1)),
    "dorefa": partial(of_bits, dorefa_weights, odd_codes),
    "wrpn": partial(of_bits, wrpn_weights, signed_codes),
    "lq_net": lq_net,
    "inq": inq,
}

ACTIVATION_QUANTIZERS: QuantizerTable = {
    "full_precision": lambda: None,
    **{name: partial(with_estimator, binary, name) for name in ESTIMATORS if CODE_SETS[name] == (-1, 1)},
    "rsign": rsign,
    "unbalanced": unbalanced,
    "sparse": sparse,
    "coupled": partial(stateless, coupled, code_set=(0, 1, 2)),
    "decoupled": partial(stateless, decoupled, code_set=(0, 1)),
    "tbn": tbn,
    "tbn_v2": tbn_v2,
    "abc_net": abc_net_activations,
    "residual": partial(with_estimator, residual_binary),
    "dorefa": partial(of_bits, dorefa_activations, unsigned_codes),
    "wrpn": partial(of_bits, wrpn_activations, unsigned_codes),
    "pact": pact,
    "hwgq": partial(of_bits, hwgq, unsigned_codes),
    "lq_net": lq_net_activations,
}


def make_quantizer(table: QuantizerTable, name: str, **options: Any) -> Quantizer | None:
    """The quantizer that `table` names, with options of its function.

    Raises:
      ValueError: for an unknown name or option; the nearest is named.

    >>> import jax.numpy as jnp
    >>> quantizer = make_quantizer(ACTIVATION_QUANTIZERS, "ste_sign", clip_value=1.25)
    >>> quantizer.apply(jnp.array([-0.5, 0.5])).codes
    Array([-1.,  1.], dtype=float32)
    """
    if name not in table:
        raise unknown_name("quantizer", name, table)
    check_options(table[name], options)
    return table[name](**options)


__all__ = [
    "ACTIVATION_QUANTIZERS",
    "GRADIENT_QUANTIZERS",
    "WEIGHT_QUANTIZERS",
    "Bases",
    "Mark",
    "Quantized",
    "Quantizer",
    "bases",
    "binary",
    "decouple",
    "dequantize",
    "dorefa_gradient",
    "full_latent",
    "make_quantizer",
    "mark",
    "read_mark",
    "stateless",
    "trained_ternary",
    "ttq",
    "validate",
    "with_estimator",
    "xnor",
]

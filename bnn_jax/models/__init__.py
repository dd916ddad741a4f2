"""Networks by name.  Each returns (logits, intermediates) when applied to normalized NHWC images.

A network computes in the dtype of its images: bfloat16 images make bfloat16 activations and intermediates.  Parameters,
statistics, sums and the last layer, so the logits too, stay in float32.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from bnn_jax.models.alexnet import alexnet_dorefa, alexnet_xnor, bnn_plus_alexnet
from bnn_jax.models.binaryduo import binaryduo_resnet18, binaryduo_vgg7
from bnn_jax.models.birealnet import (
    bireal18,
    bireal34,
    bireal_resnet20,
    ebireal18,
    ebireal34,
    ftbnn_resnet18,
)
from bnn_jax.models.bnas import bnas_a, bnas_e
from bnn_jax.models.cinet import cinet_resnet18
from bnn_jax.models.convnet import binaryconnect_convnet, bnn_convnet, mnist_mlp
from bnn_jax.models.densenet import (
    binary_densenet28,
    binary_densenet37,
    binary_densenet45,
    binary_densenet51,
    binary_densenet69,
    igp_densenet51,
    igp_densenet69,
)
from bnn_jax.models.dgrl import dgrl_resnet18
from bnn_jax.models.fractal import igp_resnet21, igp_resnet37, igp_resnet41, igp_resnet69
from bnn_jax.models.irnet import irnet_resnet18, irnet_resnet20, irnet_resnet34
from bnn_jax.models.lenet import LeNet
from bnn_jax.models.mobilenet import reactnet_a
from bnn_jax.models.reactnet import reactnet18, reactnet18_bn_free, reactnet_resnet20
from bnn_jax.models.real_to_binary import real_to_binary_baseline_resnet18, real_to_binary_resnet18
from bnn_jax.models.resnet import ResNet, resnet6, resnet20
from bnn_jax.models.resnet_large import (
    resnet18,
    resnet34,
    tbn_resnet18,
    tbn_resnet34,
    xnor_pp_resnet18,
    xnor_resnet18,
    xnor_resnet34,
)
from bnn_jax.models.vgg import bnn_plus_vgg, vgg_small

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "bnn_convnet": bnn_convnet,
    "binaryconnect_convnet": binaryconnect_convnet,
    "mnist_mlp": mnist_mlp,
    "vgg_small": vgg_small,
    "bnn_plus_vgg": bnn_plus_vgg,
    "alexnet_xnor": alexnet_xnor,
    "alexnet_dorefa": alexnet_dorefa,
    "bnn_plus_alexnet": bnn_plus_alexnet,
    "resnet6": resnet6,
    "resnet20": resnet20,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "bnn_resnet18": xnor_resnet18,
    "xnor_resnet18": xnor_resnet18,
    "xnor_resnet34": xnor_resnet34,
    "xnor_pp_resnet18": xnor_pp_resnet18,
    "tbn_resnet18": tbn_resnet18,
    "tbn_resnet34": tbn_resnet34,
    "bireal18": bireal18,
    "bireal34": bireal34,
    "bireal_resnet20": bireal_resnet20,
    "ebireal18": ebireal18,
    "ebireal34": ebireal34,
    "ftbnn_resnet18": ftbnn_resnet18,
    "irnet_resnet18": irnet_resnet18,
    "irnet_resnet20": irnet_resnet20,
    "irnet_resnet34": irnet_resnet34,
    "reactnet18": reactnet18,
    "reactnet_resnet20": reactnet_resnet20,
    "reactnet18_bn_free": reactnet18_bn_free,
    "reactnet_a": reactnet_a,
    "real_to_binary_resnet18": real_to_binary_resnet18,
    "real_to_binary_baseline_resnet18": real_to_binary_baseline_resnet18,
    "cinet_resnet18": cinet_resnet18,
    "dgrl_resnet18": dgrl_resnet18,
    "binaryduo_vgg7": binaryduo_vgg7,
    "binaryduo_resnet18": binaryduo_resnet18,
    "bnas_a": bnas_a,
    "bnas_e": bnas_e,
    "binary_densenet28": binary_densenet28,
    "binary_densenet37": binary_densenet37,
    "binary_densenet45": binary_densenet45,
    "binary_densenet51": binary_densenet51,
    "binary_densenet69": binary_densenet69,
    "igp_densenet51": igp_densenet51,
    "igp_densenet69": igp_densenet69,
    "igp_resnet21": igp_resnet21,
    "igp_resnet37": igp_resnet37,
    "igp_resnet41": igp_resnet41,
    "igp_resnet69": igp_resnet69,
}


class Published(NamedTuple):
    """The quantizers with which a network was published, by their names in the tables, and their options."""

    input_quantizer: str
    kernel_quantizer: str
    input_options: Mapping[str, Any] = {}
    kernel_options: Mapping[str, Any] = {}


_BI_REAL = Published("approx_sign", "magnitude_aware")
_DENSE = Published("ste_sign", "binary", input_options={"clip_value": 1.3}, kernel_options={"clip_value": 1.3})

PUBLISHED_QUANTIZERS: dict[str, Published] = {
    "lenet": Published("full_precision", "binary"),
    "bnn_convnet": Published("ste_sign", "binary"),
    "binaryconnect_convnet": Published("full_precision", "binary_connect"),
    "mnist_mlp": Published("ste_sign", "binary"),
    "vgg_small": Published("ede_sign", "libra_pb"),
    "bnn_plus_vgg": Published("swish_sign", "bnn_plus", kernel_options={"initial": "percentile75"}),
    "alexnet_xnor": Published("ste_sign", "xnor", kernel_options={"center": True}),
    "alexnet_dorefa": Published("dorefa", "dorefa", input_options={"bits": 2}, kernel_options={"bits": 1}),
    "bnn_plus_alexnet": Published("swish_sign", "bnn_plus", kernel_options={"initial": "percentile75"}),
    "resnet6": Published("ste_sign", "xnor"),
    "resnet20": Published("ste_sign", "xnor"),
    "resnet18": Published("full_precision", "full_precision"),
    "resnet34": Published("full_precision", "full_precision"),
    "bnn_resnet18": Published("ste_sign", "binary"),
    "xnor_resnet18": Published("ste_sign", "xnor", kernel_options={"center": True}),
    "xnor_resnet34": Published("ste_sign", "xnor", kernel_options={"center": True}),
    "xnor_pp_resnet18": Published("ste_sign", "binary"),
    "tbn_resnet18": Published(
        "tbn", "magnitude_aware", input_options={"threshold": 0.4}, kernel_options={"estimator": "identity_sign"}
    ),
    "tbn_resnet34": Published(
        "tbn", "magnitude_aware", input_options={"threshold": 0.4}, kernel_options={"estimator": "identity_sign"}
    ),
    "bireal18": _BI_REAL,
    "bireal34": _BI_REAL,
    "bireal_resnet20": _BI_REAL,
    "ebireal18": _BI_REAL,
    "ebireal34": _BI_REAL,
    "ftbnn_resnet18": _BI_REAL,
    "irnet_resnet18": Published("ede_sign", "libra_pb"),
    "irnet_resnet20": Published("ede_sign", "libra_pb"),
    "irnet_resnet34": Published("ede_sign", "libra_pb"),
    "reactnet18": Published("rsign", "magnitude_aware"),
    "reactnet_resnet20": Published("rsign", "magnitude_aware"),
    "reactnet18_bn_free": Published("rsign", "bn_free"),
    "reactnet_a": Published("rsign", "magnitude_aware"),
    "real_to_binary_resnet18": Published("ste_sign", "binary"),
    "real_to_binary_baseline_resnet18": Published("ste_sign", "binary"),
    "cinet_resnet18": Published("ste_sign", "binary"),
    "dgrl_resnet18": _BI_REAL,
    "binaryduo_vgg7": Published("coupled", "full_precision"),
    "binaryduo_resnet18": Published("coupled", "dorefa", kernel_options={"bits": 1}),
    "bnas_a": Published("ste_sign", "xnor", kernel_options={"center": True}),
    "bnas_e": Published("ste_sign", "xnor", kernel_options={"center": True}),
    "binary_densenet28": _DENSE,
    "binary_densenet37": _DENSE,
    "binary_densenet45": _DENSE,
    "binary_densenet51": _DENSE,
    "binary_densenet69": _DENSE,
    "igp_densenet51": _DENSE,
    "igp_densenet69": _DENSE,
    "igp_resnet21": _BI_REAL,
    "igp_resnet37": _BI_REAL,
    "igp_resnet41": _BI_REAL,
    "igp_resnet69": _BI_REAL,
}

__all__ = ["MODELS", "PUBLISHED_QUANTIZERS", "LeNet", "Published", "ResNet", "resnet6", "resnet20"]

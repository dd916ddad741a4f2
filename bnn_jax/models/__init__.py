"""Networks by name.  Each returns (logits, intermediates) when applied to normalized NHWC images.

A network computes in the dtype of its images: bfloat16 images make bfloat16 activations and intermediates.  Parameters,
statistics, sums and the last layer, so the logits too, stay in float32.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from bnn_jax.models.alexnet import alexnet_dorefa, alexnet_xnor, bnn_plus_alexnet
from bnn_jax.models.binary_alexnet import binary_alexnet
from bnn_jax.models.binaryduo import binaryduo_resnet18, binaryduo_vgg7
from bnn_jax.models.birealnet import (
    bireal18,
    bireal34,
    bireal50,
    bireal_resnet20,
    ebireal18,
    ebireal34,
    ftbnn_resnet18,
)
from bnn_jax.models.bitnet import BitNetLM, sample
from bnn_jax.models.bn_free import reactnet18_bn_free
from bnn_jax.models.bnas import bnas_a, bnas_e
from bnn_jax.models.bnext import bnext_tiny
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
from bnn_jax.models.densenet_bc import densenet40_40
from bnn_jax.models.dgrl import dgrl_resnet18
from bnn_jax.models.fractal import igp_resnet21, igp_resnet37, igp_resnet41, igp_resnet69
from bnn_jax.models.irnet import irnet_resnet18, irnet_resnet20, irnet_resnet34
from bnn_jax.models.lenet import LeNet
from bnn_jax.models.meliusnet import meliusnet22
from bnn_jax.models.mobilenet import reactnet_a
from bnn_jax.models.pokebnn import pokebnn
from bnn_jax.models.quicknet import quicknet, quicknet_large, quicknet_small
from bnn_jax.models.reactnet import reactnet18, reactnet_resnet20
from bnn_jax.models.real_to_binary import real_to_binary_baseline_resnet18, real_to_binary_resnet18
from bnn_jax.models.resnet import ResNet, resnet6, resnet20
from bnn_jax.models.resnet_e import binary_resnet_e18
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
from bnn_jax.models.vit import ViT
from bnn_jax.models.wide_resnet import wide_resnet40_4
from bnn_jax.quantizers import QuantizerLike


class ModelEntry(NamedTuple):
    """A network, and the quantizers with which it was published.

    Attributes:
      constructor: makes the network, in its published size unless told otherwise.
      input_quantizer, kernel_quantizer: by their names in ACTIVATION_QUANTIZERS and WEIGHT_QUANTIZERS, or what
        :func:`bnn_jax.quantizers.make_quantizer` takes else; None leaves them to the constructor.
      input_quantizer_options, kernel_quantizer_options: of their functions.
      gradient_quantizer, gradient_quantizer_options: the same of GRADIENT_QUANTIZERS; None leaves gradients real.
      paper: where the docstring of the constructor has those of its whole family.
    """

    constructor: Callable[..., nn.Module]
    input_quantizer: QuantizerLike = "full_precision"
    kernel_quantizer: QuantizerLike = "full_precision"
    input_quantizer_options: Mapping[str, Any] = {}
    kernel_quantizer_options: Mapping[str, Any] = {}
    gradient_quantizer: QuantizerLike = None
    gradient_quantizer_options: Mapping[str, Any] = {}
    paper: str = ""


_SIGNS = ("ste_sign", "binary")
_XNOR = ("ste_sign", "xnor", {}, {"center": True})
_SIGNS_SCALED = ("ste_sign", "xnor")
_BNAS = ("ste_sign", "xnor", {}, {"center": True, "as_released": True})
_TBN = ("tbn", "magnitude_aware", {"threshold": 0.4}, {"estimator": "identity_sign"})
_BNN_PLUS = ("swish_sign", "bnn_plus", {}, {"initial": "percentile75"})
_BI_REAL = ("approx_sign", "magnitude_aware")
_IR_NET = ("ede_sign", "libra_pb")
_IR_NET_20 = (*_IR_NET, {"t_min": 1e-3}, {"t_min": 1e-3})
_REACT = ("rsign", "magnitude_aware")
_STE_125 = ("ste_sign", "binary", {"clip_value": 1.25}, {"clip_value": 1.25})
_BNEXT = ({"estimator": "ste_sign", "clip_value": 1.5}, {"estimator": "identity_sign"})
_DENSE = ("ste_sign", "binary", {"clip_value": 1.3}, {"clip_value": 1.3})

_COURBARIAUX = "Courbariaux et al., BinaryConnect, 2015, arXiv:1511.00363"
_HUBARA = "Hubara et al., Binarized Neural Networks, 2016, arXiv:1602.02830"
_RASTEGARI = "Rastegari et al., XNOR-Net, 2016, arXiv:1603.05279"
_BULAT = "Bulat and Tzimiropoulos, XNOR-Net++, 2019, arXiv:1909.13863"
_WAN = "Wan et al., TBN: Convolutional Neural Network with Ternary Inputs and Binary Weights, ECCV 2018"
_LIU = "Liu et al., Bi-Real Net, 2018, arXiv:1808.00278"
_ZHU = "Zhu et al., Improving Gradient Paths for Binary Convolutional Neural Networks, TU Delft"
_SU = "Su et al., FTBNN: Rethinking Non-linearity for 1-bit CNNs and Going Beyond, 2020, arXiv:2010.09294"
_QIN = "Qin et al., IR-Net, 2020, arXiv:1909.10788"
_DARABI = "Darabi et al., BNN+, 2018, arXiv:1812.11800"

MODELS: dict[str, ModelEntry] = {
    "lenet": ModelEntry(LeNet, "full_precision", "binary"),
    "bnn_convnet": ModelEntry(bnn_convnet, *_SIGNS, paper=_HUBARA),
    "binaryconnect_convnet": ModelEntry(binaryconnect_convnet, "full_precision", "binary_connect", paper=_COURBARIAUX),
    "mnist_mlp": ModelEntry(mnist_mlp, *_SIGNS),
    "vgg_small": ModelEntry(vgg_small, *_IR_NET, paper=_QIN),
    "bnn_plus_vgg": ModelEntry(bnn_plus_vgg, *_BNN_PLUS, paper=_DARABI),
    "alexnet_xnor": ModelEntry(alexnet_xnor, *_XNOR),
    "alexnet_dorefa": ModelEntry(alexnet_dorefa, "dorefa", "dorefa", {"bits": 2}, {"bits": 1}),
    "bnn_plus_alexnet": ModelEntry(bnn_plus_alexnet, *_BNN_PLUS),
    "resnet6": ModelEntry(resnet6, "ste_sign", "xnor"),
    "resnet20": ModelEntry(resnet20, "ste_sign", "xnor"),
    "resnet18": ModelEntry(resnet18, "full_precision", "full_precision"),
    "resnet34": ModelEntry(resnet34, "full_precision", "full_precision"),
    "bnn_resnet18": ModelEntry(xnor_resnet18, *_SIGNS, paper=_HUBARA),
    "xnor_resnet18": ModelEntry(xnor_resnet18, *_XNOR, paper=_RASTEGARI),
    "xnor_resnet34": ModelEntry(xnor_resnet34, *_XNOR, paper=_RASTEGARI),
    "xnor_pp_resnet18": ModelEntry(xnor_pp_resnet18, *_SIGNS, paper=_BULAT),
    "tbn_resnet18": ModelEntry(tbn_resnet18, *_TBN, paper=_WAN),
    "tbn_resnet34": ModelEntry(tbn_resnet34, *_TBN, paper=_WAN),
    "bireal18": ModelEntry(bireal18, *_BI_REAL, paper=_LIU),
    "bireal34": ModelEntry(bireal34, *_BI_REAL, paper=_LIU),
    "bireal_resnet20": ModelEntry(bireal_resnet20, *_BI_REAL, paper=_LIU),
    "ebireal18": ModelEntry(ebireal18, *_BI_REAL, paper=_ZHU),
    "ebireal34": ModelEntry(ebireal34, *_BI_REAL, paper=_ZHU),
    "ftbnn_resnet18": ModelEntry(ftbnn_resnet18, *_BI_REAL, paper=_SU),
    "irnet_resnet18": ModelEntry(irnet_resnet18, *_IR_NET),
    "irnet_resnet20": ModelEntry(irnet_resnet20, *_IR_NET_20),
    "irnet_resnet34": ModelEntry(irnet_resnet34, *_IR_NET),
    "rbnn_resnet20": ModelEntry(irnet_resnet20, "rbnn", "rbnn"),
    "rbnn_resnet18": ModelEntry(irnet_resnet18, "rbnn", "rbnn"),
    "reactnet18": ModelEntry(reactnet18, *_REACT),
    "reactnet_resnet20": ModelEntry(reactnet_resnet20, *_REACT),
    "reactnet18_bn_free": ModelEntry(reactnet18_bn_free, "rsign", "bn_free"),
    "reactnet_a": ModelEntry(reactnet_a, *_REACT),
    "real_to_binary_resnet18": ModelEntry(real_to_binary_resnet18, *_SIGNS),
    "real_to_binary_baseline_resnet18": ModelEntry(real_to_binary_baseline_resnet18, *_SIGNS),
    "cinet_resnet18": ModelEntry(cinet_resnet18, *_SIGNS),
    "dgrl_resnet18": ModelEntry(dgrl_resnet18, *_BI_REAL),
    "binaryduo_vgg7": ModelEntry(binaryduo_vgg7, "coupled", "full_precision"),
    "binaryduo_resnet18": ModelEntry(binaryduo_resnet18, "coupled", "dorefa", {}, {"bits": 1}),
    "bnas_a": ModelEntry(bnas_a, *_BNAS),
    "bnas_e": ModelEntry(bnas_e, *_BNAS),
    "binary_densenet28": ModelEntry(binary_densenet28, *_DENSE),
    "binary_densenet37": ModelEntry(binary_densenet37, *_DENSE),
    "binary_densenet45": ModelEntry(binary_densenet45, *_DENSE),
    "binary_densenet51": ModelEntry(binary_densenet51, *_DENSE),
    "binary_densenet69": ModelEntry(binary_densenet69, *_DENSE),
    "igp_densenet51": ModelEntry(igp_densenet51, *_DENSE),
    "igp_densenet69": ModelEntry(igp_densenet69, *_DENSE),
    "igp_resnet21": ModelEntry(igp_resnet21, *_BI_REAL),
    "igp_resnet37": ModelEntry(igp_resnet37, *_BI_REAL),
    "igp_resnet41": ModelEntry(igp_resnet41, *_BI_REAL),
    "igp_resnet69": ModelEntry(igp_resnet69, *_BI_REAL),
    "wide_resnet40_4": ModelEntry(wide_resnet40_4),
    "densenet40_40": ModelEntry(densenet40_40),
    "binary_alexnet": ModelEntry(binary_alexnet, *_SIGNS),
    "binary_resnet_e18": ModelEntry(binary_resnet_e18, *_STE_125),
    "quicknet_small": ModelEntry(quicknet_small, *_STE_125),
    "quicknet": ModelEntry(quicknet, *_STE_125),
    "quicknet_large": ModelEntry(quicknet_large, *_STE_125),
    "meliusnet22": ModelEntry(meliusnet22, *_DENSE),
    "bireal50": ModelEntry(bireal50, *_BI_REAL),
    "pokebnn": ModelEntry(pokebnn, "ste_sign", "binary", {"clip_value": 3.0}),
    "bnext_tiny": ModelEntry(bnext_tiny, "rsign", "binary", *_BNEXT),
    "vit_tiny": ModelEntry(ViT, *_SIGNS_SCALED),
    "bitnet_lm": ModelEntry(BitNetLM, "bitnet", "bitnet_b158"),
}
"""name -> a network of the literature; its size, options and quantizers can be set one by one."""

__all__ = ["MODELS", "LeNet", "ModelEntry", "ResNet", "resnet6", "resnet20", "sample"]

"""Networks by name.  Each returns (logits, intermediates) when applied to normalized NHWC images."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from bnn_jax.models.lenet import LeNet
from bnn_jax.models.resnet import ResNet, resnet6, resnet20

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "resnet6": resnet6,
    "resnet20": resnet20,
}


class Published(NamedTuple):
    """The quantizers with which a network was published, by their names in the tables, and their options."""

    input_quantizer: str
    kernel_quantizer: str
    input_options: Mapping[str, Any] = {}
    kernel_options: Mapping[str, Any] = {}


PUBLISHED_QUANTIZERS: dict[str, Published] = {
    "lenet": Published("full_precision", "binary"),
    "resnet6": Published("ste_sign", "xnor"),
    "resnet20": Published("ste_sign", "xnor"),
}

__all__ = ["MODELS", "PUBLISHED_QUANTIZERS", "LeNet", "Published", "ResNet", "resnet6", "resnet20"]

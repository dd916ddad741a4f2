"""Networks by name.  Each returns (logits, intermediates) when applied to normalized NHWC images."""

from collections.abc import Callable

import flax.linen as nn

from bnn_jax.models.lenet import LeNet
from bnn_jax.models.resnet import ResNet, resnet6, resnet20

MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "resnet6": resnet6,
    "resnet20": resnet20,
}

__all__ = ["MODELS", "LeNet", "ResNet", "resnet6", "resnet20"]

"""What each network of the catalogue was published for: the size of its images and its number of classes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from bnn_jax.models.build import settings_taken


class Extent(NamedTuple):
    """What a network was published for.

    Attributes:
      image_shape: (height, width, channels); (tokens, 1, 1) of a language model.
      num_classes: of the logits.
      options: of its constructor.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    options: Mapping[str, Any] = {}


_CIFAR = Extent((32, 32, 3), 10)
_SMALL = ("lenet", "bnn_convnet", "binaryconnect_convnet", "vgg_small", "bnn_plus_vgg", "bnn_plus_alexnet", "resnet20")
_SMALL += ("bireal_resnet20", "irnet_resnet20", "rbnn_resnet20", "reactnet_resnet20", "binaryduo_vgg7", "bnas_a")
_SMALL += ("wide_resnet40_4", "densenet40_40")
EXTENTS: dict[str, Extent] = {
    **dict.fromkeys(_SMALL, _CIFAR),
    "mnist_mlp": Extent((28, 28, 1), 10),
    "resnet6": Extent((8, 8, 1), 10),
    "vit_tiny": _CIFAR,
    "bitnet_lm": Extent((64, 1, 1), 256),
}
"""name -> what it is for; all others are for ImageNet's photographs of 224x224."""


def extent_of(name: str) -> Extent:
    """What a network of MODELS was published for.

    >>> extent_of("resnet20").image_shape, extent_of("bireal18")
    ((32, 32, 3), Extent(image_shape=(224, 224, 3), num_classes=1000, options={'stem': 'imagenet'}))
    """
    large = {"stem": "imagenet"} if "stem" in (settings_taken(name) or ()) else {}
    return EXTENTS.get(name, Extent((224, 224, 3), 1000, large))

"""The full-precision first layers of a network, for small and for large images."""

import flax.linen as nn
from jaxtyping import Array, Float

from bnn_jax.layers import BatchNorm, BinaryConv, max_pool

STEMS = ("cifar", "imagenet")


class Stem(nn.Module):
    r"""conv -> BN [-> ReLU], in full precision; for ImageNet also a max pool.

    cifar: conv 3x3, stride 1.  imagenet: conv 7x7, stride 2, padding 3, and at the end max pool 3x3, stride 2, padding
    1, so a 224x224 image leaves with 56x56.

    Attributes:
      features: filters of the convolution.
      kind: "cifar" or "imagenet".
      relu: apply ReLU after the batch norm.

    Raises:
      ValueError: for another `kind`.

    Reference: He et al., Deep Residual Learning, 2016, arXiv:1512.03385.
    """

    features: int
    kind: str = "cifar"
    relu: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.kind not in STEMS:
            raise ValueError(f"`stem` (={self.kind!r}) must be cifar (small images) or imagenet (224x224)")

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch h w features"]:
        large = self.kind == "imagenet"
        geometry = {"kernel_size": (7, 7), "strides": (2, 2), "padding": 3} if large else {"padding": 1}
        x = BatchNorm(name="norm")(BinaryConv(self.features, name="conv", **geometry)(images), train=train)
        x = nn.relu(x) if self.relu else x
        return max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1))) if large else x

r"""ReActNet-A: a binary network in the shape of MobileNetV1."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.layers import BatchNorm, BinaryConv, RPReLU, avg_pool_2x2
from bnn_jax.models.residual import Block, ResidualNetwork


class ReActBlock(Block):
    """A 3x3 convolution C -> C and a 1x1 convolution C -> C or 2C, each RPReLU( BN(conv(RSign(x))) + shortcut(x) ).

    Shortcuts hold no parameters: an average pool where the 3x3 convolution has a stride, and x twice where the 1x1
    convolution doubles the channels.  The paper writes the latter as two convolutions C -> C of the same signs, joined;
    that is one convolution C -> 2C.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float):
        phase = {"train": train, "progress": progress}
        y = self.conv(x.shape[-1], strides=(self.stride, self.stride), name="conv3x3")(x, **phase)
        y = BatchNorm(name="norm3x3")(y, train=train)
        x = RPReLU(name="activation3x3")(y + (avg_pool_2x2(x) if self.stride > 1 else x))

        y = self.conv(self.features, kernel_size=(1, 1), padding=0, name="conv1x1")(x, **phase)
        y = BatchNorm(name="norm1x1")(y, train=train)
        x = jnp.concatenate([x, x], axis=-1) if self.features > x.shape[-1] else x
        return RPReLU(name="activation1x1")(y + x)


class ReActNetA(ResidualNetwork):
    r"""MobileNetV1 with full instead of depthwise 3x3 convolutions, every one binary but the first and last layer.

    stem conv 3x3 -> BN -> stages of blocks, widths 2w, 4w, ..., each stage but the first with stride 2 at its start
    -> global mean -> dense.  A stage's first block doubles the channels.  Without `input_quantizer` nothing takes
    RSign's place: the RPReLU before each convolution is the nonlinearity.

    Attributes:
      stage_sizes: blocks in each stage, a 3x3 and a 1x1 convolution a block.
      width: filters of the stem.
      input_quantizer, kernel_quantizer: of the blocks' convolutions; the method's are rsign and magnitude_aware.
      stem: "imagenet" has stride 2, "cifar" stride 1; there is no pool.
      others: see :class:`bnn_jax.models.residual.ResidualNetwork`.

    Reference: Liu et al., ReActNet, 2020, arXiv:2003.03488.
    """

    stage_sizes: tuple[int, ...] = (1, 2, 2, 6, 2)
    width: int = 32
    stem: str = "cifar"

    @nn.nowrap
    def begin(self, images, train):
        strides = (2, 2) if self.stem == "imagenet" else (1, 1)
        x = BinaryConv(self.width, kernel_size=(3, 3), strides=strides, padding=1, name="stem")(images)
        return BatchNorm(name="stem_norm")(x, train=train)

    @nn.nowrap
    def block(self, *, features, **place):
        return ReActBlock(features=2 * features, **place)


reactnet_a = partial(ReActNetA, stage_sizes=(1, 2, 2, 6, 2), width=32, stem="imagenet")
"""ReActNet-A: 13 blocks, 32 filters in the stem to 1024."""

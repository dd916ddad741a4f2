r"""Residual networks for small images, binary, ternary or full precision by their quantizers."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
from jaxtyping import Array

from bnn_jax.layers import BatchNorm, BinaryConv
from bnn_jax.models.network import STEMS, stem_pool
from bnn_jax.models.residual import Block, ResidualNetwork, subsample_and_pad


class XnorBlock(Block):
    """BN -> sign -> binary conv, twice, around one shortcut; ReLU takes the place of sign where inputs stay real."""

    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x, *, train: bool, progress: Array | float):
        y = self.activation(BatchNorm(name="norm1")(x, train=train))
        conv = self.conv(self.features, strides=(self.stride, self.stride), name="conv1")
        y = conv(y, train=train, progress=progress)
        y = self.activation(BatchNorm(name="norm2")(y, train=train))
        y = self.conv(self.features, name="conv2")(y, train=train, progress=progress)
        return subsample_and_pad(x, self.features, self.stride) + y


class ResNet(ResidualNetwork):
    r"""Pre-activation residual network of 6n+2 layers for small images.

    stem conv 3x3 -> stages of XNOR blocks, widths w, 2w, 4w, ..., stride 2 between them -> BN -> ReLU -> global mean
    -> dense.  The stem and the dense layer are in full precision.

    Attributes:
      stage_sizes: blocks in each stage, two convolutions a block.
      stem: the first convolution, see :data:`bnn_jax.models.network.STEMS`, without batch norm.
      input_quantizer, kernel_quantizer: of the convolutions in the blocks.
      input_scaling: XNOR-Net's map K, see :class:`bnn_jax.layers.BinaryConv`.
      others: see :class:`bnn_jax.models.residual.ResidualNetwork`.

    Reference: He et al., Deep Residual Learning, 2016, arXiv:1512.03385; block of Rastegari et al., XNOR-Net, 2016.
    """

    stage_sizes: tuple[int, ...] = (3, 3, 3)
    width: int = 16
    stem: str = "cifar"
    input_scaling: bool = False

    @property
    def quantized_conv(self):
        return partial(BinaryConv, padding=1, input_scaling=self.input_scaling, **self.quantizers)

    @nn.nowrap
    def begin(self, images, train):
        return stem_pool(BinaryConv(self.width, name="stem", **STEMS[self.stem])(images), self.stem)

    @nn.nowrap
    def block(self, **place):
        return XnorBlock(activation=self.unless_quantized(nn.relu), **place)

    @nn.nowrap
    def end(self, x, train):
        return nn.relu(BatchNorm(name="norm")(x, train=train)).mean((1, 2))


resnet20 = partial(ResNet, stage_sizes=(3, 3, 3))
"""ResNet-20 for 32x32 images: XNOR-Net with the quantizers sign and xnor, ternary with ttq, else full precision."""

resnet6 = partial(ResNet, stage_sizes=(1, 1))
"""The small sibling of ResNet-20 for 8x8 images: four convolutions in two stages."""

r"""Wide residual networks for small images: the networks on which Deep Frank-Wolfe was published."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
from jaxtyping import Array

from bnn_jax.layers import BatchNorm, BinaryConv
from bnn_jax.layers.by_layer import quantizers_of
from bnn_jax.models.network import STEMS, stem_pool
from bnn_jax.models.residual import Block, ResidualNetwork


class WideBlock(Block):
    """BN -> ReLU -> conv 3x3, twice, around a shortcut; where the shape changes a conv 1x1 of what the first conv sees.

    A quantizer takes ReLU's place where inputs are quantized.
    """

    activation: Callable[[Array], Array]
    shortcut_activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x, *, train: bool, progress: Array | float):
        phase, strides = {"train": train, "progress": progress}, (self.stride, self.stride)
        seen = self.activation(BatchNorm(name="norm1")(x, train=train))
        y = self.conv(self.features, strides=strides, name="conv1")(seen, **phase)
        y = self.activation(BatchNorm(name="norm2")(y, train=train))
        y = self.conv(self.features, name="conv2")(y, **phase)
        if x.shape != y.shape:
            chosen = quantizers_of(self, "downsample").get("input_quantizer")
            seen = self.shortcut_activation(seen) if chosen is None else seen  # a quantizer stands in its place
            x = BinaryConv(self.features, kernel_size=1, strides=strides, padding=0, name="downsample")(seen)
        return x + y


class WideResNet(ResidualNetwork):
    r"""Wide ResNet: a pre-activation residual network of 6n + 4 layers, wide and not very deep.

    stem conv 3x3, 16 filters -> stages of blocks, widths w, 2w, 4w, ..., stride 2 between them -> BN -> ReLU -> global
    mean -> dense.  The stem, the 1x1 convolutions on the shortcuts and the dense layer are in full precision.

    Attributes:
      stage_sizes: blocks in each stage, two convolutions a block.
      width: filters of the first stage, 16 times the widening factor.
      stem_width: filters of the stem, which has no batch norm.
      input_quantizer, kernel_quantizer: of the 3x3 convolutions in the blocks; published without.
      others: see :class:`bnn_jax.models.residual.ResidualNetwork`.

    Reference: Zagoruyko and Komodakis, Wide Residual Networks, 2016, arXiv:1605.07146; Berrada, Zisserman, Kumar, Deep
    Frank-Wolfe for Neural Network Optimization, ICLR 2019, arXiv:1811.07591, and its program.
    """

    stage_sizes: tuple[int, ...] = (6, 6, 6)
    stem: str = "cifar"
    stem_width: int = 16

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("stem_width")

    @nn.nowrap
    def begin(self, images, train):
        return stem_pool(BinaryConv(self.stem_width, name="stem", **STEMS[self.stem])(images), self.stem)

    @nn.nowrap
    def block(self, **place):
        activations = {"activation": self.unless_quantized(nn.relu)}
        return WideBlock(**activations, shortcut_activation=self.beside_quantized(nn.relu), **place)

    @nn.nowrap
    def end(self, x, train):
        return nn.relu(BatchNorm(name="norm")(x, train=train)).mean((1, 2))


wide_resnet40_4 = partial(WideResNet, stage_sizes=(6, 6, 6), width=64)
"""Wide ResNet-40-4: 40 layers, four times the filters of a ResNet for 32x32 images."""

r"""ReActNet on residual networks."""

from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from bnn_jax.layers import BatchNorm, RPReLU
from bnn_jax.models.residual import Block, ResidualNetwork, pool_and_project


class ReActBlock(Block):
    """One or two units RPReLU( BN(conv(RSign(x))) + S(x) ); S of a stride: average pool -> 1x1 conv -> BN."""

    units: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float):
        for unit in range(1, self.units + 1):
            stride = self.stride if unit == 1 else 1
            conv = self.conv(self.features, strides=(stride, stride), name=f"conv{unit}")
            y = BatchNorm(name=f"norm{unit}")(conv(x, train=train, progress=progress), train=train)
            x = pool_and_project(x, self.features, stride, train=train)
            x = RPReLU(name=f"activation{unit}")(y + x)
        return x


class ReActNet(ResidualNetwork):
    r"""Bi-Real network with learned thresholds (RSign) and learned, shifted activations (RPReLU).

    stem -> stages of units of one binary 3x3 convolution, widths w, 2w, 4w, ..., stride 2 between them -> global mean
    -> dense.  The stem, without ReLU, the 1x1 convolutions on the shortcuts and the dense layer are in full precision.
    Unit: RPReLU( BN(conv(RSign(x))) + shortcut(x) ).  Without `input_quantizer` nothing takes RSign's place: the RPReLU
    before each convolution is the nonlinearity.

    Attributes:
      stage_sizes: units in each stage, one convolution a unit.
      input_quantizer, kernel_quantizer: of the 3x3 convolutions; the method's are rsign and magnitude_aware.
      others: see :class:`bnn_jax.models.residual.ResidualNetwork`.

    Reference: Liu et al., ReActNet, 2020, arXiv:2003.03488.
    """

    stage_sizes: tuple[int, ...] = (4, 4, 4, 4)
    stem: str = "cifar"

    counts_units = True

    @nn.nowrap
    def block(self, **place):
        return ReActBlock(**place)


reactnet18 = partial(ReActNet, stage_sizes=(4, 4, 4, 4), width=64, stem="imagenet")
"""ReActNet-18: the stages of Bi-Real-Net 18, 64 to 512 filters."""

reactnet_resnet20 = partial(ReActNet, stage_sizes=(6, 6, 6), width=16)
"""ReActNet on ResNet-20 for 32x32 images, 16, 32 and 64 filters."""

r"""Real-to-Binary networks: residual, their binary convolutions scaled by a gate that sees the real input."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.layers import BatchNorm, ChannelGate, OutputScale, PReLU
from bnn_jax.models.network import stem_layers
from bnn_jax.models.residual import Block, ResidualNetwork, pool_and_project


class RealToBinaryBlock(Block):
    """Twice PReLU( scale * conv(sign(z)) ) + S(x), z = BN(x); tanh takes the place of sign where inputs stay real.

    The scale is a gate G(z), or learned factors of case 4.  S of a stride: average pool -> 1x1 conv -> BN.
    """

    activation: Callable[[Array], Array]
    gate: bool
    reduction: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float):
        for half, stride in ((1, self.stride), (2, 1)):
            z = BatchNorm(name=f"norm{half}")(x, train=train)
            conv = self.conv(self.features, strides=(stride, stride), name=f"conv{half}")
            y = conv(self.activation(z), train=train, progress=progress)
            if self.gate:
                y = y * ChannelGate(self.features, reduction=self.reduction, name=f"gate{half}")(z)
            else:
                y = OutputScale(case=4, name=f"conv{half}_scale")(y)
            y = PReLU(name=f"activation{half}")(y)
            x = y + pool_and_project(x, self.features, stride, train=train)
        return x


class RealToBinaryNet(ResidualNetwork):
    r"""Residual network of half blocks, gated (Real-to-Binary) or with learned scales (the paper's strong baseline).

    stem -> stages of blocks of two half blocks, widths w, 2w, 4w, ..., stride 2 between them -> global mean -> dense.
    Half block: PReLU( scale * conv(sign(BN(x))) ) + shortcut(x).  The stem, the 1x1 convolutions on the shortcuts, the
    gates and the dense layer are in full precision.  Without `input_quantizer`, tanh takes sign's place, as in the
    first student of the paper's recipe.

    Attributes:
      stage_sizes: blocks in each stage, two half blocks of one convolution each a block.
      input_quantizer, kernel_quantizer: of the 3x3 convolutions; the method's are ste_sign and binary.
      stem_prelu: PReLU instead of ReLU in the stem; the paper's baseline has it, and so has larq's gated network.
      gate: scale by :class:`bnn_jax.layers.ChannelGate`; otherwise by :class:`bnn_jax.layers.OutputScale` of case 4,
        which ties the network to the image size that it was initialized with.
      reduction: of the gates.
      others: see :class:`bnn_jax.models.residual.ResidualNetwork`.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with the output of each stage, that of each
      block, for attention matching, and the `features` that the last layer sees.

    Raises:
      ValueError: for another `stem`, or a `reduction` that leaves a gate with no channels.

    Reference: Martinez et al., Training Binary Neural Networks with Real-to-Binary Convolutions, 2020,
    arXiv:2003.11535.
    """

    stem: str = "cifar"
    stem_prelu: bool = False
    gate: bool = True
    reduction: int = 8

    @nn.nowrap
    def begin(self, images, train):
        activation = PReLU(name="stem_activation") if self.stem_prelu else nn.relu
        return stem_layers(images, self.width, self.stem, train=train, activation=activation)

    @nn.nowrap
    def block(self, **place):
        activation = self.unless_quantized(jnp.tanh)
        return RealToBinaryBlock(activation=activation, gate=self.gate, reduction=self.reduction, **place)

    @nn.nowrap
    def report(self, name, outputs, intermediates):
        intermediates[name] = outputs
        return outputs


real_to_binary_resnet18 = partial(RealToBinaryNet, stage_sizes=(2, 2, 2, 2), width=64, gate=True, stem="imagenet")
"""Real-to-Binary ResNet-18, its convolutions scaled by gates."""

real_to_binary_baseline_resnet18 = partial(
    RealToBinaryNet, stage_sizes=(2, 2, 2, 2), width=64, gate=False, stem_prelu=True, stem="imagenet"
)
"""The strong baseline of Real-to-Binary: the same ResNet-18 with the learned scales of XNOR-Net++."""

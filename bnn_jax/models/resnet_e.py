r"""ResNetE: a binary ResNet with a shortcut around every convolution, made as simple as it can be."""

from functools import partial

import flax.linen as nn

from bnn_jax.layers import BatchNorm
from bnn_jax.models.birealnet import BiRealBlock, with_same_padding
from bnn_jax.models.network import stem_layers
from bnn_jax.models.residual import ResidualNetwork


class ResNetE(ResidualNetwork):
    r"""ResNetE: Bi-Real Net's units between a stem with ReLU and a ReLU in front of the global mean.

    stem conv -> BN -> ReLU [-> max pool] -> BN -> stages of units, widths w, 2w, 4w, ..., stride 2 between them
    -> ReLU -> global mean -> dense
    unit:  u(x) = BN(conv 3x3(q(x))) + S(x),  S(x) = x, or where the shape changes  average pool 2 -> conv 1x1 -> BN

    The stem, the 1x1 convolutions and the dense layer are in full precision; a ReLU takes the quantizer's place where
    inputs stay real.

    Attributes:
      stage_sizes: units in each stage, one convolution a unit.
      input_quantizer, kernel_quantizer: of the convolutions in the units.
      same_padding: pad as TensorFlow's "same", as Larq Zoo's weights need it.
      others: see :class:`bnn_jax.models.residual.ResidualNetwork`.

    Reference: Bethge et al., Back to Simplicity: How to Train Accurate BNNs from Scratch?, 2019, arXiv:1906.08637; with
    the batch norm behind the stem's pool of Larq Zoo.
    """

    stage_sizes: tuple[int, ...] = (4, 4, 4, 4)
    same_padding: bool = False

    counts_units = True

    @property
    def quantized_conv(self):
        return with_same_padding(super().quantized_conv, self.same_padding)

    @nn.nowrap
    def begin(self, images, train):
        options = {"activation": nn.relu, "same_padding": self.same_padding}
        x = stem_layers(images, self.width, self.stem, train=train, **options)
        return BatchNorm(name="pool_norm")(x, train=train)

    @nn.nowrap
    def block(self, **place):
        activation = self.unless_quantized(nn.relu)
        return BiRealBlock(activation=activation, outer_shortcut=False, trainable_slopes=False, **place)

    @nn.nowrap
    def end(self, x, train):
        return nn.relu(x).mean((1, 2))


binary_resnet_e18 = partial(ResNetE, stage_sizes=(4, 4, 4, 4))
"""BinaryResNetE18."""

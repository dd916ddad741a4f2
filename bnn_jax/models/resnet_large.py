r"""ResNet-18 and -34 with two convolutions a shortcut: full precision, XNOR-Net, XNOR-Net++ and TBN."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
from jaxtyping import Array

from bnn_jax.layers import BatchNorm, BinaryConv, OutputScale, avg_pool_2x2
from bnn_jax.layers.by_layer import quantizers_of
from bnn_jax.models.network import identity, stem_layers
from bnn_jax.models.residual import Block, ResidualNetwork


class PostActivationBlock(Block):
    """conv -> BN -> ReLU -> conv -> BN, plus the shortcut -> ReLU; `activation` is what stands in ReLU's place.

    The input of the block, which a quantized convolution takes, and its shortcut come without the ReLU in front of
    them where layers apply it themselves: `shortcut_activation` makes up for it.
    """

    activation: Callable[[Array], Array]
    shortcut_activation: Callable[[Array], Array]
    binary_downsampling: bool

    @nn.compact
    def __call__(self, x, *, train: bool, progress: Array | float):
        phase = {"train": train, "progress": progress}
        strides = (self.stride, self.stride)
        y = self.conv(self.features, strides=strides, name="conv1")(x, **phase)
        y = self.activation(BatchNorm(name="norm1")(y, train=train))
        y = self.conv(self.features, name="conv2")(y, **phase)
        y = BatchNorm(name="norm2")(y, train=train)
        same_shape, chosen = x.shape == y.shape, quantizers_of(self, "downsample").get("input_quantizer")
        if same_shape or (chosen is None and not self.binary_downsampling):
            x = self.shortcut_activation(x)  # a quantizer stands in its place
        if not same_shape:
            conv = self.conv if self.binary_downsampling else BinaryConv
            conv = conv(self.features, kernel_size=(1, 1), strides=strides, padding=0, name="downsample")
            x = BatchNorm(name="downsample_norm")(conv(x, **phase), train=train)
        return self.activation(x + y)


class PostActivationResNet(ResidualNetwork):
    r"""The residual network of He et al.: batch norm and ReLU after the convolutions.

    stem -> stages of blocks, widths w, 2w, 4w, ..., stride 2 between them -> global mean -> dense
    block:  conv 3x3 -> BN -> ReLU -> conv 3x3 -> BN, plus the shortcut -> ReLU
    shortcut where the shape changes:  conv 1x1, stride 2 -> BN

    With an `input_quantizer` every ReLU but one in front of the global mean is left out, the stem's too: the quantizers
    stand in their place, and the sign of a ReLU's output would be +1 everywhere.

    Attributes:
      stage_sizes: blocks in each stage, two convolutions a block.
      input_quantizer, kernel_quantizer: of the convolutions in the blocks.
      binary_downsampling: quantize the 1x1 convolutions of the shortcuts as well.
      others: see :class:`bnn_jax.models.residual.ResidualNetwork`.

    Returns:
      (logits, intermediates), as :class:`bnn_jax.models.residual.ResidualNetwork`, and the output of each block, for
      attention matching.

    Reference: He et al., Deep Residual Learning, 2016, arXiv:1512.03385.
    """

    binary_downsampling: bool = False

    @nn.nowrap
    def begin(self, images, train):
        return stem_layers(images, self.width, self.stem, train=train, activation=self.unless_quantized(nn.relu))

    @nn.nowrap
    def block(self, **place):
        activations = {"activation": self.unless_quantized(nn.relu)}
        activations |= {"shortcut_activation": self.beside_quantized(nn.relu)}
        return PostActivationBlock(**activations, binary_downsampling=self.binary_downsampling, **place)

    @nn.nowrap
    def report(self, name, outputs, intermediates):
        intermediates[name] = outputs
        return outputs

    @nn.nowrap
    def end(self, x, train):
        return nn.relu(x).mean((1, 2))  # changes nothing in full precision, where the last block ends with it


class PreActivationBlock(Block):
    """BN -> quantizer -> conv [-> learned scale], twice, plus the shortcut; ReLU where inputs stay real."""

    activation: Callable[[Array], Array]
    binary_downsampling: bool
    output_scale_case: int | None

    @nn.compact
    def __call__(self, x, *, train: bool, progress: Array | float):
        def conv(name, inputs, **geometry):
            y = self.conv(self.features, name=name, **geometry)(inputs, train=train, progress=progress)
            return y if self.output_scale_case is None else OutputScale(self.output_scale_case, name=f"{name}_scale")(y)

        strides = (self.stride, self.stride)
        normalized = self.activation(BatchNorm(name="norm1")(x, train=train))
        y = conv("conv1", normalized, strides=strides)
        y = conv("conv2", self.activation(BatchNorm(name="norm2")(y, train=train)))
        if x.shape == y.shape:
            return x + y
        if self.binary_downsampling:
            return conv("downsample", normalized, kernel_size=(1, 1), strides=strides, padding=0) + y
        x = avg_pool_2x2(x) if self.stride == 2 else x
        x = nn.relu(BatchNorm(name="downsample_norm")(x, train=train))
        return BinaryConv(self.features, kernel_size=(1, 1), padding=0, name="downsample")(x) + y


class PreActivationResNet(ResidualNetwork):
    r"""Residual network with batch norm and quantizer before each convolution: XNOR-Net, XNOR-Net++ and TBN.

    stem -> stages of blocks, widths w, 2w, 4w, ..., stride 2 between them -> BN -> ReLU -> global mean -> dense
    block:  BN -> quantizer -> conv 3x3 [-> learned scale], twice, plus the shortcut; ReLU where inputs stay real
    shortcut where the shape changes:
      binary  conv 1x1, stride 2 [-> learned scale], of the normalized and quantized inputs of the block's first conv
      real    average pool 2 -> BN -> ReLU -> conv 1x1, that of TBN

    TBN's program also gives the convolutions biases, and its stem no batch norm.  Here they have none: each path from
    a convolution comes to a batch norm, which takes a bias away.  The wiring of the binary shortcut could not be
    confirmed; this is a reading.

    Attributes:
      stage_sizes: blocks in each stage, two convolutions a block.
      input_quantizer, kernel_quantizer: of the convolutions in the blocks.
      stem_relu: apply ReLU in the stem; TBN does not.
      input_scaling: XNOR-Net's map K, see :class:`bnn_jax.layers.BinaryConv`.
      output_scale_case: learned scales after the quantized convolutions, 1 to 4 as in
        :class:`bnn_jax.layers.OutputScale` (XNOR-Net++); None for none.
      binary_downsampling: use the binary shortcut.
      others: see :class:`bnn_jax.models.residual.ResidualNetwork`.

    Returns:
      (logits, intermediates), as :class:`bnn_jax.models.residual.ResidualNetwork`.

    Raises:
      ValueError: if `num_classes` or `width` is below 1, a stage is empty, or for another `stem` or
        `output_scale_case`; `input_scaling` needs an `input_quantizer`.

    Reference: Rastegari et al., XNOR-Net, 2016, arXiv:1603.05279; Bulat and Tzimiropoulos, XNOR-Net++, 2019,
    arXiv:1909.13863; Wan et al., TBN: Convolutional Neural Network with Ternary Inputs and Binary Weights, ECCV 2018.
    """

    stem_relu: bool = True
    input_scaling: bool = False
    output_scale_case: int | None = None
    binary_downsampling: bool = True

    def __post_init__(self):
        super().__post_init__()
        holds = self.output_scale_case in (None, 1, 2, 3, 4)
        advice = "or None for no learned scales; 4 was the best in the paper"
        self.require("output_scale_case", holds, "must be 1, 2, 3 or 4", advice)

    @property
    def quantized_conv(self):
        return partial(BinaryConv, padding=1, input_scaling=self.input_scaling, **self.quantizers)

    @nn.nowrap
    def begin(self, images, train):
        activation = nn.relu if self.stem_relu else identity
        return stem_layers(images, self.width, self.stem, train=train, activation=activation)

    @nn.nowrap
    def block(self, **place):
        return PreActivationBlock(
            activation=self.unless_quantized(nn.relu),
            binary_downsampling=self.binary_downsampling,
            output_scale_case=self.output_scale_case,
            **place,
        )

    @nn.nowrap
    def end(self, x, train):
        return nn.relu(BatchNorm(name="norm")(x, train=train)).mean((1, 2))


resnet18 = partial(PostActivationResNet, stage_sizes=(2, 2, 2, 2))
"""ResNet-18 of He et al., full precision or quantized, batch norm after the convolutions."""

resnet34 = partial(PostActivationResNet, stage_sizes=(3, 4, 6, 3))
"""ResNet-34 of He et al., full precision or quantized, batch norm after the convolutions."""

xnor_resnet18 = partial(PreActivationResNet, stage_sizes=(2, 2, 2, 2))
"""ResNet-18 of BNN and XNOR-Net; binary shortcuts."""

xnor_pp_resnet18 = partial(PreActivationResNet, stage_sizes=(2, 2, 2, 2), output_scale_case=4)
"""ResNet-18 of XNOR-Net++, its scales of case 4; binary shortcuts."""

xnor_resnet34 = partial(PreActivationResNet, stage_sizes=(3, 4, 6, 3))
"""ResNet-34 of BNN and XNOR-Net; binary shortcuts."""

tbn_resnet18 = partial(PreActivationResNet, stage_sizes=(2, 2, 2, 2), stem_relu=False, binary_downsampling=False)
"""TBN's ResNet-18: ternary inputs, binary weights, real shortcuts (their program; binary ones by the option)."""

tbn_resnet34 = partial(PreActivationResNet, stage_sizes=(3, 4, 6, 3), stem_relu=False, binary_downsampling=False)
"""TBN's ResNet-34: ternary inputs, binary weights, real shortcuts (their program; binary ones by the option)."""

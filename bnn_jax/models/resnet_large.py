r"""ResNet-18 and -34 with two convolutions a shortcut: full precision, XNOR-Net, XNOR-Net++ and TBN."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense, OutputScale, halve, widened
from bnn_jax.models.resnet import check_sizes
from bnn_jax.models.stem import Stem
from bnn_jax.quantizers import Quantizer


def _identity(x):
    return x


class PostActivationBlock(nn.Module):
    """conv -> BN -> ReLU -> conv -> BN, plus the shortcut -> ReLU; `activation` is what stands in ReLU's place."""

    features: int
    stride: int
    conv: Callable[..., nn.Module]
    activation: Callable[[Array], Array]
    binary_downsampling: bool

    @nn.compact
    def __call__(self, x, *, train: bool, progress: Array | float):
        phase = {"train": train, "progress": progress}
        strides = (self.stride, self.stride)
        y = self.conv(self.features, strides=strides, name="conv1")(x, **phase)
        y = self.activation(BatchNorm(name="norm1")(y, train=train))
        y = self.conv(self.features, name="conv2")(y, **phase)
        y = BatchNorm(name="norm2")(y, train=train)
        if x.shape != y.shape:
            conv = self.conv if self.binary_downsampling else BinaryConv
            conv = conv(self.features, kernel_size=(1, 1), strides=strides, padding=0, name="downsample")
            x = BatchNorm(name="norm_downsample")(conv(x, **phase), train=train)
        return self.activation(x + y)


class PostActivationResNet(nn.Module):
    r"""The residual network of He et al.: batch norm and ReLU after the convolutions.

    stem -> stages of blocks, widths w, 2w, 4w, ..., stride 2 between them -> global mean -> dense
    block:  conv 3x3 -> BN -> ReLU -> conv 3x3 -> BN, plus the shortcut -> ReLU
    shortcut where the shape changes:  conv 1x1, stride 2 -> BN

    With an `input_quantizer` every ReLU but one in front of the global mean is left out, the stem's too: the quantizers
    stand in their place, and the sign of a ReLU's output would be +1 everywhere.

    Attributes:
      num_classes: of the logits.
      stage_sizes: blocks in each stage, two convolutions a block.
      width: filters of the first stage.
      stem: "imagenet" (7x7, stride 2, and max pool) or "cifar" (3x3, stride 1).
      input_quantizer, kernel_quantizer: of the convolutions in the blocks.
      binary_downsampling: quantize the 1x1 convolutions of the shortcuts as well.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with each stage's output and the `features` that
      the last layer sees.

    Raises:
      ValueError: if `num_classes` or `width` is below 1, a stage is empty, or for another `stem`.

    Reference: He et al., Deep Residual Learning, 2016, arXiv:1512.03385.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    stem: str = "imagenet"
    input_quantizer: Quantizer | None = None
    kernel_quantizer: Quantizer | None = None
    binary_downsampling: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self)

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        real_inputs = self.input_quantizer is None
        conv = partial(
            BinaryConv, padding=1, input_quantizer=self.input_quantizer, kernel_quantizer=self.kernel_quantizer
        )
        intermediates = {}
        x = Stem(self.width, kind=self.stem, relu=real_inputs, name="stem")(images, train=train)
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                x = PostActivationBlock(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    conv=conv,
                    activation=nn.relu if real_inputs else _identity,
                    binary_downsampling=self.binary_downsampling,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x, train=train, progress=progress)
            intermediates[f"stage{stage + 1}"] = x
        # Changes nothing in full precision, where the last block ends with it.
        intermediates["features"] = x = nn.relu(x).mean((1, 2))
        return BinaryDense(self.num_classes, use_bias=True, name="head")(widened(x)), intermediates


class PreActivationBlock(nn.Module):
    """BN -> quantizer -> conv [-> learned scale], twice, plus the shortcut; ReLU where inputs stay real."""

    features: int
    stride: int
    conv: Callable[..., nn.Module]
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
        x = halve(x) if self.stride == 2 else x
        x = nn.relu(BatchNorm(name="norm_downsample")(x, train=train))
        return BinaryConv(self.features, kernel_size=(1, 1), padding=0, name="downsample")(x) + y


class PreActivationResNet(nn.Module):
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
      num_classes: of the logits.
      stage_sizes: blocks in each stage, two convolutions a block.
      width: filters of the first stage.
      stem: "imagenet" (7x7, stride 2, and max pool) or "cifar" (3x3, stride 1).
      stem_relu: apply ReLU in the stem; TBN does not.
      input_quantizer, kernel_quantizer: of the convolutions in the blocks.
      input_scaling: XNOR-Net's map K, see :class:`bnn_jax.layers.BinaryConv`.
      output_scale_case: learned scales after the quantized convolutions, 1 to 4 as in
        :class:`bnn_jax.layers.OutputScale` (XNOR-Net++); None for none.
      binary_downsampling: use the binary shortcut.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with each stage's output and the `features` that
      the last layer sees.

    Raises:
      ValueError: if `num_classes` or `width` is below 1, a stage is empty, or for another `stem` or
        `output_scale_case`; `input_scaling` needs an `input_quantizer`.

    Reference: Rastegari et al., XNOR-Net, 2016, arXiv:1603.05279; Bulat and Tzimiropoulos, XNOR-Net++, 2019,
    arXiv:1909.13863; Wan et al., TBN: Convolutional Neural Network with Ternary Inputs and Binary Weights, ECCV 2018.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    stem: str = "imagenet"
    stem_relu: bool = True
    input_quantizer: Quantizer | None = None
    kernel_quantizer: Quantizer | None = None
    input_scaling: bool = False
    output_scale_case: int | None = None
    binary_downsampling: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self)
        if self.output_scale_case not in (None, 1, 2, 3, 4):
            raise ValueError(
                f"`output_scale_case` (={self.output_scale_case!r}) of {type(self).__name__} must be 1, 2, 3 or 4, "
                "or None for no learned scales; 4 was the best in the paper"
            )

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        conv = partial(
            BinaryConv,
            padding=1,
            input_quantizer=self.input_quantizer,
            kernel_quantizer=self.kernel_quantizer,
            input_scaling=self.input_scaling,
        )
        intermediates = {}
        x = Stem(self.width, kind=self.stem, relu=self.stem_relu, name="stem")(images, train=train)
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                x = PreActivationBlock(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    conv=conv,
                    activation=nn.relu if self.input_quantizer is None else _identity,
                    binary_downsampling=self.binary_downsampling,
                    output_scale_case=self.output_scale_case,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x, train=train, progress=progress)
            intermediates[f"stage{stage + 1}"] = x
        intermediates["features"] = x = nn.relu(BatchNorm(name="norm")(x, train=train)).mean((1, 2))
        return BinaryDense(self.num_classes, use_bias=True, name="head")(widened(x)), intermediates


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

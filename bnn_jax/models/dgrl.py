r"""DGRL: a Bi-Real network with a light full-precision branch beside each unit, made to be distilled unit by unit."""

from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense, halve, widened
from bnn_jax.models.stem import Stem
from bnn_jax.quantizers import Quantizer


class SqueezeInteraction(nn.Module):
    r"""A bottleneck in full precision that adds to a binary convolution's output.

    1x1 conv C -> C // reduction -> BN -> ReLU  (squeeze)
    3x3 conv, with the stride -> BN -> ReLU     (interact)
    1x1 conv -> features -> BN                  (expand)

    The paper's layer sizes could not be confirmed; this is a reading.  With reduction 4 it holds 11 % of the weights of
    the binary convolutions of a ResNet-18; the paper speaks of about 10 %.

    Attributes:
      features: of the output.
      stride: of the 3x3 convolution.
      reduction: how many input channels become one.

    Raises:
      ValueError: if `reduction` is not positive or leaves the branch with no channels.

    Reference: Ye et al., Distillation Guided Residual Learning for Binary Convolutional Neural Networks, 2020,
    arXiv:2007.05223.
    """

    features: int
    stride: int = 1
    reduction: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.reduction < 1:
            raise ValueError(f"`reduction` (={self.reduction!r}) must be positive in layer {self.name!r}; 4 is usual")

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool):
        squeezed = x.shape[-1] // self.reduction
        if squeezed < 1:
            raise ValueError(
                f"`reduction` (={self.reduction}) leaves a branch with no channels of the {x.shape[-1]} inputs of "
                f"layer {'/'.join(self.path)!r}; it must be at most {x.shape[-1]}"
            )
        strides = (self.stride, self.stride)
        x = BinaryConv(squeezed, kernel_size=(1, 1), name="squeeze")(x)
        x = nn.relu(BatchNorm(name="squeeze_norm")(x, train=train))
        x = BinaryConv(squeezed, kernel_size=(3, 3), strides=strides, padding=1, name="interact")(x)
        x = nn.relu(BatchNorm(name="interact_norm")(x, train=train))
        x = BinaryConv(self.features, kernel_size=(1, 1), name="expand")(x)
        return BatchNorm(name="expand_norm")(x, train=train)


class DgrlUnit(nn.Module):
    """BN(conv(sign(x))) + branch(x) + shortcut(x); ReLU takes the place of sign where inputs stay real.

    The shortcut of a stride: average pool -> 1x1 conv -> BN.
    """

    features: int
    stride: int
    reduction: int
    input_quantizer: Quantizer | None
    kernel_quantizer: Quantizer | None

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float):
        y = BinaryConv(
            self.features,
            kernel_size=(3, 3),
            strides=(self.stride, self.stride),
            padding=1,
            input_quantizer=self.input_quantizer,
            kernel_quantizer=self.kernel_quantizer,
            name="conv",
        )(nn.relu(x) if self.input_quantizer is None else x, train=train, progress=progress)
        y = BatchNorm(name="norm")(y, train=train)
        y = y + SqueezeInteraction(self.features, self.stride, self.reduction, name="branch")(x, train=train)
        if self.stride > 1 or x.shape[-1] != self.features:
            x = halve(x) if self.stride > 1 else x
            x = BinaryConv(self.features, kernel_size=(1, 1), name="downsample")(x)
            x = BatchNorm(name="downsample_norm")(x, train=train)
        return y + x


class DGRL(nn.Module):
    r"""Bi-Real network with a squeeze-and-interaction branch beside each unit.

    stem -> stages of units of one binary 3x3 convolution, widths w, 2w, 4w, ..., stride 2 between them -> global mean
    -> dense.  The stem, without ReLU, the branches, the 1x1 convolutions on the shortcuts and the dense layer are in
    full precision.  Unit: BN(conv(sign(x))) + branch(x) + shortcut(x).

    The paper's exact form could not be confirmed; this is a reading.

    Attributes:
      num_classes: of the logits.
      stage_sizes: units in each stage, one convolution a unit.
      width: filters of the first stage.
      reduction: of the branches, see :class:`SqueezeInteraction`.
      input_quantizer, kernel_quantizer: of the 3x3 convolutions; the method's are approx_sign and magnitude_aware.
      stem: "cifar" or "imagenet", see :class:`bnn_jax.models.stem.Stem`.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with the output of each stage, that of each
      unit, for block-wise distillation, and the `features` that the last layer sees.

    Raises:
      ValueError: for another `stem`, or a `reduction` that is not positive or leaves a branch with no channels.

    Reference: Ye et al., Distillation Guided Residual Learning for Binary Convolutional Neural Networks, 2020,
    arXiv:2007.05223.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (4, 4, 4, 4)
    width: int = 64
    reduction: int = 4
    input_quantizer: Quantizer | None = None
    kernel_quantizer: Quantizer | None = None
    stem: str = "cifar"

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        intermediates = {}
        x = Stem(self.width, kind=self.stem, relu=False, name="stem")(images, train=train)
        for stage, units in enumerate(self.stage_sizes):
            for unit in range(units):
                name = f"stage{stage + 1}_unit{unit + 1}"
                intermediates[name] = x = DgrlUnit(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and unit == 0 else 1,
                    reduction=self.reduction,
                    input_quantizer=self.input_quantizer,
                    kernel_quantizer=self.kernel_quantizer,
                    name=name,
                )(x, train=train, progress=progress)
            intermediates[f"stage{stage + 1}"] = x
        intermediates["features"] = x = x.mean((1, 2))
        return BinaryDense(self.num_classes, use_bias=True, name="head")(widened(x)), intermediates


dgrl_resnet18 = partial(DGRL, stage_sizes=(4, 4, 4, 4), width=64, stem="imagenet")
"""DGRL-ResNet-18: the stages of Bi-Real-Net 18 with branches, 64 to 512 filters."""

r"""DGRL: a Bi-Real network with a light full-precision branch beside each unit, made to be distilled unit by unit."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from bnn_jax.layers import BatchNorm, BinaryConv
from bnn_jax.models.residual import Block, ResidualNetwork, pool_and_project


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


class DgrlBlock(Block):
    """One or two units BN(conv(sign(x))) + branch(x) + S(x); returns the output of each.

    ReLU takes the place of sign where inputs stay real.  S of a stride: average pool -> 1x1 conv -> BN.
    """

    units: int
    activation: Callable[[Array], Array]
    reduction: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float):
        outputs = []
        for unit in range(1, self.units + 1):
            stride = self.stride if unit == 1 else 1
            conv = self.conv(self.features, strides=(stride, stride), name=f"conv{unit}")
            y = conv(self.activation(x), train=train, progress=progress)
            y = BatchNorm(name=f"norm{unit}")(y, train=train)
            y = y + SqueezeInteraction(self.features, stride, self.reduction, name=f"branch{unit}")(x, train=train)
            x = y + pool_and_project(x, self.features, stride, train=train)
            outputs.append(x)
        return outputs


class DGRL(ResidualNetwork):
    r"""Bi-Real network with a squeeze-and-interaction branch beside each unit.

    stem -> stages of units of one binary 3x3 convolution, widths w, 2w, 4w, ..., stride 2 between them -> global mean
    -> dense.  The stem, without ReLU, the branches, the 1x1 convolutions on the shortcuts and the dense layer are in
    full precision.  Unit: BN(conv(sign(x))) + branch(x) + shortcut(x).

    The paper's exact form could not be confirmed; this is a reading.

    Attributes:
      stage_sizes: units in each stage, one convolution a unit.
      reduction: of the branches, see :class:`SqueezeInteraction`.
      input_quantizer, kernel_quantizer: of the 3x3 convolutions; the method's are approx_sign and magnitude_aware.
      others: see :class:`bnn_jax.models.residual.ResidualNetwork`.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with the output of each stage, that of each
      unit, for block-wise distillation, and the `features` that the last layer sees.

    Raises:
      ValueError: for another `stem`, or a `reduction` that is not positive or leaves a branch with no channels.

    Reference: Ye et al., Distillation Guided Residual Learning for Binary Convolutional Neural Networks, 2020,
    arXiv:2007.05223.
    """

    stage_sizes: tuple[int, ...] = (4, 4, 4, 4)
    stem: str = "cifar"
    reduction: int = 4

    counts_units = True

    @nn.nowrap
    def block(self, **place):
        return DgrlBlock(reduction=self.reduction, activation=self.unless_quantized(nn.relu), **place)

    @nn.nowrap
    def report(self, name, outputs, intermediates):
        stage, block = name.split("_block")
        for unit, x in enumerate(outputs, start=2 * int(block) - 1):
            intermediates[f"{stage}_unit{unit}"] = x
        return outputs[-1]


dgrl_resnet18 = partial(DGRL, stage_sizes=(4, 4, 4, 4), width=64, stem="imagenet")
"""DGRL-ResNet-18: the stages of Bi-Real-Net 18 with branches, 64 to 512 filters."""

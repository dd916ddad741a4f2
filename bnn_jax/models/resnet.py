r"""Residual networks for small images, binary, ternary or full precision by their quantizers."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense, widened
from bnn_jax.quantizers import Quantizer


def subsample_and_pad(x: Float[Array, "batch h w channels"], features: int, stride: int) -> Array:
    """The parameter-free shortcut (option A of He et al., 2016): every stride-th pixel, new channels zero."""
    if stride == 1 and x.shape[-1] == features:
        return x
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


def check_sizes(network: nn.Module) -> None:
    """Raise a ValueError unless `num_classes`, `width` and all of `stage_sizes` of a network are positive."""

    def require(argument, holds, rule):
        if not holds:
            value = getattr(network, argument)
            raise ValueError(f"`{argument}` (={value!r}) of {type(network).__name__} must {rule}")

    require("num_classes", network.num_classes >= 1, "be at least 1; CIFAR-10 has 10")
    require("width", network.width >= 1, "be at least 1; 16 is usual for small images, 64 for large ones")
    require(
        "stage_sizes",
        len(network.stage_sizes) > 0 and min(network.stage_sizes) >= 1,
        f"hold at least one stage, none of them empty; {type(network).stage_sizes} is usual",
    )


class XnorBlock(nn.Module):
    """BN -> sign -> binary conv, twice, around one shortcut; ReLU takes the place of sign where inputs stay real."""

    features: int
    stride: int
    input_quantizer: Quantizer | None
    kernel_quantizer: Quantizer | None
    input_scaling: bool

    @nn.compact
    def __call__(self, x, *, train: bool, progress: Array | float):
        conv = partial(
            BinaryConv,
            self.features,
            kernel_size=(3, 3),
            padding=1,
            input_quantizer=self.input_quantizer,
            kernel_quantizer=self.kernel_quantizer,
            input_scaling=self.input_scaling,
        )
        activation = nn.relu if self.input_quantizer is None else lambda y: y
        y = activation(BatchNorm(name="norm1")(x, train=train))
        y = conv(strides=(self.stride, self.stride), name="conv1")(y, train=train, progress=progress)
        y = activation(BatchNorm(name="norm2")(y, train=train))
        y = conv(name="conv2")(y, train=train, progress=progress)
        return subsample_and_pad(x, self.features, self.stride) + y


class ResNet(nn.Module):
    r"""Pre-activation residual network of 6n+2 layers for small images.

    stem conv 3x3 -> stages of XNOR blocks, widths w, 2w, 4w, ..., stride 2 between them -> BN -> ReLU -> global mean
    -> dense.  The stem and the dense layer are in full precision.

    Attributes:
      num_classes: of the logits.
      stage_sizes: blocks in each stage, two convolutions a block.
      width: filters of the first stage.
      input_quantizer, kernel_quantizer: of the convolutions in the blocks.
      input_scaling: XNOR-Net's map K, see :class:`bnn_jax.layers.BinaryConv`.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with each stage's output and the `features` that
      the last layer sees.

    Raises:
      ValueError: if `num_classes` or `width` is below 1, or a stage is empty.

    Reference: He et al., Deep Residual Learning, 2016, arXiv:1512.03385; block of Rastegari et al., XNOR-Net, 2016.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (3, 3, 3)
    width: int = 16
    input_quantizer: Quantizer | None = None
    kernel_quantizer: Quantizer | None = None
    input_scaling: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self)

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        intermediates = {}
        x = BinaryConv(self.width, kernel_size=(3, 3), padding=1, name="stem")(images)
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                x = XnorBlock(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    input_quantizer=self.input_quantizer,
                    kernel_quantizer=self.kernel_quantizer,
                    input_scaling=self.input_scaling,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x, train=train, progress=progress)
            intermediates[f"stage{stage + 1}"] = x
        x = nn.relu(BatchNorm(name="norm")(x, train=train)).mean((1, 2))
        intermediates["features"] = x
        return BinaryDense(self.num_classes, use_bias=True, name="head")(widened(x)), intermediates


resnet20 = partial(ResNet, stage_sizes=(3, 3, 3))
"""ResNet-20 for 32x32 images: XNOR-Net with the quantizers sign and xnor, ternary with ttq, else full precision."""

resnet6 = partial(ResNet, stage_sizes=(1, 1))
"""The small sibling of ResNet-20 for 8x8 images: four convolutions in two stages."""

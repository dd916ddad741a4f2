r"""ReActNet-A: a binary network in the shape of MobileNetV1."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense, RPReLU, halve, widened
from bnn_jax.models.stem import STEMS
from bnn_jax.quantizers import Quantizer


class ReActBlock(nn.Module):
    """A 3x3 convolution C -> C and a 1x1 convolution C -> C or 2C, each RPReLU( BN(conv(RSign(x))) + shortcut(x) ).

    Shortcuts hold no parameters: an average pool where the 3x3 convolution has a stride, and x twice where the 1x1
    convolution doubles the channels.  The paper writes the latter as two convolutions C -> C of the same signs, joined;
    that is one convolution C -> 2C.
    """

    features: int
    stride: int
    input_quantizer: Quantizer | None
    kernel_quantizer: Quantizer | None

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float):
        conv = partial(BinaryConv, input_quantizer=self.input_quantizer, kernel_quantizer=self.kernel_quantizer)
        strides = (self.stride, self.stride)
        y = conv(x.shape[-1], kernel_size=(3, 3), strides=strides, padding=1, name="conv3x3")(
            x, train=train, progress=progress
        )
        y = BatchNorm(name="norm3x3")(y, train=train)
        x = RPReLU(name="activation3x3")(y + (halve(x) if self.stride > 1 else x))

        y = conv(self.features, kernel_size=(1, 1), name="conv1x1")(x, train=train, progress=progress)
        y = BatchNorm(name="norm1x1")(y, train=train)
        x = jnp.concatenate([x, x], axis=-1) if self.features > x.shape[-1] else x
        return RPReLU(name="activation1x1")(y + x)


class ReActNetA(nn.Module):
    r"""MobileNetV1 with full instead of depthwise 3x3 convolutions, every one binary but the first and last layer.

    stem conv 3x3 -> BN -> stages of blocks, widths 2w, 4w, ..., each stage but the first with stride 2 at its start
    -> global mean -> dense.  A stage's first block doubles the channels.  Without `input_quantizer` nothing takes
    RSign's place: the RPReLU before each convolution is the nonlinearity.

    Attributes:
      num_classes: of the logits.
      stage_sizes: blocks in each stage, a 3x3 and a 1x1 convolution a block.
      width: filters of the stem.
      input_quantizer, kernel_quantizer: of the blocks' convolutions; the method's are rsign and magnitude_aware.
      stem: "imagenet" has stride 2, "cifar" stride 1; there is no pool.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with each stage's output and the `features` that
      the last layer sees.

    Raises:
      ValueError: for another `stem`.

    Reference: Liu et al., ReActNet, 2020, arXiv:2003.03488.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (1, 2, 2, 6, 2)
    width: int = 32
    input_quantizer: Quantizer | None = None
    kernel_quantizer: Quantizer | None = None
    stem: str = "cifar"

    def __post_init__(self):
        super().__post_init__()
        if self.stem not in STEMS:
            raise ValueError(f"`stem` (={self.stem!r}) must be cifar (small images) or imagenet (224x224)")

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        intermediates = {}
        strides = (2, 2) if self.stem == "imagenet" else (1, 1)
        x = BinaryConv(self.width, kernel_size=(3, 3), strides=strides, padding=1, name="stem")(images)
        x = BatchNorm(name="stem_norm")(x, train=train)
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                x = ReActBlock(
                    features=self.width * 2 ** (stage + 1),
                    stride=2 if stage > 0 and block == 0 else 1,
                    input_quantizer=self.input_quantizer,
                    kernel_quantizer=self.kernel_quantizer,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x, train=train, progress=progress)
            intermediates[f"stage{stage + 1}"] = x
        intermediates["features"] = x = x.mean((1, 2))
        return BinaryDense(self.num_classes, use_bias=True, name="head")(widened(x)), intermediates


reactnet_a = partial(ReActNetA, stage_sizes=(1, 2, 2, 6, 2), width=32, stem="imagenet")
"""ReActNet-A: 13 blocks, 32 filters in the stem to 1024."""

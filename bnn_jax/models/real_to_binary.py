r"""Real-to-Binary networks: residual, their binary convolutions scaled by a gate that sees the real input."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense, ChannelGate, OutputScale, PReLU, halve, max_pool, widened
from bnn_jax.models.stem import STEMS
from bnn_jax.quantizers import Quantizer


class HalfBlock(nn.Module):
    """PReLU( scale * conv(sign(z)) ) + shortcut(x), z = BN(x); tanh takes the place of sign where inputs stay real.

    The scale is a gate G(z), or learned factors of case 4.  The shortcut of a stride: average pool -> 1x1 conv -> BN.
    """

    features: int
    stride: int
    input_quantizer: Quantizer | None
    kernel_quantizer: Quantizer | None
    gate: bool
    reduction: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float):
        z = BatchNorm(name="norm")(x, train=train)
        y = BinaryConv(
            self.features,
            kernel_size=(3, 3),
            strides=(self.stride, self.stride),
            padding=1,
            input_quantizer=self.input_quantizer,
            kernel_quantizer=self.kernel_quantizer,
            name="conv",
        )(jnp.tanh(z) if self.input_quantizer is None else z, train=train, progress=progress)
        if self.gate:
            y = y * ChannelGate(self.features, reduction=self.reduction, name="gate")(z)
        else:
            y = OutputScale(case=4, name="scale")(y)
        y = PReLU(name="activation")(y)
        if self.stride > 1 or x.shape[-1] != self.features:
            x = halve(x) if self.stride > 1 else x
            x = BinaryConv(self.features, kernel_size=(1, 1), name="downsample")(x)
            x = BatchNorm(name="downsample_norm")(x, train=train)
        return y + x


class ActivatedStem(nn.Module):
    """conv -> BN -> ReLU or PReLU [-> max pool], sized as :class:`bnn_jax.models.stem.Stem`."""

    features: int
    kind: str
    prelu: bool

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width channels"], *, train: bool):
        large = self.kind == "imagenet"
        geometry = {"kernel_size": (7, 7), "strides": (2, 2), "padding": 3} if large else {"padding": 1}
        x = BatchNorm(name="norm")(BinaryConv(self.features, name="conv", **geometry)(images), train=train)
        x = PReLU(name="activation")(x) if self.prelu else nn.relu(x)
        return max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1))) if large else x


class RealToBinaryNet(nn.Module):
    r"""Residual network of half blocks, gated (Real-to-Binary) or with learned scales (the paper's strong baseline).

    stem -> stages of blocks of two half blocks, widths w, 2w, 4w, ..., stride 2 between them -> global mean -> dense.
    Half block: PReLU( scale * conv(sign(BN(x))) ) + shortcut(x).  The stem, the 1x1 convolutions on the shortcuts, the
    gates and the dense layer are in full precision.  Without `input_quantizer`, tanh takes sign's place, as in the
    first student of the paper's recipe.

    Attributes:
      num_classes: of the logits.
      stage_sizes: blocks in each stage, two half blocks of one convolution each a block.
      width: filters of the first stage.
      input_quantizer, kernel_quantizer: of the 3x3 convolutions; the method's are ste_sign and binary.
      stem: "cifar" (3x3) or "imagenet" (7x7, stride 2, and max pool 3x3, stride 2).
      stem_prelu: PReLU instead of ReLU in the stem; the paper's baseline has it, and so has larq's gated network.
      gate: scale by :class:`bnn_jax.layers.ChannelGate`; otherwise by :class:`bnn_jax.layers.OutputScale` of case 4,
        which ties the network to the image size that it was initialized with.
      reduction: of the gates.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with the output of each stage, that of each
      block, for attention matching, and the `features` that the last layer sees.

    Raises:
      ValueError: for another `stem`, or a `reduction` that leaves a gate with no channels.

    Reference: Martinez et al., Training Binary Neural Networks with Real-to-Binary Convolutions, 2020,
    arXiv:2003.11535.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    input_quantizer: Quantizer | None = None
    kernel_quantizer: Quantizer | None = None
    stem: str = "cifar"
    stem_prelu: bool = False
    gate: bool = True
    reduction: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.stem not in STEMS:
            raise ValueError(f"`stem` (={self.stem!r}) must be cifar (small images) or imagenet (224x224)")

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        intermediates = {}
        x = ActivatedStem(self.width, kind=self.stem, prelu=self.stem_prelu, name="stem")(images, train=train)
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                name = f"stage{stage + 1}_block{block + 1}"
                for half in ("a", "b"):
                    x = HalfBlock(
                        features=self.width * 2**stage,
                        stride=2 if stage > 0 and block == 0 and half == "a" else 1,
                        input_quantizer=self.input_quantizer,
                        kernel_quantizer=self.kernel_quantizer,
                        gate=self.gate,
                        reduction=self.reduction,
                        name=f"{name}{half}",
                    )(x, train=train, progress=progress)
                intermediates[name] = x
            intermediates[f"stage{stage + 1}"] = x
        intermediates["features"] = x = x.mean((1, 2))
        return BinaryDense(self.num_classes, use_bias=True, name="head")(widened(x)), intermediates


real_to_binary_resnet18 = partial(RealToBinaryNet, stage_sizes=(2, 2, 2, 2), width=64, gate=True, stem="imagenet")
"""Real-to-Binary ResNet-18, its convolutions scaled by gates."""

real_to_binary_baseline_resnet18 = partial(
    RealToBinaryNet, stage_sizes=(2, 2, 2, 2), width=64, gate=False, stem_prelu=True, stem="imagenet"
)
"""The strong baseline of Real-to-Binary: the same ResNet-18 with the learned scales of XNOR-Net++."""

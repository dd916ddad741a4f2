r"""Bi-Real Net, one binary convolution a shortcut, and its small variants EBi-Real and FTBNN."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from bnn_jax.errors import unknown_name
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense, PReLU, halve, widened
from bnn_jax.models.resnet import check_sizes
from bnn_jax.models.stem import Stem
from bnn_jax.quantizers import Quantizer


def leaky_clip(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """clip(x, -1, 1) that goes on with slope 0.1 outside.

    >>> import jax.numpy as jnp
    >>> leaky_clip(jnp.array([-3.0, 0.5, 2.0]))
    Array([-1.2,  0.5,  1.1], dtype=float32)

    Reference: Liu et al., Bi-Real Net, 2018, arXiv:1808.00278.
    """
    clipped = nn.hard_tanh(x)
    return clipped + 0.1 * (x - clipped)


REAL_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "leaky_clip": leaky_clip,
    "clip": nn.hard_tanh,
}
"""What stands in sign's place while the inputs are real, in the order in which training in stages takes them."""


class BiRealUnit(nn.Module):
    r"""BN(conv 3x3(q(x))) + S(x) [-> PReLU]; returns that and S(x), for a shortcut around two units.

    S(x) = x, or where the shape changes  average pool 2 -> conv 1x1 in full precision -> BN
    """

    features: int
    stride: int
    input_quantizer: Quantizer | None
    kernel_quantizer: Quantizer | None
    activation: str
    trainable_slopes: bool

    @nn.compact
    def __call__(self, x, *, train: bool, progress: Array | float):
        conv = BinaryConv(
            self.features,
            strides=(self.stride, self.stride),
            padding=1,
            input_quantizer=self.input_quantizer,
            kernel_quantizer=self.kernel_quantizer,
            name="conv",
        )
        inputs = REAL_ACTIVATIONS[self.activation](x) if self.input_quantizer is None else x
        y = BatchNorm(name="norm")(conv(inputs, train=train, progress=progress), train=train)
        if x.shape != y.shape:
            x = halve(x) if self.stride == 2 else x
            x = BinaryConv(self.features, kernel_size=(1, 1), padding=0, name="downsample")(x)
            x = BatchNorm(name="norm_downsample")(x, train=train)
        y = x + y
        return PReLU(both_slopes=True, name="prelu")(y) if self.trainable_slopes else y, x


class BiRealNet(nn.Module):
    r"""Residual network with a shortcut around every binary convolution.

    stem without ReLU -> stages of units, widths w, 2w, 4w, ..., stride 2 between them -> global mean -> dense
    unit:  u(x) = BN(conv 3x3(q(x))) + S(x),  S(x) = x, or where the shape changes  average pool 2 -> conv 1x1 -> BN

    The stem, the 1x1 convolutions and the dense layer are in full precision.  The variants:

    EBi-Real (`outer_shortcut`): y = u2(u1(x)) + S(x) for each pair of units, the ordinary residual network's shortcut
      on top of the two.  That S(x) is the one of u1, not a second one with weights of its own, is a reading.
    FTBNN (`trainable_slopes`): u(x) goes through a PReLU whose two slopes are learned for each channel.  The paper's
      exact form could not be confirmed; this is a reading.

    Attributes:
      num_classes: of the logits.
      stage_sizes: units in each stage, one convolution a unit.
      width: filters of the first stage.
      stem: "imagenet" (7x7, stride 2, and max pool) or "cifar" (3x3, stride 1).
      input_quantizer, kernel_quantizer: of the convolutions in the units.
      activation: takes the input quantizer's place where that is None: "relu", "leaky_clip" or "clip", the first three
        steps of training in stages; not used otherwise.
      outer_shortcut: add S(x) once more after every second unit.
      trainable_slopes: end every unit with a PReLU.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with each stage's output and the `features` that
      the last layer sees.

    Raises:
      ValueError: if `num_classes` or `width` is below 1, a stage is empty, a stage's size is odd with `outer_shortcut`,
        or for another `activation` or `stem`.

    Reference: Liu et al., Bi-Real Net, 2018, arXiv:1808.00278; Zhu et al., Improving Gradient Paths for Binary
    Convolutional Neural Networks, TU Delft (EBi-Real); Su et al., FTBNN: Rethinking Non-linearity for 1-bit CNNs and
    Going Beyond, 2020, arXiv:2010.09294.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (4, 4, 4, 4)
    width: int = 64
    stem: str = "imagenet"
    input_quantizer: Quantizer | None = None
    kernel_quantizer: Quantizer | None = None
    activation: str = "relu"
    outer_shortcut: bool = False
    trainable_slopes: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self)
        if self.activation not in REAL_ACTIVATIONS:
            raise unknown_name(f"{type(self).__name__}.activation", self.activation, REAL_ACTIVATIONS)
        if self.outer_shortcut and any(units % 2 for units in self.stage_sizes):
            raise ValueError(
                f"`stage_sizes` (={self.stage_sizes!r}) of {type(self).__name__} must be even with `outer_shortcut`, "
                "which spans two units; turn it off for odd stages"
            )

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        intermediates = {}
        x = Stem(self.width, kind=self.stem, relu=False, name="stem")(images, train=train)
        for stage, units in enumerate(self.stage_sizes):
            for unit in range(units):
                x, shortcut = BiRealUnit(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and unit == 0 else 1,
                    input_quantizer=self.input_quantizer,
                    kernel_quantizer=self.kernel_quantizer,
                    activation=self.activation,
                    trainable_slopes=self.trainable_slopes,
                    name=f"stage{stage + 1}_unit{unit + 1}",
                )(x, train=train, progress=progress)
                if unit % 2 == 0:
                    outer = shortcut
                elif self.outer_shortcut:
                    x = x + outer
            intermediates[f"stage{stage + 1}"] = x
        intermediates["features"] = x = x.mean((1, 2))
        return BinaryDense(self.num_classes, use_bias=True, name="head")(widened(x)), intermediates


bireal18 = partial(BiRealNet, stage_sizes=(4, 4, 4, 4))
"""Bi-Real Net with 18 layers."""

bireal34 = partial(BiRealNet, stage_sizes=(6, 8, 12, 6))
"""Bi-Real Net with 34 layers."""

bireal_resnet20 = partial(BiRealNet, stage_sizes=(6, 6, 6), width=16, stem="cifar")
"""ResNet-20 for 32x32 images with Bi-Real Net's units."""

ebireal18 = partial(BiRealNet, stage_sizes=(4, 4, 4, 4), outer_shortcut=True)
"""EBi-Real Net with 18 layers: Bi-Real Net with the ordinary shortcuts around two units on top."""

ebireal34 = partial(BiRealNet, stage_sizes=(6, 8, 12, 6), outer_shortcut=True)
"""EBi-Real Net with 34 layers: Bi-Real Net with the ordinary shortcuts around two units on top."""

ftbnn_resnet18 = partial(BiRealNet, stage_sizes=(4, 4, 4, 4), trainable_slopes=True)
"""FTBNN's ResNet-18: Bi-Real Net with a fully trainable PReLU after each unit."""

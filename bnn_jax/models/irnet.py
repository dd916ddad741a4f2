r"""IR-Net's residual networks: hard tanh after every binary convolution and its shortcut."""

from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from bnn_jax.errors import unknown_name
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense, widened
from bnn_jax.models.resnet import check_sizes, subsample_and_pad
from bnn_jax.models.stem import Stem
from bnn_jax.quantizers import Quantizer

SHORTCUTS = ("pad", "conv")


class IRUnit(nn.Module):
    """hardtanh(BN(conv 3x3(x)) + S(x)); S where the shape changes: subsample and pad, or conv 1x1 -> BN."""

    features: int
    stride: int
    input_quantizer: Quantizer | None
    kernel_quantizer: Quantizer | None
    shortcut: str

    @nn.compact
    def __call__(self, x, *, train: bool, progress: Array | float):
        strides = (self.stride, self.stride)
        conv = BinaryConv(
            self.features,
            strides=strides,
            padding=1,
            input_quantizer=self.input_quantizer,
            kernel_quantizer=self.kernel_quantizer,
            name="conv",
        )
        y = BatchNorm(name="norm")(conv(x, train=train, progress=progress), train=train)
        if x.shape != y.shape and self.shortcut == "conv":
            conv = BinaryConv(self.features, kernel_size=(1, 1), strides=strides, padding=0, name="downsample")
            x = BatchNorm(name="norm_downsample")(conv(x), train=train)
        elif x.shape != y.shape:
            x = subsample_and_pad(x, self.features, self.stride)
        return nn.hard_tanh(x + y)


class IRNet(nn.Module):
    r"""Residual network with a shortcut around every binary convolution and hard tanh as nonlinearity.

    stem with hard tanh -> stages of units, widths w, 2w, 4w, ..., stride 2 between them -> global mean -> BN -> dense
    unit:  hardtanh(BN(conv 3x3(q(x))) + S(x)),  S(x) = x; where the shape changes every second pixel, new channels zero
      ("pad"), or conv 1x1, stride 2 -> BN in full precision ("conv")

    The stem, the 1x1 convolutions and the dense layer are in full precision.  The full-precision network has the same
    hard tanh.  IR-Net's quantizers: `ede_sign` for the inputs, `libra_pb` for the kernels.

    Attributes:
      num_classes: of the logits.
      stage_sizes: units in each stage, one convolution a unit.
      width: filters of the first stage.
      stem: "cifar" (3x3, stride 1) or "imagenet" (7x7, stride 2, and max pool).
      input_quantizer, kernel_quantizer: of the convolutions in the units.
      shortcut: "pad" or "conv".

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with each stage's output and the `features` that
      the last layer sees.

    Raises:
      ValueError: if `num_classes` or `width` is below 1, a stage is empty, or for another `shortcut` or `stem`.

    Reference: Qin et al., Forward and Backward Information Retention for Accurate Binary Neural Networks, 2020,
    arXiv:1909.10788.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (6, 6, 6)
    width: int = 16
    stem: str = "cifar"
    input_quantizer: Quantizer | None = None
    kernel_quantizer: Quantizer | None = None
    shortcut: str = "pad"

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self)
        if self.shortcut not in SHORTCUTS:
            raise unknown_name(f"{type(self).__name__}.shortcut", self.shortcut, SHORTCUTS)

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        intermediates = {}
        # Not ReLU, whose outputs all have sign +1; hard tanh is monotone and commutes with the stem's max pool.
        x = nn.hard_tanh(Stem(self.width, kind=self.stem, relu=False, name="stem")(images, train=train))
        for stage, units in enumerate(self.stage_sizes):
            for unit in range(units):
                x = IRUnit(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and unit == 0 else 1,
                    input_quantizer=self.input_quantizer,
                    kernel_quantizer=self.kernel_quantizer,
                    shortcut=self.shortcut,
                    name=f"stage{stage + 1}_unit{unit + 1}",
                )(x, train=train, progress=progress)
            intermediates[f"stage{stage + 1}"] = x
        intermediates["features"] = x = BatchNorm(name="norm")(x.mean((1, 2)), train=train)
        return BinaryDense(self.num_classes, use_bias=True, name="head")(widened(x)), intermediates


irnet_resnet20 = partial(IRNet, stage_sizes=(6, 6, 6))
"""IR-Net's ResNet-20 for 32x32 images, without weights in the shortcuts."""

irnet_resnet18 = partial(IRNet, stage_sizes=(4, 4, 4, 4), width=64, stem="imagenet", shortcut="conv")
"""IR-Net's ResNet-18 for ImageNet."""

irnet_resnet34 = partial(IRNet, stage_sizes=(6, 8, 12, 6), width=64, stem="imagenet", shortcut="conv")
"""IR-Net's ResNet-34 for ImageNet."""

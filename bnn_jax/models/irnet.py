r"""IR-Net's residual networks: hard tanh after every binary convolution and its shortcut."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from bnn_jax.errors import unknown_name
from bnn_jax.layers import BatchNorm, BinaryConv, avg_pool_2x2
from bnn_jax.models.residual import Block, ResidualNetwork, subsample_and_pad

SHORTCUTS = ("pad", "conv", "pool")


class IRBlock(Block):
    """One or two units hardtanh(BN(conv 3x3(x)) + S(x)).

    S where the shape changes: subsample and pad, conv 1x1 -> BN, or average pool 2 and pad on both sides.
    """

    units: int
    shortcut: str

    @nn.compact
    def __call__(self, x, *, train: bool, progress: Array | float):
        for unit in range(1, self.units + 1):
            stride = self.stride if unit == 1 else 1
            conv = self.conv(self.features, strides=(stride, stride), name=f"conv{unit}")
            y = BatchNorm(name=f"norm{unit}")(conv(x, train=train, progress=progress), train=train)
            if x.shape != y.shape and self.shortcut == "conv":
                geometry = {"kernel_size": (1, 1), "strides": (stride, stride), "padding": 0}
                x = BinaryConv(self.features, name="downsample", **geometry)(x)
                x = BatchNorm(name="downsample_norm")(x, train=train)
            elif x.shape != y.shape and self.shortcut == "pool":
                x, more = avg_pool_2x2(x) if stride > 1 else x, self.features - x.shape[-1]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))
            elif x.shape != y.shape:
                x = subsample_and_pad(x, self.features, stride)
            x = nn.hard_tanh(x + y)
        return x


class IRNet(ResidualNetwork):
    r"""Residual network with a shortcut around every binary convolution and hard tanh as nonlinearity.

    stem with hard tanh -> stages of units, widths w, 2w, 4w, ..., stride 2 between them -> global mean -> BN -> dense
    unit:  hardtanh(BN(conv 3x3(q(x))) + S(x)),  S(x) = x; where the shape changes every second pixel, new channels zero
      ("pad"), conv 1x1, stride 2 -> BN in full precision ("conv"), or average pool 2, half of the new channels, which
      are zero, in front ("pool", as ReCU, BiPer and OvSW)

    The stem, the 1x1 convolutions and the dense layer are in full precision.  The full-precision network has the same
    hard tanh.  IR-Net's quantizers: `ede_sign` for the inputs, `libra_pb` for the kernels.

    Attributes:
      stage_sizes: units in each stage, one convolution a unit.
      input_quantizer, kernel_quantizer: of the convolutions in the units.
      shortcut: "pad", "conv" or "pool".
      others: see :class:`bnn_jax.models.residual.ResidualNetwork`.

    Returns:
      (logits, intermediates), as :class:`bnn_jax.models.residual.ResidualNetwork`.

    Raises:
      ValueError: as :class:`bnn_jax.models.residual.ResidualNetwork`, or for another `shortcut`.

    Reference: Qin et al., Forward and Backward Information Retention for Accurate Binary Neural Networks, 2020,
    arXiv:1909.10788.
    """

    stage_sizes: tuple[int, ...] = (6, 6, 6)
    width: int = 16
    stem: str = "cifar"
    shortcut: str = "pad"

    counts_units = True

    def __post_init__(self):
        super().__post_init__()
        if self.shortcut not in SHORTCUTS:
            raise unknown_name(f"{type(self).__name__}.shortcut", self.shortcut, SHORTCUTS)

    @nn.nowrap
    def begin(self, images, train):
        # Not ReLU, whose outputs all have sign +1; hard tanh is monotone and commutes with the stem's max pool.
        return nn.hard_tanh(super().begin(images, train))

    @nn.nowrap
    def block(self, **place):
        return IRBlock(shortcut=self.shortcut, **place)

    @nn.nowrap
    def end(self, x, train):
        return BatchNorm(name="norm")(x.mean((1, 2)), train=train)


irnet_resnet20 = partial(IRNet, stage_sizes=(6, 6, 6))
"""IR-Net's ResNet-20 for 32x32 images, without weights in the shortcuts."""

irnet_resnet18 = partial(IRNet, stage_sizes=(4, 4, 4, 4), width=64, stem="imagenet", shortcut="conv")
"""IR-Net's ResNet-18 for ImageNet."""

irnet_resnet34 = partial(IRNet, stage_sizes=(6, 8, 12, 6), width=64, stem="imagenet", shortcut="conv")
"""IR-Net's ResNet-34 for ImageNet."""

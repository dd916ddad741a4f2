r"""QuickNet: residual binary networks made for fast inference."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays
from bnn_jax.layers import BatchNorm, BinaryConv, max_pool, mean_pool
from bnn_jax.layers.convolution import resolve_padding
from bnn_jax.models.network import Network, check_image_size


def blur_pool(x: Float[Array, "batch h w channels"]) -> Float[Array, "batch rows columns channels"]:
    """Every second pixel of x blurred by [1, 2, 1] x [1, 2, 1] / 16, zeros around it: two means over 2x2 pixels.

    >>> blur_pool(jnp.ones((1, 4, 4, 1)))[0, :, :, 0]
    Array([[1.    , 0.75  ],
           [0.75  , 0.5625]], dtype=float32)

    Reference: Zhang, Making Convolutional Networks Shift-Invariant Again, 2019, arXiv:1904.11486.
    """
    geometry = {"shape": x.shape[1:3], "kernel_size": (3, 3), "strides": (2, 2), "dilation": (1, 1)}
    padded = jnp.pad(x, ((0, 0), *resolve_padding("SAME", **geometry), (0, 0)))
    return mean_pool(mean_pool(padded, 2, 1), 2, 2)


class QuickNet(Network):
    r"""QuickNet: binary 3x3 convolutions, each with a shortcut and a ReLU behind it, for fast inference.

    stem: conv 3x3/2, w/4 filters -> BN -> ReLU -> depthwise 3x3/2 -> BN without scale and bias -> conv 1x1, w -> BN
    -> stages of units  u(x) = BN(ReLU(conv 3x3(sign x))) + x,  padded with +1
    between stages:  ReLU -> max pool 2, stride 1 -> blur, stride 2 (:func:`blur_pool`) -> conv 1x1 -> BN
    -> ReLU -> global mean -> dense

    Attributes:
      width: filters of the first stage, w, a multiple of 4.
      stage_sizes: units in each stage.
      multiples: of `width`, the filters of each stage; as many as stages, or more.
      stem: "imagenet" has the strides, "cifar" stride 1 in both convolutions.
      input_quantizer, kernel_quantizer: of the 3x3 convolutions in the units.
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates), as :class:`bnn_jax.models.network.Network`.

    Raises:
      ValueError: for sizes that are not positive, a `width` that 4 does not divide, too few `multiples`, another
        `stem`, or images that the strides use up.

    Reference: Bannink et al., Larq Compute Engine: Design, Benchmark, and Deploy State-of-the-Art Binarized Neural
    Networks, MLSys 2021, arXiv:2011.09398; Larq Zoo, v1.0.
    """

    stage_sizes: tuple[int, ...] = (4, 4, 4, 4)
    multiples: tuple[int, ...] = (1, 2, 4, 8)
    stem: str = "imagenet"

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("multiples")
        self.require("width", self.width % 4 == 0, "must be a multiple of 4, for the stem has a quarter", "64 is usual")
        enough = len(self.multiples) >= len(self.stage_sizes)
        self.require("multiples", enough, f"must have one for each of {len(self.stage_sizes)} stages")

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        smallest = 2 ** len(self.stage_sizes) * (1 if self.stem == "cifar" else 4)
        check_image_size(images, smallest, f"a QuickNet with {len(self.stage_sizes)} stages")
        stride, quarter = 2 if self.stem == "imagenet" else 1, self.width // 4
        x = BinaryConv(quarter, strides=stride, name="stem1")(images)
        x = nn.relu(BatchNorm(name="stem1_norm")(x, train=train))
        x = BinaryConv(quarter, strides=stride, feature_group_count=quarter, name="stem2")(x)
        x = BatchNorm(use_scale=False, use_bias=False, name="stem2_norm")(x, train=train)
        x = BinaryConv(self.width, kernel_size=1, name="stem3")(x)
        x = BatchNorm(name="stem3_norm")(x, train=train)

        activation = self.unless_quantized(nn.relu)
        conv = partial(BinaryConv, padding=1, pad_value=1 if self.input_quantizer is not None else 0, **self.quantizers)
        intermediates = {}
        for stage, (units, multiple) in enumerate(zip(self.stage_sizes, self.multiples), start=1):
            features = self.width * multiple
            if stage > 1:
                x = blur_pool(max_pool(nn.relu(x), 2, strides=1))
                x = BinaryConv(features, kernel_size=1, name=f"transition{stage - 1}")(x)
                x = BatchNorm(name=f"transition{stage - 1}_norm")(x, train=train)
            for unit in range(1, units + 1):
                name = f"stage{stage}_unit{unit}"
                y = nn.relu(conv(features, name=f"{name}_conv")(activation(x), train=train, progress=progress))
                x = x + BatchNorm(name=f"{name}_norm")(y, train=train)
            intermediates[f"stage{stage}"] = x
        intermediates["features"] = x = nn.relu(x).mean((1, 2))
        return self.classify(x), intermediates


quicknet_small = partial(QuickNet, width=32, multiples=(1, 2, 8, 16))
"""QuickNetSmall: 32, 64, 256 and 512 filters."""

quicknet = partial(QuickNet, width=64)
"""QuickNet, of medium size: 64 to 512 filters, 4 units a stage."""

quicknet_large = partial(QuickNet, width=64, stage_sizes=(6, 8, 12, 6))
"""QuickNetLarge: the filters of QuickNet, 6, 8, 12 and 6 units."""

r"""DenseNet for small images, with bottlenecks: the other network on which Deep Frank-Wolfe was published."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense, mean_pool
from bnn_jax.models.network import STEMS, Network, check_image_size, stem_pool
from bnn_jax.precision import widened


class BottleneckLayer(nn.Module):
    """x -> concat[x, conv3x3(ReLU(BN(conv1x1(ReLU(BN(x))))))], the 1x1 convolution only with a `bottleneck`."""

    growth: int
    bottleneck: bool
    conv: Callable[..., nn.Module]
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float):
        phase = {"train": train, "progress": progress}
        y = self.activation(BatchNorm(name="norm1")(x, train=train))
        if self.bottleneck:
            y = self.conv(4 * self.growth, kernel_size=1, padding=0, name="conv1")(y, **phase)
            y = self.activation(BatchNorm(name="norm2")(y, train=train))
        y = self.conv(self.growth, name="conv2")(y, **phase)
        return jnp.concatenate([x, y], -1)


class DenseNet(Network):
    r"""DenseNet with bottlenecks (DenseNet-BC): each layer's outputs are kept and concatenated.

    stem conv 3x3, 2k filters -> dense stages with transitions between them -> BN -> ReLU -> global mean -> dense.  A
    layer is x -> concat[x, conv3x3(ReLU(BN(conv1x1(ReLU(BN(x))))))] with 4k and k filters; a transition BN -> ReLU ->
    conv 1x1, half the channels -> mean pool 2.  Quantizers take the place of the ReLUs in the layers; stem, transitions
    and the last layer, which has no bias, are in full precision.

    This is what the program of Deep Frank-Wolfe calls DenseNet 40-40: of its 40 layers each stage has twelve, in six
    pairs of a 1x1 and a 3x3 convolution.

    Attributes:
      width: the growth k, filters that each layer adds.
      stage_sizes: layers in each stage.
      bottleneck: without, a layer is x -> concat[x, conv3x3(ReLU(BN(x)))], the first form of the DenseNet.
      reduction: factor by which a transition divides the channels, rounded down.
      input_quantizer, kernel_quantizer: of the convolutions in the layers; published without.
      stem: "cifar" or "imagenet", see :data:`bnn_jax.models.network.STEMS`, without batch norm.
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates), as :class:`bnn_jax.models.network.Network`.

    Raises:
      ValueError: for sizes that are not positive, a `reduction` below 1, or images that the pools use up.

    Reference: Huang et al., Densely Connected Convolutional Networks, 2017, arXiv:1608.06993; Berrada, Zisserman,
    Kumar, Deep Frank-Wolfe for Neural Network Optimization, ICLR 2019, arXiv:1811.07591, and its program.
    """

    width: int = 40
    stage_sizes: tuple[int, ...] = (6, 6, 6)
    bottleneck: bool = True
    reduction: float = 2.0
    stem: str = "cifar"

    def __post_init__(self):
        super().__post_init__()
        self.require("reduction", self.reduction >= 1, "must be at least 1", "1 keeps all channels")

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        stages = len(self.stage_sizes)
        smallest = 2 ** (stages - 1) * (1 if self.stem == "cifar" else 4)
        check_image_size(images, smallest, f"a DenseNet with {stages} stages")
        conv, activation = partial(BinaryConv, padding=1, **self.quantizers), self.unless_quantized(nn.relu)
        place = {"growth": self.width, "bottleneck": self.bottleneck, "conv": conv, "activation": activation}
        x = stem_pool(BinaryConv(2 * self.width, name="stem", **STEMS[self.stem])(images), self.stem)
        intermediates = {}
        for stage, layers in enumerate(self.stage_sizes, start=1):
            if stage > 1:
                x = nn.relu(BatchNorm(name=f"transition{stage - 1}_norm")(x, train=train))
                features = max(1, int(x.shape[-1] / self.reduction))
                x = mean_pool(BinaryConv(features, kernel_size=1, name=f"transition{stage - 1}_conv")(x), 2)
            for index in range(1, layers + 1):
                x = BottleneckLayer(**place, name=f"stage{stage}_layer{index}")(x, train=train, progress=progress)
            intermediates[f"stage{stage}"] = x
        intermediates["features"] = x = nn.relu(BatchNorm(name="norm")(x, train=train)).mean((1, 2))
        return BinaryDense(self.num_classes, use_bias=False, name="head")(widened(x)), intermediates


densenet40_40 = partial(DenseNet, width=40, stage_sizes=(6, 6, 6))
"""DenseNet-40-40 as in the program of Deep Frank-Wolfe: 40 layers with bottlenecks, growth 40."""

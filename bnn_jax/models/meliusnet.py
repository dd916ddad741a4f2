r"""MeliusNet: dense blocks that add channels, each followed by one that improves them."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays
from bnn_jax.layers import BatchNorm, BinaryConv, max_pool
from bnn_jax.models.densenet import Transition
from bnn_jax.models.network import Network, check_image_size


class MeliusBlock(nn.Module):
    r"""A dense block and an improvement block, each one binary 3x3 convolution of BN(x).

    x -> concat[x, conv(BN(x))] =: d -> d + [0, conv(BN(d))], the last `growth` channels improved

    ReLU takes the place of sign where inputs stay real.
    """

    growth: int
    conv: Callable[..., nn.Module]
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float):
        def unit(x, name):
            y = self.activation(BatchNorm(name=f"{name}_norm")(x, train=train))
            return self.conv(self.growth, name=f"{name}_conv")(y, train=train, progress=progress)

        x = jnp.concatenate([x, unit(x, "dense")], -1)
        y = unit(x, "improvement")
        return x + jnp.pad(y, ((0, 0), (0, 0), (0, 0), (x.shape[-1] - self.growth, 0)))


class MeliusNet(Network):
    r"""MeliusNet: dense blocks that add channels, each followed by one that improves them.

    Grouped stem -> stages of blocks with transitions between them -> BN -> ReLU -> global mean -> dense.

    stem: conv 3x3/2, w/2 filters -> BN -> ReLU -> conv 3x3 in 4 groups, w/2 -> BN -> ReLU -> conv 3x3 in 8 groups, w
    -> BN -> ReLU -> max pool 2;  block: see :class:`MeliusBlock`
    transition: BN -> max pool 2 -> ReLU -> conv 1x1 in full precision, to `reduced` features

    Stem, transitions and the last layer are in full precision.

    Attributes:
      width: the growth, filters that each block adds, w; a multiple of 16, for the groups of the stem.
      stage_sizes: blocks in each stage.
      reduced: features behind each transition in units of w; as many as transitions, or more.
      stem: "imagenet", or "cifar" without stride and pool.
      input_quantizer, kernel_quantizer: of the convolutions in the blocks.
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates), as :class:`bnn_jax.models.network.Network`.

    Raises:
      ValueError: for sizes that are not positive, a `width` that 16 does not divide, `reduced` that does not fit,
        another `stem`, or images that the pools use up.

    Reference: Bethge et al., MeliusNet: Can Binary Neural Networks Achieve MobileNet-level Accuracy?, 2020,
    arXiv:2001.05936.
    """

    stage_sizes: tuple[int, ...] = (4, 5, 4, 4)
    reduced: tuple[float, ...] = (2.5, 3.5, 4.0)
    stem: str = "imagenet"

    def __post_init__(self):
        super().__post_init__()
        self.require("width", self.width % 16 == 0, "must be a multiple of 16, for the stem's groups", "64 is usual")
        transitions = len(self.stage_sizes) - 1
        fits = len(self.reduced) >= transitions and all(int(ratio * self.width) >= 1 for ratio in self.reduced)
        self.require("reduced", fits, f"must leave channels behind each of {transitions} transitions")

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        large = self.stem == "imagenet"
        smallest = 2 ** (len(self.stage_sizes) - 1) * (4 if large else 1)
        check_image_size(images, smallest, f"a MeliusNet with {len(self.stage_sizes)} stages")
        x = images
        for number, (features, groups) in enumerate(((self.width // 2, 1), (self.width // 2, 4), (self.width, 8)), 1):
            stride = 2 if large and number == 1 else 1
            x = BinaryConv(features, strides=stride, feature_group_count=groups, name=f"stem{number}")(x)
            x = nn.relu(BatchNorm(name=f"stem{number}_norm")(x, train=train))
        x = max_pool(x) if large else x

        conv, activation = partial(BinaryConv, padding=1, **self.quantizers), self.unless_quantized(nn.relu)
        intermediates = {}
        for stage, blocks in enumerate(self.stage_sizes, start=1):
            if stage > 1:
                features = int(self.reduced[stage - 2] * self.width)
                x = Transition(features, name=f"transition{stage - 1}")(x, train=train)
            for block in range(1, blocks + 1):
                layer = MeliusBlock(self.width, conv, activation, name=f"stage{stage}_block{block}")
                x = layer(x, train=train, progress=progress)
            intermediates[f"stage{stage}"] = x
        intermediates["features"] = x = nn.relu(BatchNorm(name="norm")(x, train=train)).mean((1, 2))
        return self.classify(x), intermediates


meliusnet22 = partial(MeliusNet, stage_sizes=(4, 5, 4, 4), reduced=(2.5, 3.5, 4.0))
"""MeliusNet22: 160, 224 and 256 channels behind the transitions."""

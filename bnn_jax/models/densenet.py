r"""Binary dense networks: every layer's outputs are kept and concatenated, so no sign loses them."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays
from bnn_jax.layers import BatchNorm, BinaryConv, max_pool
from bnn_jax.models.fractal import JOINS, join_paths
from bnn_jax.models.network import Network, check_image_size, identity, stem_layers


def transition_features(channels: int, reduction: float, rounding: int) -> int:
    """Channels after a transition, rounding * round(floor(channels / reduction) / rounding); at 1 the floor.

    >>> transition_features(448, 2.7, 32), transition_features(448, 2.7, 1)
    (160, 165)
    """
    # Not `//`, which takes 851 // 3.7 for 229.
    return rounding * round(int(channels / reduction) / rounding)


class DenseLayer(nn.Module):
    """x -> concat[x, conv3x3(sign(BN(x)))]; ReLU takes the place of sign where inputs stay real."""

    growth: int
    conv: Callable[..., nn.Module]
    activation: Callable[[Array], Array] = identity

    @nn.compact
    def __call__(self, x, *, train: bool, progress: Array | float = 1.0):
        y = self.activation(BatchNorm(name="norm")(x, train=train))
        y = self.conv(self.growth, name="conv")(y, train=train, progress=progress)
        return jnp.concatenate([x, y], -1)


class IGPDenseBlock(nn.Module):
    r"""Two parallel binary convolutions of x, one of them deepened by a shortcut unit, joined and concatenated.

    a = BN(conv3x3(sign x)),  b = BN(conv3x3(sign x)),  c = a + BN(conv3x3(sign a))
    x -> concat[x, join(b, c)]

    ReLU takes the place of sign where inputs stay real.
    """

    growth: int
    conv: Callable[..., nn.Module]
    activation: Callable[[Array], Array] = identity
    join: str = "mean"

    @nn.compact
    def __call__(self, x, *, train: bool, progress: Array | float = 1.0):
        def unit(y, name):
            y = self.conv(self.growth, name=f"{name}_conv")(self.activation(y), train=train, progress=progress)
            return BatchNorm(name=f"{name}_norm")(y, train=train)

        short = unit(x, "short")
        long = unit(x, "long1")
        long = long + unit(long, "long2")
        return jnp.concatenate([x, join_paths(long, short, self.join)], -1)


class Transition(nn.Module):
    """BN -> max pool 2 -> ReLU -> full-precision conv 1x1."""

    features: int

    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.relu(max_pool(BatchNorm(name="norm")(x, train=train)))
        return BinaryConv(self.features, kernel_size=(1, 1), name="conv")(x)


class DenseNetwork(Network):
    r"""The dense networks: stem -> dense stages with transitions between them -> BN -> ReLU -> mean -> dense.

    A family says what its `layer` is, and whether its stem has a ReLU.

    Attributes:
      width: the growth, filters that each dense layer adds.
      stage_sizes: dense layers in each stage.
      reduction: factor by which each transition divides the channels, one fewer than stages.
      rounding: channels after a transition are a multiple of it, see :func:`transition_features`; 1 takes the floor.
      stem_width: filters of the stem.
      pad_value: 0, +1 or -1, what pads the binary inputs; the authors' own framework, BMXNet, pads with -1.
      input_quantizer, kernel_quantizer: of the convolutions in the dense layers.
      stem: "cifar" or "imagenet", see :func:`bnn_jax.models.network.stem_layers`.
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates), as :class:`bnn_jax.models.network.Network`.

    Raises:
      ValueError: for another `stem` or `pad_value`, a `width`, `stem_width`, `rounding` or stage size < 1, no stages,
        a `reduction` that does not fit or leaves no channels, and images that the pools use up.
    """

    stage_sizes: tuple[int, ...] = (6, 6, 6, 5)
    reduction: tuple[float, ...] = (2.7, 2.7, 2.2)
    rounding: int = 32
    stem_width: int = 64
    pad_value: Literal[-1, 0, 1] = 0
    stem: str = "cifar"

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("stem_width")
        self.require_positive("rounding")
        stages, factors = len(self.stage_sizes), len(self.reduction)
        rule = f"must give a factor for each transition; {stages} stages have {stages - 1}"
        self.require("reduction", factors == stages - 1, rule)
        self.require("reduction", min(self.reduction, default=1) >= 1, "must be at least 1", "1 keeps all channels")

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        check_image_size(images, 1, f"this {type(self).__name__}")
        conv = partial(BinaryConv, padding=1, pad_value=self.pad_value, **self.quantizers)
        place = {"conv": conv, "activation": self.unless_quantized(nn.relu)}
        intermediates = {}
        x = stem_layers(images, self.stem_width, self.stem, train=train, activation=self.stem_activation)
        for stage, layers in enumerate(self.stage_sizes, start=1):
            if stage > 1:
                x = Transition(self.reduced(stage, x), name=f"transition{stage - 1}")(x, train=train)
            for index in range(1, layers + 1):
                x = self.layer(stage, index, **place)(x, train=train, progress=progress)
            intermediates[f"stage{stage}"] = x
        intermediates["features"] = x = nn.relu(BatchNorm(name="norm")(x, train=train)).mean((1, 2))
        return self.classify(x), intermediates

    @nn.nowrap
    def reduced(self, stage: int, x: Array) -> int:
        """Channels with which x enters `stage`, after checks of what only the image and the width decide."""
        name, reduction = type(self).__name__, self.reduction[stage - 2]
        if min(x.shape[1:3]) < 2:
            raise ValueError(
                f"`images` are too small for {len(self.stage_sizes)} stages of {name} with the {self.stem} stem: "
                f"{x.shape[1]}x{x.shape[2]} pixels are left before stage {stage}; use larger ones or fewer stages"
            )
        features = transition_features(x.shape[-1], reduction, self.rounding)
        if features < 1:
            raise ValueError(
                f"`reduction` (={reduction!r}) of {name} leaves none of {x.shape[-1]} channels for stage {stage} at "
                f"`rounding` {self.rounding}; use a smaller one or `rounding` 1"
            )
        return features


class BinaryDenseNet(DenseNetwork):
    r"""DenseNet without bottlenecks, its 3x3 convolutions binary.

    stem conv -> BN -> ReLU [-> max pool] -> dense layers
    -> [BN -> max pool 2 -> ReLU -> conv 1x1 -> dense layers] for each further stage
    -> BN -> ReLU -> global mean -> dense

    A dense layer is x -> concat[x, conv3x3(sign(BN(x)))].  Stem, 1x1 convolutions and the last layer are in full
    precision; in the others ReLU takes the place of sign where inputs stay real.

    Attributes, returns and errors: see :class:`DenseNetwork`.

    Reference: Bethge et al., Back to Simplicity: How to Train Accurate BNNs from Scratch?, 2019, arXiv:1906.08637.
    """

    width: int = 64

    stem_activation = staticmethod(nn.relu)

    @nn.nowrap
    def layer(self, stage, index, **place):
        return DenseLayer(self.width, name=f"stage{stage}_layer{index}", **place)


class IGPDenseNet(DenseNetwork):
    r"""Improved-gradient-path DenseNet: dense stages of two-column blocks.

    stem conv -> BN [-> max pool] -> blocks
    -> [BN -> max pool 2 -> ReLU -> conv 1x1 -> blocks] for each further stage -> BN -> ReLU -> global mean -> dense

    A block is x -> concat[x, join(b, c)], see :class:`IGPDenseBlock`.  Stem, 1x1 convolutions and the last layer are in
    full precision.

    The paper's exact form could not be confirmed; this is a reading.  Its reductions are not published.  Those of the
    named networks are fitted: operations agree, and storage, 34.24 and 41.24 Mbit, is 0.3 below the published 34.5 and
    41.5, as our BinaryDenseNet51 and 69 are below theirs; other reductions fit as well.

    Attributes:
      width: the growth, filters that each block adds.
      stage_sizes: blocks in each stage, three convolutions a block.
      reduction: factor by which each transition divides the channels, one fewer than stages; fitted, not published.
      join: "mean" or "sum" of a block's two paths.
      others: see :class:`DenseNetwork`.

    Returns:
      (logits, intermediates), as :class:`DenseNetwork`.

    Raises:
      ValueError: for another `join`, and as :class:`DenseNetwork`.

    Reference: Zhu, Hofstee, Lee and Al-Ars, Improving Gradient Paths for Binary Convolutional Neural Networks, TU
    Delft; an earlier form is SoFAr, 2020, arXiv:2009.05317.
    """

    width: int = 53
    reduction: tuple[float, ...] = (1.9, 2.8, 1.9)
    rounding: int = 1
    join: str = "mean"

    # A ReLU would leave nothing negative for the first sign, which here has no batch norm before it.
    stem_activation = staticmethod(identity)

    def __post_init__(self):
        super().__post_init__()
        self.require("join", self.join in JOINS, "must be mean or sum", "mean is the default")

    @nn.nowrap
    def layer(self, stage, index, **place):
        return IGPDenseBlock(self.width, join=self.join, name=f"stage{stage}_block{index}", **place)


binary_densenet28 = partial(BinaryDenseNet, stage_sizes=(6, 6, 6, 5), reduction=(2.7, 2.7, 2.2), stem="imagenet")
"""BinaryDenseNet28: growth 64, for ImageNet."""

binary_densenet37 = partial(BinaryDenseNet, stage_sizes=(6, 8, 12, 6), reduction=(3.3, 3.3, 4.0), stem="imagenet")
"""BinaryDenseNet37: growth 64, for ImageNet."""

binary_densenet45 = partial(BinaryDenseNet, stage_sizes=(6, 12, 14, 8), reduction=(2.7, 3.3, 4.0), stem="imagenet")
"""BinaryDenseNet45: growth 64, for ImageNet."""

binary_densenet51 = partial(
    BinaryDenseNet, width=32, stage_sizes=(12, 12, 12, 10), reduction=(2.7, 2.7, 2.2), rounding=1, stem="imagenet"
)
"""BinaryDenseNet51(32) of Zhu et al., as we read it: BinaryDenseNet28 with half the growth in twice the layers."""

binary_densenet69 = partial(
    BinaryDenseNet, width=32, stage_sizes=(12, 16, 24, 12), reduction=(3.3, 3.3, 4.0), rounding=1, stem="imagenet"
)
"""BinaryDenseNet69(32) of Zhu et al., as we read it: BinaryDenseNet37 with half the growth in twice the layers."""

igp_densenet51 = partial(IGPDenseNet, width=53, stage_sizes=(6, 6, 6, 5), reduction=(1.9, 2.8, 1.9), stem="imagenet")
"""IGP-DenseNet51(53) with fitted reductions, for ImageNet."""

igp_densenet69 = partial(IGPDenseNet, width=48, stage_sizes=(6, 8, 12, 6), reduction=(2.1, 2.0, 3.7), stem="imagenet")
"""IGP-DenseNet69(48) with fitted reductions, for ImageNet."""

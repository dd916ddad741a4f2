r"""Fractal residual networks: short gradient paths through many thin binary convolutions."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays
from bnn_jax.layers import BatchNorm, BinaryConv, mean_pool
from bnn_jax.models.network import Network, check_image_size, identity, stem_layers

JOINS = ("mean", "sum")


def join_paths(long: Array, short: Array, join: str) -> Array:
    """The mean of two parallel paths, which keeps a shortcut's gain at 1, or their sum."""
    return (long + short) / 2 if join == "mean" else long + short


class FractalBlock(nn.Module):
    r"""Binary convolutions with shortcuts, in columns that double in depth.

    f_1(x)     = x + BN(conv3x3(sign x))
    f_{C+1}(x) = join(f_C(f_C(x)), f_1(x))

    With C columns the longest path has 2^(C-1) convolutions and the block 2^C - 1.  ReLU takes the place of sign where
    inputs stay real.

    Attributes:
      columns: C, at least 1.
      join: "mean" or "sum"; with the sum the identity path has gain G_{C+1} = G_C^2 + 1 = 2, 5, 26, ... instead of 1.
      conv: makes a convolution, 3x3 unless told otherwise.
      activation: in front of each, where the convolutions take real inputs.

    Reference: Larsson et al., FractalNet, 2017, arXiv:1605.07648; unit of Liu et al., Bi-Real Net, 2018.
    """

    columns: int
    join: str = "mean"
    conv: Callable[..., nn.Module] = partial(BinaryConv, padding=1)
    activation: Callable[[Array], Array] = identity

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float = 1.0
    ) -> Float[Array, "batch h w channels"]:
        y = self.conv(x.shape[-1], name="conv")(self.activation(x), train=train, progress=progress)
        short = x + BatchNorm(name="norm")(y, train=train)
        if self.columns == 1:
            return short
        deeper = partial(FractalBlock, self.columns - 1, self.join, self.conv, self.activation)
        long = deeper(name="first")(x, train=train, progress=progress)
        long = deeper(name="second")(long, train=train, progress=progress)
        return join_paths(long, short, self.join)


class IGPResNet(Network):
    r"""Improved-gradient-path ResNet: stages of fractal blocks, each at one width.

    stem conv -> BN [-> max pool] -> fractal blocks of width w
    -> mean pool 2 -> conv 1x1 -> BN -> fractal blocks of width 2w -> ... -> global mean -> dense

    A stage with c columns and longest path d is d / 2^(c-1) fractal blocks in a row, d + d/2 + ... (c terms)
    convolutions.  Stem, 1x1 convolutions and dense layer are in full precision.  The name counts the layers on the
    longest path: stem, one 1x1 convolution between stages, the depths, the dense layer.

    The paper's exact form could not be confirmed; this is a reading whose storage equals the published one.  It does
    not state the join, nor where batch norm follows the 1x1 convolutions; the mean and the batch norm are our choices.

    Attributes:
      width: filters of the first stage; each further stage has twice as many.
      columns, depths: of each stage; any number of stages.
      join: "mean" or "sum", see :class:`FractalBlock`.
      input_quantizer, kernel_quantizer: of the convolutions in the blocks.
      stem: "cifar" or "imagenet", see :func:`bnn_jax.models.network.stem_layers`.
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates), as :class:`bnn_jax.models.network.Network`.

    Raises:
      ValueError: for another `join` or `stem`, a `width` < 1, no stages, `columns` and `depths` of unequal lengths or
        that do not fit, and images that the pools use up.

    Reference: Zhu, Hofstee, Lee and Al-Ars, Improving Gradient Paths for Binary Convolutional Neural Networks, TU
    Delft; an earlier form is SoFAr, 2020, arXiv:2009.05317.
    """

    width: int = 53
    columns: tuple[int, ...] = (3, 3, 3, 3)
    depths: tuple[int, ...] = (4, 4, 4, 4)
    join: str = "mean"
    stem: str = "cifar"

    def __post_init__(self):
        super().__post_init__()
        self.require("join", self.join in JOINS, "must be mean or sum", "mean keeps shortcuts at gain 1")
        check_stages(self.columns, self.depths)

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        check_image_size(images, 1, "an IGPResNet")
        phase = {"train": train, "progress": progress}
        conv = partial(BinaryConv, padding=1, **self.quantizers)
        activation, intermediates = self.unless_quantized(nn.relu), {}
        # A ReLU would leave nothing negative for the first sign.
        x = stem_layers(images, self.width, self.stem, train=train)
        for stage, (columns, depth) in enumerate(zip(self.columns, self.depths), start=1):
            if stage > 1:
                if min(x.shape[1:3]) < 2:
                    raise ValueError(
                        f"`images` (of {images.shape[1]}x{images.shape[2]}) are too small for {len(self.columns)} "
                        f"stages of IGPResNet with the {self.stem} stem; use larger ones or fewer stages"
                    )
                x = mean_pool(x, (2, 2), (2, 2))
                x = BinaryConv(2 * x.shape[-1], kernel_size=(1, 1), name=f"stage{stage}_widen")(x)
                x = BatchNorm(name=f"stage{stage}_norm")(x, train=train)
            for block in range(1, depth // 2 ** (columns - 1) + 1):
                name = f"stage{stage}_block{block}"
                x = FractalBlock(columns, self.join, conv, activation, name=name)(x, **phase)
            intermediates[f"stage{stage}"] = x
        intermediates["features"] = x = x.mean((1, 2))
        return self.classify(x), intermediates


def check_stages(columns: tuple[int, ...], depths: tuple[int, ...]) -> None:
    """Refuse stages that fractal blocks cannot fill: the depth of c columns is a positive multiple of 2^(c-1)."""
    if not columns or min(columns) < 1:
        raise ValueError(f"`columns` (={columns!r}) of IGPResNet must be at least 1 for each of one or more stages")
    if len(depths) != len(columns):
        raise ValueError(f"`depths` (={depths!r}) of IGPResNet must give one depth for each of `columns` {columns!r}")
    units = tuple(2 ** (column - 1) for column in columns)
    if any(depth < 1 or depth % unit for depth, unit in zip(depths, units)):
        fitting = tuple(unit * max(1, -(-depth // unit)) for depth, unit in zip(depths, units))
        raise ValueError(
            f"`depths` (={depths!r}) of IGPResNet must be positive multiples of 2^(columns - 1), here {units}; "
            f"take {fitting}"
        )


igp_resnet21 = partial(IGPResNet, width=53, columns=(3, 3, 3, 3), depths=(4, 4, 4, 4), stem="imagenet")
"""IGP-ResNet21(53): 7 convolutions a stage, for ImageNet."""

igp_resnet37 = partial(IGPResNet, width=41, columns=(4, 4, 4, 4), depths=(8, 8, 8, 8), stem="imagenet")
"""IGP-ResNet37(41): 15 convolutions a stage, for ImageNet."""

igp_resnet41 = partial(IGPResNet, width=48, columns=(3, 3, 3, 3), depths=(8, 8, 12, 8), stem="imagenet")
"""IGP-ResNet41(48): 14, 14, 21 and 14 convolutions in the stages, for ImageNet."""

igp_resnet69 = partial(IGPResNet, width=31, columns=(5, 5, 5, 5), depths=(16, 16, 16, 16), stem="imagenet")
"""IGP-ResNet69(31): 31 convolutions a stage, for ImageNet."""

r"""Bi-Real Net, one binary convolution a shortcut, its bottlenecks and its small variants EBi-Real and FTBNN."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from bnn_jax.errors import unknown_name
from bnn_jax.layers import BatchNorm, PReLU, avg_pool_2x2
from bnn_jax.models.network import stem_layers
from bnn_jax.models.residual import Block, ResidualNetwork, pool_and_project


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


class BiRealBlock(Block):
    r"""Units u(x) = BN(conv 3x3(q(x))) + S(x) [-> PReLU], one or two; [S(x) once more around the two].

    S(x) = x, or where the shape changes  average pool 2 -> conv 1x1 in full precision -> BN
    """

    units: int
    activation: Callable[[Array], Array]
    outer_shortcut: bool
    trainable_slopes: bool

    @nn.compact
    def __call__(self, x, *, train: bool, progress: Array | float):
        for unit in range(1, self.units + 1):
            stride = self.stride if unit == 1 else 1
            conv = self.conv(self.features, strides=(stride, stride), name=f"conv{unit}")
            y = conv(self.activation(x), train=train, progress=progress)
            y = BatchNorm(name=f"norm{unit}")(y, train=train)
            if unit == 1:
                x = shortcut = pool_and_project(x, self.features, stride, train=train)
            x = x + y
            x = PReLU(both_slopes=True, name=f"activation{unit}")(x) if self.trainable_slopes else x
        return x + shortcut if self.outer_shortcut else x


def with_same_padding(conv: Callable[..., nn.Module], same_padding: bool) -> Callable[..., nn.Module]:
    """The constructor `conv`, padded as TensorFlow's "same" if wanted."""
    return partial(conv, padding="SAME") if same_padding else conv


def _check_activation(network: ResidualNetwork) -> None:
    if network.activation not in REAL_ACTIVATIONS:
        raise unknown_name(f"{type(network).__name__}.activation", network.activation, REAL_ACTIVATIONS)


class BiRealNet(ResidualNetwork):
    r"""Residual network with a shortcut around every binary convolution.

    stem without ReLU -> stages of units, widths w, 2w, 4w, ..., stride 2 between them -> global mean -> dense
    unit:  u(x) = BN(conv 3x3(q(x))) + S(x),  S(x) = x, or where the shape changes  average pool 2 -> conv 1x1 -> BN

    The stem, the 1x1 convolutions and the dense layer are in full precision.  The variants:

    EBi-Real (`outer_shortcut`): y = u2(u1(x)) + S(x) for each pair of units, the ordinary residual network's shortcut
      on top of the two.  That S(x) is the one of u1, not a second one with weights of its own, is a reading.
    FTBNN (`trainable_slopes`): u(x) goes through a PReLU whose two slopes are learned for each channel.  The paper's
      exact form could not be confirmed; this is a reading.

    Attributes:
      stage_sizes: units in each stage, one convolution a unit.
      input_quantizer, kernel_quantizer: of the convolutions in the units.
      activation: takes the input quantizer's place where that is None: "relu", "leaky_clip" or "clip", the first three
        steps of training in stages; not used otherwise.
      outer_shortcut: add S(x) once more after every second unit.
      trainable_slopes: end every unit with a PReLU.
      same_padding: pad as TensorFlow's "same", as Larq Zoo's weights need it; PyTorch's pad both sides.
      others: see :class:`bnn_jax.models.residual.ResidualNetwork`.

    Returns:
      (logits, intermediates), as :class:`bnn_jax.models.residual.ResidualNetwork`.

    Raises:
      ValueError: if `num_classes` or `width` is below 1, a stage is empty, a stage's size is odd with `outer_shortcut`,
        or for another `activation` or `stem`.

    Reference: Liu et al., Bi-Real Net, 2018, arXiv:1808.00278; Zhu et al., Improving Gradient Paths for Binary
    Convolutional Neural Networks, TU Delft (EBi-Real); Su et al., FTBNN: Rethinking Non-linearity for 1-bit CNNs and
    Going Beyond, 2020, arXiv:2010.09294.
    """

    stage_sizes: tuple[int, ...] = (4, 4, 4, 4)
    activation: str = "relu"
    outer_shortcut: bool = False
    trainable_slopes: bool = False
    same_padding: bool = False

    counts_units = True

    def __post_init__(self):
        super().__post_init__()
        _check_activation(self)
        holds = not self.outer_shortcut or all(units % 2 == 0 for units in self.stage_sizes)
        rule = "must be even with `outer_shortcut`, which spans two units"
        self.require("stage_sizes", holds, rule, "turn it off for odd stages")

    @property
    def quantized_conv(self):
        return with_same_padding(super().quantized_conv, self.same_padding)

    @nn.nowrap
    def begin(self, images, train):
        return stem_layers(images, self.width, self.stem, train=train, same_padding=self.same_padding)

    @nn.nowrap
    def block(self, **place):
        return BiRealBlock(
            activation=self.unless_quantized(REAL_ACTIVATIONS[self.activation]),
            outer_shortcut=self.outer_shortcut,
            trainable_slopes=self.trainable_slopes,
            **place,
        )


class BiRealBottleneck(Block):
    r"""conv 1x1 -> BN, conv 3x3 -> BN plus its own shortcut, conv 1x1 -> BN plus the shortcut around the three.

    The inner shortcut is parameter-free, where the 3x3 convolution has a stride an average pool 2; the outer one is x,
    or where the shape changes  average pool 2 -> conv 1x1 in full precision -> BN.
    """

    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float):
        def unit(number, y, features, **geometry):
            conv = self.conv(features, name=f"conv{number}", **geometry)
            y = conv(self.activation(y), train=train, progress=progress)
            return BatchNorm(name=f"norm{number}")(y, train=train)

        inner, pointwise = max(1, self.features // 4), {"kernel_size": (1, 1), "padding": 0}
        y = unit(1, x, inner, **pointwise)
        shortcut = avg_pool_2x2(y) if self.stride > 1 else y
        y = unit(2, y, inner, strides=(self.stride, self.stride)) + shortcut
        return unit(3, y, self.features, **pointwise) + pool_and_project(x, self.features, self.stride, train=train)


class BiRealBottleneckNet(ResidualNetwork):
    r"""Bi-Real Net of bottlenecks.

    stem -> stages of blocks, widths w, 2w, 4w, ..., stride 2 between them -> global mean -> dense.  Block: see
    :class:`BiRealBottleneck`; its 1x1 convolutions are binary too.  The stem, of w/4 filters without ReLU, the 1x1
    convolutions on the shortcuts and the dense layer are in full precision; an activation takes the quantizer's place
    where inputs stay real.  Which of a bottleneck's convolutions have shortcuts of their own could not be confirmed;
    this is a reading.

    Attributes:
      stage_sizes: blocks in each stage, three convolutions a block.
      width: channels of the first stage, four times the filters of its 3x3 convolutions.
      activation: takes the input quantizer's place where that is None, as that of :class:`BiRealNet`.
      input_quantizer, kernel_quantizer: of the convolutions in the blocks.
      others: see :class:`bnn_jax.models.residual.ResidualNetwork`.

    Reference: Liu et al., Bi-Real Net: Binarizing Deep Network Towards Real-Network Performance, IJCV 2020,
    arXiv:1811.01335.
    """

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 256
    activation: str = "relu"

    def __post_init__(self):
        super().__post_init__()
        _check_activation(self)

    @nn.nowrap
    def begin(self, images, train):
        return stem_layers(images, max(1, self.width // 4), self.stem, train=train)

    @nn.nowrap
    def block(self, **place):
        return BiRealBottleneck(activation=self.unless_quantized(REAL_ACTIVATIONS[self.activation]), **place)


bireal18 = partial(BiRealNet, stage_sizes=(4, 4, 4, 4))
"""Bi-Real Net with 18 layers."""

bireal34 = partial(BiRealNet, stage_sizes=(6, 8, 12, 6))
"""Bi-Real Net with 34 layers."""

bireal50 = partial(BiRealBottleneckNet, stage_sizes=(3, 4, 6, 3), width=256)
"""Bi-Real Net with 50 layers."""

bireal_resnet20 = partial(BiRealNet, stage_sizes=(6, 6, 6), width=16, stem="cifar")
"""ResNet-20 for 32x32 images with Bi-Real Net's units."""

ebireal18 = partial(BiRealNet, stage_sizes=(4, 4, 4, 4), outer_shortcut=True)
"""EBi-Real Net with 18 layers: Bi-Real Net with the ordinary shortcuts around two units on top."""

ebireal34 = partial(BiRealNet, stage_sizes=(6, 8, 12, 6), outer_shortcut=True)
"""EBi-Real Net with 34 layers: Bi-Real Net with the ordinary shortcuts around two units on top."""

ftbnn_resnet18 = partial(BiRealNet, stage_sizes=(4, 4, 4, 4), trainable_slopes=True)
"""FTBNN's ResNet-18: Bi-Real Net with a fully trainable PReLU after each unit."""

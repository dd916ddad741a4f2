r"""PokeBNN: bottlenecks of binary convolutions with many parameter-free shortcuts, gates and learned activations."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.layers import BatchNorm, BinaryConv, ChannelGate, RPReLU, mean_pool
from bnn_jax.models.residual import Block, ResidualNetwork


def reshape_add(y: Float[Array, "batch h w features"], x: Float[Array, "batch rows columns channels"], tile: bool):
    """y plus x in the shape of y, without parameters.

    Of more channels than y's x has the means of neighbours; fewer are repeated with `tile`, else followed by zeros.
    Where y has fewer pixels, x has the means over 3x3 of them, stride 2, zeros around it.

    >>> y, x = jnp.zeros((1, 1, 1, 2)), jnp.arange(4.0).reshape(1, 1, 1, 4)
    >>> reshape_add(y, x, tile=False).ravel(), reshape_add(jnp.zeros((1, 1, 1, 4)), x[..., :2], tile=True).ravel()
    (Array([0.5, 2.5], dtype=float32), Array([0., 1., 0., 1.], dtype=float32))

    Reference: Zhang et al., PokeBNN: A Binary Pursuit of Lightweight Accuracy, CVPR 2022, arXiv:2112.00133.
    """
    features, channels = y.shape[-1], x.shape[-1]
    if channels > features:
        x = x[..., : channels // features * features]
        x = x.reshape(*x.shape[:-1], features, channels // features).mean(-1)
    elif tile and channels < features:
        x = jnp.concatenate([x] * (features // channels), -1)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))
    return y + (mean_pool(x, 3, 2, "SAME") if x.shape[1:3] != y.shape[1:3] else x)


class PokeBlock(Block):
    r"""Three PokeConvs, 1x1, 3x3, 1x1:  BN(gate(x) DPReLU(BN(conv(x)) + shortcuts)).

    Each has its input x for a shortcut, the last the block's input as well, see :func:`reshape_add`; the gate is that
    of squeeze-and-excitation with a hard sigmoid.
    """

    activation: Callable[[Array], Array]
    zero_scale: bool
    gate_reduction: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float):
        def poke(number, x, features, around=None, **geometry):
            conv = self.conv(features, name=f"conv{number}", **geometry)
            y = conv(self.activation(x), train=train, progress=progress)
            init = nn.initializers.zeros if self.zero_scale and around is not None else nn.initializers.ones
            y = BatchNorm(name=f"norm{number}", scale_init=init)(y, train=train)
            y = reshape_add(y, x, tile=False)
            y = y if around is None else reshape_add(y, around, tile=True)
            y = RPReLU(both_slopes=True, name=f"activation{number}")(y)
            reduction = min(self.gate_reduction, x.shape[-1])
            gate = ChannelGate(features, reduction, True, jax.nn.hard_sigmoid, name=f"gate{number}")
            return BatchNorm(name=f"gate_norm{number}")(y * gate(x), train=train)

        inner, pointwise = max(1, self.features // 4), {"kernel_size": (1, 1), "padding": 0}
        y = poke(1, x, inner, **pointwise)
        y = poke(2, y, inner, strides=(self.stride, self.stride))
        return poke(3, y, self.features, around=x, **pointwise)


class PokeBNN(ResidualNetwork):
    r"""Bottlenecks of binary convolutions with many shortcuts, gates and learned activations (PokeBNN).

    stem: conv 4x4/4, s/2 filters -> BN -> DPReLU -> conv 3x3 in s/2 groups, s -> BN -> DPReLU
    -> stages of blocks, widths w, 2w, 4w, ..., stride 2 between them -> global mean -> dense;  block: see
    :class:`PokeBlock`

    The paper's network computes its stem and last layer in 8 bits and its gates in 4; here they are in full precision.
    The clipping of its binary activations at 3 is a reading, and that the batch norm behind a convolution takes the
    place of a scale of its kernel.

    Attributes:
      stage_sizes: blocks in each stage, three convolutions a block.
      width: channels of the first stage, four times the filters of its 3x3 convolutions.
      stem_width: s, even.
      zero_scale: start the batch norm behind a block's last convolution with a scale of 0, so that the block does
        nothing but its shortcuts.
      gate_reduction: how many channels become one in a gate.
      stem: "imagenet", or "cifar" with a first convolution 3x3 of stride 1.
      input_quantizer, kernel_quantizer: of the convolutions in the blocks; a ReLU takes the quantizer's place where
        inputs stay real.
      others: see :class:`bnn_jax.models.residual.ResidualNetwork`.

    Raises:
      ValueError: for an odd `stem_width`, and as :class:`bnn_jax.models.residual.ResidualNetwork`.

    Reference: Zhang et al., PokeBNN: A Binary Pursuit of Lightweight Accuracy, CVPR 2022, arXiv:2112.00133; google/aqt.
    """

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 256
    stem_width: int = 64
    zero_scale: bool = True
    gate_reduction: int = 8

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("gate_reduction")
        holds = self.stem_width % 2 == 0 and self.stem_width > 0
        self.require("stem_width", holds, "must be even and positive", "64 is usual")

    @nn.nowrap
    def begin(self, images, train):
        half, size = self.stem_width // 2, 4 if self.stem == "imagenet" else 3
        x = BinaryConv(half, kernel_size=size, strides=4 if size == 4 else 1, name="stem")(images)
        x = RPReLU(both_slopes=True, name="stem_activation")(BatchNorm(name="stem_norm")(x, train=train))
        x = BinaryConv(self.stem_width, feature_group_count=half, name="stem_group")(x)
        x = BatchNorm(name="stem_group_norm")(x, train=train)
        return RPReLU(both_slopes=True, name="stem_group_activation")(x)

    @nn.nowrap
    def block(self, **place):
        own = {"zero_scale": self.zero_scale, "gate_reduction": self.gate_reduction}
        return PokeBlock(activation=self.unless_quantized(nn.relu), **own, **place)


pokebnn = partial(PokeBNN, stage_sizes=(3, 4, 6, 3), width=256)
"""PokeBNN-1.0x: the stages of ResNet-50."""

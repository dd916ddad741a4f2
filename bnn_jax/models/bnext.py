r"""BNext: ReActNet-A's plan of blocks, with gates that see input and output, and attention by elements."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bnn_jax.layers import BatchNorm, ChannelGate, PReLU, avg_pool_2x2
from bnn_jax.models.mobilenet import ReActNetA
from bnn_jax.models.residual import Block


class Processor(nn.Module):
    r"""A binary convolution whose gate sees a learned mix of its input and output (information recoupling).

    z = PReLU(BN(conv(RSign(x)))),  gate = SE(s x + (1 - s) z),  s a share a channel in [0, 1], 0.5 at the start
    plain      BN(gate z) + x
    attention  BN(gate z r) + r,  r = PReLU(x)

    Where the convolution has a stride, x in gate and shortcut is averaged over 2x2.
    """

    kernel_size: int
    stride: int
    attention: bool
    gate_reduction: int
    conv: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float):
        channels, geometry = x.shape[-1], {"kernel_size": self.kernel_size, "padding": self.kernel_size // 2}
        conv = self.conv(channels, strides=self.stride, name="conv", **geometry)
        z = BatchNorm(name="norm")(conv(x, train=train, progress=progress), train=train)
        z = PReLU(name="activation")(z)
        residual = PReLU(name="input_activation")(x) if self.attention else x
        x, residual = (avg_pool_2x2(y) if self.stride > 1 else y for y in (x, residual))
        share = self.param("share", nn.initializers.constant(0.5), (channels,))
        share = (share + lax.stop_gradient(jnp.clip(share, 0, 1) - share)).astype(x.dtype)[None, None, None]
        gate = ChannelGate(channels, min(self.gate_reduction, channels), True, name="gate")(share * x + (1 - share) * z)
        z = gate * z * residual if self.attention else gate * z
        return BatchNorm(name="gate_norm")(z, train=train) + residual


class BNextBlock(Block):
    """A 3x3 processor, with attention in every second block, and a 1x1 one, or two side by side to double channels."""

    attention: bool
    gate_reduction: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float):
        phase, shared = {"train": train, "progress": progress}, (self.gate_reduction, self.conv)
        x = Processor(3, self.stride, self.attention, *shared, name="spatial")(x, **phase)
        copies = range(1, self.features // x.shape[-1] + 1)
        pointwise = [Processor(1, 1, False, *shared, name=f"pointwise{copy}")(x, **phase) for copy in copies]
        return jnp.concatenate(pointwise, -1)


class BNext(ReActNetA):
    r"""BNext: binary convolutions with gates that see input and output, on the plan of ReActNet-A.

    stem conv 3x3 -> BN -> stages of blocks, widths 2w, 4w, ... -> PReLU -> global mean -> dense.  Each stage but the
    first has stride 2 at its start; a stage's first block doubles the channels.  Block: see :class:`BNextBlock`.  Stem,
    gates and dense layer are in full precision.  Without `input_quantizer` nothing takes RSign's place.

    Attributes:
      stage_sizes: blocks in each stage, a 3x3 and one or two 1x1 convolutions a block.
      width: filters of the stem.
      input_quantizer, kernel_quantizer: of the blocks' convolutions.
      stem: "imagenet" has stride 2, "cifar" stride 1; there is no pool.
      gate_reduction: how many channels become one in a gate.
      others: see :class:`bnn_jax.models.residual.ResidualNetwork`.

    Reference: Guo et al., Join the High Accuracy Club on ImageNet with A Binary Neural Network Ticket, 2022,
    arXiv:2211.12933; hpi-xnor/BNext.
    """

    gate_reduction: int = 8

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("gate_reduction")

    @nn.nowrap
    def block(self, *, features, name, **place):
        stage, block = (int(part.lstrip("stageblock")) for part in name.split("_"))
        number = sum(self.stage_sizes[: stage - 1]) + block
        own = {"attention": number % 2 == 0, "gate_reduction": self.gate_reduction}
        return BNextBlock(features=2 * features, name=name, **own, **place)

    @nn.nowrap
    def end(self, x, train):
        return PReLU(name="activation")(x).mean((1, 2))


bnext_tiny = partial(BNext, stage_sizes=(1, 2, 2, 6, 2), width=32, stem="imagenet")
"""BNext-T: 13 blocks, 32 filters in the stem to 1024."""

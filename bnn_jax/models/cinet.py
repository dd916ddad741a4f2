r"""CI-Net: a plain binary residual network whose channels correct one another along given edges."""

from collections.abc import Mapping
from dataclasses import field
from functools import partial

import flax.linen as nn
from flax.core import freeze
from jaxtyping import Array, Float

from bnn_jax.errors import unknown_name
from bnn_jax.layers import BatchNorm, ChannelInteractions
from bnn_jax.layers.gates import Edge
from bnn_jax.models.residual import Block, ResidualNetwork, pool_and_project


class InteractingBlock(Block):
    """hardtanh(BN( conv(sign(y)) + shortcut(x) )), y = hardtanh(BN(conv(sign(x)))); each conv followed by its edges.

    The network's last block leaves out the outer BN and hardtanh, which follow after the global mean.
    """

    last: bool
    binary_downsampling: bool
    edges: Mapping[str, tuple[Edge, ...]]
    interactions: partial

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float):
        def conv(name, x, stride=1, **geometry):
            y = self.conv(self.features, strides=(stride, stride), name=name, **geometry)
            y = y(x, train=train, progress=progress)
            return self.interactions(edges=self.edges.get(name, ()), name=f"{name}_interactions")(y)

        y = nn.hard_tanh(BatchNorm(name="norm1")(conv("conv1", x, self.stride), train=train))
        y = conv("conv2", y)
        if x.shape == y.shape or not self.binary_downsampling:
            x = pool_and_project(x, self.features, self.stride, train=train)
        else:
            x = conv("downsample", x, self.stride, kernel_size=(1, 1), padding=0)
            x = BatchNorm(name="downsample_norm")(x, train=train)
        y = y + x
        return y if self.last else nn.hard_tanh(BatchNorm(name="norm2")(y, train=train))


class CINet(ResidualNetwork):
    r"""Residual network of plain signs with channel-wise interactions.

    stem -> hardtanh -> stages of blocks, widths w, 2w, 4w, ..., stride 2 between them -> global mean -> BN -> hardtanh
    -> dense.  Block: hardtanh(BN( conv2(sign(y)) + shortcut(x) )) with y = hardtanh(BN(conv1(sign(x)))), as in the
    authors' release for small images.  The stem and the dense layer are in full precision.  Hardtanh is the
    nonlinearity of the full-precision network too.

    The graph of interactions, which the paper finds by reinforcement learning while it trains, is given here, layer by
    layer; without edges this is a plain binary network.

    Attributes:
      stage_sizes: blocks in each stage, two convolutions a block.
      input_quantizer, kernel_quantizer: of all convolutions but the stem; the method's are ste_sign and binary.
      binary_downsampling: quantize the 1x1 convolutions on the shortcuts, with stride; otherwise they are an average
        pool and a full-precision convolution.
      edges: layer -> its (source, target, level) edges, see :class:`bnn_jax.layers.ChannelInteractions`.  Layers are
        named as "stage2_block1/conv1", "/conv2" and, where binary, "/downsample".
      thresholds, step, symmetric: of the corrections; in units of the convolutions' outputs, which are integers where
        both quantizers have scale 1.
      others: see :class:`bnn_jax.models.residual.ResidualNetwork`.

    Returns:
      (logits, intermediates), as :class:`bnn_jax.models.residual.ResidualNetwork`.

    Raises:
      ValueError: for another `stem`, an unknown layer in `edges` (the nearest is named), or edges that its channels or
        the thresholds do not allow.

    Reference: Wang et al., Learning Channel-wise Interactions for Binary Convolutional Neural Networks, CVPR 2019.
    """

    stem: str = "cifar"
    binary_downsampling: bool = True
    edges: Mapping[str, tuple[Edge, ...]] = field(default_factory=dict)
    thresholds: tuple[float, ...] = (200,)
    step: float = 100
    symmetric: bool = False

    def __post_init__(self):
        super().__post_init__()
        known = self._layers()
        for layer in self.edges:
            if layer not in known:
                raise unknown_name("edges", layer, known)
        # Hashable, so that the network can be a static argument of a jitted function.
        object.__setattr__(self, "edges", freeze({k: tuple(map(tuple, edges)) for k, edges in self.edges.items()}))

    def _layers(self):
        names = []
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                shortcut = ("downsample",) if self.binary_downsampling and stage > 0 and block == 0 else ()
                names += [f"stage{stage + 1}_block{block + 1}/{conv}" for conv in ("conv1", "conv2", *shortcut)]
        return names

    @nn.nowrap
    def begin(self, images, train):
        return nn.hard_tanh(super().begin(images, train))

    @nn.nowrap
    def block(self, *, name, **place):
        options = {"thresholds": self.thresholds, "step": self.step, "symmetric": self.symmetric}
        layers = {layer.split("/")[1]: edges for layer, edges in self.edges.items() if layer.split("/")[0] == name}
        return InteractingBlock(
            last=name == f"stage{len(self.stage_sizes)}_block{self.stage_sizes[-1]}",
            binary_downsampling=self.binary_downsampling,
            edges=layers,
            interactions=partial(ChannelInteractions, **options),
            name=name,
            **place,
        )

    @nn.nowrap
    def end(self, x, train):
        return nn.hard_tanh(BatchNorm(name="norm")(x.mean((1, 2)), train=train))


cinet_resnet18 = partial(CINet, stage_sizes=(2, 2, 2, 2), width=64, stem="imagenet")
"""CI-Net on ResNet-18, its downsampling binary too; without `edges` a plain binary ResNet-18."""

"""The skeleton of the residual networks: stem, stages of blocks, head."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays
from bnn_jax.layers import BatchNorm, BinaryConv, avg_pool_2x2
from bnn_jax.models.network import Network, check_image_size, stem_layers


class Block(nn.Module):
    """What every block is told: its filters, the stride of its first convolution, and what makes its convolutions."""

    features: int
    stride: int
    conv: Callable[..., nn.Module]


class ResidualNetwork(Network):
    r"""stem -> stages of blocks, widths w, 2w, 4w, ..., stride 2 between them -> global mean -> dense.

    A family says what its `block` is, and where it begins (`begin`) or ends (`end`) in another way.  All give their
    parameters the same names, so that weights pass from one to another:

      stem, stem_norm                            the first convolution and its batch norm
      stage1_block2/conv1, norm1, conv2, norm2   in the order of the convolutions; so too activation1, gate1, ...
      stage2_block1/downsample, downsample_norm  on the shortcut where the shape changes
      norm, head                                 behind the last stage

    A block holds two convolutions.  Where each has a shortcut of its own, a unit, `stage_sizes` counts units, and the
    last block of an odd stage holds one.

    Attributes:
      stage_sizes: blocks in each stage, two convolutions a block; or units, one convolution a unit.
      width: filters of the first stage.
      stem: "cifar" (3x3, stride 1) or "imagenet" (7x7, stride 2, and max pool), see
        :func:`bnn_jax.models.network.stem_layers`.
      others: see :class:`bnn_jax.models.network.Network`.

    Reference: He et al., Deep Residual Learning, 2016, arXiv:1512.03385.
    """

    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    stem: str = "imagenet"

    counts_units = False
    """Whether `stage_sizes` counts units, of which a block holds up to two."""

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        check_image_size(images, 1, f"this {type(self).__name__}")
        intermediates = {}
        x = self.begin(images, train)
        for stage, size in enumerate(self.stage_sizes):
            for block in range(-(-size // 2) if self.counts_units else size):
                name, stride = f"stage{stage + 1}_block{block + 1}", 2 if stage > 0 and block == 0 else 1
                place = {"features": self.width * 2**stage, "stride": stride, "conv": self.quantized_conv, "name": name}
                if self.counts_units:
                    place["units"] = min(2, size - 2 * block)
                outputs = self.block(**place)(x, train=train, progress=progress)
                x = self.report(name, outputs, intermediates)
            intermediates[f"stage{stage + 1}"] = x
        intermediates["features"] = x = self.end(x, train)
        return self.classify(x), intermediates

    @property
    def quantized_conv(self) -> Callable[..., nn.Module]:
        """The constructor of the blocks' convolutions, 3x3 unless told otherwise."""
        return partial(BinaryConv, padding=1, **self.quantizers)

    @nn.nowrap
    def begin(self, images: Array, train: bool) -> Array:
        """What the first stage sees: conv -> BN [-> max pool]; a ReLU would leave nothing negative for the signs."""
        return stem_layers(images, self.width, self.stem, train=train)

    @nn.nowrap
    def block(self, **place) -> nn.Module:
        """The block at a place: its `features`, `stride`, `conv`, `name` and, where units are counted, `units`."""
        raise NotImplementedError(f"{type(self).__name__} must say what its blocks are")

    @nn.nowrap
    def report(self, name: str, outputs: Array, intermediates: dict[str, Array]) -> Array:
        """The output of the block `name`; a family whose blocks are matched puts it among the intermediates."""
        return outputs

    @nn.nowrap
    def end(self, x: Array, train: bool) -> Array:
        """The features that the last layer sees."""
        return x.mean((1, 2))


def subsample_and_pad(x: Float[Array, "batch h w channels"], features: int, stride: int) -> Array:
    """The parameter-free shortcut (option A of He et al., 2016): every stride-th pixel, new channels zero."""
    if stride == 1 and x.shape[-1] == features:
        return x
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


def pool_and_project(x: Float[Array, "batch h w channels"], features: int, stride: int, *, train: bool) -> Array:
    """x, or where its shape changes  average pool 2 -> conv 1x1 in full precision -> BN.

    The layers are `downsample` and `downsample_norm` of the block that calls this.

    Reference: Liu et al., Bi-Real Net, 2018, arXiv:1808.00278.
    """
    if stride == 1 and x.shape[-1] == features:
        return x
    x = avg_pool_2x2(x) if stride > 1 else x
    x = BinaryConv(features, kernel_size=(1, 1), padding=0, name="downsample")(x)
    return BatchNorm(name="downsample_norm")(x, train=train)

r"""Vision transformers of binary layers, with attention from one-bit queries and keys."""

import math
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays
from bnn_jax.layers import BinaryConv, BinaryDense, Normalized, SelfAttention
from bnn_jax.layers.arguments import QUANTIZERS, make_quantizers
from bnn_jax.layers.frozen import code_sets
from bnn_jax.models.network import Network, check_image_size
from bnn_jax.precision import widened
from bnn_jax.quantizers import QuantizerLike


class MLP(nn.Module):
    r"""Two binary layers, a normalization and an activation between them: the perceptron of a block.

    y = W_2 norm(GELU(W_1 x));  of two-valued inputs the sign of W_2's quantizer stands in the GELU's place

    Attributes:
      hidden: units between the layers.
      input_quantizer, kernel_quantizer, gradient_quantizer: of both, as :class:`bnn_jax.layers.BinaryDense` takes them.
    """

    hidden: int
    input_quantizer: QuantizerLike = None
    kernel_quantizer: QuantizerLike = None
    gradient_quantizer: QuantizerLike = None

    def __post_init__(self):
        make_quantizers(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens features"], *, train: bool = False, progress: Array | float = 1.0):
        dense = partial(BinaryDense, **{kind: getattr(self, kind) for kind in QUANTIZERS})
        expand, project = dense(self.hidden, name="expand"), dense(x.shape[-1], name="project")
        hidden = expand(x, train=train, progress=progress)
        two_valued = len(code_sets(project.input_quantizer, 1)[0]) == 2
        hidden = Normalized(name="norm")(hidden if two_valued else nn.gelu(hidden))
        return project(hidden, train=train, progress=progress)


class ViT(Network):
    r"""A vision transformer whose blocks are binary by their quantizers.

    patches -> x = W_p patch + position -> [x += attention(norm(x)) -> x += mlp(norm(x))] depth times -> norm -> mean
    over the tokens -> dense;  see :class:`bnn_jax.layers.SelfAttention` and :class:`MLP`

    Every binary layer has a normalization in front, after which its quantizer takes codes.  Of two-valued inputs the
    sign stands in the GELU's place.  Patches, positions, normalizations and the head are in full precision.

    Attributes:
      width: numbers of a token, w.
      depth: blocks.
      heads: of an attention; w divided by them is the bits of a query.
      patch_size: side of a patch in pixels; pixels that fill none are left out.
      mlp_ratio: hidden units of a block's perceptron, in widths.
      binary_scores: scores of BinaryAttention with its bias for relative positions, see
        :class:`bnn_jax.layers.SelfAttention`, or real ones.
      binary_values: shares and values of an attention of one bit too, as in BiT: every product of a block is binary.
        From scratch, without BiT's distillation, it learns much less.
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with the tokens `stage1`, `stage2`, ... behind
      each block and the `features` that the last layer sees.

    Raises:
      ValueError: for sizes that are not positive, heads that do not divide the width, or images smaller than a patch.

    Reference: Dosovitskiy et al., An Image is Worth 16x16 Words, 2021, arXiv:2010.11929; Xiao, Zhang, Zhang,
    BinaryAttention, 2026, arXiv:2603.09582.  Mean over tokens in place of a class token, and one-bit projections, are
    this package's choice: the paper's are real.
    """

    width: int = 64
    depth: int = 4
    heads: int = 2
    patch_size: int = 4
    mlp_ratio: int = 4
    binary_scores: bool = True
    binary_values: bool = False

    def __post_init__(self):
        super().__post_init__()
        for argument in ("depth", "heads", "patch_size", "mlp_ratio"):
            self.require_positive(argument)
        self.require("heads", self.width % self.heads == 0, f"must divide `width` (={self.width})", "2 is usual")

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        side = self.patch_size
        check_image_size(images, side, f"a ViT with `patch_size` {side}")
        phase = {"train": train, "progress": progress}
        patches = BinaryConv(self.width, (side, side), (side, side), "VALID", use_bias=True, name="patches")(images)
        grid = patches.shape[1:3]
        shape = (1, math.prod(grid), self.width)
        position = self.param("position", nn.initializers.normal(0.02), shape, jnp.float32)
        x = patches.reshape(-1, *shape[1:]) + position.astype(patches.dtype)
        binary = {"binary_scores": self.binary_scores, "binary_values": self.binary_values}
        attention = partial(SelfAttention, self.heads, **self.quantizers, **binary, grid=grid)
        mlp = partial(MLP, self.mlp_ratio * self.width, **self.quantizers)
        intermediates = {}
        for block in range(1, self.depth + 1):
            x = x + attention(name=f"attention{block}")(Normalized(name=f"attention_norm{block}")(x), **phase)
            x = x + mlp(name=f"mlp{block}")(Normalized(name=f"mlp_norm{block}")(x), **phase)
            intermediates[f"stage{block}"] = x
        intermediates["features"] = x = widened(Normalized(name="head_norm")(x)).mean(1).astype(x.dtype)
        return self.classify(x), intermediates

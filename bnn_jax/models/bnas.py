r"""BNAS: networks of searched cells of binary convolutions and pools."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays
from bnn_jax.layers import BatchNorm, BinaryConv, max_pool, mean_pool
from bnn_jax.models.network import Network, check_image_size

CONVOLUTIONS = {"conv_3x3": (3, 1), "conv_5x5": (5, 1), "dilated_conv_3x3": (3, 2), "dilated_conv_5x5": (5, 2)}
"""Name of an operation -> (kernel size, dilation)."""

OPERATIONS = ("zeroise", "max_pool_3x3", "avg_pool_3x3", *CONVOLUTIONS)

Edge: TypeAlias = tuple[str, int]
"""(operation, index of its input): 0 the cell before the last, 1 the last cell, 2 this cell's first node, ..."""

Nodes: TypeAlias = tuple[tuple[Edge, Edge], ...]


class Genotype(NamedTuple):
    """The two cells of a network: for each node, the two operations whose outputs it adds.

    Attributes:
      normal: of the cells that keep the resolution.
      reduction: of those that halve it, with as many nodes.
    """

    normal: Nodes
    reduction: Nodes


CIFAR_CELLS = Genotype(
    normal=(
        (("zeroise", 1), ("dilated_conv_3x3", 0)),
        (("conv_3x3", 1), ("zeroise", 2)),
        (("zeroise", 2), ("zeroise", 3)),
        (("zeroise", 3), ("zeroise", 4)),
    ),
    reduction=(
        (("max_pool_3x3", 0), ("zeroise", 1)),
        (("max_pool_3x3", 0), ("zeroise", 2)),
        (("zeroise", 3), ("zeroise", 2)),
        (("zeroise", 3), ("zeroise", 4)),
    ),
)
"""The cells of BNAS-A, searched and trained on CIFAR-10 (`latest_cell_zeroise` of the authors' release)."""

IMAGENET_CELLS = Genotype(
    normal=(
        (("conv_3x3", 1), ("dilated_conv_3x3", 0)),
        (("conv_3x3", 1), ("conv_3x3", 2)),
        (("conv_3x3", 2), ("dilated_conv_3x3", 1)),
        (("dilated_conv_3x3", 1), ("conv_3x3", 0)),
    ),
    reduction=(
        (("max_pool_3x3", 0), ("max_pool_3x3", 1)),
        (("max_pool_3x3", 0), ("conv_3x3", 2)),
        (("max_pool_3x3", 0), ("dilated_conv_3x3", 3)),
        (("max_pool_3x3", 0), ("dilated_conv_3x3", 4)),
    ),
)
"""The cells of BNAS-D to BNAS-H, trained on ImageNet (`latest_cell` of the release); they have no zeroise."""


class BinaryLayer(nn.Module):
    """BN -> sign -> conv -> ReLU; without the sign where inputs stay real."""

    features: int
    size: int
    quantizers: Mapping[str, Any]
    dilation: int = 1
    stride: int = 1
    affine: bool = True

    @nn.compact
    def __call__(self, x, *, train: bool, progress: Array | float = 1.0):
        x = BatchNorm(use_scale=self.affine, use_bias=self.affine, name="norm")(x, train=train)
        x = BinaryConv(
            self.features,
            kernel_size=(self.size, self.size),
            strides=(self.stride, self.stride),
            padding=self.dilation * (self.size // 2),
            kernel_dilation=(self.dilation, self.dilation),
            name="conv",
            **self.quantizers,
        )(x, train=train, progress=progress)
        return nn.relu(x)


def pool(x: Array, operation: str, stride: int) -> Array:
    """One of the operations without parameters; averages leave the padding out of their count."""
    if operation == "zeroise":
        return jnp.zeros_like(x[:, ::stride, ::stride])
    geometry = {"strides": (stride, stride), "padding": ((1, 1), (1, 1))}
    if operation == "max_pool_3x3":
        return max_pool(x, (3, 3), **geometry)
    return mean_pool(x, (3, 3), count_include_pad=False, **geometry)


class Cell(nn.Module):
    r"""A searched cell with a skip from the cell before.

    s_0 = layer(older),  s_1 = layer(previous),  s_i = o_i(s_a) + o'_i(s_b) for each node,  o of `nodes`
    y = concat[s_2, s_3, ...] + skip(previous)

    The layers of s_0 and s_1 have kernel 1; where `older` has twice the resolution, that of s_0 has kernel 3 and stride
    2.  The skip is the identity; in a reduction cell, where the operations on s_0 and s_1 have stride 2, it is BN and a
    full-precision conv 2x2 with stride 2 and a bias.

    Attributes:
      features: filters of each node.
      nodes: of a :class:`Genotype`.
      reduction: halve the resolution.
      skip: add it; the first cell has none, as the stem has another width.
      catch_up: `older` has twice the resolution of `previous`.
      affine: s_0's batch norm learns scale and bias.
      quantizers: of the convolutions.
    """

    features: int
    nodes: Nodes
    reduction: bool
    skip: bool
    catch_up: bool
    affine: bool
    quantizers: Mapping[str, Any]

    @nn.compact
    def __call__(self, older, previous, *, train: bool, progress: Array | float = 1.0):
        layer = partial(BinaryLayer, self.features, quantizers=self.quantizers)
        phase = {"train": train, "progress": progress}
        size, stride = (3, 2) if self.catch_up else (1, 1)
        states = [
            layer(size=size, stride=stride, affine=self.affine, name="input0")(older, **phase),
            layer(size=1, name="input1")(previous, **phase),
        ]
        for node, edges in enumerate(self.nodes, start=1):
            first, second = (
                operate(states[source], operation, 2 if self.reduction and source < 2 else 1, layer, name, phase)
                for (operation, source), name in zip(edges, (f"node{node}_first", f"node{node}_second"))
            )
            states.append(first + second)
        y = jnp.concatenate(states[2:], -1)
        return y + self._skip(previous, y.shape[-1], train) if self.skip else y

    def _skip(self, x, features, train):
        if not self.reduction:
            return x
        x = BatchNorm(name="skip_norm")(x, train=train)
        geometry = {"kernel_size": (2, 2), "strides": (2, 2), "padding": "VALID"}
        return BinaryConv(features, use_bias=True, name="skip_conv", **geometry)(x)


def operate(x: Array, operation: str, stride: int, layer: Callable, name: str, phase: dict) -> Array:
    """Apply one of OPERATIONS to x; a convolution is `layer` under `name`."""
    if operation not in CONVOLUTIONS:
        return pool(x, operation, stride)
    size, dilation = CONVOLUTIONS[operation]
    return layer(size=size, dilation=dilation, stride=stride, name=name)(x, **phase)


class BNAS(Network):
    r"""A stack of searched binary cells in three stages.

    stem -> cells of width w -> cells of 2w -> cells of 4w -> global mean -> dense

    A cell sees the two before it and returns one width a node, 4w, 8w, 16w; see :class:`Cell`.  The first cells of the
    second and third stage are reduction cells; they are the cells `num_cells` // 3 and 2 `num_cells` // 3, from 0.
    cifar stem: BN -> conv 3x3, 3w -> ReLU.  imagenet stem: conv 3x3, w/2 -> BN -> ReLU -> conv 3x3, w -> BN, which is
    also the first cell's older input, -> ReLU -> conv 3x3, w -> BN, all with stride 2.  Stem, reduction skips and the
    dense layer are in full precision; in the others sign is left out where inputs stay real.

    The cells and the order of their layers are those of the authors' release, and so are the parameter counts that it
    prints.  Its bookkeeping leaves the kernels of the last two convolutions real; here they are binary.  Drop path, 0.2
    on CIFAR-10 and none on ImageNet, is left out.

    Attributes:
      width: filters w of a node in the first stage.
      num_cells: at least 3.
      genotype: the two cells; CIFAR_CELLS or IMAGENET_CELLS are published.
      input_quantizer, kernel_quantizer: of the convolutions in the cells; the published gradient of the weights is n
        times the exact one, see :func:`bnn_jax.quantizers.xnor`.
      stem: "cifar" or "imagenet".
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates), as :class:`bnn_jax.models.network.Network`.

    Raises:
      ValueError: for another `stem`, a `width` < 2, `num_cells` < 3, a `genotype` that cannot be built, or images that
        do not halve at the reductions.

    Reference: Kim, Singh and Choi, Learning Architectures for Binary Networks, 2020, arXiv:2002.06963.
    """

    width: int = 68
    num_cells: int = 12
    genotype: Genotype = IMAGENET_CELLS
    stem: str = "cifar"

    def __post_init__(self):
        super().__post_init__()
        for argument, least, usual in (("width", 2, 68), ("num_cells", 3, 12)):
            holds = getattr(self, argument) >= least
            self.require(argument, holds, f"must be at least {least}", f"{usual} is usual")
        check_genotype(self.genotype)

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        check_image_size(images, 1, "a BNAS")
        large = self.stem == "imagenet"
        reductions = (self.num_cells // 3, 2 * self.num_cells // 3)
        older, x = self._stem(images, train)
        catch_up, features, intermediates = large, self.width, {}
        for index in range(self.num_cells):
            reduction = index in reductions
            if reduction:
                check_halves(images, x, self.stem)
                intermediates[f"stage{len(intermediates) + 1}"] = x
                features = 2 * features
            cell = Cell(
                features=features,
                nodes=self.genotype.reduction if reduction else self.genotype.normal,
                reduction=reduction,
                skip=index > 0,
                catch_up=catch_up,
                affine=large or not catch_up,
                quantizers=self.quantizers,
                name=f"cell{index + 1}",
            )
            older, x, catch_up = x, cell(older, x, train=train, progress=progress), reduction
        intermediates["stage3"] = x
        intermediates["features"] = x = x.mean((1, 2))
        return self.classify(x), intermediates

    def _stem(self, images, train):
        """The first cell's two inputs."""
        if self.stem == "cifar":
            x = BatchNorm(name="stem_norm")(images, train=train)
            x = nn.relu(BinaryConv(3 * self.width, padding=1, name="stem_conv")(x))
            return x, x
        outputs, x = [], images
        for index, features in enumerate((self.width // 2, self.width, self.width), start=1):
            x = nn.relu(x) if index > 1 else x
            x = BinaryConv(features, strides=(2, 2), padding=1, name=f"stem_conv{index}")(x)
            x = BatchNorm(name=f"stem_norm{index}")(x, train=train)
            outputs.append(x)
        return outputs[-2], outputs[-1]


def check_halves(images: Array, x: Array, stem: str) -> None:
    """Refuse a reduction of an odd size, where pools round up and the skip rounds down."""
    if x.shape[1] % 2 or x.shape[2] % 2:
        raise ValueError(
            f"`images` (of {images.shape[1]}x{images.shape[2]}) leave BNAS {x.shape[1]}x{x.shape[2]} pixels to halve; "
            f"with the {stem} stem sides that are multiples of {4 if stem == 'cifar' else 32} fit"
        )


def check_genotype(genotype: Genotype) -> None:
    """Refuse cells without nodes or of unequal sizes, unknown operations and inputs that come later."""
    if not genotype.normal or len(genotype.normal) != len(genotype.reduction):
        raise ValueError(
            f"`genotype` (with {len(genotype.normal)} normal and {len(genotype.reduction)} reduction nodes) of BNAS "
            "must have as many of one as of the other, and at least 1"
        )
    for nodes in genotype:
        for node, edges in enumerate(nodes):
            for operation, source in edges:
                if operation not in OPERATIONS:
                    raise ValueError(
                        f"`genotype` (with {operation!r}) of BNAS must choose from {', '.join(OPERATIONS)}"
                    )
                if not 0 <= source < node + 2:
                    raise ValueError(
                        f"`genotype` (with input {source} of node {node + 1}) of BNAS must take inputs from 0 to "
                        f"{node + 1}: the two cells before and the nodes before"
                    )


bnas_a = partial(BNAS, width=36, num_cells=20, genotype=CIFAR_CELLS)
"""BNAS-A: 20 cells for CIFAR-10."""

bnas_e = partial(BNAS, width=68, num_cells=12, genotype=IMAGENET_CELLS, stem="imagenet")
"""BNAS-E: 12 cells for ImageNet."""

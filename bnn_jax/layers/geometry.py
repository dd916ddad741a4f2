"""Where the windows of a convolution lie: its sizes and padding, checked, and what its images are surrounded with."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from bnn_jax.bitops.conv import Geometry
from bnn_jax.checks import Pads, Sizes, as_sizes, is_sizes, is_whole, sizes_rule
from bnn_jax.layers.arguments import WHOLE, require_of_layer
from bnn_jax.layers.convolution import WORDS, is_padding, padding_rule, resolve_padding, spread

SURROUNDED = {"CIRCULAR": "wrap", "REFLECT": "reflect"}
"""Padding with an image's own pixels -> its name in `jnp.pad`."""

PADDINGS = (*WORDS, "SAME_LOWER", *SURROUNDED, "CAUSAL")
STEPS = ("strides", "kernel_dilation", "input_dilation")
SOME_SIZES = f"{WHOLE} or one to three of them, as (3, 3)"
AXES = ("depth", "height", "width")


def spatial_rank(layer: nn.Module) -> int | None:
    """How many spatial axes the geometry of a layer has; None where it is told by numbers alone."""
    given = (getattr(layer, argument) for argument in ("kernel_size", *STEPS, "padding"))
    return next((len(value) for value in given if isinstance(value, tuple | list)), None)


def make_sizes(layer: nn.Module) -> None:
    """Put tuples in the place of lists, and of numbers where the number of spatial axes is known; 1 for steps None."""
    rank = spatial_rank(layer)
    for argument in ("kernel_size", *STEPS):
        value = getattr(layer, argument)
        value = 1 if value is None and argument in STEPS else value
        value = tuple(value) if isinstance(value, list) else value
        setattr(layer, argument, (value,) * rank if rank and is_whole(value, 1) else value)


def require_geometry(layer: nn.Module) -> None:
    """Refuse sizes that are not positive whole numbers for the same one to three spatial axes, groups and paddings."""
    rank = spatial_rank(layer)
    for argument in ("kernel_size", *STEPS):
        value, known = getattr(layer, argument), rank in (1, 2, 3)
        holds = is_sizes(value, rank, 1) if known else is_whole(value, 1)
        rule = sizes_rule(rank) if known and argument in STEPS else SOME_SIZES
        require_of_layer(layer, argument, value, holds, rule)
    groups, rule = layer.feature_group_count, f"{WHOLE} that divides the {layer.features} features"
    divides = is_whole(groups, 1) and layer.features % groups == 0
    require_of_layer(layer, "feature_group_count", groups, divides, rule)
    _require_padding(layer, rank)


def _require_padding(layer: nn.Module, rank: int | None) -> None:
    padding, word = layer.padding, isinstance(layer.padding, str)
    holds = is_padding(padding, rank or 2, layer.paddings)
    require_of_layer(layer, "padding", padding, holds, padding_rule(rank or 2, layer.paddings))
    if word and padding.upper() == "CAUSAL":
        require_of_layer(layer, "padding", padding, rank in (None, 1), "is of convolutions with one spatial axis")
    if word:
        steps = layer.input_dilation if isinstance(layer.input_dilation, tuple) else (layer.input_dilation,)
        rule = "is not known for an `input_dilation`"
        require_of_layer(layer, "padding", padding, set(steps) == {1}, rule, "give numbers")


def require_image(layer: nn.Module, x: Array, rank: int, *, words: bool) -> None:
    """Refuse x without the axes of an image, and a number of channels that the groups do not divide; not of `words`."""
    rule = "must be a tuple, which tells the spatial axes, for images in more than one axis of a batch"
    require_of_layer(layer, "kernel_size", layer.kernel_size, rank <= len(AXES), rule)
    axes = ", ".join(AXES[-rank:])
    require_of_layer(layer, "x.shape", x.shape, x.ndim > rank, f"must be (..., {axes}, channels)")
    _require_padding(layer, rank)
    groups, rule = layer.feature_group_count, f"must divide the {x.shape[-1]} channels of x"
    require_of_layer(layer, "feature_group_count", groups, words or x.shape[-1] % groups == 0, rule)


def sizes_of(layer: nn.Module, rank: int) -> dict[str, Sizes]:
    """The layer's sizes by argument, one number for each spatial axis."""
    return {argument: as_sizes(argument, getattr(layer, argument), rank) for argument in ("kernel_size", *STEPS)}


def windows_of(layer: nn.Module, rank: int) -> Sizes:
    """Sizes of the kernel with its dilation."""
    sizes = sizes_of(layer, rank)
    return tuple((k - 1) * d + 1 for k, d in zip(sizes["kernel_size"], sizes["kernel_dilation"]))


def geometry_of(layer: nn.Module, shape: Sizes) -> Geometry:
    """How a convolution's kernel moves over images of a spatial `shape`."""
    size, strides, dilation, input_dilation = sizes_of(layer, len(shape)).values()
    padding = layer.padding.upper() if isinstance(layer.padding, str) else layer.padding
    if padding == "CAUSAL":
        padding = tuple((k - 1, 0) for k in windows_of(layer, len(shape)))
    elif padding in SURROUNDED:
        padding = "VALID"
    pads = resolve_padding(padding, shape=shape, kernel_size=size, strides=strides, dilation=dilation)
    return Geometry(strides, pads, dilation, layer.feature_group_count, input_dilation)


def transposed_geometry(layer: nn.Module, rank: int) -> Geometry:
    """How the kernel of a transposed convolution moves: over images that its strides spread."""
    size, strides, dilation, _ = sizes_of(layer, rank).values()
    if isinstance(layer.padding, str):
        same = layer.padding.upper() == "SAME"
        pads = tuple(map(_same_transposed if same else _valid_transposed, windows_of(layer, rank), strides))
    else:
        pads = resolve_padding(layer.padding, shape=size, kernel_size=size, strides=strides, dilation=dilation)
    return Geometry((1,) * rank, pads, dilation, layer.feature_group_count, strides)


def _same_transposed(window: int, stride: int) -> tuple[int, int]:
    low = window - 1 if stride > window - 1 else -(-(window + stride - 2) // 2)
    return low, window + stride - 2 - low


def _valid_transposed(window: int, stride: int) -> tuple[int, int]:
    return window - 1, stride - 1 + max(window - stride, 0)


def surrounded(layer: nn.Module, codes: Array) -> Array:
    """Codes, or their words, inside their own continuation where the layer's padding is one."""
    mode = SURROUNDED.get(layer.padding.upper()) if isinstance(layer.padding, str) else None
    if mode is None:
        return codes
    sides = (((window - 1) // 2, window // 2) for window in windows_of(layer, codes.ndim - 2))
    return jnp.pad(codes, ((0, 0), *sides, (0, 0)), mode=mode)


def bordered(layer: nn.Module, codes: Array, geometry: Geometry) -> tuple[Array, Sizes, Pads, Sizes]:
    """The codes with all that surrounds them but zeros beside them; strides, padding and dilation of what is left."""
    codes, padding = spread(surrounded(layer, codes), geometry.spread), geometry.padding
    if layer.pad_value:
        codes = jnp.pad(codes, ((0, 0), *padding, (0, 0)), constant_values=layer.pad_value)
        padding = ((0, 0),) * len(padding)
    return codes, geometry.strides, padding, geometry.dilation

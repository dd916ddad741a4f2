r"""Convolutions, dense layers and pools of JAX as operators of a `.tflite` file.

A product of -1/+1 codes is one LceBconv2d of packed words; a dense layer is one of 1x1 pixels.  It counts in integers
and scales by 1, so that its outputs are the integers of training.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from bnn_jax.bitops.bits import WORD_BITS
from bnn_jax.bitops.conv import outside_of_axis
from bnn_jax.layers.convolution import resolve_padding
from bnn_jax.packed.tflite.schema import SAME, VALID, Graph
from bnn_jax.tracing.interpret import Unsupported

Pads: TypeAlias = tuple[tuple[int, int], tuple[int, int]]
NO_PADS: Pads = ((0, 0), (0, 0))


class Call(NamedTuple):
    """One operation of the traced computation: the primitive's name and parameters, its result's shape and dtype."""

    name: str
    params: dict[str, Any]
    shape: tuple[int, ...]
    dtype: str


class Real(NamedTuple):
    """A tensor of the graph."""

    tensor: int
    shape: tuple[int, ...]


class Signs(NamedTuple):
    """The codes +1 where `real` >= 0 and -1 elsewhere, or their opposites, inside a border of `pad` (-1 or +1)."""

    real: Real
    opposite: bool = False
    pads: Pads = NO_PADS
    pad: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes, with the border."""
        if self.pads == NO_PADS:
            return self.real.shape
        return _padded(self.real.shape, self.pads)


def _padded(shape, pads):
    n, h, w, c = shape
    return (n, h + sum(pads[0]), w + sum(pads[1]), c)


def pad_image(graph: Graph, real: Real, pads: Pads, value: float = 0.0) -> Real:
    """An NHWC tensor inside a border of `value`."""
    if pads == NO_PADS:
        return real
    shape = _padded(real.shape, pads)
    inputs = [real.tensor, graph.constant([(0, 0), *pads, (0, 0)], "int32")]
    if value:
        return Real(graph.operator("PADV2", [*inputs, graph.constant(value)], shape), shape)
    return Real(graph.operator("PAD", inputs, shape), shape)


def quantize(graph: Graph, real: Real) -> int:
    """The packed signs of a tensor, bit 1 for a negative."""
    shape = (*real.shape[:-1], math.ceil(real.shape[-1] / WORD_BITS))
    return graph.operator("LceQuantize", [real.tensor], shape, dtype="int32")


def codes_tensor(graph: Graph, signs: Signs) -> int:
    """The codes as floats, for operations other than products."""
    tensor = graph.operator("LceDequantize", [quantize(graph, signs.real)], signs.real.shape)
    if signs.opposite:
        tensor = graph.operator("NEG", [tensor], signs.real.shape)
    return pad_image(graph, Real(tensor, signs.real.shape), signs.pads, signs.pad).tensor


class _Geometry(NamedTuple):
    strides: tuple[int, int]
    dilation: tuple[int, int]
    window: tuple[int, int]

    @property
    def extent(self):
        return tuple((size - 1) * step + 1 for size, step in zip(self.window, self.dilation))

    def pads_of_same(self, shape):
        image = {"shape": shape[1:3], "kernel_size": self.window, "strides": self.strides, "dilation": self.dilation}
        return resolve_padding("SAME", **image)


def convolution(graph: Graph, call: Call, x: Real | Signs, kernel: np.ndarray) -> Real:
    """The rule of `conv_general_dilated`.

    Raises:
      Unsupported: unless images are NHWC, kernels are constant and HWIO, there are no groups and no spread inputs; for
        inputs of -1 and +1, unless the kernel is of -1 and +1 too.
    """
    params = call.params
    layouts = tuple(params["dimension_numbers"])
    if not isinstance(kernel, np.ndarray) or layouts != ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)):
        raise Unsupported("of other layouts than NHWC and a constant HWIO kernel")
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1 or set(params["lhs_dilation"]) != {1}:
        raise Unsupported("with groups or with spread inputs")
    pads = tuple((int(low), int(high)) for low, high in params["padding"])
    if min(map(min, pads)) < 0:
        raise Unsupported("with negative padding")
    geometry = _Geometry(params["window_strides"], params["rhs_dilation"], kernel.shape[:2])
    if isinstance(x, Signs):
        return _binary_convolution(graph, call.shape, x, kernel, geometry, pads)
    return _real_convolution(graph, call.shape, x, kernel, geometry, pads)


def _real_convolution(graph, shape, x, kernel, geometry, pads):
    padding = SAME if pads == geometry.pads_of_same(x.shape) else VALID
    x = x if padding == SAME else pad_image(graph, x, pads)
    bias = graph.constant(np.zeros(kernel.shape[-1]))
    (stride_h, stride_w), (dilation_h, dilation_w) = geometry.strides, geometry.dilation
    options = {"stride_h": stride_h, "stride_w": stride_w, "dilation_h": dilation_h, "dilation_w": dilation_w}
    inputs = [x.tensor, graph.constant(kernel.transpose(3, 0, 1, 2)), bias]
    return Real(graph.operator("CONV_2D", inputs, shape, padding=padding, **options), shape)


def _binary_convolution(graph, shape, signs, kernel, geometry, pads):
    if not np.all(np.abs(kernel) == 1):
        raise Unsupported("of -1/+1 inputs and a kernel of other numbers than -1 and +1")
    kernel = -kernel if signs.opposite else kernel
    real, border = signs.real, -signs.pad if signs.opposite else signs.pad
    if signs.pads != NO_PADS:
        if border == 1 and pads == NO_PADS and signs.pads == geometry.pads_of_same(real.shape):
            return _bconv2d(graph, shape, real, kernel, geometry, padding=SAME, pad_values=1)
        real = pad_image(graph, real, signs.pads, border)
    if pads == NO_PADS:
        return _bconv2d(graph, shape, real, kernel, geometry, padding=VALID, pad_values=1)
    # The engine corrects its borders of +1 to 0 by tables that hold where no window sticks out on two opposite sides.
    fits = all(size >= extent for size, extent in zip(real.shape[1:3], geometry.extent))
    if fits and pads == geometry.pads_of_same(real.shape):
        return _bconv2d(graph, shape, real, kernel, geometry, padding=SAME, pad_values=0)
    bordered = pad_image(graph, real, pads)
    y = _bconv2d(graph, shape, bordered, kernel, geometry, padding=VALID, pad_values=1)
    excess = _border_sums(graph, shape, kernel, geometry, real.shape[1:3], pads)
    return Real(graph.operator("SUB", [y.tensor, excess], shape), shape)


def _bconv2d(graph, shape, real, kernel, geometry, *, padding, pad_values):
    features, channels = kernel.shape[-1], kernel.shape[-2]
    (stride_h, stride_w), (dilation_h, dilation_w) = geometry.strides, geometry.dilation
    constants = [graph.constant(np.ones(features)), graph.constant(np.zeros(features))]
    inputs = [quantize(graph, real), graph.constant(pack_kernel(kernel), "int32"), *constants, -1]
    options = {
        "channels_in": channels,
        "dilation_height_factor": dilation_h,
        "dilation_width_factor": dilation_w,
        "fused_activation_function": 0,
        "pad_values": pad_values,
        "padding": padding,
        "stride_height": stride_h,
        "stride_width": stride_w,
    }
    return Real(graph.operator("LceBconv2d", inputs, shape, **options), shape)


def pack_kernel(kernel: np.ndarray) -> np.ndarray:
    """An HWIO kernel of -1/+1 as int32 words (O, H, W, ceil(I / 32)); -1 is bit 1, channel i is bit i % 32.

    >>> pack_kernel(np.array([1.0, -1.0, 1.0, -1.0]).reshape(1, 1, 4, 1)).ravel()
    array([10], dtype=int32)
    """
    negative = kernel.transpose(3, 0, 1, 2) < 0
    gap = -negative.shape[-1] % WORD_BITS
    words = np.packbits(np.pad(negative, [(0, 0)] * 3 + [(0, gap)]), axis=-1, bitorder="little")
    return np.ascontiguousarray(words).view("<i4").astype(np.int32)


def _border_sums(graph, shape, kernel, geometry, size, pads):
    """What a border of +1 adds to each output, the sum of the kernel's taps on it; equal rows and columns once."""
    taps = kernel.sum(2)
    axes = zip(size, geometry.window, geometry.strides, pads, geometry.dilation, shape[1:3])
    patterns = (outside_of_axis(n, k, s, low, d, m) for n, k, s, (low, _), d, m in axes)
    (rows, row_of), (columns, column_of) = (np.unique(p, axis=0, return_inverse=True) for p in patterns)
    outside = rows[:, None, :, None] | columns[None, :, None, :]
    sums = graph.constant(np.einsum("rcij,ijf->rcf", outside, taps)[None])
    inputs, wide = [sums, graph.constant(row_of, "int32")], (1, shape[1], len(columns), shape[3])
    inputs = [graph.operator("GATHER", inputs, wide, axis=1), graph.constant(column_of, "int32")]
    return graph.operator("GATHER", inputs, (1, *shape[1:]), axis=2)


def matrix_product(graph: Graph, call: Call, x: Real | Signs, kernel: np.ndarray) -> Real:
    """The rule of `dot_general`: x[..., k] kernel[k, f].

    Raises:
      Unsupported: for other products, or as :func:`convolution`.
    """
    (contracted, kernel_axes), batched = call.params["dimension_numbers"]
    constant = isinstance(kernel, np.ndarray) and kernel.ndim == 2 and not any(batched)
    if not constant or isinstance(x, np.ndarray) or contracted != (len(x.shape) - 1,):
        raise Unsupported("of other operands than rows and a constant matrix")
    kernel = kernel.T if kernel_axes == (1,) else kernel
    rows, (inputs, features) = math.prod(x.shape[:-1]), kernel.shape
    if isinstance(x, Signs):
        pixels = x._replace(real=reshape(graph, x.real, (rows, 1, 1, inputs)))
        geometry = _Geometry((1, 1), (1, 1), (1, 1))
        shape = (rows, 1, 1, features)
        y = _binary_convolution(graph, shape, pixels, kernel[None, None], geometry, NO_PADS)
    else:
        flat, weights = reshape(graph, x, (rows, inputs)), graph.constant(kernel.T)
        operands = [flat.tensor, weights, graph.constant(np.zeros(features))]
        y = Real(graph.operator("FULLY_CONNECTED", operands, (rows, features)), (rows, features))
    return reshape(graph, y, call.shape)


def reshape(graph: Graph, real: Real, shape: tuple[int, ...]) -> Real:
    """The tensor in another shape."""
    if real.shape == tuple(shape):
        return real
    return Real(graph.operator("RESHAPE", [real.tensor, graph.constant(shape, "int32")], shape), tuple(shape))


def max_pool(graph: Graph, real: Real, geometry: "_Geometry", pads: Pads, shape: tuple[int, ...]) -> Real:
    """The largest value of each window; a border counts as -infinity."""
    padding = SAME if pads == geometry.pads_of_same(real.shape) else VALID
    if padding == VALID:
        real = pad_image(graph, real, pads, float(np.finfo(np.float32).min))
    return _pool(graph, "MAX_POOL_2D", real, geometry, padding, shape)


def _pool(graph, kind, real, geometry, padding, shape):
    (stride_h, stride_w), (filter_h, filter_w) = geometry.strides, geometry.window
    options = {"stride_h": stride_h, "stride_w": stride_w, "filter_h": filter_h, "filter_w": filter_w}
    return Real(graph.operator(kind, [real.tensor], shape, padding=padding, **options), shape)


def _sum_pool(graph, real, geometry, pads, shape):
    means = _pool(graph, "AVERAGE_POOL_2D", pad_image(graph, real, pads), geometry, VALID, shape)
    return Real(graph.operator("MUL", [means.tensor, graph.constant(math.prod(geometry.window))], shape), shape)


def window_rule(pool: Callable[..., Real]) -> Callable[..., Real]:
    """The rule of `reduce_window_max` or `reduce_window_sum` by its pool."""

    def rule(graph, call, x):
        window, strides, pads = (call.params[name] for name in ("window_dimensions", "window_strides", "padding"))
        spread = {*call.params["base_dilation"], *call.params["window_dilation"]}
        pads = tuple((int(low), int(high)) for low, high in pads)
        apart = (window[0], window[-1], strides[0], strides[-1]) == (1, 1, 1, 1) and {pads[0], pads[-1]} == {(0, 0)}
        if not isinstance(x, Real) or len(window) != 4 or not apart or spread != {1}:
            raise Unsupported("over other windows than undilated ones of an NHWC image")
        return pool(graph, x, _Geometry(strides[1:3], (1, 1), window[1:3]), pads[1:3], call.shape)

    return rule


PRODUCTS = {"conv_general_dilated": convolution, "dot_general": matrix_product}
POOLS = {"reduce_window_max": window_rule(max_pool), "reduce_window_sum": window_rule(_sum_pool)}

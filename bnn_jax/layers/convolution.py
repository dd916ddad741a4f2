r"""Convolutions whose gradients are canonical forward convolutions.

XLA's CPU backend runs the convolutions that autodiff makes (permuted dimensions, dilated operands) ten to twenty-five
times slower inside a loop than outside.  Here every gradient is written as an ordinary convolution, channels last, of
transposed operands, so that a scan over training steps runs at the speed of single steps; that of a kernel, on CPUs, as
matrix products of a few examples at a time.  The gradients call the same differentiable functions again, so derivatives
of any order, in particular Jacobian-vector products as the transpose of the gradient, stay canonical.
"""

from collections.abc import Callable, Collection
from functools import partial, reduce
from math import prod
from operator import add
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from bnn_jax.bitops.conv import Geometry, out_shape
from bnn_jax.checks import Pads, Sizes, as_pads, as_sizes, check_arrays, is_whole, pads_rule, require
from bnn_jax.layers.precision import narrower
from bnn_jax.precision import sum_dtype

Padding: TypeAlias = str | int | Sizes | Pads
WORDS = ("SAME", "VALID")
"""Paddings by name that all windows take, those of pools too."""


def padding_rule(rank: int = 2, words: Collection[str] = WORDS) -> str:
    """What :func:`is_padding` takes."""
    *others, last = words
    return f"{pads_rule(rank)}, {', '.join(others)} or {last}"


def is_padding(value: Padding, rank: int = 2, words: Collection[str] = WORDS) -> bool:
    """Whether a value is a padding of so many spatial axes."""
    return value.upper() in words if isinstance(value, str) else as_pads(value, rank) is not None


def resolve_padding(padding: Padding, *, shape: Sizes, kernel_size: Sizes, strides: Sizes, dilation: Sizes) -> Pads:
    """Explicit ((top, bottom), (left, right)) padding of "SAME", "VALID", a number, a pair or a pair of pairs.

    Raises:
      ValueError: if `padding` is none of these.

    >>> resolve_padding("SAME", shape=(8, 8), kernel_size=(3, 3), strides=(2, 2), dilation=(1, 1))
    ((0, 1), (0, 1))
    """
    rank = len(shape)
    require("padding", padding, is_padding(padding, rank, (*WORDS, "SAME_LOWER")), padding_rule(rank))
    if not isinstance(padding, str):
        return as_pads(padding, rank)
    window = tuple((k - 1) * d + 1 for k, d in zip(kernel_size, dilation))
    return tuple(lax.padtype_to_pads(shape, window, strides, padding.upper()))


def spread(x: Array, steps: Sizes) -> Array:
    """x with steps - 1 zeros between neighbours on each spatial axis."""
    if all(step == 1 for step in steps):
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((0, 0, s - 1) for s in steps), (0, 0, 0)))


def _canonical(x, kernel, geometry, dtype):
    x, kernel = (operand.astype(narrower(x, kernel)) for operand in (x, kernel))
    padding = geometry.padding
    if min(map(min, padding)) < 0:
        # XLA's CPU convolution reads outside its input for some negative paddings: pad and crop first.
        x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)))
        padding = ((0, 0),) * len(padding)
    last = x.ndim - 1
    channels_last = (0, last, *range(1, last))
    return lax.conv_general_dilated(
        x,
        kernel,
        geometry.strides,
        padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=lax.ConvDimensionNumbers(channels_last, (last, last - 1, *range(last - 1)), channels_last),
        feature_group_count=geometry.groups,
        preferred_element_type=dtype,
    )


MOST_PARTS = 8
"""Of a convolution that is computed in parts on CPUs."""


def _convolved(x, kernel, geometry, dtype):
    """The convolution, in groups and over volumes in a form of its own on CPUs, where XLA has slow ones."""
    if _cpu_form(kernel, geometry) is _canonical:
        return _canonical(x, kernel, geometry, dtype)
    functions = (partial(function, geometry=geometry, dtype=dtype) for function in (_on_cpu, _canonical))
    return lax.platform_dependent(x, kernel, **dict(zip(("cpu", "default"), functions)))


def _cpu_form(kernel, geometry):
    if geometry.groups > 1 and kernel.shape[-2] == 1:
        return _by_taps
    if kernel.ndim == 5 and kernel.shape[0] <= MOST_PARTS:
        return _by_depth
    return _by_groups if 1 < geometry.groups <= MOST_PARTS else _canonical


def _on_cpu(x, kernel, geometry, dtype):
    return _cpu_form(kernel, geometry)(x, kernel, geometry, dtype)


def _by_taps(x, kernel, geometry, dtype):
    """A depthwise convolution as a sum of products, one for each tap, which XLA computes in one pass."""
    x, kernel = (operand.astype(narrower(x, kernel)).astype(dtype) for operand in (x, kernel))
    *size, _, features = kernel.shape
    outputs = out_shape(x.shape[1:-1], tuple(size), geometry)
    x = lax.pad(x, jnp.zeros((), dtype), ((0, 0, 0), *((*pads, 0) for pads in geometry.padding), (0, 0, 0)))
    per_feature = (1,) * (x.ndim - 1) + (features,)

    def tap(place):
        pixels = x[:, *_windows(place, outputs, geometry)]
        pixels = pixels if features == x.shape[-1] else jnp.repeat(pixels, features // x.shape[-1], -1)
        return pixels * kernel[place].reshape(per_feature)

    return reduce(add, map(tap, np.ndindex(*size)))


def _by_depth(x, kernel, geometry, dtype):
    """A convolution of volumes as a sum of those of images, one for each tap along the depth."""
    (pads, *_), of_image = geometry.padding, Geometry(*(sizes[1:] for sizes in geometry[:3]), geometry.groups)
    depth, *_ = outputs = out_shape(x.shape[1:-1], kernel.shape[:-2], geometry)
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (*pads, 0), *[(0, 0, 0)] * 3))

    def tap(i):
        images = x[:, _windows((i,), (depth,), geometry)[0]]
        return _on_cpu(images.reshape(x.shape[0] * depth, *x.shape[2:]), kernel[i], of_image, dtype)

    return reduce(add, map(tap, range(len(kernel)))).reshape(x.shape[0], *outputs, kernel.shape[-1])


def _by_groups(x, kernel, geometry, dtype):
    parts = (jnp.split(operand, geometry.groups, -1) for operand in (x, kernel))
    alone = geometry._replace(groups=1)
    return jnp.concatenate([_canonical(a, b, alone, dtype) for a, b in zip(*parts)], -1)


def _windows(place, outputs, geometry):
    """The pixels that a tap of a kernel meets, on each spatial axis."""
    starts = [i * d for i, d in zip(place, geometry.dilation)]
    return tuple(slice(a, a + max(0, (m - 1) * s + 1), s) for a, m, s in zip(starts, outputs, geometry.strides))


def checked_geometry(
    owner: str, x: Array, kernel: Array, strides: int | Sizes, padding: Padding, dilation: int | Sizes, groups: int
) -> Geometry:
    """The geometry that these arguments of the function `owner` stand for.

    Raises:
      ValueError: for arguments or shapes that do not go together.
    """
    rank, size = kernel.ndim - 2, kernel.shape[:-2]
    if x.ndim != kernel.ndim:
        rule = f"must be of shape (batch, {rank} spatial axes, channels), as a kernel of shape {kernel.shape} needs"
        raise ValueError(f"`x` of `{owner}` (of shape {x.shape}) {rule}; `.reshape` or index it")
    channels, features = kernel.shape[-2:]
    rule = f"must divide {features} features, and be {x.shape[-1]} channels over the kernel's {channels}"
    require("groups", groups, is_whole(groups, 1) and features % groups == 0 and channels * groups == x.shape[-1], rule)
    strides, dilation = as_sizes("strides", strides, rank), as_sizes("dilation", dilation, rank)
    pads = resolve_padding(padding, shape=x.shape[1:-1], kernel_size=size, strides=strides, dilation=dilation)
    return Geometry(strides, pads, dilation, groups)


@check_arrays
def conv(
    x: Float[Array, "batch *spatial channels"],
    kernel: Float[Array, "*taps group_channels features"],
    strides: int | Sizes = 1,
    padding: Padding = 0,
    dilation: int | Sizes = 1,
    dtype: jnp.dtype | None = None,
    groups: int = 1,
) -> Float[Array, "batch *out features"]:
    r"""Convolution (cross-correlation) over any number of spatial axes, zero-padded, with canonical gradients.

    Forward   y[b,h,w,f] = sum_{i,j,c} x[b, h s + i d - p, w s + j d - p, c] kernel[i,j,c,f], for two axes;
              of groups, c counts the channels of the group that f belongs to
    Backward  exact: dL/dx is the convolution of the spread dL/dy with the flipped, transposed kernel; dL/dkernel that
              of x and dL/dy with the batch as contracted channels, or with strides a matrix product for each tap; on
              CPUs matrix products of a few examples at a time, of groups a product for each tap.

    Where x and kernel differ in dtype they are multiplied in the narrower one, to which dL/dy is rounded as well; each
    gradient has the dtype of what it is the gradient of.  Sums are in float32 at least.

    Args:
      strides, dilation: a number or one for each axis, as (height, width).
      padding: see :func:`resolve_padding`.
      dtype: of y; None is float32, or x's and the kernel's if wider.
      groups: of channels and features.

    Raises:
      TypeError, ValueError: for arrays of other dtypes or shapes; for another geometry.

    >>> conv(jnp.ones((1, 2, 2, 1)), jnp.ones((2, 2, 1, 3))).shape
    (1, 1, 1, 3)
    """
    return conv_of(x, kernel, checked_geometry("conv", x, kernel, strides, padding, dilation, groups), dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv_of(x: Array, kernel: Array, geometry: Geometry, dtype: jnp.dtype | None) -> Array:
    """:func:`conv` of a geometry that is checked already."""
    return _convolved(x, kernel, geometry, sum_dtype(x, kernel) if dtype is None else dtype)


def input_gradient(g: Array, kernel: Array, shape: Sizes, geometry: Geometry, dtype: jnp.dtype) -> Array:
    """dL/dx of :func:`conv`, in `dtype`, for inputs of spatial `shape`; g = dL/dy; linear in g and in kernel."""
    *size, channels, features = kernel.shape
    rank, groups = len(size), geometry.groups
    g = spread(g, geometry.strides)
    reach = ((k - 1) * d for k, d in zip(size, geometry.dilation))
    pads = tuple((r - p[0], n + p[0] - m) for r, p, n, m in zip(reach, geometry.padding, shape, g.shape[1:-1]))
    kernel = jnp.flip(kernel, tuple(range(rank)))
    if groups > 1:
        kernel = kernel.reshape(*size, channels, groups, features // groups).swapaxes(-1, -3)
        kernel = kernel.reshape(*size, features // groups, channels * groups)
    else:
        kernel = kernel.swapaxes(-1, -2)
    return conv_of(g, kernel, Geometry((1,) * rank, pads, geometry.dilation, groups), dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def kernel_gradient(x: Array, g: Array, kernel_size: Sizes, geometry: Geometry, dtype: jnp.dtype) -> Array:
    """dL/dkernel of :func:`conv`, in `dtype`; g = dL/dy in x's dtype; linear in x and in g."""
    options = {"kernel_size": kernel_size, "geometry": geometry}
    if geometry.groups > 1:
        return _kernel_gradient_by_taps(x, g, **options).astype(dtype)
    at_once = prod(kernel_size) == 1 or prod(geometry.strides) > 1
    default = partial(_kernel_gradient_by_taps if at_once else _kernel_gradient_by_conv, **options)
    return lax.platform_dependent(x, g, cpu=partial(_kernel_gradient_in_parts, **options), default=default).astype(
        dtype
    )


def _kernel_gradient_forward(x, g, kernel_size, geometry, dtype):
    return kernel_gradient(x, g, kernel_size, geometry, dtype), (x, g)


def _kernel_gradient_backward(kernel_size, geometry, dtype, residuals, kernel):
    x, g = residuals
    return input_gradient(g, kernel, x.shape[1:-1], geometry, x.dtype), conv_of(x, kernel, geometry, g.dtype)


kernel_gradient.defvjp(_kernel_gradient_forward, _kernel_gradient_backward)


def _kernel_gradient_by_conv(x, g, kernel_size, geometry):
    rank = len(kernel_size)
    reach = ((k - 1) * d for k, d in zip(kernel_size, geometry.dilation))
    sizes = zip(reach, geometry.padding, x.shape[1:-1], g.shape[1:-1])
    pads = tuple((p[0], r + m - n - p[0]) for r, p, n, m in sizes)
    batch_last = (*range(1, rank + 1), 0, rank + 1)
    x, g, dtype = x.transpose(rank + 1, *range(1, rank + 1), 0), g.transpose(batch_last), sum_dtype(x, g)
    return conv_of(x, g, Geometry(geometry.dilation, pads, (1,) * rank), dtype).transpose(batch_last)


PART_BYTES = 4 << 20
"""Of the operands of one matrix product of a kernel's gradient, which stay in a CPU's cache."""


def _kernel_gradient_in_parts(x, g, kernel_size, geometry):
    """Matrix products of a few examples at a time, whose operands stay in the cache, summed over the batch."""
    batch, sizes = len(x), zip(x.shape[1:-1], geometry.padding)
    pixels = prod(n + sum(pads) for n, pads in sizes)
    of_example = pixels * x.dtype.itemsize * (kernel_size[-1] * x.shape[-1] + kernel_size[0] * g.shape[-1])
    fit = max(1, min(batch, PART_BYTES // max(1, of_example)))
    part = next(n for n in range(fit, 0, -1) if batch % n == 0)
    product = partial(_kernel_gradient_by_rows, kernel_size=kernel_size, geometry=geometry)
    if part >= batch:
        return product(x, g)
    x, g = (a.reshape(batch // part, part, *a.shape[1:]) for a in (x, g))
    zeros = jnp.zeros((*kernel_size, x.shape[-1], g.shape[-1]), sum_dtype(x, g))
    return lax.scan(lambda total, operands: (total + product(*operands), None), zeros, (x, g))[0]


def _kernel_gradient_by_rows(x, g, kernel_size, geometry):
    """Products over all taps of a row, and of images without strides over all rows as well."""
    outputs, (*_, channels), features, dtype = g.shape[1:-1], x.shape, g.shape[-1], sum_dtype(x, g)
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*p, 0) for p in geometry.padding), (0, 0, 0)))
    *leading, taps = kernel_size

    def windows(place):
        return _windows(place, outputs, geometry)

    columns = jnp.concatenate([x[..., windows((0,) * len(leading) + (j,))[-1], :] for j in range(taps)], -1)

    def product(a, b):
        a, b = (operand.reshape(-1, operand.shape[-1]) for operand in (a, b))
        return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=dtype)

    if len(leading) == 1 and geometry.strides[0] == 1:
        (rows,), step, below = leading, geometry.dilation[0], columns.shape[1] - outputs[0]
        shifted = [jnp.pad(g, ((0, 0), (i * step, below - i * step), (0, 0), (0, 0))) for i in range(rows)]
        products = product(columns, jnp.concatenate(shifted, -1))
        return products.reshape(taps, channels, rows, features).transpose(2, 0, 1, 3)

    def row(place):
        return product(columns[:, *windows(place)], g).reshape(taps, channels, features)

    return _stacked(row, tuple(leading))


def _kernel_gradient_by_taps(x, g, kernel_size, geometry):
    """One matrix product a tap: three times faster than convolving with a gradient that is spread by the strides."""
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*p, 0) for p in geometry.padding), (0, 0, 0)))
    outputs, groups, dtype = g.shape[1:-1], geometry.groups, sum_dtype(x, g)
    axes = "hwd"[: len(outputs)]

    def tap(place):
        pixels = x[:, *_windows(place, outputs, geometry)]
        if groups == 1:
            return jnp.einsum(f"b{axes}c,b{axes}f->cf", pixels, g, preferred_element_type=dtype)
        pixels, gradient = (a.reshape(*a.shape[:-1], groups, a.shape[-1] // groups) for a in (pixels, g))
        if pixels.shape[-1] == 1:
            products = pixels.astype(dtype) * gradient.astype(dtype)
            return products.sum(tuple(range(len(outputs) + 1))).reshape(1, -1)
        by_group = jnp.einsum(f"b{axes}gc,b{axes}gf->cgf", pixels, gradient, preferred_element_type=dtype)
        return by_group.reshape(by_group.shape[0], -1)

    return _stacked(tap, kernel_size)


def _stacked(function: Callable[[Sizes], Array], sizes: Sizes, place: Sizes = ()) -> Array:
    """The results of a function of every place within `sizes`, along as many leading axes."""
    if not sizes:
        return function(place)
    return jnp.stack([_stacked(function, sizes[1:], (*place, i)) for i in range(sizes[0])])


def _conv_forward(x, kernel, geometry, dtype):
    return conv_of(x, kernel, geometry, dtype), (x, kernel)


def _conv_backward(geometry, dtype, residuals, g):
    x, kernel = residuals
    g = g.astype(narrower(x, kernel))
    return (
        input_gradient(g, kernel, x.shape[1:-1], geometry, x.dtype),
        kernel_gradient(x.astype(g.dtype), g, kernel.shape[:-2], geometry, kernel.dtype),
    )


conv_of.defvjp(_conv_forward, _conv_backward)

r"""Convolutions whose gradients are canonical forward convolutions.

XLA's CPU backend runs the convolutions that autodiff makes (permuted dimensions, dilated operands) ten to twenty-five
times slower inside a loop than outside.  Here every gradient is written as an ordinary NHWC/HWIO convolution of
transposed operands, so that a scan over training steps runs at the speed of single steps.  The gradients call the same
differentiable functions again, so derivatives of any order, in particular Jacobian-vector products as the transpose of
the gradient, stay canonical.
"""

from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bnn_jax.checks import PADS, Pads, Pair, as_pads, as_pair, check_arrays, require
from bnn_jax.layers.precision import narrower
from bnn_jax.precision import sum_dtype

Padding: TypeAlias = str | int | Pair | Pads
PADDING = f"{PADS}, SAME or VALID"


def is_padding(value: Padding) -> bool:
    """Whether a value is what :func:`resolve_padding` takes."""
    return value.upper() in ("SAME", "VALID") if isinstance(value, str) else as_pads(value) is not None


def resolve_padding(padding: Padding, *, shape: Pair, kernel_size: Pair, strides: Pair, dilation: Pair) -> Pads:
    """Explicit ((top, bottom), (left, right)) padding of "SAME", "VALID", a number, a pair or a pair of pairs.

    Raises:
      ValueError: if `padding` is none of these.

    >>> resolve_padding("SAME", shape=(8, 8), kernel_size=(3, 3), strides=(2, 2), dilation=(1, 1))
    ((0, 1), (0, 1))
    """
    require("padding", padding, is_padding(padding), PADDING)
    if not isinstance(padding, str):
        return as_pads(padding)
    window = tuple((k - 1) * d + 1 for k, d in zip(kernel_size, dilation))
    return tuple(lax.padtype_to_pads(shape, window, strides, padding.upper()))


def _canonical(x, kernel, strides, padding, dilation, dtype):
    x, kernel = (operand.astype(narrower(x, kernel)) for operand in (x, kernel))
    if min(min(padding)) < 0:
        # XLA's CPU convolution reads outside its input for some negative paddings: pad and crop first.
        x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)))
        padding = ((0, 0), (0, 0))
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=dtype,
    )


def _spread(g, strides):
    """Put strides - 1 zeros between neighbours, which makes the gradient of a strided convolution a plain one."""
    if strides == (1, 1):
        return g
    return lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), *((0, 0, s - 1) for s in strides), (0, 0, 0)))


def _geometry(x: Array, kernel: Array, strides: int | Pair, padding: Padding, dilation: int | Pair) -> tuple:
    strides, dilation = as_pair("strides", strides), as_pair("dilation", dilation)
    sizes = {"shape": x.shape[1:3], "kernel_size": kernel.shape[:2]}
    return strides, resolve_padding(padding, **sizes, strides=strides, dilation=dilation), dilation


@check_arrays
def conv(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "kernel_height kernel_width channels features"],
    strides: int | Pair = 1,
    padding: Padding = 0,
    dilation: int | Pair = 1,
    dtype: jnp.dtype | None = None,
) -> Float[Array, "batch out_height out_width features"]:
    r"""2-D convolution (cross-correlation), zero-padded, with canonical gradients.

    Forward   y[b,h,w,f] = sum_{i,j,c} x[b, h s + i d - p, w s + j d - p, c] kernel[i,j,c,f]
    Backward  exact: dL/dx is the convolution of the spread dL/dy with the flipped, transposed kernel; dL/dkernel that
              of x and dL/dy with the batch as contracted channels.

    Where x and kernel differ in dtype they are multiplied in the narrower one, to which dL/dy is rounded as well; each
    gradient has the dtype of what it is the gradient of.  Sums are in float32 at least.

    Args:
      strides, dilation: a number or a pair (height, width).
      padding: see :func:`resolve_padding`.
      dtype: of y; None is float32, or x's and the kernel's if wider.

    Raises:
      TypeError, ValueError: for arrays of other dtypes or shapes; for another geometry.

    >>> conv(jnp.ones((1, 2, 2, 1)), jnp.ones((2, 2, 1, 3))).shape
    (1, 1, 1, 3)
    """
    return _conv(x, kernel, *_geometry(x, kernel, strides, padding, dilation), dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _conv(x, kernel, strides, padding, dilation, dtype):
    return _canonical(x, kernel, strides, padding, dilation, sum_dtype(x, kernel) if dtype is None else dtype)


def input_gradient(g, kernel, shape: Pair, strides: Pair, padding: Padding, dilation: Pair, dtype: jnp.dtype):
    """dL/dx of :func:`conv`, in `dtype`, for inputs of spatial `shape`; g = dL/dy; linear in g and in kernel."""
    g = _spread(g, strides)
    reach = tuple((k - 1) * d for k, d in zip(kernel.shape[:2], dilation))
    pads = tuple((r - p[0], n + p[0] - m) for r, p, n, m in zip(reach, padding, shape, g.shape[1:3]))
    return _conv(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), (1, 1), pads, dilation, dtype)


def kernel_gradient(x, g, kernel_size: Pair, strides: Pair, padding: Padding, dilation: Pair, dtype: jnp.dtype):
    """dL/dkernel of :func:`conv`, in `dtype`; g = dL/dy in x's dtype; linear in x and in g."""
    if kernel_size == (1, 1) or strides != (1, 1):
        return _kernel_gradient_by_taps(x, g, kernel_size, strides, padding, dilation).astype(dtype)
    reach = tuple((k - 1) * d for k, d in zip(kernel_size, dilation))
    pads = tuple((p[0], r + m - n - p[0]) for r, p, n, m in zip(reach, padding, x.shape[1:3], g.shape[1:3]))
    return _conv(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), dilation, pads, (1, 1), dtype).transpose(1, 2, 0, 3)


def _kernel_gradient_by_taps(x, g, kernel_size, strides, padding, dilation):
    """One matrix product a tap: three times faster than convolving with a gradient that is spread by the strides."""
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)))

    def tap(i, j):
        starts = (i * dilation[0], j * dilation[1])
        rows, columns = (slice(a, a + (m - 1) * s + 1, s) for a, m, s in zip(starts, g.shape[1:3], strides))
        return jnp.einsum("bhwc,bhwf->cf", x[:, rows, columns], g, preferred_element_type=sum_dtype(x, g))

    return jnp.stack([jnp.stack([tap(i, j) for j in range(kernel_size[1])]) for i in range(kernel_size[0])])


def _conv_forward(x, kernel, strides, padding, dilation, dtype):
    return _conv(x, kernel, strides, padding, dilation, dtype), (x, kernel)


def _conv_backward(strides, padding, dilation, dtype, residuals, g):
    x, kernel = residuals
    g = g.astype(narrower(x, kernel))
    return (
        input_gradient(g, kernel, x.shape[1:3], strides, padding, dilation, x.dtype),
        kernel_gradient(x.astype(g.dtype), g, kernel.shape[:2], strides, padding, dilation, kernel.dtype),
    )


_conv.defvjp(_conv_forward, _conv_backward)


@check_arrays
def scaled_conv(
    x: Float[Array, "batch height width channels"],
    codes: Float[Array, "kernel_height kernel_width channels features"],
    scale: Float[Array, "..."],
    strides: int | Pair = 1,
    padding: Padding = 0,
    dilation: int | Pair = 1,
) -> Float[Array, "batch out_height out_width features"]:
    r"""Convolution with integer codes, multiplied by the scale afterwards.

    Forward   y = scale * conv(x, codes); the inner sum is exact where x holds small integers too
    Backward  exact, without a pass over the output: with k = kernel_gradient(x, dL/dy),
              dL/dcodes = scale k,  dL/dscale = sum k codes,  dL/dx = input_gradient(dL/dy, scale codes)

    Dtypes as those of :func:`conv`: codes and scale stay float32 beside a narrower x, and y is float32.

    Args:
      x: inputs, normally codes themselves.
      codes: HWIO kernel of integers, exact in x's dtype.
      scale: scalar, or one value a feature in the shape (1, 1, 1, features).
      others: as those of :func:`conv`.

    Raises: as :func:`conv`.
    """
    return _scaled_conv(x, codes, scale, *_geometry(x, codes, strides, padding, dilation))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _scaled_conv(x, codes, scale, strides, padding, dilation):
    return _conv(x, codes, strides, padding, dilation, None) * scale


def _scaled_conv_forward(x, codes, scale, strides, padding, dilation):
    return _scaled_conv(x, codes, scale, strides, padding, dilation), (x, codes, scale)


def _scaled_conv_backward(strides, padding, dilation, residuals, g):
    x, codes, scale = residuals
    g = g.astype(narrower(x, codes))
    k = kernel_gradient(x.astype(g.dtype), g, codes.shape[:2], strides, padding, dilation, codes.dtype)
    dscale = (k * codes).sum((0, 1, 2) if scale.ndim else None).reshape(scale.shape)
    return input_gradient(g, codes * scale, x.shape[1:3], strides, padding, dilation, x.dtype), k * scale, dscale


_scaled_conv.defvjp(_scaled_conv_forward, _scaled_conv_backward)

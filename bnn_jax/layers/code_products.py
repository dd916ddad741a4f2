r"""Convolutions of integer codes: on packed bits where that is faster and exact, else as numbers.

A network in training keeps its codes as numbers, because its gradients are products of numbers.  Their forward product
is a sum of integers all the same: on CPUs it is taken from bits where the codes of both sides prove to be two-valued.
Both ways give the same integers, so a run is the same bit for bit.
"""

from functools import partial
from math import prod
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from bnn_jax.bitops.conv import Geometry, out_shape
from bnn_jax.bitops.paths import AS_NUMBERS, ON_BITS, PATHS
from bnn_jax.bitops.planes import PackedBase, Values, conv_product, pack_codes
from bnn_jax.checks import Sizes, check_arrays, require
from bnn_jax.layers.convolution import Padding, checked_geometry, conv_of, input_gradient, kernel_gradient
from bnn_jax.layers.precision import narrower
from bnn_jax.precision import sum_dtype

CodeSets: TypeAlias = tuple[Values, Values]
"""The code sets of the inputs and of a kernel; () for real numbers."""

EXECUTION_RULE = f"must be None (the faster) or one of {', '.join(PATHS)}"

LEAST_CHANNELS = 8
"""Of inputs that are packed in training: with fewer, packing takes the time that the product saves."""

LEAST_PRODUCTS = 144
"""Of one number of the inputs, with windows of several taps: with fewer, packing takes the time that is saved."""

LEAST_PIXELS = 1024
"""Of the results: with fewer, packing the kernel and compiling both ways take the time that the products save."""

PART_BYTES = 1 << 20
"""Of the inputs that are packed at a time, which stay in a core's cache."""


def chosen_execution(sets: CodeSets, x_shape: Sizes, kernel_shape: Sizes, geometry: Geometry) -> str:
    """The one of PATHS on which two-valued codes are multiplied in training and evaluation on a CPU.

    >>> geometry = Geometry((1, 1), ((1, 1), (1, 1)), (1, 1))
    >>> chosen_execution(((-1, 1), (-1, 1)), (128, 32, 32, 16), (3, 3, 16, 16), geometry)
    'bits'
    >>> chosen_execution(((-1, 1), (-1, 1)), (1, 7, 7, 512), (3, 3, 512, 512), geometry)
    'float32'
    """
    *taps, channels, features = kernel_shape
    if not takes_bits(sets, geometry):
        return AS_NUMBERS
    batch, *size, _ = x_shape
    pixels = prod(out_shape(size, tuple(taps), geometry))
    windows = prod(taps) > 1 and pixels * prod(taps) * features >= LEAST_PRODUCTS * prod(size)
    pays = channels >= LEAST_CHANNELS and windows and batch * pixels >= LEAST_PIXELS
    return ON_BITS if pays and batch > 1 else AS_NUMBERS


def takes_bits(sets: CodeSets, geometry: Geometry) -> bool:
    """Whether codes of these sets can be multiplied on bits in training: two-valued ones, without groups."""
    return all(len(values) == 2 for values in sets) and geometry.groups == 1


@check_arrays
def scaled_conv(
    x: Float[Array, "batch *spatial channels"],
    codes: Float[Array, "*taps group_channels features"],
    scale: Float[Array, "..."],
    strides: int | Sizes = 1,
    padding: Padding = 0,
    dilation: int | Sizes = 1,
    groups: int = 1,
    *,
    sets: CodeSets = ((), ()),
    execution: str | None = None,
) -> Float[Array, "batch *out features"]:
    r"""Convolution with integer codes, multiplied by the scale afterwards.

    Forward   y = scale * conv(x, codes); the inner sum is exact where x holds small integers too
    Backward  exact, without a pass over the output: with k = kernel_gradient(x, dL/dy),
              dL/dcodes = scale k,  dL/dscale = sum k codes,  dL/dx = input_gradient(dL/dy, scale codes)

    Where `sets` names two values for x and two for the codes, a CPU computes the inner sum on packed bits, and once
    more as numbers if a value of x or of the codes is not of its set (as NaN): y is the same bit for bit.

    Dtypes as those of :func:`conv`: codes and scale stay float32 beside a narrower x, and y is float32.

    Args:
      x: inputs, normally codes themselves.
      codes: kernel of integers, exact in x's dtype.
      scale: scalar, or one value a feature in the shape (1, ..., 1, features).
      strides, padding, dilation, groups: as those of :func:`conv`.
      sets: the values that x and the codes have as a rule; () are any.
      execution: "bits" or "float32" of what `sets` allows; None is the faster, by :func:`chosen_execution`.

    Raises:
      TypeError, ValueError: as :func:`conv`, and for another `execution`.

    >>> x, codes = jnp.ones((1, 2, 2, 3)), jnp.ones((2, 2, 3, 1))
    >>> scaled_conv(x, codes, jnp.ones(()) / 4, sets=((-1, 1), (-1, 1)), execution="bits").item()
    3.0
    """
    geometry = checked_geometry("scaled_conv", x, codes, strides, padding, dilation, groups)
    require("execution", execution, execution in (None, *PATHS), EXECUTION_RULE)
    if not takes_bits(sets, geometry):
        execution = AS_NUMBERS
    elif execution is None:
        execution = chosen_execution(sets, x.shape, codes.shape, geometry)
    return _scaled_conv(x, codes, scale, geometry, sets if execution == ON_BITS else None)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _scaled_conv(x, codes, scale, geometry, sets):
    as_numbers = partial(conv_of, geometry=geometry, dtype=None)
    if sets is None:
        return as_numbers(x, codes) * scale
    on_bits = partial(_on_bits, geometry=geometry, sets=sets)
    return lax.platform_dependent(x, codes, cpu=on_bits, default=as_numbers) * scale


def _on_bits(x, codes, geometry, sets):
    """The convolution on bits, a few examples at a time; as numbers if a code is not of its set."""
    dtype, batch = sum_dtype(x, codes), len(x)
    base = PackedBase(pack_codes(codes, sets[1]), None, sets[1])
    product = partial(conv_product, base=base, values=sets[0], shape=codes.shape, geometry=geometry, pad_value=0)
    # Of two parts at least, since XLA would compute what a loop of one step returns again in all that follows.
    fit = max(1, min(batch // 2, PART_BYTES * batch // max(1, x.size * x.dtype.itemsize)))
    part = next(n for n in range(fit, 0, -1) if batch % n == 0)

    def step(strange, images):
        return strange | ~_all_of(images, sets[0]), product(images).astype(dtype)

    strange, y = lax.scan(step, ~_all_of(codes, sets[1]), x.reshape(batch // part, part, *x.shape[1:]))
    y = y.reshape(batch, *y.shape[2:])
    # A loop of one step or none, which unlike a conditional shares the memory of y and the threads.
    as_numbers = lambda _: (jnp.zeros((), bool), conv_of(x, codes, geometry, dtype))
    return lax.while_loop(lambda state: state[0], as_numbers, (strange, y))[1]


def _all_of(x: Array, values: Values) -> Bool[Array, ""]:
    """Whether every number in x is one of two `values`."""
    low, high = (jnp.asarray(value, x.dtype) for value in values)
    return ((x != low) & (x != high)).astype(jnp.int32).sum() == 0


def _scaled_conv_forward(x, codes, scale, geometry, sets):
    return _scaled_conv(x, codes, scale, geometry, sets), (x, codes, scale)


def _scaled_conv_backward(geometry, sets, residuals, g):
    x, codes, scale = residuals
    g = g.astype(narrower(x, codes))
    k = kernel_gradient(x.astype(g.dtype), g, codes.shape[:-2], geometry, codes.dtype)
    dscale = (k * codes).sum(tuple(range(codes.ndim - 1)) if scale.ndim else None).reshape(scale.shape)
    return input_gradient(g, codes * scale, x.shape[1:-1], geometry, x.dtype), k * scale, dscale


_scaled_conv.defvjp(_scaled_conv_forward, _scaled_conv_backward)

r"""Dense layer on integer codes; see :mod:`bnn_jax.layers.binary_conv` for what decides its precision."""

import math
from collections.abc import Callable
from dataclasses import fields

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int32, Num

from bnn_jax.bitops.planes import PackedBase, dense_product
from bnn_jax.checks import check_arrays, is_whole
from bnn_jax.layers.arguments import make_quantizers, require_features, require_of_layer
from bnn_jax.layers.by_layer import take_quantizers
from bnn_jax.layers.frozen import code_sets, packed_kernel, record
from bnn_jax.layers.operands import InputBase, Phase, finish, operands, require_inputs
from bnn_jax.layers.packed_call import LARGEST_EXACT, packed_call
from bnn_jax.layers.precision import byte_dot, dot
from bnn_jax.quantizers import Quantized, QuantizerLike


class BinaryDense(nn.Module):
    r"""Dense layer on integer codes, scales after.

    y = sum over bases of scale_x scale_w (codes_x @ codes_w)  [+ bias]

    Inputs are (..., inputs), outputs (..., features): with any leading axes, the tokens of texts or none at all, every
    index of them is an example, also for what quantizers compute of one.

    Attributes: as those of :class:`bnn_jax.layers.BinaryConv` of the same name.

    Raises:
      ValueError: when the layer is built with `features` that are no positive whole number.
      TypeError: as :class:`bnn_jax.layers.BinaryConv`.

    Reference: Hubara et al., Binarized Neural Networks, 2016, arXiv:1602.02830.
    """

    features: int
    input_quantizer: QuantizerLike = None
    kernel_quantizer: QuantizerLike = None
    gradient_quantizer: QuantizerLike = None
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.glorot_uniform()
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    real_activation: Callable[[Array], Array] | None = None

    def __post_init__(self):
        make_quantizers(self)
        super().__post_init__()
        take_quantizers(self)
        require_features(self)

    @nn.compact
    @check_arrays
    def __call__(
        self, x: Num[Array, "*leading inputs"], *, train: bool = False, progress: Array | float = 1.0
    ) -> Num[Array, "*leading features"]:
        require_inputs(self, x)
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        y = self._of_rows(rows, Phase(train, progress))
        return y if x.ndim == 2 else y.reshape(*x.shape[:-1], self.features)

    @nn.nowrap
    def _of_rows(self, x, phase):
        packed = packed_kernel(self)
        if packed is not None:
            return packed_call(self, x, packed, phase)
        inputs, kernel = operands(self, x, (x.shape[-1], self.features), phase)
        y = sum(self.product(a, w) for a in inputs for w in kernel)
        return self.finished(y, x, phase)

    @nn.nowrap
    def product(self, x: InputBase, kernel: Quantized) -> Num[Array, "batch features"]:
        """Multiply one base of the inputs with one of the kernel: scale_x scale_w (codes_x @ codes_w)."""
        y = self.sums(x.codes, kernel.codes)
        record(self, x.codes, x.values, lambda: y)
        return self.scaled(y, x.scale, kernel.scale)

    @nn.nowrap
    def sums(self, codes: Array, kernel: Array) -> Num[Array, "batch features"]:
        """Multiply the codes of one base of the inputs with those of one of the kernel, as numbers; frozen as bytes."""
        are_bytes = packed_kernel(self) is not None and self._sums_of_bytes(codes.shape[-1])
        return byte_dot(codes, kernel) if are_bytes else dot(codes, kernel)

    @nn.nowrap
    def _sums_of_bytes(self, inputs: int) -> bool:
        """Whether all codes are in -128 to 127, and float32 holds their sums."""
        sets = [s for quantizer in (self.input_quantizer, self.kernel_quantizer) for s in code_sets(quantizer, 1)]
        bytes_alone = all(s and min(s) >= -128 and max(s) <= 127 for s in sets)
        return bytes_alone and inputs * math.prod(max(map(abs, s)) for s in sets) <= LARGEST_EXACT

    @nn.nowrap
    def product_on_bits(
        self, x: InputBase, kernel: PackedBase, shape: tuple[int, ...]
    ) -> Int32[Array, "batch features"]:
        """Multiply the codes of one base of the inputs with those of a packed one of a kernel of `shape`."""
        return dense_product(x.codes, kernel, values=x.values, shape=shape)

    @nn.nowrap
    def scaled(self, y: Array, input_scale: Array, kernel_scale: Array) -> Array:
        """Multiply a product of codes by its scales, in an order that decides the rounding."""
        return input_scale.astype(y.dtype) * kernel_scale * y

    @nn.nowrap
    def finished(self, y: Array, x: Array, phase: Phase) -> Num[Array, "batch features"]:
        """Add the bias to the sum of the products, see :func:`finish`."""
        return finish(self, y, x, phase)


class BinaryDenseGeneral(nn.Module):
    r"""Dense layer over any axes to any axes, as into the heads of an attention and out of them.

    y[..., o] = sum_i x[..., i] W[i, o], i over the indices of `axis` and o over those of `features`, row by row

    It is a :class:`BinaryDense`, its submodule `dense`, between two reshapes, with the matrix (inputs, outputs) as its
    kernel: each index of the other axes of x is an example, and codes are multiplied on bits as rows of one product.

    Attributes:
      features: number of outputs, or the sizes of several axes, as (heads, size).
      axis: one or several axes of x that are summed over; the others stay in front of the outputs, all in x's order.
      others: as those of :class:`BinaryDense`.

    Raises:
      ValueError: when the layer is built with `features` that are no positive whole numbers, and when it is called with
        an x that does not have the axes `axis`, each once.
      TypeError: as :class:`BinaryDense`.

    >>> import jax
    >>> x = jnp.ones((2, 5, 8))
    >>> heads, variables = BinaryDenseGeneral((2, 4), kernel_quantizer="xnor").init_with_output(jax.random.key(0), x)
    >>> heads.shape, variables["params"]["dense"]["latent_kernel"].shape
    ((2, 5, 2, 4), (8, 8))
    >>> BinaryDenseGeneral(3, axis=(-2, -1)).init_with_output(jax.random.key(0), heads)[0].shape
    (2, 5, 3)
    """

    features: int | tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    kernel_quantizer: QuantizerLike = None
    input_quantizer: QuantizerLike = None
    gradient_quantizer: QuantizerLike = None
    kernel_init: nn.initializers.Initializer = nn.initializers.glorot_uniform()
    use_bias: bool = False
    param_dtype: jnp.dtype = jnp.float32
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        make_quantizers(self)
        super().__post_init__()
        holds = len(_several(self.features)) > 0 and all(is_whole(n, 1) for n in _several(self.features))
        rule = "must be a positive whole number, or several"
        require_of_layer(self, "features", self.features, holds, rule)

    @nn.compact
    @check_arrays
    def __call__(
        self, x: Num[Array, "*axes"], *, train: bool = False, progress: Array | float = 1.0
    ) -> Num[Array, "*others_and_features"]:
        axes, features = _several(self.axis), _several(self.features)
        holds = all(is_whole(a, -x.ndim) and a < x.ndim for a in axes) and len({a % x.ndim for a in axes}) == len(axes)
        rule = f"must be different axes of x, which has {x.ndim},"
        require_of_layer(self, "axis", self.axis, holds and len(axes) > 0, rule, "-1 is usual")
        x = jnp.moveaxis(x, sorted(a % x.ndim for a in axes), range(-len(axes), 0))
        others = x.shape[: -len(axes)]
        own = {f.name for f in fields(BinaryDense)} - {"features", "name", "parent", "real_activation"}
        layer = BinaryDense(math.prod(features), name="dense", **{name: getattr(self, name) for name in own})
        inputs = math.prod(x.shape[len(others) :])
        return layer(x.reshape(*others, inputs), train=train, progress=progress).reshape(*others, *features)


def _several(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)

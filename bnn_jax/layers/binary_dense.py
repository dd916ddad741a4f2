r"""Dense layer on integer codes; see :mod:`bnn_jax.layers.binary_conv` for what decides its precision."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int32, Num

from bnn_jax.bitops.planes import PackedBase, dense_product
from bnn_jax.checks import check_arrays
from bnn_jax.layers.arguments import make_quantizers, require_features
from bnn_jax.layers.frozen import packed_kernel, record
from bnn_jax.layers.operands import InputBase, Phase, finish, operands, require_inputs
from bnn_jax.layers.packed_call import packed_call
from bnn_jax.layers.precision import dot
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

    def __post_init__(self):
        make_quantizers(self)
        super().__post_init__()
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
        y = dot(x.codes, kernel.codes)
        record(self, x.codes, x.values, lambda: y)
        return self.scaled(y, x.scale, kernel.scale)

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

r"""2-D convolution on integer codes, for binary, ternary and full precision alike.

What `input_quantizer` and `kernel_quantizer` return decides the precision.  A quantized layer keeps its real weights,
the latent weights, in the parameter `latent_kernel`; a full-precision one in `kernel`.  A layer that finds a packed
kernel among its variables (:func:`bnn_jax.packed.freeze`) computes on bits, with the same integers as result.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, Num

from bnn_jax.bitops.planes import PackedBase, conv_product
from bnn_jax.checks import Pads, Pair, check_arrays
from bnn_jax.layers.arguments import make_pairs, make_quantizers, require_features, require_of_layer, require_pairs
from bnn_jax.layers.convolution import PADDING, Padding, conv, is_padding, resolve_padding, scaled_conv
from bnn_jax.layers.frozen import packed_kernel, record
from bnn_jax.layers.operands import InputBase, Phase, finish, operands, require_inputs
from bnn_jax.layers.packed_call import packed_call
from bnn_jax.quantizers import Quantized, QuantizerLike


class BinaryConv(nn.Module):
    r"""2-D convolution on integer codes, scales after (NHWC, HWIO).

    y = sum over bases of scale_x scale_w (codes_x * codes_w)  [times K]  [+ bias],  * the zero-padded convolution

    Attributes:
      features: number of filters.
      kernel_size, strides, kernel_dilation: pairs (height, width); a number stands for two equal ones.
      padding: "SAME", "VALID", a number, a pair (height, width) or ((top, bottom), (left, right)).
      pad_value: 0, +1 or -1, the value of the padded inputs after quantization.
      input_quantizer, kernel_quantizer: of `bnn_jax.quantizers`, or the name of one in ACTIVATION_QUANTIZERS and
        WEIGHT_QUANTIZERS, or an estimator, as "ste_sign" or a function that `make_sign` made; None is full precision.
      input_scaling: multiply by XNOR-Net's map K = mean_c|x| * ones/(kernel area), held constant in the backward pass;
        the authors' own release leaves it out, and so does the default.
      gradient_quantizer: (y, key) -> y whose backward pass quantizes the gradient, as
        `bnn_jax.quantizers.dorefa_gradient`, or its name in GRADIENT_QUANTIZERS; in training only.
      use_bias: add a bias per feature.
      dtype: of sums, scales and bias.  Activations have it too, or the dtype of the inputs where that is narrower: of
        bfloat16 images a network makes bfloat16 activations.  Codes are multiplied in the activations' dtype, in which
        -1, 0 and +1 are exact (in `dtype` if a code is not), and summed in this one.
      param_dtype: of the parameters.

    Called as ``layer(x, train=False, progress=1.0)``: quantizers with a state, a schedule or randomness need to know
    whether this is training and which share of it is done; randomness comes from the stream "quantizer".

    Raises:
      ValueError: when the layer is built with `features`, sizes, strides or a dilation that are no positive whole
        numbers, another `padding` or `pad_value`, or `input_scaling` without an `input_quantizer`; when it is called
        with x of another shape.
      TypeError: when it is called with x of integers, unless they are the packed words of a frozen network.

    Reference: Rastegari et al., XNOR-Net, 2016, arXiv:1603.05279.
    """

    features: int
    kernel_size: int | Pair = (3, 3)
    strides: int | Pair = (1, 1)
    padding: Padding = "SAME"
    kernel_dilation: int | Pair = (1, 1)
    pad_value: int = 0
    input_quantizer: QuantizerLike = None
    kernel_quantizer: QuantizerLike = None
    gradient_quantizer: QuantizerLike = None
    input_scaling: bool = False
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.glorot_uniform()
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        make_pairs(self, "kernel_size", "strides", "kernel_dilation")
        make_quantizers(self)
        super().__post_init__()
        require_features(self)
        require_pairs(self, "kernel_size", "strides", "kernel_dilation")
        require_of_layer(self, "padding", self.padding, is_padding(self.padding), PADDING)
        require_of_layer(self, "pad_value", self.pad_value, self.pad_value in (-1, 0, 1), "must be 0, +1 or -1")
        scalable, rule = self.input_quantizer is not None or not self.input_scaling, "needs an `input_quantizer`"
        require_of_layer(self, "input_scaling", self.input_scaling, scalable, rule, "set one or turn it off")

    @nn.compact
    @check_arrays
    def __call__(
        self, x: Num[Array, "batch height width channels"], *, train: bool = False, progress: Array | float = 1.0
    ) -> Num[Array, "batch h w features"]:
        require_inputs(self, x)
        phase = Phase(train, progress)
        geometry = {"kernel_size": self.kernel_size, "strides": self.strides, "dilation": self.kernel_dilation}
        padding = resolve_padding(self.padding, shape=x.shape[1:3], **geometry)
        packed = packed_kernel(self)
        if packed is not None:
            return packed_call(self, x, packed, phase, padding)
        inputs, kernel = operands(self, x, (*self.kernel_size, x.shape[-1], self.features), phase)
        y = sum(self.product(a, w, padding) for a in inputs for w in kernel)
        return self.finished(y, x, phase, padding)

    @nn.nowrap
    def product(self, x: InputBase, kernel: Quantized, padding: Pads) -> Num[Array, "batch h w features"]:
        """Convolve one base of the inputs with one of the kernel: scale_x scale_w (codes_x * codes_w)."""
        codes = x.codes
        if self.pad_value:
            codes = jnp.pad(codes, ((0, 0), *padding, (0, 0)), constant_values=self.pad_value)
            padding = ((0, 0), (0, 0))
        geometry = (self.strides, padding, self.kernel_dilation)
        record(self, x.codes, x.values, lambda: conv(codes, kernel.codes, *geometry))
        y = scaled_conv(codes, kernel.codes, kernel.scale, *geometry)
        return x.scale.astype(y.dtype) * y

    @nn.nowrap
    def product_on_bits(
        self, x: InputBase, kernel: PackedBase, shape: tuple[int, ...], padding: Pads
    ) -> Int32[Array, "batch h w features"]:
        """Convolve the codes of one base of the inputs with those of a packed one of a kernel of `shape`."""
        geometry = {"strides": self.strides, "padding": padding, "dilation": self.kernel_dilation}
        return conv_product(x.codes, kernel, values=x.values, shape=shape, pad_value=self.pad_value, **geometry)

    @nn.nowrap
    def scaled(self, y: Array, input_scale: Array, kernel_scale: Array) -> Array:
        """Multiply a product of codes by its scales, in the order of :meth:`product`, which decides the rounding."""
        return input_scale.astype(y.dtype) * (y * kernel_scale)

    @nn.nowrap
    def finished(self, y: Array, x: Array, phase: Phase, padding: Pads) -> Num[Array, "batch h w features"]:
        """Multiply by XNOR-Net's map of the inputs x, where it is wanted; add the bias, see :func:`finish`."""
        if self.input_scaling:
            y = y * self._input_scale(x.astype(self.dtype), padding)
        return finish(self, y, x, phase)

    def _input_scale(self, x, padding):
        magnitude = lax.stop_gradient(jnp.abs(x).mean(-1, keepdims=True))
        box = jnp.full((*self.kernel_size, 1, 1), 1 / (self.kernel_size[0] * self.kernel_size[1]), self.dtype)
        return conv(magnitude, box, self.strides, padding, self.kernel_dilation)

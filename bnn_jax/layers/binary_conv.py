r"""Convolutions on integer codes, for binary, ternary and full precision alike.

What `input_quantizer` and `kernel_quantizer` return decides the precision.  A quantized layer keeps its real weights,
the latent weights, in the parameter `latent_kernel`; a full-precision one in `kernel`.  A layer that finds a packed
kernel among its variables (:func:`bnn_jax.packed.freeze`) computes on bits, with the same integers as result.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, Num

from bnn_jax.bitops.conv import Geometry
from bnn_jax.bitops.paths import PATHS
from bnn_jax.bitops.planes import PackedBase, Values, conv_product
from bnn_jax.checks import Sizes, check_arrays
from bnn_jax.layers.arguments import make_quantizers, require_features, require_of_layer
from bnn_jax.layers.by_layer import take_quantizers
from bnn_jax.layers.code_products import EXECUTION_RULE, scaled_conv
from bnn_jax.layers.convolution import Padding, conv, spread
from bnn_jax.layers.frozen import code_sets, is_words, packed_kernel, record
from bnn_jax.layers.geometry import (
    PADDINGS,
    WORDS,
    bordered,
    geometry_of,
    make_sizes,
    require_geometry,
    require_image,
    sizes_of,
    spatial_rank,
    surrounded,
    transposed_geometry,
)
from bnn_jax.layers.operands import InputBase, Phase, finish, operands, require_inputs
from bnn_jax.layers.packed_call import packed_call
from bnn_jax.quantizers import Quantized, QuantizerLike


class BinaryConv(nn.Module):
    r"""Convolution over one to three spatial axes on integer codes, scales after (channels last, as Flax's `Conv`).

    y = sum over bases of scale_x scale_w (codes_x * codes_w)  [times K]  [+ bias],  * the zero-padded convolution

    Inputs are (..., *spatial, channels), kernels (*spatial, channels / groups, features): with any number of batch
    axes, none too, every index of them is an example, also for what quantizers compute of one.

    Attributes:
      features: number of filters.
      kernel_size: one number for each spatial axis, as (height, width).  A single number, here and below, stands for
        equal ones; where no tuple tells the number of spatial axes, x has one batch axis (or is (width, channels)).
      strides, kernel_dilation, input_dilation: the same, or None for 1.  The last puts zeros between the pixels.
      padding: a number, one for each axis, or pairs ((top, bottom), (left, right)); "SAME", "SAME_LOWER", "VALID";
        "CIRCULAR" and "REFLECT", which pad with codes of the image; "CAUSAL" for one axis.  Numbers alone go with an
        `input_dilation`.
      pad_value: 0, +1 or -1, the value of the padded inputs after quantization.
      feature_group_count: groups of channels, each convolved with its own filters; as many as channels: depthwise.
      input_quantizer, kernel_quantizer: of `bnn_jax.quantizers`, or the name of one in ACTIVATION_QUANTIZERS and
        WEIGHT_QUANTIZERS, or an estimator, as "ste_sign" or a function that `make_sign` made; None is full precision.
      input_scaling: multiply by XNOR-Net's map K = mean_c|x| * ones/(kernel area), held constant in the backward pass;
        the authors' own release leaves it out, and so does the default.
      gradient_quantizer: (y, key) -> y whose backward pass quantizes the gradient, as
        `bnn_jax.quantizers.dorefa_gradient`, or its name in GRADIENT_QUANTIZERS; in training only.
      real_activation: of inputs that no quantizer takes.
      execution: how two-valued codes are multiplied in training and in evaluation on a CPU: on packed "bits" or as
        "float32"; None is the faster for the shape.  The results are the same bit for bit.  Other codes, groups and
        spread pixels are multiplied as numbers.
      use_bias: add a bias per feature.
      dtype: of sums, scales and bias.  Activations have it too, or the dtype of the inputs where that is narrower: of
        bfloat16 images a network makes bfloat16 activations.  Codes are multiplied in the activations' dtype, in which
        -1, 0 and +1 are exact (in `dtype` if a code is not), and summed in this one.
      param_dtype: of the parameters.

    Called as ``layer(x, train=False, progress=1.0)``: quantizers with a state, a schedule or randomness need to know
    whether this is training and which share of it is done; randomness comes from the stream "quantizer".

    Raises:
      ValueError: when the layer is built with `features`, sizes, strides or a dilation that are no positive whole
        numbers, or of different numbers of axes, groups that do not divide the features, another `padding`, `pad_value`
        or `execution`, or `input_scaling` without an `input_quantizer` or of groups; when it is called with x of
        another shape, or whose channels the groups do not divide.
      TypeError: when it is called with x of integers, unless they are the packed words of a frozen network.

    >>> import jax
    >>> layer = BinaryConv(8, kernel_size=(3,), feature_group_count=4, kernel_quantizer="xnor", padding="CAUSAL")
    >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 10, 4)))
    >>> y.shape, variables["params"]["latent_kernel"].shape
    ((2, 10, 8), (3, 1, 8))

    Reference: Rastegari et al., XNOR-Net, 2016, arXiv:1603.05279.
    """

    features: int
    kernel_size: int | Sizes = (3, 3)
    strides: int | Sizes | None = 1
    padding: Padding = "SAME"
    kernel_dilation: int | Sizes | None = 1
    pad_value: int = 0
    input_quantizer: QuantizerLike = None
    kernel_quantizer: QuantizerLike = None
    gradient_quantizer: QuantizerLike = None
    input_scaling: bool = False
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.glorot_uniform()
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    input_dilation: int | Sizes | None = 1
    feature_group_count: int = 1
    real_activation: Callable[[Array], Array] | None = None
    execution: str | None = None

    paddings: ClassVar[tuple[str, ...]] = PADDINGS
    """Paddings by name."""

    def __post_init__(self):
        make_sizes(self)
        make_quantizers(self)
        super().__post_init__()
        take_quantizers(self)
        require_features(self)
        require_geometry(self)
        require_of_layer(self, "pad_value", self.pad_value, self.pad_value in (-1, 0, 1), "must be 0, +1 or -1")
        require_of_layer(self, "execution", self.execution, self.execution in (None, *PATHS), EXECUTION_RULE)
        scalable, rule = self.input_quantizer is not None or not self.input_scaling, "needs an `input_quantizer`"
        require_of_layer(self, "input_scaling", self.input_scaling, scalable, rule, "set one or turn it off")
        scalable, rule = self.feature_group_count == 1 or not self.input_scaling, "has one map for all channels"
        require_of_layer(self, "input_scaling", self.input_scaling, scalable, rule, "a group has none of its own")

    @nn.compact
    @check_arrays
    def __call__(
        self, x: Num[Array, "*axes channels"], *, train: bool = False, progress: Array | float = 1.0
    ) -> Num[Array, "*outputs features"]:
        rank, phase = spatial_rank(self) or max(1, x.ndim - 2), Phase(train, progress)
        require_image(self, x, rank, words=packed_kernel(self) is not None and is_words(x))
        require_inputs(self, x)
        if x.ndim == rank + 2:
            return self._of_images(x, phase)
        batch, image = x.shape[: -rank - 1], x.shape[-rank - 1 :]
        y = self._of_images(x.reshape(math.prod(batch), *image), phase)
        return y.reshape(*batch, *y.shape[1:])

    @nn.nowrap
    def _of_images(self, x, phase):
        geometry, packed = self.geometry(x.shape[1:-1]), packed_kernel(self)
        if packed is not None:
            return packed_call(self, x, packed, phase, geometry)
        channels = x.shape[-1] // self.feature_group_count
        inputs, kernel = operands(self, x, (*self._kernel_size(x), channels, self.features), phase)
        kernel = list(zip(kernel, code_sets(self.kernel_quantizer, len(kernel))))
        y = sum(self.product(a, w, geometry, values) for a in inputs for w, values in kernel)
        return self.finished(y, x, phase, geometry)

    @nn.nowrap
    def geometry(self, shape: Sizes) -> Geometry:
        """How the kernel moves over images of a spatial `shape`."""
        return geometry_of(self, shape)

    @nn.nowrap
    def product(
        self, x: InputBase, kernel: Quantized, geometry: Geometry, values: Values = ()
    ) -> Num[Array, "batch *out features"]:
        """Convolve one base of the inputs with one of the kernel: scale_x scale_w (codes_x * codes_w).

        Where the kernel's codes are of two `values`, as are those of x, that may be on bits.
        """
        codes, *window = bordered(self, x.codes, geometry)
        record(self, x.codes, x.values, lambda: conv(codes, kernel.codes, *window, groups=geometry.groups))
        # Zeros between spread pixels are no codes.
        sets = (x.values, values) if set(geometry.spread) == {1} else ((), ())
        options = {"sets": sets, "execution": self.execution}
        y = scaled_conv(codes, kernel.codes, kernel.scale, *window, geometry.groups, **options)
        return x.scale.astype(y.dtype) * y

    @nn.nowrap
    def sums(self, codes: Array, kernel: Array, geometry: Geometry) -> Num[Array, "batch *out features"]:
        """Convolve the codes of one base of the inputs with those of one of the kernel, as numbers."""
        codes, *window = bordered(self, codes, geometry)
        return conv(codes, kernel, *window, groups=geometry.groups)

    @nn.nowrap
    def product_on_bits(
        self, x: InputBase, kernel: PackedBase, shape: tuple[int, ...], geometry: Geometry
    ) -> Int32[Array, "batch *out features"]:
        """Convolve the codes of one base of the inputs with those of a packed one of a kernel of `shape`."""
        codes = surrounded(self, x.codes)
        return conv_product(codes, kernel, values=x.values, shape=shape, geometry=geometry, pad_value=self.pad_value)

    @nn.nowrap
    def scaled(self, y: Array, input_scale: Array, kernel_scale: Array) -> Array:
        """Multiply a product of codes by its scales, in the order of :meth:`product`, which decides the rounding."""
        return input_scale.astype(y.dtype) * (y * kernel_scale)

    @nn.nowrap
    def finished(self, y: Array, x: Array, phase: Phase, geometry: Geometry) -> Num[Array, "batch *out features"]:
        """Multiply by XNOR-Net's map of the inputs x, where it is wanted; add the bias, see :func:`finish`."""
        if self.input_scaling:
            y = y * self._input_scale(x.astype(self.dtype), geometry)
        return finish(self, y, x, phase)

    def _input_scale(self, x, geometry):
        magnitude = lax.stop_gradient(jnp.abs(x).mean(-1, keepdims=True))
        size = self._kernel_size(x)
        box = jnp.full((*size, 1, 1), 1 / math.prod(size), self.dtype)
        magnitude = spread(surrounded(self, magnitude), geometry.spread)
        return conv(magnitude, box, geometry.strides, geometry.padding, geometry.dilation)

    @nn.nowrap
    def _kernel_size(self, images) -> Sizes:
        return sizes_of(self, images.ndim - 2)["kernel_size"]


class BinaryConvTranspose(BinaryConv):
    r"""Transposed convolution on integer codes, as Flax's `ConvTranspose` without `transpose_kernel`.

    y is that of :class:`BinaryConv` with steps of one over images with strides - 1 zeros between their pixels; outputs
    have strides times the size of the inputs with "SAME", kernel_size - strides more with "VALID".

    Attributes: as those of :class:`BinaryConv`, with these differences.
      strides: steps between the pixels.
      padding: a number, one for each axis, or pairs, of the spread images; "SAME" or "VALID".
      input_dilation: stays 1; the strides are one.

    Raises: as :class:`BinaryConv`.

    >>> import jax
    >>> layer = BinaryConvTranspose(4, kernel_size=(3, 3), strides=2, kernel_quantizer="xnor")
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 5, 5, 2)))[0].shape
    (1, 10, 10, 4)

    Reference: Zeiler et al., Deconvolutional Networks, 2010.
    """

    paddings: ClassVar[tuple[str, ...]] = WORDS

    def __post_init__(self):
        single, rule = set(np.ravel(self.input_dilation)) == {1}, "must stay 1"
        require_of_layer(self, "input_dilation", self.input_dilation, single, rule, "`strides` spread the inputs")
        super().__post_init__()

    @nn.nowrap
    def geometry(self, shape: Sizes) -> Geometry:
        """How the kernel moves over images of a spatial `shape`."""
        return transposed_geometry(self, len(shape))

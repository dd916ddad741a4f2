r"""Convolution and dense layers on integer codes, for binary, ternary and full precision alike.

What `input_quantizer` and `kernel_quantizer` return decides the precision.  A quantized layer keeps its real weights,
the latent weights, in the parameter `latent_kernel`; a full-precision one in `kernel`.  A layer that finds a packed
kernel among its variables (:func:`bnn_jax.packed.freeze`) computes on bits, with the same integers as result.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bnn_jax.bitops.planes import PackedBase, Values, conv_product, dense_product, input_words, multiplies_on_bits
from bnn_jax.layers.convolution import Padding, Pair, conv, resolve_padding, scaled_conv
from bnn_jax.layers.frozen import (
    PRODUCTS,
    code_sets,
    freeze_kernel,
    is_freezing,
    is_recording,
    is_words,
    packed_kernel,
    scale_of,
    unpacked,
)
from bnn_jax.layers.precision import activation_dtype, dot, holds
from bnn_jax.precision import widened
from bnn_jax.quantizers import Bases, Quantized, Quantizer, bases, dequantize, mark
from bnn_jax.types import LATENT_KERNEL, Key


class Phase(NamedTuple):
    """What of the run's course a layer is told: training or evaluation, and the share of the training done."""

    train: bool
    progress: Array | float


def _marked(quantized: Bases, place: str, quantizer: Quantizer) -> tuple[Quantized, ...]:
    """The bases, their codes and scales named in the traced computation, by which the analyses know them."""
    quantized, code_set = bases(quantized), quantizer.code_set
    if not code_set:
        return quantized
    sets = code_set if isinstance(code_set[0], Sequence) else [code_set] * len(quantized)
    return tuple(
        Quantized(mark(base.codes, place, values=len(values)), mark(base.scale, place))
        for base, values in zip(quantized, sets, strict=True)
    )


def _quantize(module: nn.Module, name: str, quantizer: Quantizer | None, x: Array, phase: Phase):
    """The bases of x; the quantizer's learned parameters are the module's parameter `name`, its state the variable.

    Quantizers see x in float32 at least, in which their thresholds and scales are not rounded.
    """
    if quantizer is None:
        return (Quantized(x, jnp.ones((), x.dtype)),)
    x = widened(x)
    given = dict(module.param(name, quantizer.init, x)) if quantizer.init else {}
    if quantizer.init and packed_kernel(module) is not None:
        # What decides only the backward pass is not stored.
        given = quantizer.init(jax.random.key(0), x) | given
    given |= {wanted: value for wanted, value in phase._asdict().items() if wanted in quantizer.wants}
    if "key" in quantizer.wants:
        given["key"] = module.make_rng("quantizer") if phase.train else None
    if quantizer.init_state is None:
        return _marked(quantizer.apply(x, **given), name, quantizer)
    state = module.variable("quantizer_state", name, lambda: quantizer.init_state(module.make_rng("params"), x))
    quantized, updated = quantizer.apply(x, state.value, **given)
    if phase.train:
        state.value = lax.stop_gradient(updated)
    return _marked(quantized, name, quantizer)


class Operands(NamedTuple):
    """What a layer multiplies.

    Attributes:
      inputs: the bases of the inputs.
      values: their code sets, () for real numbers.
      kernel: the bases of the kernel, packed where they are multiplied on bits; one, dequantized, for real inputs.
      shape: of the kernel.
      integers: the product of the codes alone is wanted.
    """

    inputs: tuple[Quantized, ...]
    values: list[Values]
    kernel: tuple[Quantized | PackedBase, ...]
    shape: tuple[int, ...]
    integers: bool

    @property
    def only(self) -> tuple[Array, Values, PackedBase]:
        """Input codes, their set and the base of the kernel, where there is one of each."""
        return self.inputs[0].codes, self.values[0], self.kernel[0]


def _operands(module: nn.Module, x: Array, kernel_shape: tuple[int, ...], phase: Phase) -> Operands:
    packed = packed_kernel(module)
    if packed is None:
        kernel, shape = _trained_kernel(module, kernel_shape, phase), kernel_shape
    else:
        kernel, shape = packed.bases, packed.shape
    if is_words(x):
        inputs = (Quantized(x, jnp.asarray(packed.input_scale, module.dtype)),)
    else:
        inputs = _inputs(module, x, phase)
    values = [()] if module.input_quantizer is None else code_sets(module.input_quantizer, len(inputs))
    if packed is not None and not all(multiplies_on_bits(v, base.values) for v in values for base in kernel):
        kernel = tuple(unpacked(base, shape, module.dtype) for base in kernel)
    # A kernel that is about to be rounded to a narrower dtype keeps its scale apart.
    if module.input_quantizer is None and (len(kernel) > 1 or inputs[0].codes.dtype == module.dtype):
        kernel = (Quantized(dequantize(kernel), jnp.ones((), module.dtype)),)
    return Operands(inputs, values, kernel, shape, packed is not None and packed.integers)


def _inputs(module: nn.Module, x: Array, phase: Phase) -> tuple[Quantized, ...]:
    """The bases of x, their codes in x's dtype if that holds every code of inputs and kernel, else in the layer's."""
    dtype = activation_dtype(x, module.dtype)
    quantized = _quantize(module, "input_quantizer", module.input_quantizer, x.astype(dtype), phase)
    if dtype != module.dtype:
        quantizers = filter(None, (module.input_quantizer, module.kernel_quantizer))
        exact = all(holds(dtype, values) for quantizer in quantizers for values in code_sets(quantizer, 1))
        dtype = dtype if exact else module.dtype
    return tuple(base._replace(codes=base.codes.astype(dtype)) for base in quantized)


def _trained_kernel(module: nn.Module, shape: tuple[int, ...], phase: Phase) -> tuple[Quantized, ...]:
    name = "kernel" if module.kernel_quantizer is None else LATENT_KERNEL
    kernel = module.param(name, module.kernel_init, shape, module.param_dtype).astype(module.dtype)
    kernel = _quantize(module, "kernel_quantizer", module.kernel_quantizer, kernel, phase)
    if module.kernel_quantizer is not None and is_freezing(module, phase.train):
        freeze_kernel(module, kernel, shape)
    return kernel


def _record(module: nn.Module, codes: Array, values: Values, product: Callable[[], Array]) -> None:
    """Put the packed input codes and their integer product into the collection "products", if that is mutable."""
    if values and is_recording(module):
        module.sow(PRODUCTS, "words", input_words(codes, values))
        module.sow(PRODUCTS, "integers", product().astype(jnp.int32))


def _finish(module: nn.Module, y: Array, x: Array, phase: Phase) -> Array:
    """Add the bias; quantize the gradient that will come back through here; return to the dtype of the inputs x."""
    if module.use_bias:
        bias = module.param("bias", nn.initializers.zeros, (module.features,), module.param_dtype)
        y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    if module.gradient_quantizer is not None and phase.train:
        y = module.gradient_quantizer(y, module.make_rng("quantizer"))
    return y.astype(activation_dtype(x, module.dtype))


def _conv(layer: "BinaryConv", codes: Array, values: Values, base: Quantized | PackedBase, shape, padding) -> Array:
    """scale_w (codes * codes_w)."""
    if isinstance(base, PackedBase):
        integers = _conv_integers(layer, codes, values, base, shape, padding)
        return integers.astype(layer.dtype) * scale_of(base, layer.dtype)
    padded = codes
    if layer.pad_value:
        padded = jnp.pad(codes, ((0, 0), *padding, (0, 0)), constant_values=layer.pad_value)
        padding = ((0, 0), (0, 0))
    geometry = (layer.strides, padding, layer.kernel_dilation)
    _record(layer, codes, values, lambda: conv(padded, base.codes, *geometry))
    return scaled_conv(padded, base.codes, base.scale, *geometry)


def _conv_integers(layer: "BinaryConv", codes: Array, values: Values, base: PackedBase, shape, padding) -> Array:
    y = conv_product(
        codes,
        base,
        values=values,
        shape=shape,
        strides=layer.strides,
        padding=padding,
        dilation=layer.kernel_dilation,
        pad_value=layer.pad_value,
    )
    _record(layer, codes, values, lambda: y)
    return y


def _dense(layer: "BinaryDense", inputs: Quantized, values: Values, base: Quantized | PackedBase, shape) -> Array:
    """scale_x scale_w (codes_x @ codes_w)."""
    if isinstance(base, PackedBase):
        y = _dense_integers(layer, inputs.codes, values, base, shape).astype(layer.dtype)
        return inputs.scale * scale_of(base, layer.dtype) * y
    y = dot(inputs.codes, base.codes)
    _record(layer, inputs.codes, values, lambda: y)
    return inputs.scale * base.scale * y


def _dense_integers(layer: "BinaryDense", codes: Array, values: Values, base: PackedBase, shape) -> Array:
    y = dense_product(codes, base, values=values, shape=shape)
    _record(layer, codes, values, lambda: y)
    return y


def _require(layer: nn.Module, argument: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"`{argument}` (={getattr(layer, argument)!r}) {rule} in layer {layer.name!r}")


class BinaryConv(nn.Module):
    r"""2-D convolution on integer codes, scales after (NHWC, HWIO).

    y = sum over bases of scale_x scale_w (codes_x * codes_w)  [times K]  [+ bias],  * the zero-padded convolution

    Attributes:
      features: number of filters.
      kernel_size, strides, kernel_dilation: pairs (height, width).
      padding: "SAME", "VALID", an int or ((top, bottom), (left, right)).
      pad_value: 0, +1 or -1, the value of the padded inputs after quantization.
      input_quantizer, kernel_quantizer: from `bnn_jax.quantizers`; None is full precision.
      input_scaling: multiply by XNOR-Net's map K = mean_c|x| * ones/(kernel area), held constant in the backward pass;
        the authors' own release leaves it out, and so does the default.
      gradient_quantizer: (y, key) -> y whose backward pass quantizes the gradient, as
        `bnn_jax.quantizers.dorefa_gradient`; in training only.
      use_bias: add a bias per feature.
      dtype: of sums, scales and bias.  Activations have it too, or the dtype of the inputs where that is narrower: of
        bfloat16 images a network makes bfloat16 activations.  Codes are multiplied in the activations' dtype, in which
        -1, 0 and +1 are exact (in `dtype` if a code is not), and summed in this one.
      param_dtype: of the parameters.

    Called as ``layer(x, train=False, progress=1.0)``: quantizers with a state, a schedule or randomness need to know
    whether this is training and which share of it is done; randomness comes from the stream "quantizer".

    Raises:
      ValueError: when the layer is built with `features` < 1, strides < 1, another `pad_value`, or `input_scaling`
        without an `input_quantizer`.

    Reference: Rastegari et al., XNOR-Net, 2016, arXiv:1603.05279.
    """

    features: int
    kernel_size: Pair = (3, 3)
    strides: Pair = (1, 1)
    padding: str | int | Padding = "SAME"
    kernel_dilation: Pair = (1, 1)
    pad_value: int = 0
    input_quantizer: Quantizer | None = None
    kernel_quantizer: Quantizer | None = None
    input_scaling: bool = False
    gradient_quantizer: Callable[[Array, Key], Array] | None = None
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.glorot_uniform()
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        _require(self, "features", self.features >= 1, "must be positive")
        _require(self, "strides", min(self.strides) >= 1, "must be positive")
        _require(self, "pad_value", self.pad_value in (-1, 0, 1), "must be 0, +1 or -1")
        _require(
            self,
            "input_scaling",
            not self.input_scaling or self.input_quantizer is not None,
            "needs an `input_quantizer`; set one or turn it off",
        )

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool = False, progress: Array | float = 1.0
    ) -> Float[Array, "batch h w features"]:
        phase = Phase(train, progress)
        operands = _operands(self, x, (*self.kernel_size, x.shape[-1], self.features), phase)
        padding = resolve_padding(
            self.padding,
            shape=x.shape[1:3],
            kernel_size=self.kernel_size,
            strides=self.strides,
            dilation=self.kernel_dilation,
        )
        if operands.integers:
            return _conv_integers(self, *operands.only, operands.shape, padding)
        y = sum(
            x_base.scale * _conv(self, x_base.codes, values, w_base, operands.shape, padding)
            for x_base, values in zip(operands.inputs, operands.values)
            for w_base in operands.kernel
        )
        if self.input_scaling:
            y = y * self._input_scale(x.astype(self.dtype), padding)
        return _finish(self, y, x, phase)

    def _input_scale(self, x, padding):
        magnitude = lax.stop_gradient(jnp.abs(x).mean(-1, keepdims=True))
        box = jnp.full((*self.kernel_size, 1, 1), 1 / (self.kernel_size[0] * self.kernel_size[1]), self.dtype)
        return conv(magnitude, box, self.strides, padding, self.kernel_dilation)


class BinaryDense(nn.Module):
    r"""Dense layer on integer codes, scales after.

    y = sum over bases of scale_x scale_w (codes_x @ codes_w)  [+ bias]

    Attributes: as those of :class:`BinaryConv` of the same name.

    Raises:
      ValueError: when the layer is built with `features` < 1.

    Reference: Hubara et al., Binarized Neural Networks, 2016, arXiv:1602.02830.
    """

    features: int
    input_quantizer: Quantizer | None = None
    kernel_quantizer: Quantizer | None = None
    gradient_quantizer: Callable[[Array, Key], Array] | None = None
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.glorot_uniform()
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        _require(self, "features", self.features >= 1, "must be positive")

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch inputs"], *, train: bool = False, progress: Array | float = 1.0
    ) -> Float[Array, "batch features"]:
        phase = Phase(train, progress)
        operands = _operands(self, x, (x.shape[-1], self.features), phase)
        if operands.integers:
            return _dense_integers(self, *operands.only, operands.shape)
        y = sum(
            _dense(self, x_base, values, w_base, operands.shape)
            for x_base, values in zip(operands.inputs, operands.values)
            for w_base in operands.kernel
        )
        return _finish(self, y, x, phase)

r"""ReActNet on residual networks, with batch normalization and without any."""

import math
from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense, OutputScale, RPReLU, halve, max_pool, widened
from bnn_jax.models.stem import STEMS, Stem
from bnn_jax.quantizers import Quantizer
from bnn_jax.quantizers.standardized import standardize


class ReActUnit(nn.Module):
    """RPReLU( BN(conv(RSign(x))) + shortcut(x) ); the shortcut of a stride: average pool -> 1x1 conv -> BN."""

    features: int
    stride: int
    input_quantizer: Quantizer | None
    kernel_quantizer: Quantizer | None

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float):
        y = BinaryConv(
            self.features,
            kernel_size=(3, 3),
            strides=(self.stride, self.stride),
            padding=1,
            input_quantizer=self.input_quantizer,
            kernel_quantizer=self.kernel_quantizer,
            name="conv",
        )(x, train=train, progress=progress)
        y = BatchNorm(name="norm")(y, train=train)
        if self.stride > 1 or x.shape[-1] != self.features:
            x = halve(x) if self.stride > 1 else x
            x = BinaryConv(self.features, kernel_size=(1, 1), name="downsample")(x)
            x = BatchNorm(name="downsample_norm")(x, train=train)
        return RPReLU(name="activation")(y + x)


class ReActNet(nn.Module):
    r"""Bi-Real network with learned thresholds (RSign) and learned, shifted activations (RPReLU).

    stem -> stages of units of one binary 3x3 convolution, widths w, 2w, 4w, ..., stride 2 between them -> global mean
    -> dense.  The stem, without ReLU, the 1x1 convolutions on the shortcuts and the dense layer are in full precision.
    Unit: RPReLU( BN(conv(RSign(x))) + shortcut(x) ).  Without `input_quantizer` nothing takes RSign's place: the RPReLU
    before each convolution is the nonlinearity.

    Attributes:
      num_classes: of the logits.
      stage_sizes: units in each stage, one convolution a unit.
      width: filters of the first stage.
      input_quantizer, kernel_quantizer: of the 3x3 convolutions; the method's are rsign and magnitude_aware.
      stem: "cifar" or "imagenet", see :class:`bnn_jax.models.stem.Stem`.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with each stage's output and the `features` that
      the last layer sees.

    Raises:
      ValueError: for another `stem`.

    Reference: Liu et al., ReActNet, 2020, arXiv:2003.03488.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (4, 4, 4, 4)
    width: int = 64
    input_quantizer: Quantizer | None = None
    kernel_quantizer: Quantizer | None = None
    stem: str = "cifar"

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        intermediates = {}
        x = Stem(self.width, kind=self.stem, relu=False, name="stem")(images, train=train)
        for stage, units in enumerate(self.stage_sizes):
            for unit in range(units):
                x = ReActUnit(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and unit == 0 else 1,
                    input_quantizer=self.input_quantizer,
                    kernel_quantizer=self.kernel_quantizer,
                    name=f"stage{stage + 1}_unit{unit + 1}",
                )(x, train=train, progress=progress)
            intermediates[f"stage{stage + 1}"] = x
        intermediates["features"] = x = x.mean((1, 2))
        return BinaryDense(self.num_classes, use_bias=True, name="head")(widened(x)), intermediates


reactnet18 = partial(ReActNet, stage_sizes=(4, 4, 4, 4), width=64, stem="imagenet")
"""ReActNet-18: the stages of Bi-Real-Net 18, 64 to 512 filters."""

reactnet_resnet20 = partial(ReActNet, stage_sizes=(6, 6, 6), width=16)
"""ReActNet on ResNet-20 for 32x32 images, 16, 32 and 64 filters."""


def input_factors(
    stage_sizes: tuple[int, ...], *, alpha: float, count_first_unit: bool = True
) -> tuple[tuple[float, ...], ...]:
    r"""beta of each unit of a network without normalization: 1 / sqrt(expected variance of its input).

    The expected variance is 1 at the first unit, grows by alpha^2 with each unit, and is set back to 1 in the first
    unit of every later stage, whose shortcut sees the normalized input.

    Args:
      stage_sizes: units in each stage.
      alpha: factor of the units' convolutions.
      count_first_unit: let a stage's first unit add alpha^2 too; the authors' release leaves it out.

    >>> [[round(beta, 3) for beta in stage] for stage in input_factors((2, 2), alpha=0.75)]
    [[1.0, 0.8], [0.686, 0.8]]
    """
    variance, factors = 1.0, []
    for stage, units in enumerate(stage_sizes):
        of_stage = []
        for unit in range(units):
            of_stage.append(1 / math.sqrt(variance))
            variance = 1.0 if stage > 0 and unit == 0 else variance
            variance += alpha**2 if count_first_unit or unit > 0 else 0.0
        factors.append(tuple(of_stage))
    return tuple(factors)


def _standardize_kernel(variables):
    kernel = variables["params"]["kernel"]
    scaled = standardize(kernel, unbiased=False, epsilon=1e-5) / math.sqrt(math.prod(kernel.shape[:-1]))
    return {"params": {**variables["params"], "kernel": scaled}}


def scaled_standardized_conv(
    parent: nn.Module, x: Array, features: int, *, name: str, train: bool, progress: Array | float, **options
):
    """A convolution of a compact `parent`, its kernel quantized or, without a quantizer, gain (w - mean)/(std sqrt(n)).

    The gain, one at the start, is the parameter `scale` of `{name}_gain`.  A kernel quantizer must standardize itself.
    """
    if options.get("kernel_quantizer") is not None:
        return BinaryConv(features, name=name, **options)(x, train=train, progress=progress)
    standardized = nn.map_variables(
        BinaryConv, "params", trans_in_fn=_standardize_kernel, init=parent.is_initializing()
    )
    y = standardized(features, name=name, **options)(x, train=train, progress=progress)
    return OutputScale(case=1, name=f"{name}_gain")(y)


class BnFreeUnit(nn.Module):
    """RPReLU( alpha conv(RSign(beta x)) + shortcut ); of a stride: average pool -> 1x1 conv of beta x."""

    features: int
    stride: int
    alpha: float
    beta: float
    input_quantizer: Quantizer | None
    kernel_quantizer: Quantizer | None
    downsample_quantizer: Quantizer | None

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float):
        conv = partial(scaled_standardized_conv, self, features=self.features, train=train, progress=progress)
        normalized = self.beta * x
        y = conv(
            normalized,
            kernel_size=(3, 3),
            strides=(self.stride, self.stride),
            padding=1,
            input_quantizer=self.input_quantizer,
            kernel_quantizer=self.kernel_quantizer,
            name="conv",
        )
        if self.stride > 1 or x.shape[-1] != self.features:
            x = halve(normalized) if self.stride > 1 else normalized
            x = conv(x, kernel_size=(1, 1), kernel_quantizer=self.downsample_quantizer, name="downsample")
        return RPReLU(name="activation")(self.alpha * y + x)


class ReActNetBnFree(nn.Module):
    r"""ReActNet without batch normalization: standardized weights, and factors that hold the variance.

    stem conv [-> max pool] -> stages of units as :class:`ReActNet` -> global mean -> dense.
    Unit: RPReLU( alpha conv(RSign(beta x)) + shortcut ), with beta from :func:`input_factors`.  Every convolution has
    scaled, standardized weights: the binary ones by the quantizer bn_free, the others (the stem, those on the
    shortcuts, and all where `kernel_quantizer` is None) as gain (w - mean(w)) / (std(w) sqrt(n)).  The paper trains it
    with adaptive gradient clipping, which belongs to the optimizer.

    Attributes:
      num_classes: of the logits.
      stage_sizes: units in each stage, one convolution a unit.
      width: filters of the first stage.
      input_quantizer, kernel_quantizer: of the 3x3 convolutions; the method's are rsign and bn_free.
      stem: "cifar" (3x3) or "imagenet" (7x7, stride 2, and max pool 3x3, stride 2).
      alpha: factor of the units' convolutions.
      count_first_unit: see :func:`input_factors`.
      downsample_quantizer: of the 1x1 convolutions' kernels; the authors' release binarizes them, by bn_free, and
        leaves their inputs real.

    Returns:
      (logits, intermediates), as :class:`ReActNet`.

    Raises:
      ValueError: for another `stem`, or an `alpha` that is not positive.

    Reference: Chen et al., "BNN - BN = ?": Training Binary Neural Networks without Batch Normalization, 2021,
    arXiv:2104.08215.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (4, 4, 4, 4)
    width: int = 64
    input_quantizer: Quantizer | None = None
    kernel_quantizer: Quantizer | None = None
    stem: str = "cifar"
    alpha: float = 0.2
    count_first_unit: bool = True
    downsample_quantizer: Quantizer | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.stem not in STEMS:
            raise ValueError(f"`stem` (={self.stem!r}) must be cifar (small images) or imagenet (224x224)")
        if not self.alpha > 0:
            raise ValueError(f"`alpha` (={self.alpha!r}) of a BN-free ReActNet must be positive; 0.2 is usual")

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        large = self.stem == "imagenet"
        geometry = {"kernel_size": (7, 7), "strides": (2, 2), "padding": 3} if large else {"padding": 1}
        x = scaled_standardized_conv(self, images, self.width, name="stem", train=train, progress=progress, **geometry)
        x = max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1))) if large else x

        intermediates = {}
        betas = input_factors(self.stage_sizes, alpha=self.alpha, count_first_unit=self.count_first_unit)
        for stage, of_stage in enumerate(betas):
            for unit, beta in enumerate(of_stage):
                x = BnFreeUnit(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and unit == 0 else 1,
                    alpha=self.alpha,
                    beta=beta,
                    input_quantizer=self.input_quantizer,
                    kernel_quantizer=self.kernel_quantizer,
                    downsample_quantizer=self.downsample_quantizer,
                    name=f"stage{stage + 1}_unit{unit + 1}",
                )(x, train=train, progress=progress)
            intermediates[f"stage{stage + 1}"] = x
        intermediates["features"] = x = x.mean((1, 2))
        return BinaryDense(self.num_classes, use_bias=True, name="head")(widened(x)), intermediates


reactnet18_bn_free = partial(ReActNetBnFree, stage_sizes=(4, 4, 4, 4), width=64, stem="imagenet")
"""ReActNet-18 without batch normalization."""

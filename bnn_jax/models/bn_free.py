r"""Residual networks without batch normalization: standardized weights, and factors that hold the variance."""

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from bnn_jax.layers import BinaryConv, OutputScale, RPReLU, avg_pool_2x2
from bnn_jax.layers.by_layer import quantizers_of
from bnn_jax.models.network import STEMS, stem_pool
from bnn_jax.models.residual import ResidualNetwork
from bnn_jax.quantizers import Quantizer
from bnn_jax.quantizers.standardized import standardize


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
    parent: nn.Module,
    x: Array,
    features: int,
    *,
    name: str,
    train: bool = False,
    progress: Array | float = 1.0,
    **options,
):
    """A convolution of a compact `parent`, its kernel quantized or, without a quantizer, gain (w - mean)/(std sqrt(n)).

    The gain, one at the start, is the parameter `scale` of `{name}_gain`.  A kernel quantizer must standardize itself.
    """
    chosen = quantizers_of(parent, name).get("kernel_quantizer", options.get("kernel_quantizer"))
    if chosen is not None:
        return BinaryConv(features, name=name, **options)(x, train=train, progress=progress)
    standardized = nn.map_variables(
        BinaryConv, "params", trans_in_fn=_standardize_kernel, init=parent.is_initializing()
    )
    y = standardized(features, name=name, **options)(x, train=train, progress=progress)
    return OutputScale(case=1, name=f"{name}_gain")(y)


class BnFreeBlock(nn.Module):
    """One or two units RPReLU( alpha conv(RSign(beta x)) + S(x) ).

    S of a stride: average pool -> 1x1 conv of beta x.
    """

    features: int
    stride: int
    alpha: float
    betas: tuple[float, ...]
    quantizers: Mapping[str, Any]
    downsample_quantizer: Quantizer | None

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w channels"], *, train: bool, progress: Array | float):
        conv = partial(scaled_standardized_conv, self, features=self.features, train=train, progress=progress)
        for unit, beta in enumerate(self.betas, start=1):
            stride = self.stride if unit == 1 else 1
            geometry = {"kernel_size": (3, 3), "strides": (stride, stride), "padding": 1}
            normalized = beta * x
            y = conv(normalized, name=f"conv{unit}", **geometry, **self.quantizers)
            if stride > 1 or x.shape[-1] != self.features:
                x = avg_pool_2x2(normalized) if stride > 1 else normalized
                x = conv(x, kernel_size=(1, 1), kernel_quantizer=self.downsample_quantizer, name="downsample")
            x = RPReLU(name=f"activation{unit}")(self.alpha * y + x)
        return x


class ReActNetBnFree(ResidualNetwork):
    r"""ReActNet without batch normalization: standardized weights, and factors that hold the variance.

    stem conv [-> max pool] -> stages of units as :class:`bnn_jax.models.reactnet.ReActNet` -> global mean -> dense.
    Unit: RPReLU( alpha conv(RSign(beta x)) + shortcut ), with beta from :func:`input_factors`.  Every convolution has
    scaled, standardized weights: the binary ones by the quantizer bn_free, the others (the stem, those on the
    shortcuts, and all where `kernel_quantizer` is None) as gain (w - mean(w)) / (std(w) sqrt(n)).  The paper trains it
    with adaptive gradient clipping, which belongs to the optimizer.

    Attributes:
      stage_sizes: units in each stage, one convolution a unit.
      input_quantizer, kernel_quantizer: of the 3x3 convolutions; the method's are rsign and bn_free.
      alpha: factor of the units' convolutions.
      count_first_unit: see :func:`input_factors`.
      downsample_quantizer: of the 1x1 convolutions' kernels; the authors' release binarizes them, by bn_free, and
        leaves their inputs real.
      others: see :class:`bnn_jax.models.residual.ResidualNetwork`.

    Returns:
      (logits, intermediates), as :class:`bnn_jax.models.residual.ResidualNetwork`.

    Raises:
      ValueError: for another `stem`, or an `alpha` that is not positive.

    Reference: Chen et al., "BNN - BN = ?": Training Binary Neural Networks without Batch Normalization, 2021,
    arXiv:2104.08215.
    """

    stage_sizes: tuple[int, ...] = (4, 4, 4, 4)
    stem: str = "cifar"
    alpha: float = 0.2
    count_first_unit: bool = True
    downsample_quantizer: Quantizer | None = None

    counts_units = True

    def __post_init__(self):
        super().__post_init__()
        self.require("alpha", self.alpha > 0, "must be positive", "0.2 is usual")

    @nn.nowrap
    def begin(self, images, train):
        x = scaled_standardized_conv(self, images, self.width, name="stem", **STEMS[self.stem])
        return stem_pool(x, self.stem)

    @nn.nowrap
    def block(self, *, name, units, conv, **place):
        stage, block = (int(number) - 1 for number in re.findall(r"\d+", name))
        betas = input_factors(self.stage_sizes, alpha=self.alpha, count_first_unit=self.count_first_unit)[stage]
        return BnFreeBlock(
            alpha=self.alpha,
            betas=betas[2 * block : 2 * block + units],
            quantizers=self.quantizers,
            downsample_quantizer=self.downsample_quantizer,
            name=name,
            **place,
        )


reactnet18_bn_free = partial(ReActNetBnFree, stage_sizes=(4, 4, 4, 4), width=64, stem="imagenet")
"""ReActNet-18 without batch normalization."""

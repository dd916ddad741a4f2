r"""BinaryDuo: networks of coupled, ternary neurons that become networks of twice as many binary ones.

The first stage trains with `coupled=True`; :func:`decouple_variables` turns its variables into those of the same
network with `coupled=False`, which computes the same function and is then fine-tuned.
"""

import math
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense, max_pool, mean_pool
from bnn_jax.layers.by_layer import REAL
from bnn_jax.models.network import Network, check_image_size, stem_layers
from bnn_jax.precision import widened
from bnn_jax.quantizers import Quantizer, decouple, dequantize


@lru_cache(maxsize=64)
def _levels(quantizer: Quantizer) -> int:
    """How many values a quantizer of activations has, as it starts."""
    with jax.ensure_compile_time_eval():
        x = jnp.sinh(jnp.linspace(-6, 6, 601)).reshape(-1, 1)
        given = dict(quantizer.init(jax.random.key(0), x)) if quantizer.init else {}
        phase = {"train": False, "progress": 1.0, "key": None}
        given |= {wanted: phase[wanted] for wanted in quantizer.wants}
        if quantizer.init_state is None:
            quantized = quantizer.apply(x, **given)
        else:
            quantized, _ = quantizer.apply(x, quantizer.init_state(jax.random.key(0), x), **given)
        return len(np.unique(np.asarray(dequantize(quantized))))


class _Duo(Network):
    """A network whose neurons are coupled, or as many pairs of binary ones."""

    coupled: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.coupled or self.input_quantizer in (None, REAL):
            return
        levels = _levels(self.input_quantizer)
        if levels != 2:
            raise ValueError(
                f"`input_quantizer` (of {levels} levels) must be binary in a decoupled {type(self).__name__}; "
                "choose decoupled, or set coupled=True for the first stage"
            )


def _twice(x: Array) -> Array:
    return jnp.concatenate([x, x], -1)


class BinaryDuoVGG7(_Duo):
    r"""The small VGG-7 of BinaryDuo for 32x32 images.

    conv 3x3 w, in full precision -> BN -> quantize -> conv 3x3 w -> max pool 2 -> BN -> quantize -> conv 3x3 2w ->
    max pool 2 -> BN -> quantize -> conv 3x3 2w -> max pool 2 -> BN -> quantize -> conv 4x4/4 7.47w -> BN -> quantize ->
    conv 1x1 11.38w -> BN -> ReLU -> global mean -> dense, in full precision.  At the published width: 45, 45, 90, 90,
    336, 512.

    coupled: each quantizer makes ternary neurons.  Decoupled: each batch norm sees its input twice, and its outputs
    become twice as many binary neurons; the weights behind them double, to about those of the plain network of
    64, 64, 128, 128, 512, 512.  A ReLU takes the place of the quantizer where inputs stay real.

    Attributes:
      width: filters of the first convolution, w.
      coupled: True for the first stage of training, False for the second.
      input_quantizer: of the activations, usually `coupled` or `decoupled`.
      kernel_quantizer: of all layers but the first and the last; None in the paper's runs on CIFAR-10.
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with the outputs `stage1`, `stage2`, `stage3` of
      the second, fourth and fifth batch norm and the `features` that the last layer sees.

    Raises:
      ValueError: for an `input_quantizer` with more than two levels in a decoupled network, sizes that are not
        positive, or images under 32x32.

    Reference: Kim et al., BinaryDuo, 2020, arXiv:2002.06517, and the authors' program.
    """

    width: int = 45

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        check_image_size(images, 32, "the VGG-7 of BinaryDuo")
        activation = self.unless_quantized(nn.relu)
        conv = partial(BinaryConv, **self.quantizers)
        phase = {"train": train, "progress": progress}

        def neurons(number, x):
            x = x if self.coupled else _twice(x)
            return activation(BatchNorm(name=f"norm{number}")(x, train=train))

        x = neurons(1, BinaryConv(self.width, padding=1, name="stem")(images))
        x = neurons(2, max_pool(conv(self.width, padding=1, name="conv2")(x, **phase)))
        intermediates = {"stage1": x}
        x = neurons(3, max_pool(conv(2 * self.width, padding=1, name="conv3")(x, **phase)))
        intermediates["stage2"] = x = neurons(4, max_pool(conv(2 * self.width, padding=1, name="conv4")(x, **phase)))
        window = {"kernel_size": (4, 4), "strides": (4, 4), "padding": "VALID"}
        intermediates["stage3"] = x = neurons(5, conv(round(self.width * 336 / 45), name="conv5", **window)(x, **phase))
        x = conv(round(self.width * 512 / 45), kernel_size=(1, 1), name="conv6")(x, **phase)
        x = nn.relu(BatchNorm(name="norm6")(x, train=train)).mean((1, 2))
        intermediates["features"] = x
        return BinaryDense(self.num_classes, name="head")(widened(x)), intermediates


class BinaryDuoResNet(_Duo):
    r"""The ResNet-18 of BinaryDuo, with a shortcut around every convolution ("R18-sc").

    stem -> BN -> [x + BN(conv 3x3(quantize(x)))] twice a block -> ReLU -> global mean -> dense; stem, dense and the
    1x1 convolutions of the shortcuts that change the size, mean pool 2 -> conv 1x1 -> BN, are in full precision.
    The last convolution is wider than its stage, the shortcut around it gets channels of zeros.
    At the published width: stages of 64, 90, 180, 360 and the last convolution of 512.

    coupled: each quantizer makes ternary neurons.  Decoupled: what flows along the shortcuts is there twice, as
    x - 1/4 and x + 1/4 at the switch, and becomes twice as many binary neurons; the shortcuts that change the size or
    lead to the last convolution take the mean of the two.  A ReLU takes the quantizer's place where inputs stay real.

    Attributes:
      width: filters of the first stage, w; the others have sqrt(2) w, rounded down, and doublings of that, the last
        convolution w 2^(stages - 1).
      stage_sizes: blocks in each stage, of two convolutions.
      stem: "cifar" or "imagenet", see :func:`bnn_jax.models.network.stem_layers`.
      coupled: True for the first stage of training, False for the second.
      input_quantizer: of the activations, usually `coupled` or `decoupled`.
      kernel_quantizer: of the 3x3 convolutions; the paper's is `dorefa` of 1 bit: one scale a layer.
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates), as :class:`bnn_jax.models.network.Network`.

    Raises:
      ValueError: for an `input_quantizer` with more than two levels in a decoupled network, another `stem`, sizes that
        are not positive, or images that do not leave whole 2x2 windows for the mean pools.

    Reference: Kim et al., BinaryDuo, 2020, arXiv:2002.06517, and the authors' program.
    """

    width: int = 64
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    stem: str = "cifar"

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        check_image_size(images, 1, "a BinaryDuoResNet")
        self._check_windows(images)
        activation = self.unless_quantized(nn.relu)
        conv = partial(BinaryConv, padding=1, **self.quantizers)
        twice, once = (lambda x: x, lambda x: x) if self.coupled else (_twice, _mean_of_halves)
        stages = len(self.stage_sizes)
        widths = [self.width] + [math.isqrt(2 * self.width**2) << stage for stage in range(stages - 1)]
        widest = self.width * 2 ** (stages - 1)
        last = 2 * sum(self.stage_sizes)

        x = stem_layers(images, self.width, self.stem, train=train, activation=nn.relu)
        x = BatchNorm(name="norm1")(twice(x), train=train)
        intermediates, number = {}, 0
        for stage, blocks in enumerate(self.stage_sizes):
            for layer in range(2 * blocks):
                number += 1
                stride = 2 if stage and layer == 0 else 1
                y = conv(
                    widest if number == last else widths[stage], strides=(stride, stride), name=f"conv{number + 1}"
                )(activation(x), train=train, progress=progress)
                y = BatchNorm(name=f"norm{number + 1}")(y if number == last else twice(y), train=train)
                if stride == 2:
                    x = mean_pool(once(x), (2, 2), (2, 2))
                    x = BinaryConv(widths[stage], kernel_size=(1, 1), name=f"downsample{number + 1}_conv")(x)
                    x = twice(BatchNorm(name=f"downsample{number + 1}_norm")(x, train=train))
                elif number == last:
                    x = jnp.pad(once(x), ((0, 0), (0, 0), (0, 0), (0, widest - widths[stage])))
                x = x + y
            intermediates[f"stage{stage + 1}"] = x
        intermediates["features"] = x = nn.relu(x).mean((1, 2))
        return self.classify(x), intermediates

    @nn.nowrap
    def _check_windows(self, images):
        multiple = 2 ** (len(self.stage_sizes) - 1) * (4 if self.stem == "imagenet" else 1)
        height, width = images.shape[1:3]
        if min(height, width) < 1 or height % multiple or width % multiple:
            raise ValueError(
                f"`images` (of {height}x{width}) must leave whole 2x2 windows for the mean pools of a BinaryDuoResNet "
                f"with the stem {self.stem!r}; use sides that are multiples of {multiple}"
            )


def _mean_of_halves(x):
    first, second = jnp.split(x, 2, -1)
    return (first + second) / 2


def decouple_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    r"""The variables of the decoupled network that computes what the coupled one does: the switch of BinaryDuo.

    For each quantized layer: batch norm before it twice, with the biases b - 1/4 and b + 1/4; half its kernel twice.
    Where a shortcut brings the shift along, both biases stay b.  All other variables stay as they are.

    Equal in evaluation and in training, batch statistics included, up to the rounding of x +- 1/4 at a threshold, for
    full-precision kernels and for kernel quantizers whose scale is in proportion to the kernel, as `dorefa` of 1 bit,
    `xnor` and `magnitude_aware`; not for `binary`, whose scale is always 1.

    Args:
      variables: "params" and "batch_stats" of a :class:`BinaryDuoVGG7` or :class:`BinaryDuoResNet` with coupled=True.

    Raises:
      ValueError: for variables of another network or a decoupled one, or with parameters or a state of quantizers,
        which this cannot know how to split.

    >>> model = BinaryDuoVGG7(num_classes=10, width=4)
    >>> variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)), train=False))
    >>> variables["params"]["conv2"]["kernel"].shape
    (3, 3, 4, 4)
    >>> jax.eval_shape(decouple_variables, variables)["params"]["conv2"]["kernel"].shape
    (3, 3, 8, 4)

    Reference: Kim et al., BinaryDuo, 2020, arXiv:2002.06517, and the authors' program.
    """
    _check_coupled(variables)
    params, stats = dict(variables["params"]), dict(variables["batch_stats"])
    has_shortcuts = "stem_norm" in params
    number = 1
    while f"conv{number + 1}" in params:
        norm, conv = f"norm{number}", f"conv{number + 1}"
        ((kernel_name, kernel),) = params[conv].items()
        twice, shifted, halves = decouple((params[norm], stats[norm]), params[norm]["bias"], kernel)
        params[norm], stats[norm] = twice
        # A shortcut carries the shift on from where its stream begins: behind the stem and behind each downsampling.
        if not has_shortcuts or number == 1 or f"downsample{number}_conv" in params:
            params[norm] = params[norm] | {"bias": shifted}
        params[conv] = {kernel_name: halves}
        number += 1
    return {**variables, "params": params, "batch_stats": stats}


def _check_coupled(variables):
    params = variables.get("params", {})
    if not {"stem", "norm1", "conv2", "head"} <= params.keys() or "batch_stats" not in variables:
        raise ValueError(
            f"`variables` (with the layers {', '.join(params) or 'none'}) must be `params` and `batch_stats` of a "
            "BinaryDuo network"
        )
    owners = [name for name, layer in params.items() if {"kernel_quantizer", "input_quantizer"} & layer.keys()]
    if owners or "quantizer_state" in variables:
        raise ValueError(
            f"`variables` (with parameters or state of quantizers{' in ' if owners else ''}{', '.join(owners)}) cannot "
            "be decoupled; use a kernel quantizer without any, as dorefa or xnor"
        )
    stem_filters = jax.tree.leaves(params["stem"])[0].shape[-1]
    neurons = params["norm1"]["scale"].shape[-1]
    if neurons != stem_filters:
        raise ValueError(
            f"`variables` (with {neurons} neurons behind {stem_filters} filters of the stem) must be those of a "
            "coupled network; these are decoupled already"
        )


binaryduo_vgg7 = partial(BinaryDuoVGG7)
"""BinaryDuo's VGG-7 for CIFAR-10, coupled unless told otherwise."""

binaryduo_resnet18 = partial(BinaryDuoResNet, stage_sizes=(2, 2, 2, 2), stem="imagenet")
"""BinaryDuo's ResNet-18 with a shortcut around every convolution, coupled unless told otherwise."""

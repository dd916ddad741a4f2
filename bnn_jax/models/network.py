"""What all networks have: their sizes, checked, and the quantizers of their layers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from bnn_jax import checks
from bnn_jax.bitops.paths import PATHS
from bnn_jax.errors import unknown_name
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense, max_pool
from bnn_jax.layers.arguments import QUANTIZERS, make_quantizers
from bnn_jax.layers.by_layer import REAL, LayerQuantizers
from bnn_jax.layers.code_products import EXECUTION_RULE
from bnn_jax.layers.convolution import Padding
from bnn_jax.precision import widened
from bnn_jax.quantizers import QuantizerLike

STEMS: dict[str, dict[str, Any]] = {
    "cifar": {"kernel_size": (3, 3), "padding": 1},
    "imagenet": {"kernel_size": (7, 7), "strides": (2, 2), "padding": 3},
}
"""First convolutions by name: for small images, and for those of 224x224, where a max pool follows."""

POSITIVE = ("num_classes", "width", "stage_sizes")
"""Sizes that most networks have."""


class Network(nn.Module):
    r"""The base of all networks.

    Called as ``network(images, train=False, progress=1.0)`` with NHWC images; `progress` is the share of the training
    done, for schedules.

    Attributes:
      num_classes: of the logits.
      width: of the network's own unit, most often the filters of its first stage.
      input_quantizer, kernel_quantizer, gradient_quantizer: of the quantized layers, as
        :class:`bnn_jax.layers.BinaryConv` takes them; None is full precision.
      quantizers: those of single layers, as ``{"stage3_*": "real", "head": "8-bit"}``: shell-style pattern of the name
        of a layer, or of a block that it is in -> "real", "binary", "8-bit", a pair (input_quantizer, kernel_quantizer)
        or a dict of arguments.  The first that matches counts.  Of the layers that the network quantizes, those whose
        inputs stay real have the activation of a network in full precision before them.  As a mapping it is the
        keyword arguments of a quantized layer.
      execution: of its convolutions, as :class:`bnn_jax.layers.BinaryConv` takes it.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with each stage's output and the `features` that
      the last layer sees.

    Raises:
      ValueError: for sizes that are not positive, another `execution`, or an unknown `stem` where the network has one;
        when it is initialized with a pattern of `quantizers` that matches no layer; when it is called with images
        without pixels or channels.
    """

    num_classes: int
    width: int = 64
    input_quantizer: QuantizerLike = None
    kernel_quantizer: QuantizerLike = None
    gradient_quantizer: QuantizerLike = None
    quantizers: Mapping[str, Any] | None = None
    execution: str | None = None

    def __post_init__(self):
        counts = [f.name for f in fields(self) if f.type in (int, tuple[int, ...])]
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):
                setattr(self, field.name, tuple(value))  # as a file has it; networks are hashed
        make_quantizers(self)
        patterns = self.quantizers.given if isinstance(self.quantizers, LayerQuantizers) else self.quantizers
        patterns = {} if patterns is None else patterns
        own = {kind: getattr(self, kind) for kind in QUANTIZERS}
        own |= {kind: None for kind, quantizer in own.items() if quantizer == REAL}  # of another network's patterns
        self.quantizers = LayerQuantizers(own, patterns)
        self.input_quantizer = self.quantizers["input_quantizer"]
        super().__post_init__()
        for argument in counts:
            self._require_whole(argument)
        for argument in POSITIVE:
            if hasattr(self, argument):
                self.require_positive(argument)
        self.require("execution", self.execution in (None, *PATHS), EXECUTION_RULE)
        if getattr(self, "stem", "cifar") not in STEMS:
            raise unknown_name(f"{type(self).__name__}.stem", self.stem, STEMS)

    @nn.nowrap
    def require(self, argument: str, holds: bool, rule: str, advice: str = "") -> None:
        """Refuse the value of `argument`, naming the network, unless the rule `holds`."""
        checks.require(argument, getattr(self, argument), holds, f"of {type(self).__name__} {rule}", advice)

    @nn.nowrap
    def _require_whole(self, argument: str) -> None:
        """Refuse a value that is no whole number, or a negative one, or no tuple of them where the default is one."""
        value, usual = getattr(self, argument), getattr(type(self), argument, None)
        several = isinstance(usual, tuple)
        numbers = value if several and isinstance(value, tuple) else (value,)
        least = -math.inf if argument in POSITIVE else 0
        holds = isinstance(value, tuple) == several and all(checks.is_whole(number, least) for number in numbers)
        rule = "must be a tuple of whole numbers" if several else "must be a whole number, not negative"
        self.require(argument, holds, rule, "" if usual is None else f"{usual} is usual")

    @nn.nowrap
    def require_positive(self, argument: str) -> None:
        """Refuse a number below 1, an empty tuple and one that holds such a number."""
        value, usual = getattr(self, argument), getattr(type(self), argument, None)
        numbers = value if isinstance(value, tuple) else (value,)
        holds = len(numbers) > 0 and all(number > 0 for number in numbers)
        rule = "must be positive numbers, at least one" if isinstance(value, tuple) else "must be positive"
        self.require(argument, holds, rule, "" if usual is None else f"{usual} is usual")

    @nn.nowrap
    def init_with_output(self, *args: Any, **kwargs: Any) -> Any:
        """Initialize as Flax does, and refuse a pattern of `quantizers` that matches no layer."""
        layers: dict[str, None] = {}

        def remember(call, arguments, options, context):
            if context.method_name == "__call__" and isinstance(context.module, BinaryConv | BinaryDense):
                layers["/".join(context.module.path)] = None
            return call(*arguments, **options)

        with nn.intercept_methods(remember):
            returned = super().init_with_output(*args, **kwargs)
        self.quantizers.require_matches(layers)
        return returned

    @nn.nowrap
    def unless_quantized(self, activation: Callable[[Array], Array]) -> Callable[[Array], Array]:
        """The `activation` where inputs stay real; otherwise the identity, for the quantizer stands in its place.

        Where `quantizers` has patterns, real layers of the network apply it to their inputs themselves.
        """
        self.quantizers.activation = activation
        return activation if self.input_quantizer is None else identity

    @nn.nowrap
    def beside_quantized(self, activation: Callable[[Array], Array]) -> Callable[[Array], Array]:
        """The `activation` for what no quantized layer takes, where :meth:`unless_quantized` left it to such layers.

        That is in a network of real inputs whose `quantizers` have patterns: its layers apply it themselves, its
        shortcuts do not.
        """
        return activation if self.input_quantizer == REAL else identity

    @nn.nowrap
    def classify(
        self, features: Float[Array, "batch features"], *, final_norm: bool = False, train: bool = False
    ) -> Float[Array, "batch classes"]:
        """The logits: a dense layer `head` in full precision, its sums in float32.

        With `final_norm` they are normalized, without scale and bias, and the layer has no bias.
        """
        logits = BinaryDense(self.num_classes, use_bias=not final_norm, name="head")(widened(features))
        if not final_norm:
            return logits
        return BatchNorm(use_scale=False, use_bias=False, name="head_norm")(logits, train=train)


def identity(x: Array) -> Array:
    """Return x."""
    return x


def flattened(x: Array) -> Array:
    """The values of each example in one row, (batch, values); a batch may be empty."""
    return x.reshape((x.shape[0], math.prod(x.shape[1:])))


def stem_layers(
    images: Float[Array, "batch height width channels"],
    features: int,
    kind: str,
    *,
    train: bool,
    activation: Callable[[Array], Array] = identity,
    same_padding: bool = False,
) -> Float[Array, "batch h w features"]:
    """conv -> BN -> activation in full precision, the layers `stem` and `stem_norm` of the network that calls this.

    cifar: conv 3x3, stride 1.  imagenet: conv 7x7, stride 2, padding 3, and at the end max pool 3x3, stride 2, padding
    1, so a 224x224 image leaves with 56x56.

    Args:
      images: normalized.
      features: filters of the convolution.
      kind: "cifar" or "imagenet".
      train: use the statistics of the batch.
      activation: between batch norm and pool.
      same_padding: pad as TensorFlow's "same", strided windows of an even image at the end alone.

    Reference: He et al., Deep Residual Learning, 2016, arXiv:1512.03385.
    """
    geometry = STEMS[kind] | ({"padding": "SAME"} if same_padding else {})
    x = BinaryConv(features, name="stem", **geometry)(images)
    x = activation(BatchNorm(name="stem_norm")(x, train=train))
    return stem_pool(x, kind, padding="SAME" if same_padding else 1)


def stem_pool(
    x: Float[Array, "batch h w features"], kind: str, *, padding: Padding = 1
) -> Float[Array, "batch rows columns features"]:
    """The max pool at the end of an imagenet stem."""
    return max_pool(x, (3, 3), strides=(2, 2), padding=padding) if kind == "imagenet" else x


def check_image_size(images: Float[Array, "batch height width channels"], smallest: int, network: str) -> None:
    """Refuse images that the strides and pools of `network` use up, and those without channels.

    Raises:
      ValueError: if a side has fewer than `smallest` pixels, or a pixel no values.
    """
    checks.require("images.shape", images.shape, images.shape[3] > 0, "must have a channel at least", "gray has one")
    height, width = images.shape[1:3]
    if min(height, width) < smallest:
        raise ValueError(
            f"`images` (of {height}x{width}) are too small for {network}; they need {smallest}x{smallest} pixels"
        )

r"""The networks of BinaryConnect and BinaryNet, in which every layer is binary."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense, max_pool
from bnn_jax.layers.by_layer import REAL, quantizers_of
from bnn_jax.models.network import Network, check_image_size, flattened
from bnn_jax.precision import widened
from bnn_jax.quantizers import Quantized, Quantizer, bases


def latent_uniform(kernel_quantizer: Quantizer | None, limit: float | None) -> nn.initializers.Initializer:
    """U(-limit, limit) for latent weights; Glorot's initializer for real ones, or where `limit` is None."""
    if kernel_quantizer is None or limit is None:
        return nn.initializers.glorot_uniform()
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


def named(network: Network, name: str) -> dict[str, Any]:
    """The `name` of a layer, and how its weights start by the kernel quantizer of a pattern or of the network."""
    quantizer = quantizers_of(network, name).get("kernel_quantizer", network.kernel_quantizer)
    return {"name": name, "kernel_init": latent_uniform(quantizer, network.latent_range)}


class ConvNet(Network):
    r"""The CIFAR network of BinaryConnect and BinaryNet: convolutions in stages, then dense layers, all of them binary.

    stages of [conv 3x3 -> (max pool 2 after the stage's last) -> BN -> sign], widths w, 2w, 4w -> flatten ->
    [dense 8w -> BN -> sign] twice -> dense -> BN.  The sign belongs to the layer behind it, so the image and the
    logits stay real; a ReLU takes its place where inputs stay real, as in BinaryConnect.  There are no biases, which
    the batch norms would absorb.  With 32x32x3 images and ten classes: 14,022,016 binary weights.

    Attributes:
      width: filters of the first stage, w.
      stage_sizes: convolutions in each stage.
      dense_layers: hidden dense layers, of 8w units.
      latent_range: latent weights start uniform in [-latent_range, latent_range], as in the authors' programs, which
        scale the learning rates to fit; None starts from Glorot's range, as real weights do.
      input_quantizer: of all layers but the first, which sees the image; None quantizes weights only.
      kernel_quantizer: of all layers, the first and the last included.
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with the outputs `stage1`, `stage2`, ... of the
      stages, behind their last batch norm, and the `features` that the last layer sees.

    Raises:
      ValueError: for sizes that are not positive, or images that the pools use up.

    Reference: Courbariaux et al., BinaryConnect, 2015, arXiv:1511.00363; Hubara et al., Binarized Neural Networks,
    2016, arXiv:1602.02830.
    """

    width: int = 128
    stage_sizes: tuple[int, ...] = (2, 2, 2)
    dense_layers: int = 2
    latent_range: float | None = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.latent_range is not None:
            self.require_positive("latent_range")

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        check_image_size(images, 2 ** len(self.stage_sizes), f"a ConvNet with {len(self.stage_sizes)} pools")
        layer = partial(named, self)
        conv = partial(BinaryConv, padding=1, **self.quantizers)
        dense = partial(BinaryDense, **self.quantizers)
        norm = partial(BatchNorm, epsilon=1e-4)
        activation = self.unless_quantized(nn.relu)
        phase = {"train": train, "progress": progress}

        x, number, intermediates = images, 0, {}
        for stage, convs in enumerate(self.stage_sizes):
            for position in range(convs):
                number += 1
                quantizer = None if number == 1 else self.input_quantizer
                x = conv(self.width * 2**stage, input_quantizer=quantizer, **layer(f"conv{number}"))(x, **phase)
                x = max_pool(x) if position == convs - 1 else x
                x = activation(norm(name=f"norm{number}")(x, train=train))
            intermediates[f"stage{stage + 1}"] = x
        x = flattened(x)
        for number in range(1, self.dense_layers + 1):
            x = dense(8 * self.width, **layer(f"dense{number}"))(x, **phase)
            x = activation(norm(name=f"dense_norm{number}")(x, train=train))
        intermediates["features"] = x
        x = norm(name="head_norm")(dense(self.num_classes, **layer("head"))(widened(x), **phase), train=train)
        return x, intermediates


def with_dropout(quantizer: Quantizer, rate: float) -> Quantizer:
    r"""Drop neurons behind their quantizer: a sign of zero would be +1, so that no mask before it can drop any.

    Forward   training:  codes m / (1 - rate), m = 0 with probability rate, else 1, for each element;
              evaluation:  codes
    Backward  exact for the mask, the quantizer's own for the codes
    """

    def apply(x, *state, key, **given):
        own = {"key": None if key is None else jax.random.fold_in(key, 1)} if "key" in quantizer.wants else {}
        result = quantizer.apply(x, *state, **own, **given)
        if key is None:
            return result
        quantized, *updated = result if state else (result,)
        keep = jax.random.bernoulli(key, 1 - rate, x.shape).astype(x.dtype)
        dropped = tuple(Quantized(base.codes * keep, base.scale / (1 - rate)) for base in bases(quantized))
        return (dropped, *updated) if state else dropped

    return quantizer._replace(apply=apply, wants=tuple(dict.fromkeys((*quantizer.wants, "key"))))


class BinaryMLP(Network):
    r"""The MNIST network of BinaryConnect and BinaryNet: dense layers, all of them binary.

    dropout -> [dense -> BN -> sign -> dropout] three times -> dense -> BN.  The sign belongs to the layer behind it; a
    ReLU takes its place where inputs stay real.  The randomness of the dropout comes from the stream "quantizer".

    Attributes:
      width: units of a hidden layer.
      hidden_layers: how many.
      input_dropout, hidden_dropout: probability that a pixel or a hidden neuron is dropped in training.
      latent_range: latent weights start uniform in [-latent_range, latent_range]; None: Glorot's range.
      input_quantizer: of all layers but the first; None quantizes weights only.
      kernel_quantizer: of all layers.
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with the outputs `stage1`, `stage2`, ... of the
      hidden layers, behind their batch norm, and the `features` that the last layer sees.

    Raises:
      ValueError: for sizes that are not positive, a dropout outside [0, 1), or images without pixels or channels.

    Reference: Courbariaux et al., BinaryConnect, 2015, arXiv:1511.00363; Hubara et al., Binarized Neural Networks,
    2016, arXiv:1602.02830.
    """

    width: int = 4096
    hidden_layers: int = 3
    input_dropout: float = 0.2
    hidden_dropout: float = 0.5
    latent_range: float | None = 1.0

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("hidden_layers")
        if self.latent_range is not None:
            self.require_positive("latent_range")
        for argument in ("input_dropout", "hidden_dropout"):
            self.require(argument, 0 <= getattr(self, argument) < 1, "must be in [0, 1)", "0 drops nothing")

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        check_image_size(images, 1, "a BinaryMLP")
        layer, dense = partial(named, self), partial(BinaryDense, **self.quantizers)
        norm = partial(BatchNorm, epsilon=1e-4)
        dropout = partial(nn.Dropout, rng_collection="quantizer", deterministic=not train)
        real, hidden_quantizer = self.input_quantizer is None, self.input_quantizer
        if self.hidden_dropout:
            self.quantizers.around_input = dropped = partial(with_dropout, rate=self.hidden_dropout)
            hidden_quantizer = hidden_quantizer if hidden_quantizer in (None, REAL) else dropped(hidden_quantizer)

        def dropped_relu(x):
            if not train or self.hidden_dropout == 0:
                return nn.relu(x)
            kept = jax.random.bernoulli(self.make_rng("quantizer"), 1 - self.hidden_dropout, x.shape)
            return jnp.where(kept, nn.relu(x) / (1 - self.hidden_dropout), 0)

        self.unless_quantized(dropped_relu)  # of single layers that stay real
        phase = {"train": train, "progress": progress}

        x = dropout(self.input_dropout, name="input_dropout")(flattened(images))
        intermediates = {}
        for number in range(1, self.hidden_layers + 1):
            quantizer = None if number == 1 else hidden_quantizer
            x = dense(self.width, input_quantizer=quantizer, **layer(f"dense{number}"))(x, **phase)
            x = norm(name=f"norm{number}")(x, train=train)
            x = dropout(self.hidden_dropout, name=f"dropout{number}")(nn.relu(x)) if real else x
            intermediates[f"stage{number}"] = x
        intermediates["features"] = x
        x = dense(self.num_classes, input_quantizer=hidden_quantizer, **layer("head"))(widened(x), **phase)
        return norm(name="head_norm")(x, train=train), intermediates


bnn_convnet = partial(ConvNet)
"""BinaryNet for CIFAR-10: binary activations and weights in all layers."""

binaryconnect_convnet = partial(ConvNet)
"""BinaryConnect for CIFAR-10, the same layers: binary weights, and ReLU instead of sign for want of a quantizer."""

mnist_mlp = partial(BinaryMLP)
"""BinaryNet's network for MNIST: 3 hidden layers of 4096 units, dropout.

BinaryConnect's has 2048 units and no dropout: `width=2048`, `input_dropout=0`, `hidden_dropout=0`.
"""

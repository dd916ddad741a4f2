r"""AlexNets: those of XNOR-Net, of DoReFa-Net and of BNN+."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense, max_pool
from bnn_jax.layers.by_layer import REAL, quantizers_of
from bnn_jax.layers.convolution import resolve_padding
from bnn_jax.models.network import Network, check_image_size, flattened

overlapping_pool = partial(max_pool, window=(3, 3), strides=(2, 2))


class XnorAlexNet(Network):
    r"""AlexNet of XNOR-Net: pools follow the binary convolutions, on real values; no groups, no dropout.

    conv 11x11/4 w -> BN -> ReLU -> max pool 3/2, in full precision
    -> [BN -> sign -> conv + bias (-> max pool 3/2)]: 5x5 8w/3 with pool, 3x3 4w, 3x3 4w, 3x3 8w/3 with pool
    -> [BN -> sign -> dense + bias] 128w/3 twice, the first a convolution over all that the pools leave, 6x6 of 224x224
    -> BN -> ReLU -> dense + bias, in full precision.

    A pool before the sign would see +1 nearly everywhere; a ReLU takes the place of sign where inputs stay real.
    The weights of width 96 at 224x224: 34,848 and 4,096,000 in full precision, 58,236,928 binary.

    Attributes:
      width: filters of the first convolution, w.
      input_quantizer, kernel_quantizer: of all layers but the first and the last.
      input_scaling: XNOR-Net's map K, see :class:`bnn_jax.layers.BinaryConv`.
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with the outputs `stage1`, `stage2`, `stage3` of
      the three pools and the `features` that the last layer sees.

    Raises:
      ValueError: for sizes that are not positive, or images under 63x63, which the strides use up.

    Reference: Rastegari et al., XNOR-Net, 2016, arXiv:1603.05279, and the authors' program.
    """

    width: int = 96
    input_scaling: bool = False

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        check_image_size(images, 63, "the AlexNet of XNOR-Net")
        conv = partial(BinaryConv, input_scaling=self.input_scaling, use_bias=True, **self.quantizers)

        def block(number, x, features, **geometry):
            x = self.unless_quantized(nn.relu)(BatchNorm(epsilon=1e-4, name=f"norm{number}")(x, train=train))
            return conv(features, name=f"conv{number}", **geometry)(x, train=train, progress=progress)

        middle, units = round(self.width * 8 / 3), round(self.width * 128 / 3)
        x = BinaryConv(self.width, kernel_size=(11, 11), strides=(4, 4), padding=2, use_bias=True, name="conv1")(images)
        x = overlapping_pool(nn.relu(BatchNorm(name="norm1")(x, train=train)))
        intermediates = {"stage1": x}
        intermediates["stage2"] = x = overlapping_pool(block(2, x, middle, kernel_size=(5, 5), padding=2))
        x = block(3, x, 4 * self.width, padding=1)
        x = block(4, x, 4 * self.width, padding=1)
        intermediates["stage3"] = x = overlapping_pool(block(5, x, middle, padding=1))
        x = block(6, x, units, kernel_size=x.shape[1:3], padding="VALID")
        x = block(7, x, units, kernel_size=(1, 1))
        x = BatchNorm(epsilon=1e-3, name="norm")(x, train=train)
        intermediates["features"] = x = flattened(nn.relu(x))
        return self.classify(x), intermediates


class DorefaAlexNet(Network):
    r"""AlexNet of DoReFa-Net: three convolutions in two groups, pools behind the batch norm.

    conv 12x12/4 w + bias, in full precision -> [quantize -> layer (-> quantizer of its gradient) -> BN (-> max pool)]:
    conv 5x5 8w/3 in groups, pool 3/2 "SAME"; conv 3x3 4w, pool 3/2 "SAME"; conv 3x3 4w in groups; conv 3x3 8w/3 in
    groups, pool 3/2 "VALID"; dense 128w/3 twice -> clip to [0, 1] -> dense + bias, in full precision.

    A ReLU takes the place of quantizer and clip where inputs stay real.  Each group is a layer, so a weight scale of
    the whole layer is one of a group here; the gradient of both groups is quantized together, but apart where a pattern
    of `quantizers` chooses the quantizer of a group's.

    Attributes:
      width: filters of the first convolution, w; even, for the groups.
      input_quantizer, kernel_quantizer: of all layers but the first and the last.
      gradient_quantizer: of the same layers, (y, key) -> y, as `bnn_jax.quantizers.dorefa_gradient`; in training only.
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with the outputs `stage1`, `stage2`, `stage3` of
      the three pools and the `features` that the last layer sees.

    Raises:
      ValueError: for an odd `width`, sizes that are not positive, or images under 44x44, which the strides use up.

    Reference: Zhou et al., DoReFa-Net, 2016, arXiv:1606.06160, and the authors' program.
    """

    width: int = 96

    def __post_init__(self):
        super().__post_init__()
        self.require("width", self.width % 2 == 0, "must be even, for the groups split it", "96 is usual")

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        check_image_size(images, 44, "the AlexNet of DoReFa-Net")
        middle, units = 2 * round(self.width * 4 / 3), round(self.width * 128 / 3)
        x = BinaryConv(self.width, kernel_size=(12, 12), strides=(4, 4), padding="VALID", use_bias=True, name="conv0")(
            images
        )
        phase = {"train": train, "progress": progress}
        x = self._layer("1", x, middle, groups=2, kernel_size=(5, 5), **phase)
        intermediates = {"stage1": (x := _same_pool(x))}
        intermediates["stage2"] = x = _same_pool(self._layer("2", x, 4 * self.width, **phase))
        x = self._layer("3", x, 4 * self.width, groups=2, **phase)
        x = overlapping_pool(self._layer("4", x, middle, groups=2, **phase))
        intermediates["stage3"] = x
        x = flattened(x)
        for number in ("5", "6"):
            x = self._layer(number, x, units, **phase)
        intermediates["features"] = x = nn.relu(x) if self.input_quantizer in (None, REAL) else jnp.clip(x, 0, 1)
        return self.classify(x), intermediates

    def _layer(self, number, x, features, *, train, progress, groups=1, **geometry):
        """Activation -> dense layer, or convolution in groups -> quantizer of the gradient -> BN."""
        x = self.unless_quantized(nn.relu)(x)
        layer, name = (BinaryDense, f"dense{number}") if x.ndim == 2 else (BinaryConv, f"conv{number}")
        names = [name] if groups == 1 else [f"{name}_group{group + 1}" for group in range(groups)]
        apart = any("gradient_quantizer" in quantizers_of(self, name) for name in names)
        quantizers = self.quantizers | ({} if apart else {"gradient_quantizer": None})
        layer = partial(layer, features // groups, **quantizers, **geometry)
        parts = jnp.split(x, groups, -1)
        y = [layer(name=name)(part, train=train, progress=progress) for name, part in zip(names, parts)]
        y = jnp.concatenate(y, -1)
        if self.gradient_quantizer is not None and train and not apart:
            y = self.gradient_quantizer(y, self.make_rng("quantizer"))
        return BatchNorm(epsilon=1e-4, name=f"norm{number}")(y, train=train)


def _same_pool(x):
    geometry = {"kernel_size": (3, 3), "strides": (2, 2), "dilation": (1, 1)}
    return overlapping_pool(x, padding=resolve_padding("SAME", shape=x.shape[1:3], **geometry))


class BnnPlusAlexNet(Network):
    r"""AlexNet of "one weird trick" with batch norm, as BNN+ trains it.

    conv w, in full precision -> max pool 3/2 -> BN -> [sign -> layer (-> max pool 3/2) -> BN]: conv 5x5 3w with pool,
    conv 3x3 6w, conv 3x3 4w, conv 3x3 4w with pool, dense 64w twice -> hardtanh -> dense, in full precision -> BN
    without scale and bias.  A hardtanh takes the place of sign where inputs stay real.

    The places of the batch norms and the network for 32x32 images could not be confirmed; this is a reading: pools
    before batch norms, and for the small images a first convolution of 3x3 and stride 1.

    Attributes:
      width: filters of the first convolution, w.
      stem: the first convolution, "cifar": 3x3, stride 1; "imagenet": 11x11, stride 4, padding 2.
      final_norm: normalize the logits, without scale and bias.
      input_quantizer, kernel_quantizer: of all layers but the first and the last.
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with the outputs `stage1`, `stage2`, `stage3`
      behind the three pools and their batch norms, and the `features` that the last layer sees.

    Raises:
      ValueError: for another `stem`, sizes that are not positive, or images under 15x15, or 63x63 with the stem
        "imagenet", which the strides use up.

    Reference: Darabi et al., BNN+, 2018, arXiv:1812.11800; Krizhevsky, One weird trick for parallelizing convolutional
    neural networks, 2014, arXiv:1404.5997.
    """

    width: int = 64
    stem: str = "cifar"
    final_norm: bool = True

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        large = self.stem == "imagenet"
        check_image_size(images, 63 if large else 15, f"the AlexNet of BNN+ with the stem {self.stem!r}")
        conv, dense = partial(BinaryConv, **self.quantizers), partial(BinaryDense, **self.quantizers)
        clip = self.unless_quantized(nn.hard_tanh)
        phase = {"train": train, "progress": progress}

        def norm(number, x):
            return clip(BatchNorm(name=f"norm{number}")(x, train=train))

        geometry = {"kernel_size": (11, 11), "strides": (4, 4), "padding": 2} if large else {"padding": 1}
        x = BinaryConv(self.width, name="conv1", **geometry)(images)
        intermediates = {"stage1": (x := norm(1, overlapping_pool(x)))}
        x = conv(3 * self.width, kernel_size=(5, 5), padding=2, name="conv2")(x, **phase)
        intermediates["stage2"] = x = norm(2, overlapping_pool(x))
        x = norm(3, conv(6 * self.width, padding=1, name="conv3")(x, **phase))
        x = norm(4, conv(4 * self.width, padding=1, name="conv4")(x, **phase))
        x = conv(4 * self.width, padding=1, name="conv5")(x, **phase)
        intermediates["stage3"] = x = norm(5, overlapping_pool(x))
        x = flattened(x)
        x = norm(6, dense(64 * self.width, name="dense1")(x, **phase))
        x = norm(7, dense(64 * self.width, name="dense2")(x, **phase))
        intermediates["features"] = x = nn.hard_tanh(x)
        return self.classify(x, final_norm=self.final_norm, train=train), intermediates


alexnet_xnor = partial(XnorAlexNet)
"""AlexNet of XNOR-Net, for 224x224 images."""

alexnet_dorefa = partial(DorefaAlexNet)
"""AlexNet of DoReFa-Net, for 224x224 images; quantizes gradients where it is told to."""

bnn_plus_alexnet = partial(BnnPlusAlexNet)
"""AlexNet of BNN+: for 32x32 images, or with `stem="imagenet"` for 224x224."""

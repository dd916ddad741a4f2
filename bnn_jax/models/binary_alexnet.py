r"""BinaryAlexNet: an AlexNet in the manner of BinaryNet, every layer binary."""

from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense
from bnn_jax.models.alexnet import overlapping_pool
from bnn_jax.models.network import Network, check_image_size, flattened
from bnn_jax.precision import widened


class BinaryAlexNet(Network):
    r"""BinaryAlexNet: binary kernels in all layers and binary inputs in all but the first.

    [conv (-> max pool 3/2) -> BN]: 11x11/4 w with pool, of the image; 5x5 3w with pool, 3x3 6w, 3x3 6w, 3x3 4w with
    pool -> flatten -> [dense -> BN]: 64w, 64w, one unit a class.

    The sign belongs to the layer behind it; a ReLU takes its place where inputs stay real.  Batch norms have no scale.

    Attributes:
      width: filters of the first convolution, w.
      input_quantizer: of all layers but the first.
      kernel_quantizer: of all layers.
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with the outputs `stage1`, `stage2`, `stage3` of
      the blocks with a pool and the `features` that the last layer sees.

    Raises:
      ValueError: for sizes that are not positive, or images under 57x57, which the strides use up.

    Reference: Bannink et al., Larq Compute Engine, MLSys 2021, arXiv:2011.09398, and Larq Zoo; after Hubara et al.,
    Binarized Neural Networks, 2016, arXiv:1602.02830.
    """

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        check_image_size(images, 57, "a BinaryAlexNet")
        norm, activation = partial(BatchNorm, use_scale=False), self.unless_quantized(nn.relu)
        phase = {"train": train, "progress": progress}

        def block(number, x, features, *, pool=False, **geometry):
            quantizers = self.quantizers | ({"input_quantizer": None} if number == 1 else {})
            x = activation(x) if number > 1 else x
            y = BinaryConv(features, name=f"conv{number}", **quantizers, **geometry)(x, **phase)
            return norm(name=f"norm{number}")(overlapping_pool(y) if pool else y, train=train)

        x = block(1, images, self.width, kernel_size=11, strides=4, pool=True)
        intermediates = {"stage1": x}
        intermediates["stage2"] = x = block(2, x, 3 * self.width, kernel_size=5, pool=True)
        x = block(4, block(3, x, 6 * self.width), 6 * self.width)
        intermediates["stage3"] = x = block(5, x, 4 * self.width, pool=True)
        x = flattened(x)
        for number in (6, 7):
            x = BinaryDense(64 * self.width, name=f"dense{number}", **self.quantizers)(activation(x), **phase)
            x = norm(name=f"norm{number}")(x, train=train)
        intermediates["features"] = x = activation(x)
        logits = BinaryDense(self.num_classes, name="head", **self.quantizers)(widened(x), **phase)
        return norm(name="head_norm")(logits, train=train), intermediates


binary_alexnet = partial(BinaryAlexNet, width=64)
"""BinaryAlexNet: 61.8 million binary weights."""

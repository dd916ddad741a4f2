r"""LeNet for small images, its convolutions binary by their quantizers."""

from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays
from bnn_jax.layers import BinaryConv, BinaryDense, max_pool
from bnn_jax.models.network import Network, check_image_size, flattened
from bnn_jax.precision import widened

torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(n), 1/sqrt(n)) for fan-in n, as the PyTorch tutorial's layers start."""


class LeNet(Network):
    r"""Two convolutions and three dense layers; no batch norm, no biases in the convolutions.

    conv -> ReLU -> max pool 2 -> [extra convs] -> conv -> ReLU -> max pool 2 -> dense 120 -> ReLU -> dense 84 -> ReLU
    -> dense.  The convolutions are quantized, the dense layers are in full precision.  With 32x32x3 images, width 6 and
    kernel 5: 450 + 2400 convolution weights, and 400 features for the dense layers.

    Attributes:
      width: filters of the first convolution; the second has 8/3 of them, rounded.
      kernel_size: side of the kernels of the two convolutions.
      extra_layers: convolutions width -> width, kernel 5, "SAME", each followed by a ReLU, after the first pool.
      input_quantizer: of all convolutions but the first, which sees the image; None quantizes weights only.
      kernel_quantizer: of all convolutions, the first included.
      input_scaling: XNOR-Net's map K, see :class:`bnn_jax.layers.BinaryConv`.
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates): float32 (batch, num_classes), and a dict with the outputs `conv1`, `conv2` of the stages
      and the `features` that the last layer sees.

    Raises:
      ValueError: for images that the kernels and pools use up.

    Reference: the network of PyTorch's CIFAR-10 tutorial, after LeCun et al., Gradient-Based Learning Applied to
    Document Recognition, 1998; as the base model of So, A Survey of Gradient Estimators for Binary Neural Networks for
    Image Classification, Stanford, poster.
    """

    width: int = 6
    kernel_size: int = 5
    extra_layers: int = 0
    input_scaling: bool = False

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        check_image_size(images, 3 * self.kernel_size + 1, f"a LeNet with `kernel_size` {self.kernel_size}")
        inner = partial(BinaryConv, kernel_init=torch_uniform, input_scaling=self.input_scaling, **self.quantizers)
        first = partial(inner, input_quantizer=None, input_scaling=False)
        dense = partial(BinaryDense, kernel_init=torch_uniform, use_bias=True)
        size = (self.kernel_size, self.kernel_size)

        phase = {"train": train, "progress": progress}
        x = nn.relu(max_pool(first(self.width, kernel_size=size, padding="VALID", name="conv1")(images, **phase)))
        for layer in range(self.extra_layers):
            x = nn.relu(inner(self.width, kernel_size=(5, 5), padding=2, name=f"extra{layer + 1}")(x, **phase))
        intermediates = {"conv1": x}
        x = inner(round(self.width * 8 / 3), kernel_size=size, padding="VALID", name="conv2")(x, **phase)
        intermediates["conv2"] = x = nn.relu(max_pool(x))
        x = nn.relu(dense(120, name="dense1")(flattened(x)))
        intermediates["features"] = x = nn.relu(dense(84, name="dense2")(x))
        return dense(self.num_classes, name="head")(widened(x)), intermediates

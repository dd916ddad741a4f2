r"""VGG-like networks for small images: VGG-small, and the one of BNN+."""

from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense, max_pool
from bnn_jax.models.network import Network, check_image_size, flattened


class VGG(Network):
    r"""3x3 convolutions in stages that end with a max pool, then dense layers; first and last in full precision.

    stages of [conv 3x3 -> (max pool 2 after the stage's last) -> BN -> hardtanh -> sign], widths w, 2w, 4w -> flatten
    -> [dense 4w -> BN -> hardtanh -> sign] -> dense [-> BN without scale and bias].  The sign belongs to the layer
    behind it; the last layer, which is real, sees the hardtanh.

    Attributes:
      width: filters of the first stage, w.
      stage_sizes: convolutions in each stage.
      dense_layers: hidden dense layers, of 4w units.
      hardtanh: True clips before every sign too, as IR-Net, which changes gradients alone; False clips only where
        inputs stay real, for estimators and quantizers that reach beyond [-1, 1], as BNN+'s, HWGQ's or LQ-Nets'.
      final_norm: normalize the logits, without scale and bias.
      input_quantizer, kernel_quantizer: of all layers but the first and the last.
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates), as :class:`bnn_jax.models.convnet.ConvNet`.

    Raises: as :class:`bnn_jax.models.convnet.ConvNet`.

    Reference: Qin et al., IR-Net, 2020, arXiv:1909.10788; Zhang et al., LQ-Nets, 2018, arXiv:1807.10029; Darabi et al.,
    BNN+, 2018, arXiv:1812.11800.
    """

    width: int = 128
    stage_sizes: tuple[int, ...] = (2, 2, 2)
    dense_layers: int = 0
    hardtanh: bool = True
    final_norm: bool = False

    @nn.compact
    @check_arrays
    def __call__(
        self, images: Float[Array, "batch height width channels"], *, train: bool, progress: Array | float = 1.0
    ):
        check_image_size(images, 2 ** len(self.stage_sizes), f"a VGG with {len(self.stage_sizes)} pools")
        clip = self.unless_quantized(nn.hard_tanh) if not self.hardtanh else nn.hard_tanh
        phase = {"train": train, "progress": progress}

        x, number, intermediates = images, 0, {}
        for stage, convs in enumerate(self.stage_sizes):
            for position in range(convs):
                number += 1
                quantizers = self.quantizers if number > 1 else {}
                x = BinaryConv(self.width * 2**stage, padding=1, name=f"conv{number}", **quantizers)(x, **phase)
                x = max_pool(x) if position == convs - 1 else x
                x = clip(BatchNorm(name=f"norm{number}")(x, train=train))
            intermediates[f"stage{stage + 1}"] = x
        x = flattened(x)
        for layer in range(self.dense_layers):
            x = BinaryDense(4 * self.width, name=f"dense{layer + 1}", **self.quantizers)(x, **phase)
            x = clip(BatchNorm(name=f"dense_norm{layer + 1}")(x, train=train))
        intermediates["features"] = x = nn.hard_tanh(x)
        return self.classify(x, final_norm=self.final_norm, train=train), intermediates


vgg_small = partial(VGG)
"""VGG-small as IR-Net has it: convolutions 128-128-256-256-512-512, one dense layer, hardtanh behind batch norms."""

bnn_plus_vgg = partial(VGG, width=256, dense_layers=2, hardtanh=False, final_norm=True)
"""The VGG of BNN+, which does not state its pools; the pools and the batch norm of the logits are a reading."""

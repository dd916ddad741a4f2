"""IGP-ResNet37(41), a fractal binary network, on ImageNet, read from disk.

Paper: Zhu, Hofstee, Lee, Al-Ars, Improving Gradient Paths for Binary Convolutional Neural Networks, TU Delft; earlier
as SoFAr: Shortcut-based Fractal Architectures for Binary Convolutional Neural Networks, 2020, arXiv:2009.05317.
Command: bnn-jax train --config imagenet_igp_resnet37_41 --data.data-dir DIR
Expected: 62.87 top-1 validation accuracy in the paper, where Bi-Real ResNet-18 has 59.58.  Not yet run here.
Recipe: the paper does not state one.  This is that of its baseline, Bi-Real Net (Liu et al., 2018, arXiv:1808.00278):
Adam 1e-3 with linear decay, batch 512, 256 epochs, no weight decay, label smoothing 0.1; random area and shape,
lighting 0.1, flips.
10000 training images are set aside to choose the best epoch; test is the official validation split.
"""

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        name="imagenet_igp_resnet37_41",
        epochs=256,
        batch_size=512,
        loss="label_smoothed_cross_entropy",
        data=DataConfig(
            "imagenet2012",
            validation_examples=10000,
            flip=True,
            stream=True,
            preprocessing="random_resized_crop",
            lighting_std=0.1,
        ),
        model=ModelConfig("igp_resnet37", input_quantizer="approx_sign", kernel_quantizer="magnitude_aware"),
        optim=OptimConfig("adam", 1e-3, schedule="linear", latent_box=None),
    )

"""Bi-Real Net with 18 layers on ImageNet, read from disk.

Paper: Liu et al., Bi-Real Net: Enhancing the Performance of 1-bit CNNs with Improved Representational Capability and
Advanced Training Algorithm, 2018, arXiv:1808.00278.
Command: bnn-jax train --config imagenet_bireal_resnet18 --data.data-dir DIR
Expected: 56.4 top-1 validation accuracy in the paper.  Not yet run here.
Recipe, that of the authors' later program, from scratch: Adam 1e-3 with linear decay, batch 512, 256 epochs, no weight
decay, label smoothing 0.1; random area and shape, lighting 0.1, flips.  The paper's own stages, which begin with a
full-precision network, are: bnn-jax stages bireal --config imagenet_bireal_resnet18
10000 training images are set aside to choose the best epoch; test is the official validation split.
"""

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        name="imagenet_bireal_resnet18",
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
        model=ModelConfig("bireal18", input_quantizer="approx_sign", kernel_quantizer="magnitude_aware"),
        optim=OptimConfig("adam", 1e-3, schedule="linear", latent_box=None),
    )

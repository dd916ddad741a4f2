"""XNOR-Net's AlexNet on ImageNet, read from disk.

Paper: Rastegari, Ordonez, Redmon, Farhadi, XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
Networks, 2016, arXiv:1603.05279.
Command: bnn-jax train --config imagenet_xnor_alexnet --data.data-dir DIR
Expected: 44.2 top-1 validation accuracy in the paper; the authors' model reaches 43.3.  Not yet run here.
Recipe, that of the authors' program: Adam, batch 800, 55 epochs, shorter side 256, random crop of 224, flips; weights
centred and kept in [-1, 1], their gradient as released, no map K; learning rates 1e-3, 5e-4, 1e-4, 5e-5, 1e-5 from
epochs 1, 19, 30, 44, 53 on.  10000 training images are set aside to choose the best epoch; test is the official
validation split.
"""

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        name="imagenet_xnor_alexnet",
        epochs=55,
        batch_size=800,
        loss="cross_entropy",
        data=DataConfig(
            "imagenet2012", validation_examples=10000, flip=True, stream=True, preprocessing="short_side_crop"
        ),
        model=ModelConfig(
            "alexnet_xnor",
            input_quantizer="ste_sign",
            kernel_quantizer="xnor",
            kernel_quantizer_options={"center": True, "as_released": True, "gradient": "diagonal"},
        ),
        optim=OptimConfig(
            "adam",
            1e-3,
            schedule="milestones",
            schedule_options={"at_shares": (18 / 55, 29 / 55, 43 / 55, 52 / 55), "factor": (0.5, 0.2, 0.5, 0.2)},
            latent_box=(-1.0, 1.0),
        ),
    )

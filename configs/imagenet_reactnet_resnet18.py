"""ReActNet with the ResNet-18 structure on ImageNet, read from disk.

Paper: Liu, Shen, Savvides, Cheng, ReActNet: Towards Precise Binary Neural Network with Generalized Activation
Functions, 2020, arXiv:2003.03488.
Command: bnn-jax stages reactnet --config imagenet_reactnet_resnet18 --data.data-dir DIR
Expected: 65.9 top-1 validation accuracy in the paper.  Not yet run here.
Recipe: first binary activations with weight decay 1e-5, then binary weights too; each stage Adam 2.5e-3 with linear
decay, batch 512, 128 epochs, taught by the distribution loss of a full-precision ResNet-34 alone; random area and
shape, lighting 0.1, flips.  The teacher is trained first; --finished teacher FOLDER puts a trained one in its place.
This file alone, with bnn-jax train, trains the last stage from random weights, with labels.
10000 training images are set aside to choose the best epoch; test is the official validation split.
"""

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        name="imagenet_reactnet_resnet18",
        epochs=128,
        batch_size=512,
        loss="cross_entropy",
        data=DataConfig(
            "imagenet2012",
            validation_examples=10000,
            flip=True,
            stream=True,
            preprocessing="random_resized_crop",
            lighting_std=0.1,
        ),
        model=ModelConfig("reactnet18", input_quantizer="rsign", kernel_quantizer="magnitude_aware"),
        optim=OptimConfig("adam", 2.5e-3, schedule="linear", latent_box=None),
    )

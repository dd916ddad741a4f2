"""Full-precision ResNet-20 on CIFAR-10, the baseline of the binary and ternary ones.

Paper: Paren, Jaeckle, Berrada, Kumar, Zisserman, Binary Neural Networks, Oxford, poster.
Command: bnn-jax compare optimizers --config cifar10_full_precision_resnet20 --optimizers sgd
Expected test accuracy, from the poster: SGD with momentum 91.94, after a number of epochs that it does not state.  With
10 epochs 80.68 +- 0.42 (three seeds, results/cifar10_full_precision_resnet20); 200 epochs were not run.
"""

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig

OPTIMIZERS = (
    OptimConfig(
        "sgd",
        0.1,
        weight_decay=1e-4,
        schedule="cosine",
        latent_box=None,
        options={"nesterov": True},
        tune={"learning_rate": (0.03, 0.1, 0.3)},
    ),
    OptimConfig("dfw", 0.1, weight_decay=1e-4, latent_box=None, tune={"learning_rate": (0.01, 0.1, 1.0)}),
)


def get_config() -> Config:
    return Config(
        name="cifar10_full_precision_resnet20",
        epochs=200,
        batch_size=128,
        data=DataConfig("cifar10", validation_examples=5000, crop_padding=4, flip=True),
        model=ModelConfig("resnet20", input_quantizer="full_precision", kernel_quantizer="full_precision"),
        optim=OPTIMIZERS[0],
        optimizers=OPTIMIZERS,
        tune_epochs=3,
        scan_steps=39,
    )

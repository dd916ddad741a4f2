"""Ternary ResNet-20 (TTQ) on CIFAR-10: SGD with momentum against Deep Frank-Wolfe.

Paper: Paren, Jaeckle, Berrada, Kumar, Zisserman, Binary Neural Networks, Oxford, poster; Zhu et al., Trained Ternary
Quantization, 2017, arXiv:1612.01064.
Command: bnn-jax compare optimizers --config cifar10_ttq_resnet20 --optimizers dfw sgd
Expected test accuracy, from the poster: SGD 90.66, Deep Frank-Wolfe 89.06, after a number of epochs that it does not
state.  Zhu et al. start from a trained full-precision network; this config starts from a random one.  With 10 epochs
and three seeds Deep Frank-Wolfe 65.2 +- 4.0, SGD 59.2 +- 13.1 (results/cifar10_ttq_resnet20); 200 epochs were not run.
"""

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig

# The same for both.
SETTINGS = {
    "weight_decay": 1e-4,
    "schedule": "cosine",
    "latent_box": None,
    "tune": {"learning_rate": (0.03, 0.1, 0.3, 1.0)},
}
OPTIMIZERS = (
    OptimConfig("dfw", 0.1, **SETTINGS),
    OptimConfig("sgd", 0.1, options={"nesterov": True}, **SETTINGS),
)


def get_config() -> Config:
    return Config(
        name="cifar10_ttq_resnet20",
        epochs=200,
        batch_size=128,
        data=DataConfig("cifar10", validation_examples=5000, crop_padding=4, flip=True),
        model=ModelConfig("resnet20", input_quantizer="full_precision", kernel_quantizer="ttq"),
        optim=OPTIMIZERS[0],
        optimizers=OPTIMIZERS,
        tune_epochs=3,
        scan_steps=39,
    )

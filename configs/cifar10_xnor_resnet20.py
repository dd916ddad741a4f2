"""XNOR ResNet-20 on CIFAR-10: Deep Frank-Wolfe against Adam and SGD.

Paper: Paren, Jaeckle, Berrada, Kumar, Zisserman, Binary Neural Networks, Oxford, poster.
Command: python scripts/compare_optimizers.py --config configs/cifar10_xnor_resnet20.py --data.data-dir DIR --tune
Expected test accuracy after 200 epochs, from the poster: Adam 72.89, Deep Frank-Wolfe 75.87.  The poster names neither
augmentation nor learning rates; pad-4 crop and flip are those of Berrada et al., Deep Frank-Wolfe, 2019.
Time: minutes on a GPU for each run; about two minutes an epoch on two CPU cores.
"""

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig

OPTIMIZERS = (
    OptimConfig("dfw", learning_rate=1.0, tune={"learning_rate": (0.3, 1.0, 3.0)}),
    OptimConfig("adam", learning_rate=0.001, schedule="cosine", tune={"learning_rate": (0.001, 0.003, 0.01)}),
    OptimConfig("sgd", learning_rate=0.1, schedule="cosine", tune={"learning_rate": (0.03, 0.1, 0.3)}),
    OptimConfig("polyak_sgd", learning_rate=1.0, tune={"learning_rate": (0.3, 1.0, 3.0)}),
    OptimConfig("momo", learning_rate=1.0, tune={"learning_rate": (0.3, 1.0, 3.0)}),
)


def get_config() -> Config:
    return Config(
        name="cifar10_xnor_resnet20",
        epochs=200,
        batch_size=128,
        data=DataConfig("cifar10", validation_examples=5000, crop_padding=4, flip=True),
        model=ModelConfig("resnet20", width=16, input_quantizer="ste_sign", kernel_quantizer="xnor"),
        optim=OPTIMIZERS[0],
        optimizers=OPTIMIZERS,
        tune_epochs=3,
        scan_steps=39,  # an epoch has 351 = 9 * 39 steps
    )

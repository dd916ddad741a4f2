"""An XNOR-Net of LeNet's size on MNIST: Deep Frank-Wolfe against Adam and SGD.

Paper: the network is after LeNet-5 (LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998), two
convolutions and two dense layers, with the quantizers of Rastegari et al., XNOR-Net, 2016; loss as Paren et al.
Command: bnn-jax compare optimizers --config mnist_xnor_lenet --data.data-dir DIR --tune
Open to --tune: as in digits_xnor.
Expected: 98.4 % after five epochs of Deep Frank-Wolfe with the settings here, which are those that
results/mnist_xnor_lenet chose, rates to two digits; less than a minute on two CPU cores.
"""

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig

SCHEDULE = {"schedule": ("constant", "cosine")}
DECAY = {"latent_weight_decay": (0.0, 1e-5, 1e-4, 1e-3)}
ADAM_DECAY = {"latent_weight_decay": (0.0, 1e-3, 1e-2, 1e-1)}  # beside the step, so by the rate smaller
OPTIMIZERS = (
    OptimConfig("dfw", 2.8, schedule="cosine", tune={"learning_rate": (0.1, 10.0)} | SCHEDULE | DECAY),
    OptimConfig("adam", 0.028, schedule="cosine", tune={"learning_rate": (0.001, 0.1)} | SCHEDULE | ADAM_DECAY),
    OptimConfig(
        "sgd",
        0.83,
        schedule="cosine",
        options={"nesterov": True},
        tune={"learning_rate": (0.03, 3.0)} | SCHEDULE | DECAY,
    ),
)


def get_config() -> Config:
    return Config(
        name="mnist_xnor_lenet",
        epochs=5,
        batch_size=128,
        data=DataConfig("mnist", validation_examples=5000),
        model=ModelConfig(
            "bnn_convnet",
            width=20,
            input_quantizer="ste_sign",
            kernel_quantizer="xnor",
            options={"stage_sizes": (1, 1), "dense_layers": 1, "latent_range": None},
        ),
        optim=OPTIMIZERS[0],
        optimizers=OPTIMIZERS,
        scan_steps=13,  # an epoch has 429 = 33 * 13 steps
    )

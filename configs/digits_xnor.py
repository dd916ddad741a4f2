"""XNOR-Net on handwritten digits: Deep Frank-Wolfe against Adam and SGD in a few minutes on a laptop.

Paper: after Paren et al., Binary Neural Networks, Oxford, poster, whose network and loss this is in small.
Command: bnn-jax compare optimizers --config digits_xnor   (or: make compare)
Data: 1797 real 8x8 digits that scikit-learn ships (Alpaydin and Kaynak, UCI, 1998); nothing is downloaded.
Open to --tune, for each optimizer: two decades of the rate, its schedule, a decay of the latent weights.
Without --tune dfw, adam and sgd have the settings that results/digits_xnor chose, rates rounded.
Expected: each optimizer at least 95 % test accuracy; about a minute on two CPU cores.
"""

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig

SCHEDULE = {"schedule": ("constant", "cosine")}
DECAY = {"latent_weight_decay": (0.0, 1e-5, 1e-4, 1e-3)}
ADAM_DECAY = {"latent_weight_decay": (0.0, 1e-3, 1e-2, 1e-1)}  # beside the step, so by the rate smaller
MOMO_DECAY = {"weight_decay": (0.0, 1e-3, 1e-2, 1e-1)}  # its own, of all weights and beside the step
OPTIMIZERS = (
    OptimConfig("dfw", 1.4, schedule="cosine", tune={"learning_rate": (0.1, 10.0)} | SCHEDULE | DECAY),
    OptimConfig("adam", 0.04, schedule="cosine", tune={"learning_rate": (0.003, 0.3)} | SCHEDULE | ADAM_DECAY),
    OptimConfig(
        "sgd",
        0.25,
        schedule="cosine",
        latent_weight_decay=1e-4,
        options={"nesterov": True},
        tune={"learning_rate": (0.1, 10.0)} | SCHEDULE | DECAY,
    ),
    OptimConfig("polyak_sgd", 1.0, tune={"learning_rate": (0.1, 10.0)} | SCHEDULE | DECAY),
    OptimConfig("momo", 1.0, tune={"learning_rate": (0.1, 10.0)} | SCHEDULE | MOMO_DECAY),
)


def get_config() -> Config:
    return Config(
        name="digits",
        epochs=60,
        batch_size=32,
        data=DataConfig("digits"),
        model=ModelConfig("resnet6", width=32),
        optim=OPTIMIZERS[0],
        optimizers=OPTIMIZERS,
        checkpoint_every_epochs=30,
    )

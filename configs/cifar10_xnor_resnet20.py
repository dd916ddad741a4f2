"""XNOR ResNet-20 on CIFAR-10: Deep Frank-Wolfe against Adam and SGD.

Paper: Paren, Jaeckle, Berrada, Kumar, Zisserman, Binary Neural Networks, Oxford, poster.
Command: bnn-jax compare optimizers --config cifar10_xnor_resnet20 --data.data-dir DIR --tune
Expected test accuracy, from the poster, which does not state the epochs: Adam 72.89, Deep Frank-Wolfe 75.87.  Here,
after 20 epochs: 73.47 and 69.79 (results/cifar10_xnor_resnet20).  The poster names neither augmentation nor learning
rates; pad-4 crop and flip are those of Berrada et al., Deep Frank-Wolfe, 2019.  The rates, schedules and decays of
"dfw", "dfw, as published", "adam" and "sgd" are those that trials of three epochs chose; the others are guesses.
Rows: "dfw" may have a schedule and a decay of the latent weights, as the others; "dfw, as published" has eta alone;
"dfw, target" has a target loss in place of the schedule, close to the running mean, so that gamma acts although the
network does not interpolate.  --rows picks among them.
Time: minutes on a GPU for each run; about two minutes an epoch on two CPU cores.
"""

from dataclasses import replace

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig

SCHEDULE = {"schedule": ("constant", "cosine")}
DECAY = {"latent_weight_decay": (0.0, 1e-5, 1e-4, 1e-3)}
ADAM_DECAY = {"latent_weight_decay": (0.0, 1e-3, 1e-2, 1e-1)}  # beside the step, so by the rate smaller
TARGET = {"options.target_share": (0.9, 0.95, 0.98, 0.99)} | DECAY
MOMO_DECAY = {"weight_decay": (0.0, 1e-3, 1e-2, 1e-1)}  # its own, of all weights and beside the step

# Open to each: three halves of a decade of the rate, its schedule, a decay of the latent weights or none.
ROWS = {
    "dfw": OptimConfig("dfw", 3.75, schedule="cosine", tune={"learning_rate": (0.3, 10.0)} | SCHEDULE | DECAY),
    "dfw, as published": OptimConfig("dfw", 3.0, tune={"learning_rate": (0.1, 0.3, 1.0, 3.0, 10.0)}),
    "dfw, target": OptimConfig(
        "dfw", 3.0, options={"target_share": 0.95}, tune={"learning_rate": (1.0, 30.0)} | TARGET
    ),
    "adam": OptimConfig(
        "adam", 0.0375, schedule="cosine", tune={"learning_rate": (0.003, 0.1)} | SCHEDULE | ADAM_DECAY
    ),
    "sgd": OptimConfig(
        "sgd",
        0.697,
        latent_weight_decay=1e-5,
        options={"nesterov": True},
        tune={"learning_rate": (0.1, 3.0)} | SCHEDULE | DECAY,
    ),
    "polyak_sgd": OptimConfig("polyak_sgd", 1.0, tune={"learning_rate": (0.3, 10.0)} | SCHEDULE | DECAY),
    "momo": OptimConfig("momo", 1.0, tune={"learning_rate": (0.3, 10.0)} | SCHEDULE | MOMO_DECAY),
}


def get_config() -> Config:
    return Config(
        name="cifar10_xnor_resnet20",
        epochs=200,
        batch_size=128,
        data=DataConfig("cifar10", validation_examples=5000, crop_padding=4, flip=True),
        model=ModelConfig("resnet20", width=16, input_quantizer="ste_sign", kernel_quantizer="xnor"),
        optim=ROWS["dfw"],
        optimizers=tuple(settings for label, settings in ROWS.items() if label == settings.name),
        tune_epochs=3,
        scan_steps=39,  # an epoch has 351 = 9 * 39 steps
    )


def get_rows(config: Config) -> dict[str, tuple[Config, dict[str, str]]]:
    """label -> (config, no further cells of the table)."""
    return {label: (replace(config, optim=settings), {}) for label, settings in ROWS.items()}

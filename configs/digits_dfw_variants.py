"""What Deep Frank-Wolfe gains by a schedule, a decay of the latent weights, a target, a warm-up and inner steps.

Paper: Berrada, Zisserman, Kumar, Deep Frank-Wolfe for Neural Network Optimization, 2019; the target after Paren,
Poudel, Kumar, Faking Interpolation Until You Make It, 2022.
Command: bnn-jax compare optimizers --config digits_dfw_variants --tune --seeds 0 1 2 3 4
Data and network: those of digits_xnor.
Each row has eta, and in the same budget what its name says.
"""

from dataclasses import replace

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig

ETA = {"learning_rate": (0.1, 10.0)}
SCHEDULE = {"schedule": ("constant", "cosine")}
DECAY = {"latent_weight_decay": (0.0, 1e-5, 1e-4, 1e-3)}
TARGET = {"options.target_share": (0.5, 0.8, 0.9, 0.95)}
ROWS = {
    "as published": OptimConfig("dfw", 1.0, tune=ETA),
    "schedule": OptimConfig("dfw", 1.0, tune=ETA | SCHEDULE),
    "schedule, decay": OptimConfig("dfw", 1.0, tune=ETA | SCHEDULE | DECAY),
    "target": OptimConfig("dfw", 1.0, tune=ETA | TARGET),
    "target, decay": OptimConfig("dfw", 1.0, tune=ETA | TARGET | DECAY),
    "warm-up": OptimConfig("dfw", 1.0, tune=ETA | {"warmup_share": (0.0, 0.05, 0.1, 0.2)}),
    "inner steps": OptimConfig("dfw", 1.0, tune=ETA | {"inner_steps": (1, 2, 4)}),
}


def get_config() -> Config:
    return Config(
        name="digits_dfw_variants",
        epochs=60,
        batch_size=32,
        data=DataConfig("digits"),
        model=ModelConfig("resnet6", width=32),
        optim=ROWS["as published"],
        checkpoint_every_epochs=30,
    )


def get_rows(config: Config) -> dict[str, tuple[Config, dict[str, str]]]:
    """label -> (config, no further cells of the table)."""
    return {label: (replace(config, optim=settings), {}) for label, settings in ROWS.items()}

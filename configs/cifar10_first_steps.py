"""What the exact step size of Deep Frank-Wolfe does where it acts in the first steps alone, as on CIFAR-10.

Paper: after Berrada, Zisserman, Kumar, Deep Frank-Wolfe for Neural Network Optimization, 2019, on the task of Paren,
Jaeckle, Berrada, Kumar, Zisserman, Binary Neural Networks, Oxford, poster.
Command: bnn-jax compare optimizers --config cifar10_first_steps --data.data-dir DIR --seeds 0 1 2
Data, network and loss: those of cifar10_xnor_resnet20, whose trials chose the rate and the schedule for Deep
Frank-Wolfe.  There gamma is below 1 in some of the first steps, and 1 in all others; with gamma 1 throughout the
updates are those of Nesterov's SGD.  So "sgd" is "dfw" without its exact step size, and "sgd, warm-up" has another
protection in its place: a rate that rises linearly in the first 21 steps, whatever --epochs says.  After 20 epochs
(results/cifar10_first_steps_20epochs) "dfw" has 69.79 +- 0.30, "sgd, warm-up" 70.33 +- 1.13.
"""

from dataclasses import replace

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig

SGD = OptimConfig("sgd", 3.75, schedule="cosine", options={"nesterov": True})
ROWS = {
    "dfw": OptimConfig("dfw", 3.75, schedule="cosine"),
    "sgd": SGD,
}
WARMUP_EPOCHS = 0.06  # 21 steps


def get_config() -> Config:
    return Config(
        name="cifar10_first_steps",
        epochs=3,
        batch_size=128,
        data=DataConfig("cifar10", validation_examples=5000, crop_padding=4, flip=True),
        model=ModelConfig("resnet20", width=16, input_quantizer="ste_sign", kernel_quantizer="xnor"),
        optim=ROWS["dfw"],
        scan_steps=39,  # an epoch has 351 = 9 * 39 steps
    )


def get_rows(config: Config) -> dict[str, tuple[Config, dict[str, str]]]:
    """label -> (config, no further cells of the table)."""
    warmup = replace(SGD, warmup_share=WARMUP_EPOCHS / config.epochs)
    rows = ROWS | {"sgd, warm-up": warmup}
    return {label: (replace(config, optim=settings), {}) for label, settings in rows.items()}

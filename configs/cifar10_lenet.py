"""LeNet with binary convolution weights on CIFAR-10: what the choice of gradient estimator does.

Paper: So, A Survey of Gradient Estimators for Binary Neural Networks for Image Classification, Stanford, poster.
Command: python scripts/compare_estimators.py --config configs/cifar10_lenet.py --data.data-dir DIR --tune
Expected: the column "survey (%)", the best of the poster's own tuning.  The poster does not state optimizer, epochs,
batch size, initialisation, augmentation, or whether activations are binary; here: weights only, plain sign without a
scale, dense layers in full precision, Adam with cosine decay, no augmentation.
Time: about 6 seconds an epoch on two CPU cores, 20 with 10 more layers, 80 with 50, which is why those rows have only
2 epochs.
"""

from dataclasses import replace

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig

RATES = (0.0003, 0.001, 0.003)
DEEP_EPOCHS = 2
DEEP_SCAN_STEPS = 90  # a row that diverges is found out sooner


def get_config() -> Config:
    return Config(
        name="cifar10_lenet",
        epochs=10,
        batch_size=50,
        loss="cross_entropy",
        data=DataConfig("cifar10", validation_examples=5000),
        model=ModelConfig("lenet", width=6, input_quantizer="full_precision", kernel_quantizer="binary"),
        optim=OptimConfig("adam", learning_rate=0.001, schedule="cosine", tune_learning_rates=RATES),
        tune_epochs=1,
        scan_steps=900,
    )


def get_rows(config: Config) -> dict[str, tuple[Config, dict[str, str]]]:
    """label -> (config, further cells of the table), in the order of the poster's table."""

    def row(survey, *, kernel_quantizer="binary", estimator=None, estimator_options=None, epochs=None, **options):
        kernel_options = {} if estimator is None else {"estimator": estimator} | (estimator_options or {})
        model = replace(
            config.model,
            kernel_quantizer=kernel_quantizer,
            kernel_quantizer_options=kernel_options,
            options=options,
        )
        shorter = {} if epochs is None else {"epochs": min(config.epochs, epochs), "scan_steps": DEEP_SCAN_STEPS}
        return replace(config, model=model, **shorter), {"survey (%)": survey}

    return {
        "full precision": row("75.22", kernel_quantizer="full_precision"),
        "naive": row("11.86", kernel_quantizer="post_training"),
        "STE": row("59.98", estimator="ste_sign"),
        "second order": row("9.996", estimator="approx_sign"),
        "tanh": row("59.44", estimator="tanh_sign"),
        "2 over cosh": row("58.10", estimator="cosh_sign"),
        "Gumbel": row("56.64", estimator="gumbel_sign", estimator_options={"sampled": False}),
        "STE, kernel 3": row("54.17", estimator="ste_sign", kernel_size=3),
        "STE, 1 more layer": row("32.72", estimator="ste_sign", extra_layers=1),
        "STE, 10 more layers": row("9.986", estimator="ste_sign", extra_layers=10, epochs=DEEP_EPOCHS),
        "STE, 50 more layers": row("10.00", estimator="ste_sign", extra_layers=50, epochs=DEEP_EPOCHS),
        "STE, scale per filter": row("-", kernel_quantizer="xnor", estimator="ste_sign"),
    }

"""XNOR-Net on handwritten digits: Deep Frank-Wolfe against Adam and SGD in a few minutes on a laptop.

Paper: after Paren et al., Binary Neural Networks, Oxford, poster, whose network and loss this is in small.
Command: python scripts/compare_optimizers.py --config configs/digits_xnor.py   (or: make compare)
Data: 1797 real 8x8 digits that scikit-learn ships (Alpaydin and Kaynak, UCI, 1998); nothing is downloaded.
Learning rates of Adam and SGD: those that --tune chose, see results/digits_xnor.  For Deep Frank-Wolfe it chose 0.3,
where no latent weight gets as far as the box.  From 0.3 to 3.0 the validation accuracies lie within two points; 3.0
stands here because some latent weights then sit on the bounds in every run, and the box takes part in the search.
Expected: each optimizer at least 95 % test accuracy; about a minute and a half on two CPU cores.
"""

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig

OPTIMIZERS = (
    OptimConfig("dfw", learning_rate=3.0, tune={"learning_rate": (0.03, 0.1, 0.3, 1.0, 3.0)}),
    OptimConfig("adam", learning_rate=0.03, schedule="cosine", tune={"learning_rate": (0.001, 0.003, 0.01, 0.03, 0.1)}),
    OptimConfig("sgd", learning_rate=1.0, schedule="cosine", tune={"learning_rate": (0.01, 0.03, 0.1, 0.3, 1.0)}),
    OptimConfig("polyak_sgd", learning_rate=1.0, tune={"learning_rate": (0.03, 0.1, 0.3, 1.0, 3.0)}),
    OptimConfig("momo", learning_rate=1.0, tune={"learning_rate": (0.03, 0.1, 0.3, 1.0, 3.0)}),
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

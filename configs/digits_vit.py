"""A vision transformer with one-bit weights, activations, queries and keys on handwritten digits.

Paper: attention after Xiao, Zhang, Zhang, BinaryAttention, 2026, arXiv:2603.09582; the projections, real there, are
binary here as in XNOR-Net (Rastegari et al., 2016, arXiv:1603.05279).
Command: bnn-jax compare optimizers --config digits_vit --optimizers adam
Data: 1797 real 8x8 digits that scikit-learn ships (Alpaydin and Kaynak, UCI, 1998); nothing is downloaded.
Expected: 95.7 +- 0.2 % test accuracy at the best validation epoch, 96.0 +- 0.4 % at the last; three minutes on two
CPU cores.  The packed networks are the trained ones, to the bit: bnn-jax verify runs/digits_vit/adam/seed0
"""

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig

ADAM = OptimConfig("adam", learning_rate=3e-3, schedule="cosine", warmup_share=0.1)


def get_config() -> Config:
    return Config(
        name="digits_vit",
        epochs=100,
        batch_size=32,
        loss="cross_entropy",
        data=DataConfig("digits"),
        model=ModelConfig("vit_tiny", options={"patch_size": 2, "depth": 2}),
        optim=ADAM,
        optimizers=(ADAM,),
        checkpoint_every_epochs=50,
    )

"""The vision transformer of `digits_vit` on CIFAR-10: 64 tokens, four blocks, one-bit weights and activations.

Paper: attention after Xiao, Zhang, Zhang, BinaryAttention, 2026, arXiv:2603.09582; the projections, real there, are
binary here as in XNOR-Net (Rastegari et al., 2016, arXiv:1603.05279).
Command: bnn-jax train --config cifar10_vit --workdir runs/cifar10_vit
Data: CIFAR-10 as `bnn-jax prepare cifar10` makes it.
Expected: one epoch (--epochs 1) reaches 36 % test accuracy in four minutes on two busy CPU cores; not run to the end.
"""

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig


def get_config() -> Config:
    return Config(
        name="cifar10_vit",
        epochs=100,
        batch_size=128,
        loss="cross_entropy",
        data=DataConfig("cifar10", crop_padding=4, flip=True),
        model=ModelConfig("vit_tiny", width=128, options={"heads": 4}),
        optim=OptimConfig("adam", learning_rate=3e-3, schedule="cosine", warmup_share=0.05),
        checkpoint_every_epochs=5,
    )

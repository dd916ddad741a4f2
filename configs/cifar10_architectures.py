"""Binary networks of equal storage on CIFAR-10: does a better gradient path mean a lower error?

Paper: Zhu, Hofstee, Lee, Al-Ars, Improving Gradient Paths for Binary Convolutional Neural Networks, TU Delft.
Command: bnn-jax compare architectures --config cifar10_architectures --data.data-dir DIR
Expected: the paper's order of top-1 errors on ImageNet, at 28 to 35 Mbit: IGP-ResNet37(41) 37.13, BinaryDenseNet51(32)
38.14, Bi-Real ResNet-18 40.42, IR-Net 41.90, XNOR-Net 48.80; ReActNet's 34.10 is not a matter of paths.  The paper has
no CIFAR-10, and one epoch is far from the end of training: only the order compares.
Result: results/architectures_cifar10, test accuracy XNOR 41.61, Bi-Real 38.80, IR-Net 32.49, ReActNet 46.74, IGP-ResNet
45.37, BinaryDenseNet 51.91.
Time: 2 h for 6 rows, 3 seeds and 1 epoch on two CPU cores that other work shared; --tune doubles it.
Each row sets network, width and options itself, and has its published quantizers; --model.input-quantizer approx_sign
--model.kernel-quantizer magnitude_aware gives all rows those of Bi-Real Net, so that the networks alone differ.
"""

from dataclasses import replace

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig

NOTES = """## What differs from the paper

The paper's experiment is ImageNet; this one is CIFAR-10, networks of 20 to 28 layers and few epochs.  Each width, or
growth, is the largest with which the storage is not above that of Bi-Real Net's ResNet-20 of width 16: 1 bit a binary
weight, 32 a real one and a bias of the last layer, without batch norm, scales and thresholds.  Each network has the
quantizers with which it was published, unless the command names others: rows differ in more than their gradient paths.

A gradient path's cost N is the sum of the multiply-accumulates of the binary convolutions on it, its length L their
number; the table has the three smallest values of each.  In the *whole network* the cheapest convolution decides the
second value, which in a Bi-Real Net is one that doubles the channels, at half the cost of the others.  In the *first
stage* all convolutions of a residual network cost the same, as in the blocks of the paper's argument: 0, 2N for ResNet
and 0, N, 2N for Bi-Real Net and IGP-ResNet, whose N is smaller.

Do better gradient paths mean a lower error here?  Where the network alone differs, yes: IGP-ResNet has the quantizers
of Bi-Real Net, 0.47 of its N_2nd in the first stage, and 6.6 points less error at the same storage, five times the
spread of the differences by seed.  BinaryDenseNet, with the smallest N_2nd of the whole network, has the lowest error
of all.  Across quantizers, no: the XNOR-Net, with the worst paths, is ahead of Bi-Real Net and IR-Net after this one
epoch, and ReActNet, whose paths are Bi-Real Net's, is 7.9 points ahead of it.  One learning rate, Adam's 0.003, serves
all rows; it was tuned for none of them.
"""


def get_config() -> Config:
    return Config(
        name="cifar10_architectures",
        epochs=1,
        batch_size=128,
        loss="cross_entropy",
        data=DataConfig("cifar10", validation_examples=5000, crop_padding=4, flip=True),
        model=ModelConfig("bireal_resnet20", width=16),
        optim=OptimConfig("adam", 0.003, schedule="cosine", tune={"learning_rate": (0.001, 0.003, 0.01)}),
        scan_steps=39,  # an epoch has 351 = 9 * 39 steps
    )


def get_rows(config: Config) -> dict[str, tuple[Config, dict[str, str]]]:
    """label -> (config, no further cells of the table)."""

    def row(name, width, **options):
        return replace(config, model=replace(config.model, name=name, width=width, options=options)), {}

    return {
        "XNOR ResNet-20": row("resnet20", 18),
        "Bi-Real ResNet-20": row("bireal_resnet20", 16),
        "IR-Net ResNet-20": row("irnet_resnet20", 18),
        "ReActNet ResNet-20": row("reactnet_resnet20", 16),
        # A block a stage, as in the paper's IGP-ResNet21, would leave 8 % of the storage unused at the largest width.
        "IGP-ResNet28(11)": row("igp_resnet21", 11, stem="cifar", columns=(3, 3, 3), depths=(8, 8, 8)),
        "BinaryDenseNet22(12)": row(
            "binary_densenet28",
            12,
            stem="cifar",
            stem_width=16,
            stage_sizes=(6, 6, 6),
            reduction=(2.7, 2.7),
            rounding=1,
        ),
    }

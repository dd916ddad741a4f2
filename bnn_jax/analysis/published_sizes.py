"""The sizes that a paper prints for binary networks, beside those that this package counts.

Reference: Zhu, Hofstee, Lee, Al-Ars, Improving Gradient Paths for Binary Convolutional Neural Networks, TU Delft,
Table 1; earlier as SoFAr: Shortcut-based Fractal Architectures for Binary Convolutional Neural Networks, 2020,
arXiv:2009.05317.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from bnn_jax.analysis.accounting import Account, Convention, account_model
from bnn_jax.analysis.tables import TEXT, Tables, print_text
from bnn_jax.models.binaryduo import binaryduo_resnet18
from bnn_jax.models.birealnet import bireal18, bireal34, ftbnn_resnet18
from bnn_jax.models.bn_free import reactnet18_bn_free
from bnn_jax.models.bnas import bnas_e
from bnn_jax.models.cinet import cinet_resnet18
from bnn_jax.models.densenet import binary_densenet51, binary_densenet69, igp_densenet51, igp_densenet69
from bnn_jax.models.dgrl import dgrl_resnet18
from bnn_jax.models.fractal import igp_resnet37, igp_resnet41
from bnn_jax.models.irnet import irnet_resnet18
from bnn_jax.models.reactnet import reactnet18
from bnn_jax.models.real_to_binary import real_to_binary_resnet18
from bnn_jax.models.resnet_large import resnet18, resnet34, tbn_resnet18, tbn_resnet34, xnor_resnet18
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, make_quantizer

WEIGHTS = Convention(biases=False, batch_norm=False, scales=False, other=False)
"""All weights and the classifier's bias; all MACs."""
NO_CLASSIFIER_MACS = WEIGHTS._replace(classifier_macs=False)
WITH_SCALES = NO_CLASSIFIER_MACS._replace(scales=True)
WITH_BATCH_NORM = WEIGHTS._replace(batch_norm=True)
NO_CLASSIFIER_BIAS = WEIGHTS._replace(classifier_bias=False)

CONVENTIONS: dict[Convention, str] = {
    WEIGHTS: "bias",
    NO_CLASSIFIER_MACS: "bias; no FC MACs",
    WITH_SCALES: "bias, scales; no FC MACs",
    WITH_BATCH_NORM: "bias, batch norm",
    NO_CLASSIFIER_BIAS: "nothing",
}
"""What is stored besides the weights, in words; the bias is that of the last layer, FC."""


class PublishedSize(NamedTuple):
    """A row of the table, and how to build its network.

    Attributes:
      name: as printed; # has binary downsampling layers.
      megabits: storage as printed, with one decimal.
      gigaflops: computation as printed, with two.
      network: its constructor.
      inputs, kernels: quantizers by name; None is full precision.
      convention: what has to be counted for the printed figures; where none gives them, the one that comes nearest.
      options: of the network.
      kernel_options: of the quantizer.
    """

    name: str
    megabits: float
    gigaflops: float
    network: Callable[..., Any]
    inputs: str | None = "ste_sign"
    kernels: str | None = "binary"
    convention: Convention = WEIGHTS
    options: Mapping[str, Any] = {}
    kernel_options: Mapping[str, Any] = {}


_DOWN, _LARGE = {"binary_downsampling": True}, {"stem": "imagenet"}

TABLE: tuple[PublishedSize, ...] = (
    PublishedSize("BNN ResNet18 #", 27.9, 0.14, resnet18, convention=NO_CLASSIFIER_MACS, options=_DOWN),
    PublishedSize("XNOR ResNet18 #", 28.0, 0.14, xnor_resnet18, "ste_sign", "xnor", WITH_SCALES),
    PublishedSize("S2-Bi-Real ResNet18", 33.2, 0.16, bireal18, "approx_sign", "magnitude_aware"),
    PublishedSize("Bin ResNet18 #", 27.9, 0.14, resnet18, "long_tailed_sign", "binary", NO_CLASSIFIER_MACS, _DOWN),
    PublishedSize("TBN-ResNet18 #", 27.9, 0.17, tbn_resnet18, "tbn", "magnitude_aware", options=_DOWN),
    PublishedSize("Bi-Real ResNet18", 33.2, 0.16, bireal18, "approx_sign", "magnitude_aware"),
    PublishedSize(
        "CI-Net ResNet18 #", 27.9, 0.14, cinet_resnet18, convention=NO_CLASSIFIER_MACS, options=_DOWN | _LARGE
    ),
    PublishedSize("XNOR-Net++ ResNet18 #", 28.0, 0.14, xnor_resnet18, "ste_sign", "learned_scale", WITH_SCALES),
    PublishedSize("IR-ResNet18", 33.1, 0.16, irnet_resnet18, "ede_sign", "libra_pb", NO_CLASSIFIER_BIAS),
    PublishedSize("BNAS-E", 33.1, 0.16, bnas_e, "ste_sign", "xnor", NO_CLASSIFIER_BIAS, _LARGE),
    PublishedSize("Bi-Real ResNet18(64)", 33.2, 0.16, bireal18, "approx_sign", "magnitude_aware"),
    PublishedSize("Si-ResNet18", 33.2, 0.16, bireal18, "sparse", "xnor"),
    PublishedSize(
        "CI-Net ResNet18", 33.2, 0.16, cinet_resnet18, options={"binary_downsampling": False, "stem": "imagenet"}
    ),
    PublishedSize("RBNN-ResNet18", 33.2, 0.16, bireal18, "rbnn", "rbnn"),
    PublishedSize("FT-ResNet18", 33.2, 0.16, ftbnn_resnet18, "ste_sign", "xnor"),
    PublishedSize("DGRL-ResNet18 (K=1)", 33.2, 0.16, dgrl_resnet18, "ste_sign", "xnor", options=_LARGE),
    PublishedSize("UaBNN-ResNet18", 33.2, 0.16, bireal18, "ste_sign", "c_sign"),
    PublishedSize(
        "BinaryDuo ResNet18", 33.2, 0.16, binaryduo_resnet18, "decoupled", "xnor", options={"coupled": False} | _LARGE
    ),
    PublishedSize("ReActNet-18 (BN-Free)", 33.2, 0.16, reactnet18_bn_free, "rsign", "bn_free", options=_LARGE),
    PublishedSize(
        "SA-BNN-ResNet18",
        33.2,
        0.16,
        bireal18,
        "ste_sign",
        "magnitude_aware",
        kernel_options={"estimator": "state_aware_sign"},
    ),
    PublishedSize("IA-BNN-ResNet18", 33.2, 0.16, bireal18, "unbalanced", "magnitude_aware"),
    PublishedSize("IGP-ResNet37(41)", 32.2, 0.13, igp_resnet37, convention=NO_CLASSIFIER_BIAS, options=_LARGE),
    PublishedSize("FULW-ResNet18", 33.2, 0.16, bireal18, "ste_sign", "xnor"),
    PublishedSize("ProxyResNet18", 33.2, 0.16, bireal18, "ste_sign", "proxy"),
    PublishedSize("Real-to-bin ResNet18", 33.2, 0.16, real_to_binary_resnet18, options=_LARGE),
    PublishedSize("ReActNet-ResNet18", 33.2, 0.16, reactnet18, "rsign", "magnitude_aware", options=_LARGE),
    PublishedSize("DIR-Net2-ResNet18", 33.2, 0.16, bireal18, "dir_sign", "dir_net"),
    PublishedSize("TBN-ResNet34 #", 38.0, 0.23, tbn_resnet34, "tbn", "magnitude_aware", options=_DOWN),
    PublishedSize("Bi-Real ResNet34", 43.3, 0.19, bireal34, "approx_sign", "magnitude_aware"),
    PublishedSize("Bi-Real ResNet34(64)", 43.3, 0.19, bireal34, "approx_sign", "magnitude_aware"),
    PublishedSize("IGP-ResNet41(48)", 42.6, 0.16, igp_resnet41, convention=NO_CLASSIFIER_BIAS, options=_LARGE),
    PublishedSize("BinaryDenseNet51(32)", 34.8, 0.27, binary_densenet51, options=_LARGE),
    PublishedSize("IGP-DenseNet51(53)", 34.5, 0.30, igp_densenet51, options=_LARGE),
    PublishedSize("BinaryDenseNet69(32)", 42.0, 0.28, binary_densenet69, options=_LARGE),
    PublishedSize("IGP-DenseNet69(48)", 41.5, 0.31, igp_densenet69, options=_LARGE),
    PublishedSize("Full-precision ResNet18", 374.1, 1.81, resnet18, None, None, WITH_BATCH_NORM),
    PublishedSize("Full-precision ResNet34", 697.3, 3.66, resnet34, None, None, WITH_BATCH_NORM),
)
"""Table 1 in its order.  Rows that differ in their error rates alone stand once."""


def account_row(row: PublishedSize) -> Account:
    """The account of a row's network for one ImageNet image of 224x224."""
    quantizers = {
        "input_quantizer": row.inputs and make_quantizer(ACTIVATION_QUANTIZERS, row.inputs),
        "kernel_quantizer": row.kernels and make_quantizer(WEIGHT_QUANTIZERS, row.kernels, **row.kernel_options),
    }
    return account_model(row.network(num_classes=1000, **quantizers, **row.options), (224, 224, 3))


def account_rows(rows: Iterable[PublishedSize]) -> Iterator[tuple[PublishedSize, Account]]:
    """Each row with its account; equal networks are traced once."""
    found: dict[str, Account] = {}
    for row in rows:
        network = repr(row._replace(name="", megabits=0, gigaflops=0, convention=WEIGHTS))
        if network not in found:
            found[network] = account_row(row)
        yield row, found[network]


def counted_as(row: PublishedSize, account: Account) -> tuple[float, float]:
    """(Mbit, GFLOP) of an account in the row's convention."""
    return account.megabits(row.convention), account.flops(row.convention) / 1e9


def verdict(row: PublishedSize, account: Account) -> str:
    """ "ok" if both figures round to the printed ones, else by how much they differ from these.

    >>> counted = account_row(TABLE[0])
    >>> verdict(TABLE[0], counted), verdict(TABLE[0]._replace(megabits=28.5), counted)
    ('ok', '-0.6 Mbit')
    """
    megabits, gigaflops = counted_as(row, account)
    differences = []
    if round(megabits, 1) != row.megabits:
        differences.append(f"{megabits - row.megabits:+.1f} Mbit")
    if round(gigaflops, 2) != row.gigaflops:
        differences.append(f"{gigaflops - row.gigaflops:+.3f} GFLOP")
    return ", ".join(differences) or "ok"


LETTERS = {"classifier_bias": "b", "scales": "s", "batch_norm": "n", "classifier_macs": "m"}
"""What a convention counts besides weights and the other MACs."""


def print_sizes(table: Iterable[PublishedSize], tables: Tables = TEXT) -> list[dict[str, Any]]:
    """Print published figures beside those counted here, and return both as plain JSON values."""
    lines, rows = [], []
    for row, account in account_rows(table):
        megabits, gigaflops = counted_as(row, account)
        found = verdict(row, account)
        letters = "".join(letter for field, letter in LETTERS.items() if getattr(row.convention, field))
        numbers = (f"{row.megabits}", f"{megabits:.3f}", f"{row.gigaflops:.2f}", f"{gigaflops:.4f}")
        lines.append((row.name, *numbers, letters, found))
        rows.append(
            {
                "network": row.name,
                "printed_megabits": row.megabits,
                "printed_gigaflops": row.gigaflops,
                "megabits": megabits,
                "gigaflops": gigaflops,
                "counted": CONVENTIONS[row.convention],
                "verdict": found,
            }
        )
    header = ("network", "Mbit\nprinted", "Mbit\ncounted", "GFLOP\nprinted", "GFLOP\ncounted", "with", "verdict")
    title = "Zhu et al., Table 1: as printed, and as counted for one 224x224 image"
    tables.print(header, lines, title=title, texts=(0, 5, 6))
    print_text(
        "FLOPs: full-precision MACs + binary MACs / 64 + ternary MACs / 32.",
        "The paper does not say what it counts.  Each row shows what gives its figures, or comes nearest: all weights "
        "with b the bias of the classifier, s scales, n batch norm, and m the classifier's MACs.",
        "Each network is that of its method; most rows print the figures of the backbone alone.",
    )
    return rows

"""What is known of each pretrained network beside its file: how it was trained, and how well it does."""

from pathlib import Path
from typing import NamedTuple

from bnn_jax.errors import unknown_name

FILES = Path(__file__).parent / "files"
ENDING = ".bnn.safetensors"


class DataRecord(NamedTuple):
    """A data set that networks were trained on.

    Attributes:
      class_names: in the order of the labels.
      licence: of the data, as their authors state it.
      copies: what the images are, where not the originals: of these others the networks may classify a few otherwise.
    """

    class_names: tuple[str, ...]
    licence: str
    copies: str | None = None


class Record(NamedTuple):
    """A pretrained network.

    Attributes:
      network: its name in MODELS.
      data: name of the data set, in DATA.
      correct, examples: images of the test set that the packed network classifies right, and how many there are.
      row: of the comparison that it was trained in: the optimizer, and the loss where it is not that of the first row.
      seed, epochs: of its run.  The epoch whose weights these are, and of a comparison the seed, were chosen by
        validation accuracy.
      source: folder of the comparison in the repository, or the config of a single run.
      same_as: name of the record whose file this one shares; None has its own.
    """

    network: str
    data: str
    correct: int
    examples: int
    row: str
    seed: int
    epochs: int
    source: str
    same_as: str | None = None

    @property
    def accuracy(self) -> float:
        """Share of the test set."""
        return self.correct / self.examples


_DIGITS = tuple("0123456789")

DATA: dict[str, DataRecord] = {
    "digits": DataRecord(_DIGITS, "CC BY 4.0 (UCI Machine Learning Repository)"),
    "mnist": DataRecord(_DIGITS, "CC BY-SA 3.0 (LeCun and Cortes)"),
    "cifar10": DataRecord(
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        "none stated; the author asks to cite Krizhevsky, 2009",
        copies="JPEG copies",
    ),
}
"""name -> a data set of pretrained networks."""

PRETRAINED: dict[str, Record] = {
    "digits_xnor_resnet6": Record(
        "resnet6", "digits", 356, 359, "adam", 1, 60, "results/digits_xnor", same_as="digits_xnor_resnet6_adam"
    ),
    "digits_xnor_resnet6_dfw": Record("resnet6", "digits", 356, 359, "dfw", 2, 60, "results/digits_xnor"),
    "digits_xnor_resnet6_adam": Record("resnet6", "digits", 356, 359, "adam", 1, 60, "results/digits_xnor"),
    "digits_xnor_resnet6_sgd": Record("resnet6", "digits", 354, 359, "sgd", 2, 60, "results/digits_xnor"),
    "digits_xnor_resnet6_adam_cross_entropy": Record(
        "resnet6", "digits", 356, 359, "adam-cross_entropy", 0, 60, "results/digits_xnor"
    ),
    "digits_xnor_resnet6_sgd_cross_entropy": Record(
        "resnet6", "digits", 353, 359, "sgd-cross_entropy", 0, 60, "results/digits_xnor"
    ),
    "mnist_xnor_lenet": Record(
        "bnn_convnet",
        "mnist",
        9857,
        10000,
        "adam-cross_entropy",
        3,
        5,
        "results/mnist_xnor_lenet",
        same_as="mnist_xnor_lenet_adam_cross_entropy",
    ),
    "mnist_xnor_lenet_dfw": Record("bnn_convnet", "mnist", 9850, 10000, "dfw", 1, 5, "results/mnist_xnor_lenet"),
    "mnist_xnor_lenet_adam": Record("bnn_convnet", "mnist", 9859, 10000, "adam", 4, 5, "results/mnist_xnor_lenet"),
    "mnist_xnor_lenet_sgd": Record("bnn_convnet", "mnist", 9778, 10000, "sgd", 3, 5, "results/mnist_xnor_lenet"),
    "mnist_xnor_lenet_adam_cross_entropy": Record(
        "bnn_convnet", "mnist", 9857, 10000, "adam-cross_entropy", 3, 5, "results/mnist_xnor_lenet"
    ),
    "mnist_xnor_lenet_sgd_cross_entropy": Record(
        "bnn_convnet", "mnist", 9815, 10000, "sgd-cross_entropy", 4, 5, "results/mnist_xnor_lenet"
    ),
    "cifar10_xnor_resnet20": Record(
        "resnet20",
        "cifar10",
        7407,
        10000,
        "adam",
        1,
        20,
        "results/cifar10_xnor_resnet20",
        same_as="cifar10_xnor_resnet20_adam",
    ),
    "cifar10_xnor_resnet20_dfw": Record(
        "resnet20", "cifar10", 6993, 10000, "dfw", 1, 20, "results/cifar10_xnor_resnet20"
    ),
    "cifar10_xnor_resnet20_dfw_as_published": Record(
        "resnet20", "cifar10", 6616, 10000, "dfw, as published", 1, 20, "results/cifar10_xnor_resnet20"
    ),
    "cifar10_xnor_resnet20_adam": Record(
        "resnet20", "cifar10", 7407, 10000, "adam", 1, 20, "results/cifar10_xnor_resnet20"
    ),
    "cifar10_xnor_resnet20_sgd": Record(
        "resnet20", "cifar10", 6771, 10000, "sgd", 0, 20, "results/cifar10_xnor_resnet20"
    ),
    "cifar10_ttq_resnet20": Record(
        "resnet20",
        "cifar10",
        6764,
        10000,
        "dfw",
        2,
        10,
        "results/cifar10_ttq_resnet20",
        same_as="cifar10_ttq_resnet20_dfw",
    ),
    "cifar10_ttq_resnet20_dfw": Record(
        "resnet20", "cifar10", 6764, 10000, "dfw", 2, 10, "results/cifar10_ttq_resnet20"
    ),
    "cifar10_ttq_resnet20_sgd": Record(
        "resnet20", "cifar10", 6662, 10000, "sgd", 1, 10, "results/cifar10_ttq_resnet20"
    ),
    "digits_vit_tiny": Record("vit_tiny", "digits", 344, 359, "adam", 0, 100, "configs/digits_vit.py"),
}
"""name -> a pretrained network, whose file is zoo/files/NAME.bnn.safetensors."""


def file_of(name: str) -> Path:
    """The file of a pretrained network.

    Raises:
      UsageError: for a name that is not in PRETRAINED; the nearest is named.

    >>> file_of("digits_vit_tiny").name
    'digits_vit_tiny.bnn.safetensors'
    """
    if name not in PRETRAINED:
        raise unknown_name("name", name, PRETRAINED)
    return FILES / f"{PRETRAINED[name].same_as or name}{ENDING}"

"""List what a config can name, a line and the paper of each: bnn-jax list models"""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from bnn_jax.cli.options import TableOptions, parse_options
from bnn_jax.errors import unknown_name
from bnn_jax.estimators import ESTIMATORS
from bnn_jax.losses import LOSSES
from bnn_jax.models import MODELS
from bnn_jax.optim import OPTIMIZERS
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, GRADIENT_QUANTIZERS, WEIGHT_QUANTIZERS
from bnn_jax.zoo import DATA as TRAINED_ON
from bnn_jax.zoo import PRETRAINED, file_of


@dataclass(frozen=True, kw_only=True)
class Arguments(TableOptions):
    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TABLE")]
    """models, quantizers, estimators, optimizers, losses, data or pretrained."""


TABLES = ("models", "quantizers", "estimators", "optimizers", "losses", "data", "pretrained")

LECUN = "LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998"
KRIZHEVSKY = "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"

DATA: dict[str, tuple[str, str]] = {
    "digits": (
        "1797 grey digits of 8x8, in scikit-learn",
        "Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Repository, 1998",
    ),
    "mnist": ("70,000 grey digits of 28x28; bnn-jax prepare mnist", LECUN),
    "fashion_mnist": (
        "70,000 grey clothes of 28x28 in 10 classes; bnn-jax prepare fashion_mnist",
        "Xiao, Rasul and Vollgraf, Fashion-MNIST, 2017, arXiv:1708.07747",
    ),
    "cifar10": ("60,000 images of 32x32 in 10 classes; bnn-jax prepare cifar10", KRIZHEVSKY),
    "cifar100": ("60,000 images of 32x32 in 100 classes; bnn-jax prepare cifar100", KRIZHEVSKY),
    "imagenet2012": (
        "1.3 million photographs in 1000 classes, prepared by TFDS; with --data.stream",
        "Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, 2015, arXiv:1409.0575",
    ),
    "text": ("the docstrings of this package, as bytes", ""),
    "NAME": ("another image set that TFDS prepared as ArrayRecord in --data.data-dir", ""),
    "FILE.npz": ("your arrays: train_images, train_labels, test_images, test_labels, or x_train, ...", ""),
    "FILE.txt": ("your text, any, as bytes; --data.tokens of them are an example", ""),
    "FOLDER": ("your images of any format, a folder for each class", ""),
}
"""What data.name can be -> what it is, and the paper."""


def function_behind(made: Callable[..., Any]) -> Callable[..., Any]:
    """The function that an entry of a table is made of, whose docstring has its formula."""
    while isinstance(made, functools.partial):
        # An estimator turned into a quantizer; a function turned into one; options set.
        inner = [getattr(value, "apply", value) for value in made.args if callable(getattr(value, "apply", value))]
        made = inner[-1] if inner and hasattr(made.args[-1], "apply") else inner[0] if inner else made.func
    return made


def wrapped_by(made: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function that a docstring names in its first line, "The quantizer of :func:`rsign_inputs`"; None if none."""
    line = (inspect.getdoc(made) or "").partition("\n")[0]
    found = re.search(r"(?:^|(?:quantizer|optimizer) of ):func:`(\w+)`", line)
    return getattr(sys.modules[made.__module__], found[1]) if found else None


def documented(made: Callable[..., Any]) -> tuple[str, str]:
    """The first line of the docstring of what an entry of a table makes, and its reference."""
    made = function_behind(made)
    text = inspect.getdoc(made) or ""
    line, reference = text.partition("\n")[0], re.search(r"^References?: ((?:.|\n)+?)(?:\n\n|\Z)", text, re.M)
    paper = " ".join(reference[1].split()) if reference else ""
    if wrapped := wrapped_by(made):
        line, inner = documented(wrapped)
        paper = paper or inner
    return re.sub(r":\w+:`([\w.]+)`", r"\1", line), paper


def paper_of(network: str) -> str:
    """The paper of a network in MODELS."""
    entry = MODELS[network]
    return entry.paper or documented(entry.constructor)[1]


def rows_of(what: str) -> list[tuple[str, ...]]:
    """The rows of a table: name, for quantizers their place too, a line, the paper; of pretrained ones the network."""
    if what == "data":
        return [(name, *told) for name, told in DATA.items()]
    if what == "models":
        return [(name, documented(entry.constructor)[0], paper_of(name)) for name, entry in MODELS.items()]
    if what == "quantizers":
        tables = {"weights": WEIGHT_QUANTIZERS, "inputs": ACTIVATION_QUANTIZERS, "gradients": GRADIENT_QUANTIZERS}
        return [(name, place, *documented(made)) for place, table in tables.items() for name, made in table.items()]
    if what == "pretrained":
        sets = {name: name + (f" ({data.copies})" if data.copies else "") for name, data in TRAINED_ON.items()}
        told = {
            name: f"{sets[r.data]}: {r.correct} of {r.examples} test images right" for name, r in PRETRAINED.items()
        }
        sizes = {name: f"{file_of(name).stat().st_size / 1e3:.1f} kB" for name in PRETRAINED}
        return [(name, f"{told[name]}, {sizes[name]}", r.network) for name, r in PRETRAINED.items()]
    if what == "optimizers":
        return [(name, *documented(optimizer.make)) for name, optimizer in OPTIMIZERS.items()]
    table = ESTIMATORS if what == "estimators" else LOSSES
    return [(name, *documented(entry.apply)) for name, entry in table.items()]


def main() -> None:
    arguments = parse_options(Arguments, __doc__)
    what = arguments.what
    if what not in TABLES:
        raise unknown_name("TABLE", what, TABLES)
    of, source = ["of"] if what == "quantizers" else [], "network" if what == "pretrained" else "paper"
    header = ("name", *of, "description", source)
    with arguments.tables() as tables:
        tables.print(header, rows_of(what), title=what, texts=range(len(header)), unbroken={0})

"""Size and operations of a network: python scripts/summarize.py resnet20 --image-size 32 --classes 10

--table igp prints Table 1 of Zhu et al., Improving Gradient Paths for Binary Convolutional Neural Networks, each figure
beside the one counted here.  Nothing is run: the network is traced for one image.
"""

import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bnn_jax.analysis.accounting import EVERYTHING, Account, Convention, Layer, account_model, as_dict
from bnn_jax.analysis.published_sizes import CONVENTIONS, TABLE, account_rows, counted_as, verdict
from bnn_jax.errors import UsageError, exit_code_of
from bnn_jax.models import MODELS
from bnn_jax.training.config import Options
from bnn_jax.training.metrics import write_file

MOST_LINES = 24
LARGE_IMAGES = 64


@dataclass(frozen=True)
class Arguments:
    model: tyro.conf.Positional[str | None] = None
    """Name of a network."""
    table: Literal["igp"] | None = None
    """A published table instead of a network."""
    width: int | None = None
    """Of the network's own unit, most often the filters of its first stage; None takes the published width."""
    image_size: int = 32
    """Height and width of the image."""
    channels: int = 3
    classes: int | None = None
    """None takes 10, or 1000 for images from 64x64 on."""
    stem: Literal["cifar", "imagenet"] | None = None
    """None takes that of the image size, for a network that has stems."""
    input_quantizer: str | None = None
    """None takes the one with which the network was published; full_precision turns quantization off."""
    input_quantizer_options: Options = field(default_factory=dict)
    """Of its function, as: bits 2"""
    kernel_quantizer: str | None = None
    """Likewise."""
    kernel_quantizer_options: Options = field(default_factory=dict)
    """Likewise."""
    input_scaling: bool = False
    """XNOR-Net's map K."""
    options: Options = field(default_factory=dict)
    """What else this network's constructor takes, as: extra_layers 1"""
    counted: Annotated[Convention, tyro.conf.arg(name="")] = EVERYTHING
    json: Path | None = None
    """File for all the numbers."""


def account_of(arguments: Arguments) -> Account:
    """The account of the network that the command line names."""
    large = arguments.image_size >= LARGE_IMAGES
    options = dict(arguments.options)
    if arguments.stem is not None:
        options["stem"] = arguments.stem
    elif "stem" in _options_of(arguments.model):
        options.setdefault("stem", "imagenet" if large else "cifar")
    try:
        return account_model(
            arguments.model,
            (arguments.image_size, arguments.image_size, arguments.channels),
            num_classes=arguments.classes or (1000 if large else 10),
            width=arguments.width,
            input_quantizer=arguments.input_quantizer,
            input_quantizer_options=arguments.input_quantizer_options,
            kernel_quantizer=arguments.kernel_quantizer,
            kernel_quantizer_options=arguments.kernel_quantizer_options,
            input_scaling=arguments.input_scaling,
            options=options,
        )
    except UsageError:
        raise
    except (ValueError, TypeError) as error:
        raise UsageError(f"the network cannot be built: {error}") from None


def print_network(title: str, account: Account, convention: Convention) -> None:
    """The layers, those of one kind on one line if they are many, and the totals."""
    table = Table(box=box.SIMPLE, title=Text(title), padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    table.add_column("kernel")
    for header in ("weights", "bits", "MACs"):
        table.add_column(header, justify="right")
    table.add_column("products")
    for name, layer in lines_of(account.layers):
        kernel = "x".join(map(str, layer.shape)) or "-"
        bits = str(layer.weight_bits) if layer.weights else "-"
        cells = (name, kernel, f"{layer.weights:,}", bits, f"{layer.macs.total:,}", layer.macs.kind)
        table.add_row(*map(Text, cells))
    console = Console(width=min(100, Console().width))
    console.print(table)
    totals = Table.grid(padding=(0, 2))
    for label, text in totals_of(account, convention):
        totals.add_row(Text(label), Text(text))
    console.print(totals)


def lines_of(layers: tuple[Layer, ...]) -> Iterator[tuple[str, Layer]]:
    """(name, layer) of each line; layers that differ in their names alone share one where they would fill a screen."""
    groups: dict[Any, list[Layer]] = {}
    for number, layer in enumerate(layers):
        alike = layer._replace(name="") if len(layers) > MOST_LINES else number
        groups.setdefault(alike, []).append(layer)
    for group in groups.values():
        name = group[0].name.rpartition("/")[0] or group[0].name
        times = f" and {len(group) - 1} alike" if len(group) > 1 else ""
        yield name + times, group[0]


def totals_of(account: Account, convention: Convention) -> Iterator[tuple[str, str]]:
    """(label, text) of each total."""
    counts = {f"{bits}-bit weights": count for bits, count in account.quantized_weights.items()}
    counts |= {
        "real weights": account.full_precision_weights,
        "biases": account.biases,
        "scales": account.analytic_scales + account.learned_scales,
        "batch norm": account.batch_norm,
        "other numbers": sum(account.other.values()),
    }
    yield "stored", ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    yield "not counted", ", ".join(n.replace("_", " ") for n, on in convention._asdict().items() if not on) or "nothing"
    yield "storage", f"{account.megabits(convention):,.3f} Mbit, {account.mebibytes(convention):,.3f} MiB"
    yield "packed file", f"{account.payload_bytes():,} bytes and a header below 4 KiB"
    macs = account.macs(convention)
    kinds = {name.replace("_", "-"): count for name, count in macs._asdict().items() if name != "bit_products"}
    yield "multiply-accumulates", ", ".join(f"{count:,} {name}" for name, count in kinds.items() if count)
    yield (
        "FLOPs",
        f"{account.flops(convention):,.0f}: full-precision + bit products / 64 (binary 1, ternary 2, m x k bits m k)",
    )


LETTERS = {"classifier_bias": "b", "scales": "s", "batch_norm": "n", "classifier_macs": "m"}
"""What a convention counts besides weights and the other MACs."""


def print_published() -> list[dict[str, Any]]:
    """Print the published table beside our figures, and return its rows."""
    table = Table(box=box.SIMPLE, title=Text("Zhu et al., Table 1: as printed, and as counted for one 224x224 image"))
    table.add_column("network", no_wrap=True)
    for header in ("Mbit\nprinted", "\ncounted", "GFLOP\nprinted", "\ncounted"):
        table.add_column(header, justify="right")
    table.add_column("with", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    rows = []
    for row, account in account_rows(TABLE):
        megabits, gigaflops = counted_as(row, account)
        found = verdict(row, account)
        counted = CONVENTIONS[row.convention]
        cells = (row.name, f"{row.megabits}", f"{megabits:.3f}", f"{row.gigaflops:.2f}", f"{gigaflops:.4f}")
        letters = "".join(letter for field, letter in LETTERS.items() if getattr(row.convention, field))
        table.add_row(*map(Text, (*cells, letters, found)))
        printed = {"network": row.name, "printed_megabits": row.megabits, "printed_gigaflops": row.gigaflops}
        rows.append(printed | {"megabits": megabits, "gigaflops": gigaflops, "counted": counted, "verdict": found})
    console = Console(width=min(100, Console().width))
    console.print(table)
    for line in (
        "FLOPs: full-precision MACs + binary MACs / 64 + ternary MACs / 32.",
        "The paper does not say what it counts.  Each row shows what gives its figures, or comes nearest: all weights",
        "with b the bias of the classifier, s scales, n batch norm, and m the classifier's MACs.",
        "Each network is that of its method; most rows print the figures of the backbone alone.",
    ):
        console.print(Text(line))
    return rows


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    for name in ("image_size", "channels", "classes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"`{name}` (={value}) must be at least 1")
    if (arguments.model is None) is (arguments.table is None):
        raise UsageError(
            f"`model` (={arguments.model!r}) and `--table` (={arguments.table!r}) cannot go together; "
            "name a network or a table"
        )
    if arguments.table:
        record = {"table": arguments.table, "rows": print_published()}
    else:
        account = account_of(arguments)
        size = "x".join(map(str, (arguments.image_size, arguments.image_size, arguments.channels)))
        print_network(f"{arguments.model}, one image of {size}", account, arguments.counted)
        record = {"model": arguments.model} | as_dict(account, arguments.counted)
    if arguments.json:
        write_file(arguments.json, json.dumps(record, indent=1))


def _options_of(name: str) -> tuple[str, ...]:
    return tuple(inspect.signature(MODELS[name].constructor).parameters) if name in MODELS else ()


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

"""The account of a network in the terminal: its layers, what it stores and what it computes."""

from collections.abc import Iterator
from typing import Any

from bnn_jax.analysis.accounting import Account, Convention, Layer
from bnn_jax.analysis.tables import TEXT, Tables, print_lines

MOST_LINES = 24


def print_account(title: str, account: Account, convention: Convention, tables: Tables = TEXT) -> None:
    """Print the layers, those of one kind on one line if they are many, and the totals."""
    rows = []
    for name, layer in _lines(account.layers):
        kernel = "x".join(map(str, layer.shape)) or "-"
        bits = str(layer.weight_bits) if layer.weights else "-"
        rows.append((name, kernel, f"{layer.weights:,}", bits, f"{layer.macs.total:,}", layer.macs.kind))
    tables.print(("layer", "kernel", "weights", "bits", "MACs", "products"), rows, title=title, texts=(0, 1, 5))
    print_lines(_totals(account, convention))


def _lines(layers: tuple[Layer, ...]) -> Iterator[tuple[str, Layer]]:
    """(name, layer) of each line; layers that differ in their names alone share one where they would fill a screen."""
    groups: dict[Any, list[Layer]] = {}
    for number, layer in enumerate(layers):
        alike = layer._replace(name="") if len(layers) > MOST_LINES else number
        groups.setdefault(alike, []).append(layer)
    for group in groups.values():
        name = group[0].name.rpartition("/")[0] or group[0].name
        times = f" and {len(group) - 1} alike" if len(group) > 1 else ""
        yield name + times, group[0]


def _totals(account: Account, convention: Convention) -> Iterator[tuple[str, str]]:
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

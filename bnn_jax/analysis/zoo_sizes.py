"""The sizes of every network of the catalogue, for what it was published for."""

from collections.abc import Iterable, Iterator
from typing import Any

from bnn_jax.analysis.accounting import Account, account_model
from bnn_jax.analysis.gradient_paths import module_gradient_paths
from bnn_jax.analysis.tables import TEXT, Tables
from bnn_jax.models import MODELS
from bnn_jax.models.build import build_model
from bnn_jax.models.extents import extent_of


def parameters(account: Account) -> int:
    """Numbers that inference needs: weights, biases, learned scales, two of each normalized channel, all others."""
    weights = sum(layer.weights for layer in account.layers)
    numbers = account.biases + account.learned_scales + account.batch_norm + sum(account.other.values())
    return weights + numbers


def size_of(name: str) -> dict[str, Any]:
    """The sizes of a network for one image, everything counted, as plain JSON values.

    `parameters`, see :func:`parameters`;  `megabits`, `macs` by kind, `payload_bytes` (of the packed file without its
    header) of :class:`bnn_jax.analysis.accounting.Account`;  `costs`, `lengths`: the smallest three of the gradient
    paths, N_1st, N_2nd, N_3rd and L_1st, L_2nd, L_3rd, of :func:`bnn_jax.analysis.gradient_paths.gradient_paths`.
    """
    extent = extent_of(name)
    network = build_model(name, num_classes=extent.num_classes, options=extent.options)
    account, paths = (
        account_model(network, extent.image_shape),
        module_gradient_paths(network, (1, *extent.image_shape), train=False),
    )
    return {
        "name": name,
        "image_shape": list(extent.image_shape),
        "num_classes": extent.num_classes,
        "parameters": parameters(account),
        "megabits": account.megabits(),
        "macs": account.macs()._asdict(),
        "payload_bytes": account.payload_bytes(),
        "costs": list(paths.costs),
        "lengths": list(paths.lengths),
    }


def sizes(names: Iterable[str] = MODELS) -> Iterator[dict[str, Any]]:
    """The sizes of each."""
    return map(size_of, names)


def print_zoo_sizes(tables: Tables = TEXT) -> list[dict[str, Any]]:
    """Print the sizes of all networks, and return them."""
    rows, lines = [], []
    for row in sizes():
        rows.append(row)
        macs = row["macs"]
        binary = macs["binary"] + macs["ternary"] + macs["multibit"]
        second = f"{row['costs'][1] / 1e6:,.1f}" if len(row["costs"]) > 1 else ""
        numbers = (f"{row['parameters']:,}", f"{row['megabits']:,.2f}", f"{binary / 1e6:,.1f}")
        numbers += (f"{macs['full_precision'] / 1e6:,.1f}", f"{row['payload_bytes']:,}", second)
        lines.append((row["name"], "x".join(map(str, row["image_shape"])), *numbers))
    header = ("network", "image", "parameters", "Mbit", "MMAC\nquantized", "MMAC\nreal", "packed\nbytes", "N_2nd\nMMAC")
    tables.print(header, lines, title="all networks, one image", texts=(0, 1))
    return rows

"""The benchmark of packed bits as tables and as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnn_jax.analysis.figures import COLOURS, drawing
from bnn_jax.analysis.tables import TEXT, Tables
from bnn_jax.paths import local_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {
    "packed": "packed bits",
    "packed_from_float": "packed bits, packing included",
    "bnn_lab": "bnn-lab (C)",
    "float32": "XLA float32",
    "torch": "PyTorch float32",
    "int8": "XLA int8",
    "trained": "trained network, float32",
    "numbers_from_float": "float32 codes, unpacking included",
    "chosen": "path taken",
    "on_bits": "all on bits",
    "on_float32": "all on float32",
}
NOT_DRAWN = {"numbers_from_float", "chosen", "on_bits", "on_float32"}


def print_packed(found: dict[str, Any], tables: Tables = TEXT) -> None:
    """Print the tables of :func:`benchmark_packed`, memory, file sizes and the mean ratios."""
    shapes = {
        "matmul": lambda row: "x".join(map(str, row["shape"])),
        "conv": lambda row: f"{row['side']}^2 {_channels(row, '->')}, batch {row['batch']}",
        "network": lambda row: f"{row['name']} {row['side']}^2, batch {row['batch']}",
    }
    for kind, shape_of in shapes.items():
        measure = "ms" if kind == "network" else "gmacs"
        who = [name for name in NAMES if any(name in row[measure] for row in found[kind])]
        rows = [
            (
                shape_of(row),
                row.get("path", ""),
                *(f"{row[measure][name]:.3g}" if name in row[measure] else "" for name in who),
            )
            for row in found[kind]
        ]
        unit = "ms a batch" if kind == "network" else "10^9 multiply-accumulates a second"
        header = ("shape", "path", *(NAMES[name].replace(" ", "\n", 1) for name in who))
        tables.print(header, rows, texts=(0, 1), title=f"{kind}: {unit}")
    for row in found["network"]:
        memory = ", ".join(f"{NAMES[who]} {size / 1e6:.1f}" for who, size in row["peak_memory"].items())
        print(f"{row['name']} batch {row['batch']}: file {row['file_bytes'] / 1e6:.3f} MB; peak memory in MB: {memory}")
    for name, ratios in found["summary"].items():
        print(f"{name}: geometric mean {ratios['geometric_mean']:.2f}, {ratios['worst']:.2f} to {ratios['best']:.2f}")
    if found.get("not_measured"):
        print(f"out of time before: {', '.join(found['not_measured'])}")


def _channels(row: dict[str, Any], arrow: str) -> str:
    groups = f" in {row['groups']}" if row.get("groups", 1) > 1 else ""
    return f"{row['channels']}{arrow}{row['features']}{groups}"


def plot_packed(found: dict[str, Any], path: str | Path) -> Path:
    """Draw matmuls and convolutions as multiply-accumulates a second, networks as latency, to a PNG at `path`."""
    path = local_path("path", path)
    products = "10$^9$ multiply-accumulates / s"
    with drawing(path, (9.0, 12.0), count=3, columns=1) as (_, axes):
        labels = ["x".join(map(str, row["shape"])) for row in found["matmul"]]
        _bars(axes[0], labels, [row["gmacs"] for row in found["matmul"]], products, "Matrix products (M x K x N)")
        labels = [f"{row['side']}²·{_channels(row, '→')}, batch {row['batch']}" for row in found["conv"]]
        _bars(axes[1], labels, [row["gmacs"] for row in found["conv"]], products, "Convolutions 3x3")
        labels = [f"{row['name']}, {row['side']}²\nbatch {row['batch']}" for row in found["network"]]
        _bars(axes[2], labels, [row["ms"] for row in found["network"]], "ms a batch (less is better)", "Networks")
    return path


def _bars(axes: "Axes", labels: list[str], rows: list[dict[str, float]], unit: str, title: str) -> None:
    who = [name for name in NAMES if any(name in row for row in rows) and name not in NOT_DRAWN]
    colours = dict(zip(NAMES, COLOURS))
    width = 0.85 / max(1, len(who))
    for place, name in enumerate(who):
        positions = [i + (place - (len(who) - 1) / 2) * width for i, row in enumerate(rows) if name in row]
        axes.bar(positions, [row[name] for row in rows if name in row], width, label=NAMES[name], color=colours[name])
    many = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if len(labels) > 8 else {}
    axes.grid(False, axis="x")
    axes.set_xticks(range(len(labels)), labels, fontsize=8, **many)
    axes.set_yscale("log")
    # Room for the legend.
    axes.set_ylim(top=6 * axes.get_ylim()[1])
    axes.set_ylabel(unit)
    axes.set_title(title)
    if who:
        axes.legend(frameon=False, fontsize=8, ncols=3)

"""Pictures of one run: its curves, and what its diagnostics recorded layer by layer."""

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnn_jax.analysis.figures import COLOURS, broken_label, drawing, line_look
from bnn_jax.errors import RunError, UsageError
from bnn_jax.paths import local_path
from bnn_jax.training.diagnostics import histogram_bounds
from bnn_jax.training.metrics import read_metrics
from bnn_jax.training.run_folder import read_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[dict[str, Any]]

WINDOWS = 100
"""Training steps are drawn as the median and quartiles of at most so many groups of neighbours."""

STATISTICS = {
    "flips": "flips: share of the weights in a step",
    "flip_flops": "flip-flops: share that flipped back",
    "never_flipped": "never flipped: share since the start",
    "input_saturation": "saturation of inputs: share without gradient",
    "kernel_saturation": "saturation of kernels: share without gradient",
    "input_balance": "balance of inputs: mean code",
    "kernel_balance": "balance of kernels: mean code",
    "gradient_cosine": "cosine of gradient and flip slope",
}
"""What `diagnostics.png` draws of the records, a panel each."""

LOGARITHMIC = ("flips", "flip_flops")
NATURALLY_ZERO = ("kernel_saturation",)
"""Panels that are left out where nothing but zeros was recorded."""


NEEDED = {
    "train": {"step", "epoch", "loss", "accuracy"},
    "evaluation": {"step", "epoch", "train_loss", "validation_loss", "validation_accuracy"},
    "diagnostics": {"step", "epoch", "steps", "layers", "total"},
}
"""Kind of a record -> what each has that is drawn of it."""


def plot_run(workdir: str | Path, *, output: str | Path | None = None) -> list[Path]:
    """Draw a run, finished or not, to PNG files, each written whole or not at all.

    curves.png       loss, accuracy and learning rate over optimizer steps, and Deep Frank-Wolfe's step size gamma
    diagnostics.png  the statistics of `bnn_jax.training.diagnostics`, a line for each layer and one over all
    histograms.png   the latent weights of each layer, over their box (up) and the steps (right)

    Args:
      workdir: folder of the run.
      output: folder for the pictures, made if missing; None is `workdir`.

    Returns:
      The paths of those that were drawn: the last two need records of diagnostics, the last one latent weights.

    Raises:
      UsageError: if `workdir` holds no run, or one without a training step.
      RunError: if its metrics are damaged, or a picture cannot be written.
    """
    workdir = local_path("workdir", workdir)
    folder = workdir if output is None else local_path("output", output)
    config = read_config(workdir)
    by_kind = _read(workdir)
    if not by_kind["train"]:
        raise UsageError(f"`workdir` (={workdir}) holds no training steps yet; run bnn-jax train with it first")
    pictures = {"curves.png": lambda path: _draw_curves(path, by_kind["train"], by_kind["evaluation"])}
    if by_kind["diagnostics"]:
        pictures["diagnostics.png"] = lambda path: _draw_diagnostics(path, by_kind["diagnostics"])
    if any("histogram" in record["total"] for record in by_kind["diagnostics"]):
        bounds = histogram_bounds(config.optim.latent_box)
        pictures["histograms.png"] = lambda path: _draw_histograms(path, by_kind["diagnostics"], bounds)
    return [_written(folder / name, draw) for name, draw in pictures.items()]


def plot_runs(workdirs: Sequence[str | Path], *, output: str | Path = ".") -> list[Path]:
    """Draw several runs over each other, a line each, over epochs: training loss and validation accuracy.

    Args:
      workdirs: folders of the runs, finished or not.
      output: folder for the picture, overlay.png, made if missing.

    Returns:
      Its path, in a list.

    Raises:
      UsageError: if no folder is named, or one holds no run, or one without a finished epoch.
      RunError: if its metrics are damaged, or the picture cannot be written.
    """
    path = local_path("output", output) / "overlay.png"
    folders = [local_path("workdirs", workdir) for workdir in workdirs]
    if not folders:
        raise UsageError("`workdirs` must name the folder of a run, or several; as runs/mine")
    of_runs = {}
    for folder in folders:
        read_config(folder)
        of_runs[folder] = _read(folder)["evaluation"]
        if not of_runs[folder]:
            raise UsageError(f"`workdirs` (={folder}) holds no finished epoch yet; train it first")
    labels = _run_labels(list(of_runs))
    return [_written(path, lambda path: _draw_overlay(path, dict(zip(labels, of_runs.values()))))]


def _run_labels(folders: Sequence[Path]) -> list[str]:
    """Of each folder what it does not share with the others.

    >>> _run_labels([Path("runs/adam/seed0"), Path("runs/dfw/seed0")]), _run_labels([Path("runs/a"), Path("runs/b")])
    (['adam/seed0', 'dfw/seed0'], ['a', 'b'])
    """
    whole = [folder.absolute() for folder in folders]
    shared = os.path.commonpath(whole)
    return [folder.name if str(folder) == shared else folder.relative_to(shared).as_posix() for folder in whole]


def _written(path: Path, draw: Callable[[Path], None]) -> Path:
    try:
        draw(path)
    except OSError as error:
        reason = f"cannot write {path} ({error.strerror})"
        raise RunError(f"{reason}; name another folder with `--output`") from None
    return path


def _draw_overlay(path: Path, of_runs: dict[str, Records]) -> None:
    from matplotlib.ticker import MaxNLocator

    panels = (("train_loss", 1.0, "training loss"), ("validation_accuracy", 100.0, "validation accuracy (%)"))
    with drawing(path, (10.4, 3.9), count=len(panels)) as (figure, axes):
        for panel, (name, factor, title) in zip(axes, panels):
            for index, records in enumerate(of_runs.values()):
                epochs = [record["epoch"] for record in records]
                values = [factor * record[name] for record in records]
                panel.plot(epochs, values, linewidth=1.6, **_marker(records), **line_look(index))
            panel.set_title(title)
            panel.set_xlabel("epoch")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(axes[0].lines, map(broken_label, of_runs), loc="outside right center", frameon=False, fontsize=9)


def layer_names(records: Records) -> list[str]:
    """The layers of all records, numbers in their names by value: conv2 before conv10.

    >>> layer_names([{"layers": {"conv10": {}, "conv2": {}}}])
    ['conv2', 'conv10']
    """
    names = {name for record in records for name in record["layers"]}
    return sorted(names, key=lambda name: [(part.isdigit(), part.zfill(9)) for part in re.split(r"(\d+)", name)])


def series(records: Records, layer: str | None, statistic: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a statistic of a layer, None for the total, where there is a number.

    >>> series([{"step": 5, "total": {"flips": 0.5}}, {"step": 9, "total": {"flips": None}}], None, "flips")
    (array([5]), array([0.5]))
    """
    found = [(r["step"], (r["total"] if layer is None else r["layers"].get(layer, {})).get(statistic)) for r in records]
    pairs = [pair for pair in found if pair[1] is not None]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs])


def _read(workdir: Path) -> dict[str, list[dict[str, Any]]]:
    path = workdir / "metrics.jsonl"
    by_kind = {kind: [] for kind in NEEDED}
    try:
        for record in read_metrics(path):
            if not record.keys() >= NEEDED.get(record["kind"], set()):
                raise KeyError(record["kind"])
            by_kind.setdefault(record["kind"], []).append(record)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise RunError(f"{path} is damaged: it holds a line that is no record; remove that line to draw it") from None
    return by_kind


def _draw_curves(path: Path, steps: Records, evaluations: Records) -> None:
    panels = [
        ("loss", lambda axes: _draw_training(axes, steps, evaluations, "loss", 1.0)),
        ("accuracy (%)", lambda axes: _draw_training(axes, steps, evaluations, "accuracy", 100.0)),
    ]
    if "learning_rate" in steps[0]:
        panels.append(("learning rate", lambda axes: _draw_rate(axes, steps)))
    if "gamma" in steps[0]:
        panels.append(("step size γ (1 = full learning rate)", lambda axes: _draw_gamma(axes, steps)))
    columns = 3 if len(panels) == 3 else 2
    with drawing(path, _size(len(panels), columns, 4.6, 2.9), count=len(panels), columns=columns) as (_, axes):
        for panel, (title, draw) in zip(axes, panels):
            draw(panel)
            _over_steps(panel, title, steps)


def _size(count: int, columns: int, width: float, height: float) -> tuple[float, float]:
    """Of a figure with so many panels of a size."""
    return width * columns, height * -(-count // columns)


def _over_steps(panel: "Axes", title: str, records: Records) -> None:
    panel.set_title(title)
    panel.set_xlim(0, 1.02 * records[-1]["step"])
    panel.set_xlabel("optimizer step")


def _column(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(record["step"], record[name]) for record in records if name in record]
    return np.array([step for step, _ in found]), np.array([value for _, value in found], float)


def _draw_training(axes: "Axes", steps: Records, evaluations: Records, name: str, factor: float) -> None:
    _draw_windows(axes, *_column(steps, name), factor=factor, colour=COLOURS[0], label="training batches")
    x, values = _column(evaluations, f"validation_{name}")
    if len(x):
        marker = "o" if len(x) <= 20 else None
        axes.plot(x, factor * values, color=COLOURS[1], linewidth=1.6, marker=marker, markersize=4, label="validation")
    axes.legend(frameon=False, fontsize=9)


def _draw_rate(axes: "Axes", steps: Records) -> None:
    x, rates = _column(steps, "learning_rate")
    axes.plot(x, rates, color=COLOURS[0], linewidth=1.6)
    axes.set_ylim(0, 1.1 * rates.max())


def _draw_gamma(axes: "Axes", steps: Records) -> None:
    x, gammas = _column(steps, "gamma")
    _draw_windows(axes, x, gammas, factor=1.0, colour=COLOURS[0], label="median and quartiles")
    shares = [(x[group].mean(), (gammas[group] < 1).mean()) for group in _windows(len(x))]
    axes.plot(*zip(*shares), color=COLOURS[1], linewidth=1.2, linestyle="--", label="share of the steps with γ < 1")
    # The legend has a place of its own above the curves, which are anywhere.
    axes.set_ylim(-0.02, 1.4)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _draw_windows(axes: "Axes", x: np.ndarray, values: np.ndarray, *, factor: float, colour: str, label: str) -> None:
    """Median and quartiles of groups of neighbouring steps."""
    groups = _windows(len(x))
    middles = [x[group].mean() for group in groups]
    low, median, high = factor * np.stack([np.percentile(values[group], (25, 50, 75)) for group in groups], axis=1)
    axes.fill_between(middles, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(middles, median, color=colour, linewidth=1.6, label=label)


def _windows(steps: int) -> list[np.ndarray]:
    """The numbers of the steps in each group of neighbours."""
    return np.array_split(np.arange(steps), min(WINDOWS, steps))


def _draw_diagnostics(path: Path, records: Records) -> None:
    from matplotlib import colormaps

    layers = layer_names(records)
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    shown = [name for name in STATISTICS if _is_shown(records, name)]
    columns = {1: 1, 2: 2, 3: 3, 4: 2, 7: 4, 8: 4}.get(len(shown), 3)
    with drawing(path, _size(len(shown), columns, 4.3, 2.8), count=len(shown), columns=columns) as (figure, axes):
        for panel, name in zip(axes, shown):
            for layer, colour in zip(layers, colours):
                panel.plot(*series(records, layer, name), color=colour, linewidth=1.1, **_marker(records))
            panel.plot(*series(records, None, name), color="black", linewidth=2.0, **_marker(records))
            _set_scale(panel, name)
            _over_steps(panel, STATISTICS[name], records)
        _draw_legend(figure, layers, colours)


def _is_shown(records: Records, name: str) -> bool:
    _, values = series(records, None, name)
    return len(values) > 0 and (name not in NATURALLY_ZERO or bool(values.any()))


def _marker(records: Records) -> dict[str, Any]:
    return {"marker": "o", "markersize": 3} if len(records) <= 5 else {}


def _set_scale(axes: "Axes", name: str) -> None:
    if name in LOGARITHMIC:
        drawn = np.concatenate([line.get_ydata() for line in axes.lines])
        if drawn.any():
            axes.set_yscale("log", nonpositive="mask")
    elif name.endswith("saturation"):
        axes.set_ylim(0, max(0.05, axes.get_ylim()[1]))
    else:
        axes.axhline(0, color="#888888", linewidth=0.8, zorder=0)


def _draw_legend(figure: "Figure", layers: Sequence[str], colours: np.ndarray) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color="black", linewidth=2.0), *(Line2D([], [], color=colour) for colour in colours)]
    lines_that_fit = int(figure.get_figheight() / 0.19)
    columns = -(-len(lines) // lines_that_fit)
    figure.legend(lines, ["all layers", *layers], frameon=False, fontsize=9, ncols=columns, loc="outside right upper")


def _draw_histograms(path: Path, records: Records, bounds: tuple[float, float]) -> None:
    from matplotlib.colors import PowerNorm

    records = [record for record in records if "histogram" in record["total"]]
    layers = [name for name in layer_names(records) if "histogram" in records[0]["layers"].get(name, {})]
    names = [None, *layers] if len(layers) > 1 else layers
    edges = np.array([record["step"] for record in records])
    edges = np.concatenate([[edges[0] - records[0]["steps"]], edges])
    shares = {}
    for name in names:
        _, counts = series(records, name, "histogram")
        shares[name] = counts / counts.sum(axis=1, keepdims=True)
    norm = PowerNorm(0.5, vmin=0, vmax=max(share.max() for share in shares.values()))
    columns = min(math.ceil(math.sqrt(len(names))), 6)
    with drawing(path, _size(len(names), columns, 3.2, 2.3), count=len(names), columns=columns) as (figure, axes):
        for panel, (name, share) in zip(axes, shares.items()):
            mesh = panel.pcolormesh(edges, np.linspace(*bounds, share.shape[1] + 1), share.T, norm=norm, cmap="magma")
            panel.grid(False)
            panel.axhline(0, color="white", linewidth=0.6, linestyle=":")
            panel.set_title("all layers" if name is None else name, fontsize=10, parse_math=False)
            panel.tick_params(labelsize=8)
        figure.colorbar(mesh, ax=axes, label="share of the layer's latent weights in a bin", shrink=0.9)
        figure.supxlabel("optimizer step", fontsize=11)
        figure.supylabel("latent weight", fontsize=11)

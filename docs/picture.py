"""Draw the picture of README.md from results/: python docs/picture.py"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bnn_jax.analysis.figures import COLOURS, drawing

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "_static" / "readme.png"
LABELS = {"dfw": "Deep Frank-Wolfe", "adam": "Adam", "sgd": "SGD"}
NETWORKS = {"xnor_resnet18": "XNOR-Net", "bireal18": "Bi-Real Net", "vgg_small": "VGG-small", "resnet20": "ResNet-20"}
WINDOW = 20
"""Steps of which a median is drawn."""
INK = 96
"""Colours of the file."""


def draw_accuracy(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Validation accuracy over epochs: the mean over the seeds, and their range."""
    for row, colour in zip(rows, COLOURS):
        curves = 100 * np.array([run["curve"]["validation_accuracy"] for run in row["runs"]])
        epochs = 1 + np.arange(curves.shape[1])
        axes.plot(epochs, curves.mean(0), color=colour, label=LABELS[row["label"]])
        axes.fill_between(epochs, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.set(ylim=(80, 100), xlabel="epoch", title="Trained: validation accuracy (%)")
    axes.legend(frameon=False, loc="lower right", fontsize=9)


def draw_step_size(axes: Any, runs: list[dict[str, Any]]) -> None:
    """Deep Frank-Wolfe's step size: the median of all seeds in windows, and the quartiles."""
    gammas = np.array([run["gamma"]["value"] for run in runs])
    windows = gammas[:, : gammas.shape[1] // WINDOW * WINDOW].reshape(len(runs), -1, WINDOW)
    low, median, high = np.quantile(windows, (0.25, 0.5, 0.75), axis=(0, 2))
    steps = WINDOW * (0.5 + np.arange(len(median)))
    axes.plot(steps, median, color=COLOURS[0])
    axes.fill_between(steps, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.set(ylim=(0, 1.02), xlabel="step", title="Step size γ of Deep Frank-Wolfe")


def draw_speed(axes: Any, networks: list[dict[str, Any]]) -> None:
    """How many times as fast as in float32 networks run on packed bits, one image at a time."""
    found = {row["name"]: row["ms"] for row in networks if row["batch"] == 1 and row["name"] in NETWORKS}
    places, speed = np.arange(len(found))[::-1], np.array([ms["float32"] / ms["packed"] for ms in found.values()])
    axes.barh(places, speed, 0.6, color=COLOURS[1])
    for place, width, ms in zip(places, speed, found.values()):
        axes.text(width + 0.1, place, f"{ms['float32']:.2g} → {ms['packed']:.2g} ms", va="center", fontsize=9)
    axes.grid(False, axis="y")
    axes.set_yticks(places, [NETWORKS[name] for name in found])
    axes.set(xlim=(0, 1.4 * speed.max()), xlabel="times as fast as float32", title="Packed: one image, two cores")


def main(path: Path = PICTURE) -> None:
    comparison = json.loads((ROOT / "results" / "digits_xnor" / "results.json").read_text())["rows"]
    networks = json.loads((ROOT / "results" / "benchmark_packed.json").read_text())["network"]
    with drawing(path, (11.2, 3.1), count=3) as (_, (accuracy, step_size, speed)):
        draw_accuracy(accuracy, [row for row in comparison if row["label"] in LABELS])
        draw_step_size(step_size, next(row["runs"] for row in comparison if row["label"] == "dfw"))
        draw_speed(speed, networks)
    with Image.open(path) as drawn:
        drawn.convert("RGB").quantize(INK).save(path, optimize=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

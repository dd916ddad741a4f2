"""The picture of a grid: accuracy over its first numeric axis, a line for each value of the others."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from bnn_jax.analysis.documents import value_text
from bnn_jax.analysis.figures import COLOURS, drawing, line_look, marker_look
from bnn_jax.names import last_part
from bnn_jax.paths import local_path
from bnn_jax.sweeps.results import Results, Row, is_finished, is_number, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {"validation_accuracy_best": "validation, which chooses", "test_accuracy_best": "test"}
SPANS_DECADES = 20
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
SPREAD = 0.022
"""Part of the width between points of neighbouring lines at one place, so that their bars do not hide each other."""
BEST = "best by validation"
HEIGHT, SEEDS_WIDTH, PANELS_WIDTH, LEGEND_WIDTH, CHARACTER = 4.2, 5.0, 7.4, 0.8, 0.085
"""Inches: of a figure, of one without axes, of the two panels, of the signs in a legend, and of a letter in it."""


def plot_grid(results: Results, path: str | Path) -> Path:
    """Draw validation and test accuracy (%) of each cell to a PNG at `path`; returns the path.

    Points are means over the seeds that finished, bars one sample standard deviation, faint points single seeds; a ring
    marks the best cell.  Over the first axis of numbers, logarithmic where they span decades, else over the first axis,
    value by value; one line for each combination of the other axes.  Without axes, a place for each accuracy.
    """
    path = local_path("path", path)
    axes, n = results.axes, len(results.seeds)
    panels = PANELS if axes else {"": "each seed, mean ± one standard deviation"}
    best = next((summary["label"] for summary in summarize(results) if summary["best"]), None)
    labels = _line_labels(results)
    beside = LEGEND_WIDTH + CHARACTER * max(map(len, [BEST, *labels])) if any(labels) else 0.0
    size = (PANELS_WIDTH + beside if axes else SEEDS_WIDTH, HEIGHT)
    with drawing(path, size, count=len(panels), sharey=True) as (figure, drawn):
        figure.get_layout_engine().set(w_pad=0.1)
        for panel, title in zip(drawn, panels.values()):
            panel.set_title(title, fontsize=11)
        drawn[0].set_ylabel("accuracy (%)")
        if axes:
            _draw_lines(figure, drawn, results, best, labels)
        else:
            _draw_seeds(drawn[0], results.rows[0].runs)
        data = ", ".join(data["name"] for data in results.datasets)
        seeds = f"{n} seeds" if n > 1 else "1 seed"
        spread = ", mean ± one standard deviation" if axes and n > 1 else ""
        figure.suptitle(f"{data}: {seeds}{spread}", fontsize=12, x=0.01, ha="left", parse_math=False)
    return path


def _lines(results: Results) -> dict[tuple[tuple[str, Any], ...], list[Row]]:
    """The cells of each combination of the axes that are not drawn along."""
    lines = {}
    others = [name for name in results.axes if name != _axis_along(results.axes)]
    for cell in results.rows:
        lines.setdefault(tuple((name, cell.settings[name]) for name in others), []).append(cell)
    return lines


def _line_labels(results: Results) -> list[str]:
    """What the legend calls each line; nothing where there is one axis or none."""
    if not results.axes:
        return []
    return [", ".join(f"{_short_name(name)} {_place_text(value)}" for name, value in line) for line in _lines(results)]


def _draw_lines(figure: Any, panels: Sequence["Axes"], results: Results, best: str | None, labels: list[str]) -> None:
    along = _axis_along(results.axes)
    values = results.axes[along]
    scale = _scale(values)
    places = {value: place if scale in ("ordinal", "names") else value for place, value in enumerate(values)}
    lines = _lines(results)
    step = min(SPREAD, 0.4 / len(values) / len(lines))
    for axes, name in zip(panels, PANELS):
        for index, cells in enumerate(lines.values()):
            shift = step * (index - (len(lines) - 1) / 2)
            look = line_look(index) | marker_look(index) | ({"linestyle": "none"} if scale == "names" else {})
            _draw_line(
                axes, cells, name, best, look, lambda cell, s=shift: _moved(places, cell.settings[along], scale, s)
            )
        _set_places(axes, along, values, places, scale)
    handles = panels[0].get_legend_handles_labels()[0]
    ring = panels[0].plot([], [], "o", markersize=13, markerfacecolor="none", markeredgecolor="#222222")
    if any(labels):
        figure.legend([*handles, *ring], [*labels, BEST], loc="outside right center", frameon=False)
    else:
        figure.legend(ring, [BEST], loc="outside lower right", frameon=False)


def _draw_line(axes: "Axes", cells: list[Row], name: str, best: str | None, look: dict, place_of: Callable) -> None:
    points = []
    for cell in sorted(cells, key=place_of):
        found = [100 * run[name] for run in cell.runs if is_finished(run)]
        x = place_of(cell)
        points.append((x, fmean(found) if found else math.nan, stdev(found) if len(found) > 1 else 0.0))
        axes.plot([x] * len(found), found, ".", color=look["color"], alpha=0.4, markersize=7, markeredgewidth=0)
        if cell.label == best:
            axes.plot(x, points[-1][1], "o", markersize=13, markerfacecolor="none", markeredgecolor="#222222", zorder=5)
    bars = None if all(std == 0 for _, _, std in points) else [std for _, _, std in points]
    x, mean, _ = zip(*points)
    axes.errorbar(x, mean, bars, capsize=3, linewidth=1.6, elinewidth=1.1, markersize=5, label=cells[0].label, **look)


def _draw_seeds(axes: "Axes", runs: list[dict[str, Any]]) -> None:
    names = {
        "validation_accuracy_best": "validation,\nbest epoch",
        "test_accuracy_best": "test,\nbest epoch",
        "test_accuracy_last": "test,\nlast epoch",
    }
    runs = [run for run in runs if is_finished(run)]
    for place, name in enumerate(names):
        found = [100 * run[name] for run in runs]
        offsets = [place + 0.2 + 0.03 * (index - (len(found) - 1) / 2) for index in range(len(found))]
        axes.plot(offsets, found, ".", color=COLOURS[0], alpha=0.5, markersize=7, markeredgewidth=0)
        if found:
            spread = stdev(found) if len(found) > 1 else None
            axes.errorbar(place, fmean(found), spread, fmt="o", color=COLOURS[0], capsize=4, markersize=7)
    axes.set_xticks(range(len(names)), names.values())
    axes.set_xlim(-0.5, len(names) - 0.5)


def _axis_along(axes: dict[str, list[Any]]) -> str:
    """The first axis of numbers; of none the first."""
    numeric = (name for name, values in axes.items() if all(_is_quantity(value) for value in values))
    return next(numeric, next(iter(axes)))


def _is_quantity(value: Any) -> bool:
    return is_number(value) and not isinstance(value, bool)


def _scale(values: Sequence[Any]) -> str:
    """ "log", "linear", "names", or "ordinal" for 0 beside numbers that span decades."""
    if not all(_is_quantity(value) for value in values):
        return "names"
    positive = [value for value in values if value > 0]
    if not positive or max(positive) < SPANS_DECADES * min(positive):
        return "linear"
    return "log" if len(positive) == len(values) else "ordinal"


def _moved(places: dict[Any, int | float], value: Any, scale: str, shift: float) -> float:
    """Where a line's point is drawn: beside its value by `shift`, a part of the axis's width."""
    low, high = min(places.values()), max(places.values())
    if scale == "log":
        return places[value] * (high / low) ** shift
    return places[value] + shift * (high - low)


def _set_places(axes: "Axes", along: str, values: Sequence[Any], places: dict[Any, int | float], scale: str) -> None:
    from matplotlib.ticker import NullLocator

    if scale == "log":
        axes.set_xscale("log")
    texts = [_place_text(value) for value in values]
    axes.set_xticks([places[value] for value in values], texts)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(along, parse_math=False)
    if len(values) > 6 or sum(map(len, texts)) > 24:
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor", parse_math=False)


def _place_text(value: Any) -> str:
    """A value of an axis where there is little room: of a name with a module its last part."""
    return last_part(value) if isinstance(value, str) else value_text(value)


def _short_name(name: str) -> str:
    """The last part of an axis's name that says something: latent_weight_decay, of optim.name optim.

    >>> _short_name("optim.latent_weight_decay"), _short_name("optim.name")
    ('latent_weight_decay', 'optim')
    """
    return name.removesuffix(".name").rpartition(".")[2]

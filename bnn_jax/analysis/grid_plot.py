"""The picture of a grid: accuracy over its first numeric axis, a line for each value of the others."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from bnn_jax.analysis.documents import value_text
from bnn_jax.analysis.figures import COLOURS, drawing, line_look, marker_look
from bnn_jax.paths import local_path
from bnn_jax.sweeps.results import Results, Row, is_finished, is_number, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {"validation_accuracy_best": "validation, which chooses", "test_accuracy_best": "test"}
SPANS_DECADES = 20
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
SPREAD = 0.022
"""Part of the width between points of neighbouring lines at one place, so that their bars do not hide each other."""


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
    with drawing(path, (9.4 if axes else 5.0, 4.2), count=len(panels), sharey=True) as (figure, drawn):
        figure.get_layout_engine().set(w_pad=0.1)
        for panel, title in zip(drawn, panels.values()):
            panel.set_title(title, fontsize=11)
        drawn[0].set_ylabel("accuracy (%)")
        if axes:
            _draw_lines(figure, drawn, results, best)
        else:
            _draw_seeds(drawn[0], results.rows[0].runs)
        data = ", ".join(data["name"] for data in results.datasets)
        seeds = f"{n} seeds" if n > 1 else "1 seed"
        spread = ", mean ± one standard deviation" if axes and n > 1 else ""
        figure.suptitle(f"{data}: {seeds}{spread}", fontsize=12, x=0.01, ha="left", parse_math=False)
    return path


def _draw_lines(figure: Any, panels: Sequence["Axes"], results: Results, best: str | None) -> None:
    along = _axis_along(results.axes)
    values = results.axes[along]
    scale = _scale(values)
    places = {value: place if scale in ("ordinal", "names") else value for place, value in enumerate(values)}
    others = [name for name in results.axes if name != along]
    lines = {}
    for cell in results.rows:
        lines.setdefault(tuple(cell.settings[name] for name in others), []).append(cell)
    step = min(SPREAD, 0.4 / len(values) / len(lines))
    for axes, name in zip(panels, PANELS):
        for index, cells in enumerate(lines.values()):
            shift = step * (index - (len(lines) - 1) / 2)
            look = line_look(index) | marker_look(index) | ({"linestyle": "none"} if scale == "names" else {})
            _draw_line(
                axes, cells, name, best, look, lambda cell, s=shift: _moved(places, cell.settings[along], scale, s)
            )
        _set_places(axes, along, values, places, scale)
    labels = [", ".join(f"{_last(name)} {value_text(value)}" for name, value in zip(others, line)) for line in lines]
    handles = panels[0].get_legend_handles_labels()[0]
    ring = panels[0].plot([], [], "o", markersize=13, markerfacecolor="none", markeredgecolor="#222222")
    if others:
        figure.legend([*handles, *ring], [*labels, "best by validation"], loc="outside right center", frameon=False)
    else:
        figure.legend(ring, ["best by validation"], loc="outside lower right", frameon=False)


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
    axes.set_xticks([places[value] for value in values], [value_text(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(along, parse_math=False)
    if len(values) > 6 or sum(len(value_text(value)) for value in values) > 24:
        axes.tick_params(axis="x", labelrotation=45)


def _last(name: str) -> str:
    return name.rpartition(".")[2]

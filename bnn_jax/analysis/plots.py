"""Pictures of a comparison: accuracy over epochs, step size over steps, estimators, error over gradient paths."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnn_jax.analysis.figures import (
    COLOURS,
    drawing,
    faintness,
    height_for,
    label_line_ends,
    line_look,
    marker_look,
)
from bnn_jax.analysis.grid_plot import plot_grid
from bnn_jax.names import last_part
from bnn_jax.paths import local_path
from bnn_jax.sweeps.results import Results, Row, is_finished, is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from bnn_jax.estimators import EstimatorLike

WIDTH, HEIGHT, STACKED_HEIGHT = 7.4, 4.2, 6.4
STACKED = (3, 2)
"""Heights of the two panels of the step size."""
FEWEST_WINDOWS, MOST_WINDOWS, STEPS_IN_A_WINDOW = 20, 100, 40
FEW_EPOCHS = 12
MOST_COLUMNS = 4
MEAN_AND_SPREAD = "mean ± one standard deviation"


def pictures_of(results: Results) -> dict[str, Callable[[Path], Path]]:
    """The names of the pictures that a report has, and what draws each to a path."""
    if results.is_grid:
        return {"sweep.png": lambda path: plot_grid(results, path)}
    pictures = {"accuracy.png": lambda path: plot_accuracy(results, path)}
    if any(_gammas(row) for row in results.rows):
        pictures["step_size.png"] = lambda path: plot_step_size(results, path)
    if results.estimators:
        pictures["estimators.png"] = lambda path: plot_estimators(results.estimators, path)
    if any(row.gradient_paths for row in results.rows):
        pictures["paths.png"] = lambda path: plot_paths(results, path)
    return pictures


def plot_accuracy(results: Results, path: str | Path) -> Path:
    """Draw validation accuracy (%) over epochs to a PNG at `path`; returns the path.

    One line a row, the mean over its finished runs, with a band of one sample standard deviation to each side.  Runs
    that did not finish are thin dashed lines that end in a cross.  The axis starts where each row still shows at least
    85 % of its epochs, so that the first epochs do not flatten the rest.
    """
    path = local_path("path", path)
    curves = [_accuracies(run for run in row.runs if is_finished(run)) for row in results.rows]
    broken = [_accuracies(run for run in row.runs if not is_finished(run)) for row in results.rows]
    faint = faintness(len(results.rows))
    with drawing(path, (WIDTH, height_for(results.labels, HEIGHT))) as (_, (axes,)):
        ends = []
        for index, (label, done, undone) in enumerate(zip(results.labels, curves, broken)):
            look = line_look(index)
            for epochs, accuracy in undone:
                axes.plot(epochs, accuracy, color=look["color"], linestyle=(0, (4, 3)), linewidth=0.9)
                axes.plot(epochs[-1], accuracy[-1], color=look["color"], marker="x", markersize=7)
            if done:
                epochs, mean = _draw_mean_and_band(axes, done, look, faint)
                ends.append((mean[-1], label, look))
            elif undone:
                ends.append((undone[-1][1][-1], f"{label} (none finished)", look | {"linestyle": ":"}))
        _set_accuracy_axes(axes, curves, broken)
        axes.set_title(_title(results, curves), parse_math=False)
        label_line_ends(axes, ends)
    return path


def plot_step_size(results: Results, path: str | Path) -> Path:
    """Draw the step size gamma, and how often it is below 1, over optimizer steps to a PNG at `path`; returns the path.

    The steps are cut into windows of equal length.  Above, a line is the median of a row's gammas in a window over all
    its finished runs, the band spans their quartiles, and the faint lines are the medians of the single runs.  Below it
    is the share of these gammas that are less than 1.  Rows of which no run recorded a gamma have no line.
    """
    path = local_path("path", path)
    gammas = [_gammas(row) for row in results.rows]
    faint = faintness(sum(map(bool, gammas)))
    stacked = {"count": 2, "columns": 1, "sharex": True, "height_ratios": STACKED}
    height = height_for(results.labels, STACKED_HEIGHT, STACKED[0] / sum(STACKED))
    with drawing(path, (WIDTH, height), **stacked) as (_, (axes, shares)):
        ends = []
        for index, (label, of_row) in enumerate(zip(results.labels, gammas)):
            if of_row:
                median = _draw_gammas(axes, shares, of_row, line_look(index), faint)
                ends.append((median[-1], label, line_look(index)))
        axes.set(ylabel="step size γ (1 = full learning rate)", ylim=(-0.02, 1.03))
        shares.set(xlabel="optimizer step", ylabel="steps with γ < 1 (%)", ylim=(-3, 103))
        axes.set_xlim(0, max([1, *(steps[-1] for of_row in gammas for steps, _ in of_row)]))
        axes.set_title(_title(results, gammas, "running median and quartiles", always=True), parse_math=False)
        label_line_ends(axes, ends)
    return path


def plot_estimators(estimators: "Sequence[str] | Mapping[str, EstimatorLike]", path: str | Path) -> Path:
    """Draw forward value and chosen derivative of estimators, from the live functions, to a PNG.

    A panel each, x from -2.5 to 2.5; A is the area under the derivative over the x that are drawn.

    Args:
      estimators: names of the table, or title -> estimator.
      path: of the picture.

    Raises:
      ValueError: for an unknown estimator; the nearest is named.
    """
    path = local_path("path", path)
    import jax
    import jax.numpy as jnp

    from bnn_jax.estimators import as_estimator

    x = np.linspace(-2.5, 2.5, 2001, dtype=np.float32)
    named = estimators if isinstance(estimators, Mapping) else {last_part(name): name for name in estimators}
    rows = -(-len(named) // MOST_COLUMNS)
    columns = -(-len(named) // rows)
    size = (2.4 * columns, 2.1 * rows)
    with drawing(path, size, count=len(named), columns=columns, sharex=True) as (_, panels):
        for (name, estimator), axes in zip(named.items(), panels):
            estimator = as_estimator(estimator)
            derivative = np.asarray(jax.grad(lambda x, estimator=estimator: estimator(x).sum())(jnp.asarray(x)))
            axes.grid(False)
            axes.axhline(0, color="#DDDDDD", linewidth=0.7)
            axes.plot(x, np.asarray(estimator(jnp.asarray(x))), color="#888888", linewidth=1.2)
            axes.plot(x, derivative, color=COLOURS[0], linewidth=1.6)
            axes.fill_between(x, 0, derivative, color=COLOURS[0], alpha=0.15, linewidth=0)
            axes.set_title(f"{name}\nA = {np.trapezoid(derivative, x):.3g}", fontsize=9, parse_math=False)
            axes.tick_params(labelsize=8)
    return path


def plot_paths(results: Results, path: str | Path) -> Path:
    """Draw the test error (%) over N_2nd, the cost of the second cheapest gradient path, to a PNG; returns the path.

    A panel for each place in the rows' ``gradient_paths``, as {"first stage": {"costs": [0, 64, 128], ...}, ...}; a
    point for each row: the mean over its finished runs, at the best epoch, with one sample standard deviation to each
    side.  A row without a second path or a finished run has no point.
    """
    path = local_path("path", path)
    places = list(dict.fromkeys(place for row in results.rows for place in row.gradient_paths))
    errors = [[100 * (1 - run["test_accuracy_best"]) for run in row.runs if is_finished(run)] for row in results.rows]
    with drawing(path, (1.6 + 3.6 * len(places), 3.9), count=len(places), sharey=True) as (figure, panels):
        points = {}
        for place, axes in zip(places, panels):
            points |= _draw_error_over_cost(axes, place, results, errors)
        panels[0].set_ylabel("test error (%)")
        figure.legend(points.values(), points.keys(), loc="outside right center", frameon=False, fontsize=9)
        figure.suptitle(_title(results, errors), fontsize=12, x=0.01, ha="left", parse_math=False)
    return path


def _draw_error_over_cost(axes: "Axes", place: str, results: Results, errors: list) -> dict[str, Any]:
    """Draw a panel; returns its points by label, for the legend."""
    points = {}
    for index, (label, row, found) in enumerate(zip(results.labels, results.rows, errors)):
        costs = row.gradient_paths.get(place, {}).get("costs", ())
        if len(costs) > 1 and found:
            std = np.std(found, ddof=1) if len(found) > 1 else None
            look = marker_look(index) | {"linestyle": "none", "markersize": 7, "capsize": 3}
            points[label] = axes.errorbar(costs[1] / 1e6, np.mean(found), std, **look)
    axes.set_xlim(left=0)
    axes.set_title(place, parse_math=False)
    axes.set_xlabel(r"$N_{\mathrm{2nd}}$ ($10^6$ multiply-accumulates)")
    return points


def _accuracies(runs: Iterable[dict[str, Any]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(epochs, validation accuracy in %) of the runs that have a curve."""
    curves = _numbers((run.get("curve") for run in runs), "epoch", "validation_accuracy")
    return [(epochs, 100 * accuracy) for epochs, accuracy in curves]


def _gammas(row: Row) -> list[tuple[np.ndarray, np.ndarray]]:
    """(steps, gamma) of the finished runs that recorded any."""
    return _numbers((run.get("gamma") for run in row.runs if is_finished(run)), "step", "value")


def _numbers(records: Iterable[dict[str, list] | None], x: str, y: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(x, y) of each record, without the points that lack a number, if any are left."""
    kept = ([pair for pair in zip(record[x], record[y]) if is_number(pair[1])] for record in records if record)
    return [tuple(np.array(values) for values in zip(*pairs)) for pairs in kept if pairs]


def _draw_mean_and_band(
    axes: "Axes", curves: list, look: dict[str, Any], faint: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the mean of the curves over the epochs that all of them have; returns those epochs and the mean."""
    epochs = np.array(sorted(set.intersection(*(set(epochs.tolist()) for epochs, _ in curves))))
    accuracy = np.stack([accuracy[np.isin(own_epochs, epochs)] for own_epochs, accuracy in curves])
    mean = accuracy.mean(axis=0)
    marker = {"marker": "o", "markersize": 4, "clip_on": False} if len(epochs) <= FEW_EPOCHS else {}
    axes.plot(epochs, mean, linewidth=1.8, **marker, **look)
    if len(curves) > 1:
        std = accuracy.std(axis=0, ddof=1)
        low, high = mean - std, np.minimum(mean + std, 100)
        if len(epochs) > 1:
            axes.fill_between(epochs, low, high, color=look["color"], alpha=0.18 * faint, linewidth=0)
        else:
            axes.errorbar(epochs, mean, (mean - low, high - mean), color=look["color"], capsize=3, clip_on=False)
    return epochs, mean


def _draw_gammas(axes: "Axes", shares: "Axes", gammas: list, look: dict[str, Any], faint: float) -> np.ndarray:
    """Draw median, quartiles and single runs of a row's gammas, and the share below 1; returns the medians."""
    last = max(steps[-1] for steps, _ in gammas)
    count = max(len(steps) for steps, _ in gammas)
    # Gamma scatters from batch to batch: a window needs many steps for a quiet median.
    windows = min(MOST_WINDOWS, max(count // STEPS_IN_A_WINDOW, min(count, FEWEST_WINDOWS)))
    edges = np.linspace(0, last, windows + 1)
    if len(gammas) > 1:
        for steps, values in gammas:
            axes.plot(
                *_windowed(steps, values, edges, np.median), color=look["color"], alpha=0.35 * faint, linewidth=0.7
            )
    steps, values = (np.concatenate(parts) for parts in zip(*gammas))
    quartiles = partial(np.percentile, q=(25.0, 50.0, 75.0))
    middles, (low, median, high) = _windowed(steps, values, edges, quartiles)
    axes.fill_between(middles, low, high, color=look["color"], alpha=0.15 * faint, linewidth=0)
    axes.plot(middles, median, linewidth=1.8, **look)
    shares.plot(middles, 100 * _windowed(steps, values < 1, edges, np.mean)[1], linewidth=1.8, **look)
    return median


def _windowed(
    steps: np.ndarray, values: np.ndarray, edges: np.ndarray, statistic: Callable[[np.ndarray], Any]
) -> tuple[np.ndarray, np.ndarray]:
    """A statistic of the values whose step lies in (edges[i], edges[i+1]], of the windows i that hold any.

    Returns the windows' middle steps [windows] and what the statistic gives [..., windows].
    """
    window = np.maximum(np.searchsorted(edges, steps, side="left") - 1, 0)
    filled = np.unique(window)
    middles = (edges[filled] + edges[filled + 1]) / 2
    return middles, np.stack([statistic(values[window == one]) for one in filled], axis=-1)


def _set_accuracy_axes(axes: "Axes", *groups: list) -> None:
    from matplotlib.ticker import MaxNLocator

    curves = [curve for rows in groups for row in rows for curve in row]
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not curves:
        axes.text(0.5, 0.5, "no run recorded a curve", ha="center", va="center", transform=axes.transAxes)
        return
    # Of many epochs the first ones may lie below the picture, but no mark of a few.
    few = lambda accuracy: len(accuracy) <= FEW_EPOCHS
    low = min(np.percentile(accuracy, 0 if few(accuracy) else 15, method="lower") for _, accuracy in curves)
    # Bands reach further than the curves.
    low = min(low, axes.dataLim.y0) if all(few(accuracy) for _, accuracy in curves) else low
    high = max(axes.dataLim.y1, *(accuracy.max() for _, accuracy in curves))
    margin = max(0.06 * (high - low), 0.5)
    axes.set_ylim(max(low - margin, 0), min(high + margin, 100.5))
    first, last = min(epochs[0] for epochs, _ in curves), max(epochs[-1] for epochs, _ in curves)
    axes.set_xlim(first - 0.02 * last if last > first else first - 1, last)


def _title(results: Results, of_rows: Sequence[list], spread: str = MEAN_AND_SPREAD, *, always: bool = False) -> str:
    """Data, the number of seeds behind the lines, what line and band show: "digits: 3 seeds, mean ± ..."."""
    counts = sorted({len(of_row) for of_row in of_rows if of_row})
    data = results.datasets[0]["name"]
    if not counts:
        return f"{data}: no run finished"
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    seeds = f"{number} seed" if counts[-1] == 1 else f"{number} seeds"
    return f"{data}: {seeds}, {spread}" if always or counts[-1] > 1 else f"{data}: {seeds}"

"""Pictures of a comparison: accuracy over epochs, step size over steps, estimators, error over gradient paths."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with every common form of colour blindness; the darkest first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE = {"font.size": 11, "axes.titlesize": 12, "axes.titlelocation": "left", "axes.edgecolor": "#888888"}
SIZE_INCHES, DOTS_PER_INCH = (7.4, 4.2), 150
FEWEST_WINDOWS, MOST_WINDOWS, STEPS_IN_A_WINDOW = 20, 100, 40
FEW_EPOCHS = 12
LINE_HEIGHT = 0.058  # of a line of label text, as a share of the axes' height


def is_finished(run: dict[str, Any]) -> bool:
    """Whether a run ended with finite test accuracies and is not marked ``"diverged"``."""
    accuracies = (run.get("test_accuracy_best"), run.get("test_accuracy_last"))
    return not run.get("diverged") and all(is_number(accuracy) for accuracy in accuracies)


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float; None, NaN and infinities are not."""
    return isinstance(value, int | float) and math.isfinite(value)


def has_step_size(results: dict[str, Any]) -> bool:
    """Whether any finished run of the comparison recorded a step size gamma."""
    return any(_gammas(row) for row in results["rows"])


def has_gradient_paths(results: dict[str, Any]) -> bool:
    """Whether any row of the comparison says what its network's gradient paths cost."""
    return any(row.get("gradient_paths") for row in results["rows"])


def row_labels(results: dict[str, Any]) -> list[str]:
    """The rows' labels, with the loss where the comparison has more than one: "adam, cross_entropy"."""
    one_loss = len({row["loss"] for row in results["rows"]}) == 1
    return [
        row["label"] if one_loss or row["loss"] in row["label"] else f"{row['label']}, {row['loss']}"
        for row in results["rows"]
    ]


def plot_accuracy(results: dict[str, Any], path: str | Path) -> Path:
    """Draw validation accuracy (%) over epochs to a PNG at `path`; returns the path.

    One line a row, the mean over its finished runs, with a band of one sample standard deviation to each side.  Runs
    that did not finish are thin dashed lines that end in a cross.  The axis starts where each row still shows at least
    85 % of its epochs, so that the first epochs do not flatten the rest.
    """
    curves = [_accuracy_curves(run for run in row["runs"] if is_finished(run)) for row in results["rows"]]
    broken = [_accuracy_curves(run for run in row["runs"] if not is_finished(run)) for row in results["rows"]]
    with _style():
        figure, axes = _figure()
        ends = []
        for index, (label, done, undone) in enumerate(zip(row_labels(results), curves, broken)):
            look = _look(index)
            for epochs, accuracy in undone:
                axes.plot(epochs, accuracy, color=look["color"], linestyle=(0, (4, 3)), linewidth=0.9)
                axes.plot(epochs[-1], accuracy[-1], color=look["color"], marker="x", markersize=7)
            if done:
                epochs, mean = _draw_mean_and_band(axes, done, look)
                ends.append((mean[-1], label, look))
            elif undone:
                ends.append((undone[-1][1][-1], f"{label} (none finished)", look | {"linestyle": ":"}))
        _set_accuracy_axes(axes, curves, broken)
        seeds = _seeds_text(curves, "mean ± one standard deviation")
        axes.set_title(f"{results['dataset']['name']}: {seeds}", parse_math=False)
        _label_line_ends(axes, ends)
        return _save(figure, path)


def plot_step_size(results: dict[str, Any], path: str | Path) -> Path | None:
    """Draw the step size gamma over optimizer steps to a PNG at `path`; returns the path.

    The steps are cut into windows of equal length.  A line is the median of a row's gammas in a window over all its
    finished runs, the band spans their quartiles, and the faint lines are the medians of the single runs.  Where no run
    recorded a gamma, no file is written and None is returned.
    """
    if not has_step_size(results):
        return None
    rows = [
        (index, label, _gammas(row)) for index, (label, row) in enumerate(zip(row_labels(results), results["rows"]))
    ]
    with _style():
        figure, axes = _figure()
        ends = []
        for index, label, gammas in rows:
            if gammas:
                median = _draw_gammas(axes, gammas, _look(index))
                ends.append((median[-1], label, _look(index)))
        axes.set(xlabel="optimizer step", ylabel="step size γ (1 = full learning rate)", ylim=(-0.02, 1.03))
        axes.set_xlim(0, max([1, *(steps[-1] for _, _, gammas in rows for steps, _ in gammas)]))
        seeds = _seeds_text([gammas for _, _, gammas in rows], "running median and quartiles", always=True)
        axes.set_title(f"{results['dataset']['name']}: {seeds}", parse_math=False)
        _label_line_ends(axes, ends)
        return _save(figure, path)


def plot_estimators(names: Sequence[str], path: str | Path) -> Path:
    """Draw forward value and chosen derivative of estimators of the table, from the live functions, to a PNG.

    A panel each, x from -2.5 to 2.5; A is the area under the derivative over the x that are drawn.

    Raises:
      ValueError: for an unknown estimator; the nearest is named.
    """
    import jax
    import jax.numpy as jnp
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from bnn_jax.estimators import as_estimator

    x = np.linspace(-2.5, 2.5, 2001, dtype=np.float32)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    with _style():
        figure = Figure(figsize=(2.4 * columns, 2.1 * rows), dpi=DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        panels = np.atleast_1d(figure.subplots(rows, columns, sharex=True)).ravel()
        for name, axes in zip(names, panels):
            estimator = as_estimator(name)
            derivative = np.asarray(jax.grad(lambda x, estimator=estimator: estimator(x).sum())(jnp.asarray(x)))
            axes.axhline(0, color="#DDDDDD", linewidth=0.7)
            axes.plot(x, np.asarray(estimator(jnp.asarray(x))), color="#888888", linewidth=1.2)
            axes.plot(x, derivative, color=COLOURS[0], linewidth=1.6)
            axes.fill_between(x, 0, derivative, color=COLOURS[0], alpha=0.15, linewidth=0)
            axes.set_title(f"{name}\nA = {np.trapezoid(derivative, x):.3g}", fontsize=9, parse_math=False)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        return _save(figure, path)


def plot_paths(results: dict[str, Any], path: str | Path) -> Path | None:
    """Draw the test error (%) over N_2nd, the cost of the second cheapest gradient path, to a PNG; returns the path.

    A panel for each place in the rows' ``gradient_paths``, as {"first stage": {"costs": [0, 64, 128], ...}, ...}; a
    point for each row: the mean over its finished runs, at the best epoch, with one sample standard deviation to each
    side.  A row without a second path or a finished run has no point.  Where no row has gradient paths, no file is
    written and None is returned.
    """
    if not has_gradient_paths(results):
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = list(dict.fromkeys(place for row in results["rows"] for place in row.get("gradient_paths", {})))
    errors = [
        [100 * (1 - run["test_accuracy_best"]) for run in row["runs"] if is_finished(run)] for row in results["rows"]
    ]
    with _style():
        figure = Figure(figsize=(1.6 + 3.6 * len(places), 3.9), dpi=DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        panels = np.atleast_1d(figure.subplots(1, len(places), sharey=True))
        points = {}
        for place, axes in zip(places, panels):
            points |= _draw_error_over_cost(axes, place, results, errors)
        panels[0].set_ylabel("test error (%)")
        figure.legend(points.values(), points.keys(), loc="outside right center", frameon=False, fontsize=9)
        seeds = _seeds_text(errors, "mean ± one standard deviation")
        figure.suptitle(f"{results['dataset']['name']}: {seeds}", fontsize=12, x=0.01, ha="left", parse_math=False)
        return _save(figure, path)


def _draw_error_over_cost(axes: "Axes", place: str, results: dict[str, Any], errors: list) -> dict[str, Any]:
    """Draw a panel; returns its points by label, for the legend."""
    points = {}
    for index, (label, row, found) in enumerate(zip(row_labels(results), results["rows"], errors)):
        costs = row.get("gradient_paths", {}).get(place, {}).get("costs", ())
        if len(costs) > 1 and found:
            std = np.std(found, ddof=1) if len(found) > 1 else None
            look = {"color": _look(index)["color"], "marker": MARKERS[index % len(MARKERS)]}
            look |= {"linestyle": "none", "markersize": 7, "capsize": 3}
            points[label] = axes.errorbar(costs[1] / 1e6, np.mean(found), std, **look)
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(left=0)
    axes.set_title(place, parse_math=False)
    axes.set_xlabel("$N_{2nd}$ ($10^6$ multiply-accumulates)")
    return points


def _accuracy_curves(runs: Iterable[dict[str, Any]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(epochs, validation accuracy in %) of the runs that have a curve, without the epochs that lack a number."""
    curves = []
    for run in runs:
        curve = run.get("curve") or {"epoch": [], "validation_accuracy": []}
        points = [pair for pair in zip(curve["epoch"], curve["validation_accuracy"]) if is_number(pair[1])]
        if points:
            epochs, accuracy = zip(*points)
            curves.append((np.array(epochs), 100 * np.array(accuracy)))
    return curves


def _gammas(row: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(steps, gamma) of the finished runs that recorded any, without the steps that lack a number."""
    gammas = []
    for run in filter(is_finished, row["runs"]):
        gamma = run.get("gamma") or {"step": [], "value": []}
        points = [pair for pair in zip(gamma["step"], gamma["value"]) if is_number(pair[1])]
        if points:
            steps, values = zip(*points)
            gammas.append((np.array(steps), np.array(values)))
    return gammas


def _draw_mean_and_band(axes: "Axes", curves: list, look: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Draw the mean of the curves over the epochs that all of them have; returns those epochs and the mean."""
    epochs = np.array(sorted(set.intersection(*(set(epochs.tolist()) for epochs, _ in curves))))
    accuracy = np.stack([accuracy[np.isin(own_epochs, epochs)] for own_epochs, accuracy in curves])
    mean = accuracy.mean(axis=0)
    axes.plot(epochs, mean, linewidth=1.8, marker="o" if len(epochs) <= FEW_EPOCHS else None, markersize=4, **look)
    if len(curves) > 1:
        std = accuracy.std(axis=0, ddof=1)
        axes.fill_between(epochs, mean - std, np.minimum(mean + std, 100), color=look["color"], alpha=0.18, linewidth=0)
    return epochs, mean


def _draw_gammas(axes: "Axes", gammas: list, look: dict[str, Any]) -> np.ndarray:
    """Draw median, quartiles and single runs of a row's gammas; returns the median of each window."""
    last = max(steps[-1] for steps, _ in gammas)
    count = max(len(steps) for steps, _ in gammas)
    # Gamma scatters from batch to batch: a window needs many steps for a quiet median.
    windows = min(MOST_WINDOWS, max(count // STEPS_IN_A_WINDOW, min(count, FEWEST_WINDOWS)))
    edges = np.linspace(0, last, windows + 1)
    if len(gammas) > 1:
        for steps, values in gammas:
            middles, quantiles = _windowed_quantiles(steps, values, edges, (50,))
            axes.plot(middles, quantiles[0], color=look["color"], alpha=0.35, linewidth=0.7)
    steps, values = (np.concatenate(parts) for parts in zip(*gammas))
    middles, (low, median, high) = _windowed_quantiles(steps, values, edges, (25, 50, 75))
    axes.fill_between(middles, low, high, color=look["color"], alpha=0.15, linewidth=0)
    axes.plot(middles, median, linewidth=1.8, **look)
    return median


def _windowed_quantiles(
    steps: np.ndarray, values: np.ndarray, edges: np.ndarray, percentiles: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Percentiles of the values whose step lies in (edges[i], edges[i+1]], of the windows i that hold any.

    Returns the windows' middle steps [windows] and the percentiles [len(percentiles), windows].
    """
    window = np.maximum(np.searchsorted(edges, steps, side="left") - 1, 0)
    filled = np.unique(window)
    middles = (edges[filled] + edges[filled + 1]) / 2
    return middles, np.stack([np.percentile(values[window == one], percentiles) for one in filled], axis=1)


def _set_accuracy_axes(axes: "Axes", *groups: list) -> None:
    from matplotlib.ticker import MaxNLocator

    curves = [curve for rows in groups for row in rows for curve in row]
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not curves:
        axes.text(0.5, 0.5, "no run recorded a curve", ha="center", va="center", transform=axes.transAxes)
        return
    low = min(np.percentile(accuracy, 15, method="lower") for _, accuracy in curves)
    high = max(accuracy.max() for _, accuracy in curves)
    margin = max(0.06 * (high - low), 0.5)
    axes.set_ylim(max(low - margin, 0), min(high + margin, 100.5))
    first, last = min(epochs[0] for epochs, _ in curves), max(epochs[-1] for epochs, _ in curves)
    axes.set_xlim(first - 0.02 * last if last > first else first - 1, last)


def _seeds_text(curves: Sequence[list], spread: str, *, always: bool = False) -> str:
    """The number of seeds behind the lines, and what line and band show: "3 seeds, mean ± one standard deviation"."""
    counts = sorted({len(of_row) for of_row in curves if of_row})
    if not counts:
        return "no run finished"
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    seeds = f"{number} seed" if counts[-1] == 1 else f"{number} seeds"
    return f"{seeds}, {spread}" if always or counts[-1] > 1 else seeds


def _look(index: int) -> dict[str, Any]:
    style = LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": style}


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _figure() -> "tuple[Figure, Axes]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _label_line_ends(axes: "Axes", ends: list[tuple[float, str, dict[str, Any]]]) -> None:
    """Write the label of each (y, label, look) right of the axes at height y, apart from the other labels."""
    texts = [textwrap.fill(label, 20) for _, label, _ in ends]
    to_fraction = axes.transData + axes.transAxes.inverted()
    heights = [min(max(to_fraction.transform((0, y))[1], 0.0), 1.0) for y, _, _ in ends]
    spread = _spread(heights, [LINE_HEIGHT * (text.count("\n") + 1.15) for text in texts])
    for (_, _, look), text, end, height in zip(ends, texts, heights, spread):
        axes.plot((1, 1.035), (end, height), transform=axes.transAxes, clip_on=False, linewidth=1.3, **look)
        axes.text(1.045, height, text, transform=axes.transAxes, va="center", color="#222222", parse_math=False)


def _spread(heights: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Centres near `heights`, in their order and in [0, 1], at which boxes of these sizes do not overlap.

    More boxes than fit are squeezed evenly.

    >>> _spread([0.5, 0.5, 1.0], [0.25, 0.25, 0.25])
    [0.5, 0.75, 1.0]
    """
    squeeze = min(1.0, 1.0 / sum(sizes)) if sizes else 1.0
    order = sorted(range(len(heights)), key=heights.__getitem__)
    gaps = [squeeze * (sizes[low] + sizes[high]) / 2 for low, high in pairwise(order)]
    centres = [heights[i] for i in order]
    for i, gap in enumerate(gaps):
        centres[i + 1] = max(centres[i + 1], centres[i] + gap)
    if centres:
        centres[-1] = min(centres[-1], 1.0)
    for i, gap in reversed(list(enumerate(gaps))):
        centres[i] = min(centres[i], centres[i + 1] - gap)
    return [centre for _, centre in sorted(zip(order, centres))]


def _save(figure: "Figure", path: str | Path) -> Path:
    figure.savefig(path, format="png", facecolor="white")
    return Path(path)

"""The pictures of a comparison: what they draw, and that it can be read."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from made_up_results import a_comparison, a_grid, a_row, a_run

from bnn_jax.analysis.figures import broken_label
from bnn_jax.analysis.grid_plot import plot_grid
from bnn_jax.analysis.plots import pictures_of, plot_accuracy, plot_paths, plot_step_size
from bnn_jax.analysis.report import report_markdown

BLUE, VERMILLION, GREEN = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)


def a_long_run(seed, *, level=0.95, epochs=20, steps=None):
    rng = np.random.default_rng(seed)
    epoch = np.arange(1, epochs + 1)
    accuracy = level - 0.8 * np.exp(-epoch / 4) + rng.normal(0, 0.004, epochs)
    gamma = None
    if steps:
        value = np.clip(3 * np.exp(-3 * np.arange(steps) / steps) * rng.lognormal(0, 0.5, steps), 0, 1)
        gamma = {"step": list(range(1, steps + 1)), "value": value.tolist()}
    curve = {"epoch": epoch.tolist(), "validation_accuracy": accuracy.tolist()}
    return a_run(seed, level, curve=curve, gamma=gamma)


def comparison(labels, *, seeds=3, epochs=20, steps=400):
    def runs_of(i, label):
        options = {"level": 0.96 - 0.004 * i, "epochs": epochs, "steps": steps if "dfw" in label else None}
        return [a_long_run(10 * i + seed, **options) for seed in range(seeds)]

    return a_comparison(*(a_row(label, runs_of(i, label)) for i, label in enumerate(labels)))


def pixels(path):
    from PIL import Image

    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def count(image, colour, tolerance=12):
    return int((np.abs(image - np.array(colour)).max(axis=-1) <= tolerance).sum())


def line_with(axes, xs):
    """The boldest line drawn over exactly these x."""
    lines = [line for line in axes.lines if len(line.get_xdata()) == len(xs) and np.allclose(line.get_xdata(), xs)]
    return max(lines, key=lambda line: line.get_linewidth())


def test_accuracy_picture_shows_each_row_in_its_colour(tmp_path):
    path = plot_accuracy(comparison(["dfw", "adam", "sgd"]), tmp_path / "accuracy.png")
    image = pixels(path)
    assert path == tmp_path / "accuracy.png"
    assert image.shape[0] > 500 and image.shape[1] > 1000
    assert all(count(image, colour) > 500 for colour in (BLUE, VERMILLION, GREEN))
    assert count(image, (255, 255, 255), 0) > 0.6 * image.shape[0] * image.shape[1]
    one = pixels(plot_accuracy(comparison(["dfw"]), tmp_path / "one.png"))
    assert count(one, BLUE) > 500
    assert count(one, VERMILLION) == count(one, GREEN) == 0


def test_accuracy_line_and_band_are_mean_and_standard_deviation(figures, tmp_path):
    results = comparison(["adam"])
    plot_accuracy(results, tmp_path / "accuracy.png")
    (axes,) = figures[0].axes
    values = 100 * np.array([run["curve"]["validation_accuracy"] for run in results.rows[0].runs])
    mean, std = np.mean(values, axis=0), np.std(values, axis=0, ddof=1)
    np.testing.assert_allclose(line_with(axes, range(1, 21)).get_ydata(), mean)
    corners = axes.collections[0].get_paths()[0].vertices
    at_7 = corners[corners[:, 0] == 7, 1]
    np.testing.assert_allclose([at_7.min(), at_7.max()], [mean[6] - std[6], mean[6] + std[6]])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "validation accuracy (%)")
    assert "digits" in axes.get_title("left") and "3 seeds" in axes.get_title("left")


def test_one_seed_is_a_line_without_band(figures, tmp_path):
    plot_accuracy(comparison(["adam"], seeds=1), tmp_path / "accuracy.png")
    (axes,) = figures[0].axes
    assert len(axes.collections) == 0
    assert axes.get_title("left") == "digits: 1 seed"


@pytest.mark.parametrize("epochs", [1, 3, 10, 12])
def test_no_mark_or_band_of_few_epochs_lies_outside_the_axes(epochs, figures, tmp_path):
    results = comparison(["dfw"], epochs=epochs)
    for run, share in zip(results.rows[0].runs, (0.4, 0.7, 0.7)):
        run["curve"]["validation_accuracy"] = [share * value for value in run["curve"]["validation_accuracy"]]
    plot_accuracy(results, tmp_path / "accuracy.png")
    (axes,) = figures[0].axes
    low, high = axes.get_ylim()
    (marks,) = [line.get_ydata() for line in axes.lines if line.get_marker() == "o"]
    values = 100 * np.array([run["curve"]["validation_accuracy"] for run in results.rows[0].runs])
    band = values.mean(axis=0) + np.outer((-1, 1), values.std(axis=0, ddof=1))
    assert band.max() > values.max()
    assert low <= min(marks.min(), band.min()) < max(marks.max(), band.max()) <= high


def test_marks_of_a_few_epochs_beside_a_row_of_many(figures, tmp_path):
    results = comparison(["dfw", "adam"])
    for run in results.rows[1].runs:
        run["curve"] = {"epoch": [*range(1, 9)], "validation_accuracy": [0.1 * epoch for epoch in range(1, 9)]}
    plot_accuracy(results, tmp_path / "accuracy.png")
    low, _ = figures[0].axes[0].get_ylim()
    assert low <= 10


@pytest.mark.parametrize("at_chance", [False, True])
def test_accuracy_axis_shows_most_epochs_of_every_row(at_chance, figures, tmp_path):
    results = comparison(["dfw", "adam", "sgd", "bop"])
    for run in results.rows[3].runs if at_chance else []:
        run["curve"]["validation_accuracy"] = [0.1] * 20
    plot_accuracy(results, tmp_path / "accuracy.png")
    low, high = figures[0].axes[0].get_ylim()
    for row in results.rows:
        values = 100 * np.array([run["curve"]["validation_accuracy"] for run in row.runs])
        assert np.mean((values > low) & (values < high)) >= 0.85


def test_epochs_without_a_number_are_left_out_of_the_mean(figures, tmp_path):
    results = comparison(["adam"], seeds=2, epochs=4)
    first, second = (run["curve"]["validation_accuracy"] for run in results.rows[0].runs)
    first[1], second[2] = None, float("nan")
    plot_accuracy(results, tmp_path / "accuracy.png")
    line = line_with(figures[0].axes[0], [1, 4])
    np.testing.assert_allclose(line.get_ydata(), [50 * (first[0] + second[0]), 50 * (first[3] + second[3])])


def test_a_diverged_run_ends_in_a_cross_and_is_not_in_the_mean(figures, tmp_path):
    results = comparison(["adam"])
    runs = results.rows[0].runs
    runs[1].update(diverged="The loss became NaN.", test_accuracy_best=None, test_accuracy_last=None)
    runs[1]["curve"] = {"epoch": [1, 2, 3], "validation_accuracy": [0.3, 0.2, 0.1]}
    plot_accuracy(results, tmp_path / "accuracy.png")
    (axes,) = figures[0].axes
    mean = np.mean([runs[i]["curve"]["validation_accuracy"] for i in (0, 2)], axis=0)
    np.testing.assert_allclose(line_with(axes, range(1, 21)).get_ydata(), 100 * mean)
    np.testing.assert_allclose(line_with(axes, [1, 2, 3]).get_ydata(), [30, 20, 10])
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in crosses] == [(3, pytest.approx(10))]


@pytest.mark.parametrize("curve", [None, {"epoch": [1], "validation_accuracy": [0.1]}])
def test_a_comparison_that_all_diverged_still_makes_a_picture(curve, figures, tmp_path):
    results = comparison(["dfw", "adam"], seeds=1)
    for row in results.rows:
        row.runs[0].update(diverged="The loss became NaN.", curve=curve)
    assert pixels(plot_accuracy(results, tmp_path / "accuracy.png")).std() > 5
    (axes,) = figures[0].axes
    texts = {text.get_text().replace("\n", " ") for text in axes.texts}
    expected = {"dfw (none finished)", "adam (none finished)"} if curve else {"no run recorded a curve"}
    assert texts == expected
    assert axes.get_title("left") == "digits: no run finished"


LONG = "adam with cosine decay and latent clipping"


@pytest.mark.parametrize("draw", [plot_accuracy, plot_step_size])
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(
    "labels",
    [
        ["dfw"],
        ["dfw", "adam", "sgd"],
        ["dfw", "adam", "sgd", "dfw, eta $_{$10", "dfw " + LONG],
        [f"dfw {i}, {words}" for i, words in enumerate(["target, decay", "schedule", LONG] * 6)],
    ],
)
def test_texts_neither_overlap_nor_leave_the_picture(draw, seeds, labels, figures, tmp_path):
    draw(comparison(labels, seeds=seeds), tmp_path / "picture.png")
    (figure,) = figures
    axes, *below = figure.axes
    assert not any(panel.texts for panel in below)
    drawn = [label for label in labels if draw is plot_accuracy or "dfw" in label]
    assert sorted(text.get_text().replace("\n", " ") for text in axes.texts) == sorted(drawn)
    boxes = [text.get_window_extent() for text in axes.texts]
    named = [axis.label for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert box.x0 > axes.get_window_extent().x1
    for box in [*boxes, *(label.get_window_extent() for label in named if label.get_text())]:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert axes.get_window_extent().width > 0.5 * figure.bbox.width


def test_labels_of_rows_that_end_together_stand_in_their_order(figures, tmp_path):
    same = a_comparison(*(a_row(label, [a_long_run(0), a_long_run(1)]) for label in ("first", "second", "third")))
    plot_accuracy(same, tmp_path / "accuracy.png")
    heights = {text.get_text(): text.get_window_extent().y0 for text in figures[0].axes[0].texts}
    assert heights["first"] > heights["second"] > heights["third"]


def test_labels_break_between_words_and_after_underscores_alone():
    broken = broken_label("stochastic_ste_sign_with_clipping, weight decay 1e-4, straightthroughestimatorwithoutend")
    assert broken.split("\n") == [
        "stochastic_ste_sign_",
        "with_clipping, weight",
        "decay 1e-4,",
        "straightthroughestimatorwithoutend",
    ]


def test_a_single_epoch_shows_the_spread_as_a_bar(figures, tmp_path):
    plot_accuracy(comparison(["adam", "sgd"], epochs=1), tmp_path / "accuracy.png")
    (axes,) = figures[0].axes
    (low, high), _ = (container.lines[2][0].get_segments()[0][:, 1] for container in axes.containers)
    found = [100 * a_long_run(seed, level=0.96, epochs=1)["curve"]["validation_accuracy"][0] for seed in range(3)]
    np.testing.assert_allclose((low, high), np.mean(found) + np.std(found, ddof=1) * np.array([-1, 1]))


def test_the_loss_is_in_the_label_where_there_are_several(figures, tmp_path):
    results = comparison(["adam", "adam"])
    results = replace(results, rows=[results.rows[0], replace(results.rows[1], loss="cross_entropy")])
    plot_accuracy(results, tmp_path / "accuracy.png")
    texts = {text.get_text().replace("\n", " ") for text in figures[0].axes[0].texts}
    assert texts == {"adam, multiclass_hinge", "adam, cross_entropy"}


def test_step_size_picture_is_drawn_only_for_rows_that_have_it(tmp_path):
    image = pixels(plot_step_size(comparison(["adam", "dfw"]), tmp_path / "step_size.png"))
    assert count(image, VERMILLION) > 500
    assert count(image, BLUE) == 0


def test_no_step_size_no_picture():
    empty = comparison(["dfw"], seeds=1)
    empty.rows[0].runs[0]["gamma"] = {"step": [], "value": []}
    for results in (comparison(["adam", "sgd"]), empty):
        assert list(pictures_of(results)) == ["accuracy.png"]


def test_step_size_line_and_band_are_median_and_quartiles_over_seeds_and_steps(figures, tmp_path):
    results = comparison(["dfw"], steps=4000)
    runs = results.rows[0].runs
    runs[0]["gamma"]["value"][5] = float("nan")
    plot_step_size(results, tmp_path / "step_size.png")
    axes, shares = figures[0].axes
    # 4000 steps in 100 windows: steps 1..40, 41..80, ...
    windows = np.array([run["gamma"]["value"] for run in runs]).reshape(3, 100, 40)
    low, median, high = np.nanpercentile(windows, (25, 50, 75), axis=(0, 2))
    middles = 20 + 40 * np.arange(100)
    np.testing.assert_allclose(line_with(axes, middles).get_ydata(), median)
    corners = axes.collections[0].get_paths()[0].vertices
    at_70 = corners[corners[:, 0] == middles[70], 1]
    np.testing.assert_allclose([at_70.min(), at_70.max()], [low[70], high[70]])
    seeds = [line.get_ydata() for line in axes.lines if len(line.get_xdata()) == 100 and line.get_linewidth() < 1]
    np.testing.assert_allclose(seeds, np.nanmedian(windows, axis=2))
    assert axes.get_ylim()[0] <= 0 and 1 <= axes.get_ylim()[1] < 1.1
    assert "(1 = full learning rate)" in axes.get_ylabel()
    below = 100 * np.nanmean(np.where(np.isnan(windows), np.nan, windows < 1), axis=(0, 2))
    np.testing.assert_allclose(line_with(shares, middles).get_ydata(), below)
    assert shares.get_ylabel() == "steps with γ < 1 (%)"


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_a_short_run_has_a_step_size_picture(steps, figures, tmp_path):
    results = comparison(["dfw"], seeds=2, steps=steps)
    for run in results.rows[0].runs:
        run["gamma"] = {"step": list(range(steps)), "value": [0.25] * steps}
    plot_step_size(results, tmp_path / "step_size.png")
    bold = max(figures[0].axes[0].lines, key=lambda line: line.get_linewidth())
    np.testing.assert_allclose(bold.get_ydata(), 0.25)


def test_many_rows_keep_apart_by_colour_and_line_style(figures, tmp_path):
    plot_accuracy(comparison([f"run {i}" for i in range(12)], seeds=1), tmp_path / "accuracy.png")
    curves = [line for line in figures[0].axes[0].lines if len(line.get_xdata()) == 20]
    assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == 12


def with_paths(label, accuracies, *costs):
    paths = {place: {"costs": list(found)} for place, found in zip("ab", costs)}
    return a_row(label, [a_run(seed, one) for seed, one in enumerate(accuracies)], gradient_paths=paths)


def test_errors_over_gradient_paths_have_the_points_of_each_row(figures, tmp_path):
    results = a_comparison(
        with_paths("two", [0.5, 0.7], (0, 2_000_000), (0, 5_000_000, 7_000_000)),
        with_paths("one", [0.9], (0, 1_000_000), (3_000_000,)),
        with_paths("none", [float("nan")], (0, 1_000_000), (0, 1_000_000)),
    )
    assert plot_paths(results, tmp_path / "paths.png") == tmp_path / "paths.png"
    left, right = figures[0].axes
    points = [[container.lines[0].get_xydata()[0].tolist() for container in axes.containers] for axes in (left, right)]
    np.testing.assert_allclose(points[0], [[2, 40], [1, 10]])
    np.testing.assert_allclose(points[1], [[5, 40]])
    bar = left.containers[0].lines[2][0].get_segments()[0]
    spread = 10 * np.sqrt(2)  # sample standard deviation of 50 and 30
    np.testing.assert_allclose(bar, [[2, 40 - spread], [2, 40 + spread]])
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["two", "one"]


def test_a_comparison_without_gradient_paths_has_no_picture_of_them():
    results = a_comparison(a_row("one", [a_run(0, 0.5)]))
    assert "paths.png" not in pictures_of(results)
    assert "paths.png" not in report_markdown(results)


@pytest.mark.parametrize(
    ("axes", "scale", "ticks"),
    [
        ({"optim.learning_rate": [0.001, 0.1]}, "log", ["0.001", "0.1"]),
        ({"model.width": [4, 8]}, "linear", ["4", "8"]),
        ({"optim.weight_decay": [0.0, 1e-4, 0.1]}, "linear", ["0", "0.0001", "0.1"]),
        ({"loss": ["hinge", "cross_entropy"], "model.width": [4, 8]}, "linear", ["4", "8"]),
        ({"loss": ["hinge", "cross_entropy"]}, "linear", ["hinge", "cross_entropy"]),
        ({}, "linear", ["validation,\nbest epoch", "test,\nbest epoch", "test,\nlast epoch"]),
    ],
)
def test_a_grid_is_drawn_over_the_first_axis_of_numbers(figures, tmp_path, axes, scale, ticks):
    cells = max(map(len, axes.values()), default=1)
    plot_grid(a_grid(axes, [(0.5, 0.6)] * cells), tmp_path / "sweep.png")
    panels = figures[0].axes
    assert len(panels) == (2 if axes else 1)
    assert {panel.get_xscale() for panel in panels} == {scale}
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ticks
    assert any(np.isclose(np.asarray(line.get_ydata(), float), 55).any() for line in panels[0].lines)


def test_names_in_a_grid_are_short_and_stand_apart(figures, tmp_path):
    names = ["stochastic_ste_sign", "approx_sign", "my_package.estimators:my_own_sign", "tanh_sign"]
    axes = {"model.input_quantizer": names, "optim.name": ["adam", "dfw"]}
    results = a_grid(axes, [(0.5, 0.6)] * 8)
    settings = [{"model.input_quantizer": name, "optim.name": optim} for name in names for optim in ("adam", "dfw")]
    rows = [replace(row, settings=of_row) for row, of_row in zip(results.rows, settings)]
    plot_grid(replace(results, rows=rows), tmp_path / "sweep.png")
    ticks = [label.get_text() for label in figures[0].axes[0].get_xticklabels()]
    assert ticks == ["stochastic_ste_sign", "approx_sign", "my_own_sign", "tanh_sign"]
    assert all(label.get_ha() == "right" for label in figures[0].axes[0].get_xticklabels())
    assert figures[0].axes[0].get_window_extent().height > 0.5 * figures[0].bbox.height
    assert [t.get_text() for t in figures[0].legends[0].get_texts()] == [
        "optim adam",
        "optim dfw",
        "best by validation",
    ]


@pytest.mark.full
def test_matplotlib_comes_late_and_leaves_no_global_state(tmp_path):
    script = """
import sys
from bnn_jax.analysis.plots import plot_accuracy
from bnn_jax.sweeps.results import Results, Row
assert "matplotlib" not in sys.modules
run = {"test_accuracy_best": 1, "test_accuracy_last": 1, "curve": {"epoch": [1, 2], "validation_accuracy": [0.1, 0.2]}}
plot_accuracy(Results(datasets=[{"name": "digits"}], rows=[Row("a", "adam", "b", [run])]), sys.argv[1])
import matplotlib
print("pyplot" if "matplotlib.pyplot" in sys.modules else "plain", matplotlib.rcParams["font.size"])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "accuracy.png")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["plain", "10.0"]
    assert (tmp_path / "accuracy.png").stat().st_size > 1000

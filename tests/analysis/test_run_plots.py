"""Pictures of a run that is made up: what they show of its records, and what is said of a folder without any."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from bnn_jax.analysis import run_plots
from bnn_jax.analysis.run_plots import (
    _draw_curves,
    _draw_diagnostics,
    _draw_histograms,
    layer_names,
    plot_run,
    plot_runs,
    series,
)
from bnn_jax.errors import RunError, UsageError
from bnn_jax.training.config import Config, to_dict
from bnn_jax.training.run_folder import write_checksummed

LAYERS = ("block/conv1", "block/conv2", "block/conv10")
CONFIG = Config("made_up", epochs=2, batch_size=8)


def steps(*, gamma=False, count=40):
    return [
        {"kind": "train", "step": i, "epoch": 1 + i // 21, "loss": 1 / i, "accuracy": i / 100, "learning_rate": 0.1}
        | ({"gamma": 0.5} if gamma else {})
        for i in range(1, count + 1)
    ]


def evaluations():
    return [
        {"kind": "evaluation", "step": 20 * e, "epoch": e, "train_loss": 1 / e, "validation_loss": 0.5 / e}
        | {"validation_accuracy": 0.3 * e}
        for e in (1, 2)
    ]


def diagnostics(*, kernel_saturation=0.0, histogram=True):
    def statistics(scale):
        numbers = {"flips": 0.01 * scale, "flip_flops": 0.0, "input_saturation": 0.2, "input_balance": 0.1 * scale}
        numbers |= {"kernel_saturation": kernel_saturation, "gradient_cosine": None}
        return numbers | ({"histogram": [1, 2, 3, 2 * scale]} if histogram else {})

    return [
        {
            "kind": "diagnostics",
            "step": step,
            "epoch": 1,
            "steps": 10,
            "layers": {layer: statistics(i + step) for i, layer in enumerate(LAYERS)},
            "total": statistics(5),
        }
        for step in (10, 20, 30)
    ]


@pytest.fixture
def run(tmp_path):
    def make(*records, config=CONFIG):
        write_checksummed(tmp_path / "config.json", to_dict(config))
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return tmp_path

    return make


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_a_run_with_diagnostics_has_three_pictures(run):
    folder = run(*steps(gamma=True), *evaluations(), *diagnostics())
    drawn = plot_run(folder)
    assert drawn == [folder / name for name in ("curves.png", "diagnostics.png", "histograms.png")]
    assert all(map(is_png, drawn))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["config.json", "metrics.jsonl", *(path.name for path in drawn)]
    )


def test_a_run_draws_what_it_has_into_the_folder_that_is_named(run, tmp_path):
    output = tmp_path / "new" / "pictures"
    assert plot_run(run(*steps()), output=output) == [output / "curves.png"]
    assert [path.name for path in output.iterdir()] == ["curves.png"]
    without_latent = run(*steps(count=1), *diagnostics(histogram=False)[:1])
    assert [path.name for path in plot_run(without_latent)] == ["curves.png", "diagnostics.png"]


def lines_of(axes):
    return [(line.get_xdata(), line.get_ydata()) for line in axes.lines]


def test_curves_show_training_and_validation(figures, tmp_path):
    _draw_curves(tmp_path / "curves.png", steps(gamma=True), evaluations())
    (figure,) = figures
    loss, accuracy, rate, gamma = figure.axes
    assert [axes.get_title("left") for axes in (loss, accuracy, rate)] == ["loss", "accuracy (%)", "learning rate"]
    (x, median), (validation_x, validation) = lines_of(loss)
    np.testing.assert_allclose(x, range(1, 41))  # fewer steps than windows: each is its own
    np.testing.assert_allclose(median, 1 / np.arange(1, 41))
    np.testing.assert_allclose(validation_x, [20, 40])
    np.testing.assert_allclose(validation, [0.5, 0.25])
    np.testing.assert_allclose(lines_of(accuracy)[1][1], [30, 60])
    np.testing.assert_allclose(lines_of(rate)[0][1], 0.1)
    np.testing.assert_allclose(lines_of(gamma)[0][1], 0.5)
    np.testing.assert_allclose(lines_of(gamma)[1][1], 1.0)  # all below 1


def test_many_steps_are_drawn_as_medians_of_groups(figures, tmp_path):
    _draw_curves(tmp_path / "curves.png", steps(count=1000), [])
    (x, median), *_ = lines_of(figures[0].axes[0])
    assert len(x) == 100
    groups = np.arange(1, 1001).reshape(100, 10)
    np.testing.assert_allclose(x, groups.mean(1))
    np.testing.assert_allclose(median, np.median(1 / groups, axis=1))


def test_diagnostics_have_a_line_a_layer_and_one_over_all(figures, tmp_path):
    for kernel_saturation in (0.0, 0.1):
        _draw_diagnostics(tmp_path / "diagnostics.png", diagnostics(kernel_saturation=kernel_saturation))
    figure, saturated = figures
    titles = [axes.get_title("left").split(":")[0] for axes in figure.axes]
    # Kernels saturate nowhere, and no cosine is a number: neither has a panel.
    assert titles == ["flips", "flip-flops", "saturation of inputs", "balance of inputs"]
    flips = lines_of(figure.axes[0])
    assert len(flips) == len(LAYERS) + 1
    for i, (x, values) in enumerate(flips[:-1]):
        np.testing.assert_array_equal(x, [10, 20, 30])
        np.testing.assert_allclose(values, [0.01 * (i + step) for step in (10, 20, 30)])
    np.testing.assert_allclose(flips[-1][1], 0.05)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["all layers", *LAYERS]
    assert [axes.get_yscale() for axes in figure.axes[:2]] == ["log", "linear"]  # all flip-flops are 0
    assert "saturation of kernels" in [axes.get_title("left").split(":")[0] for axes in saturated.axes]


def test_histograms_are_shares_over_the_box_and_the_steps(figures, tmp_path):
    _draw_histograms(tmp_path / "histograms.png", diagnostics(), (-2.0, 2.0))
    (figure,) = figures
    meshes = {axes.get_title("left"): axes.collections[0] for axes in figure.axes if axes.get_title("left")}
    assert list(meshes) == ["all layers", *LAYERS]
    shares = np.asarray(meshes["block/conv2"].get_array()).reshape(4, 3)
    for column, step in enumerate((10, 20, 30)):
        counts = np.array([1, 2, 3, 2 * (1 + step)])
        np.testing.assert_allclose(shares[:, column], counts / counts.sum())
    corners = meshes["all layers"].get_coordinates()
    np.testing.assert_allclose(corners[0, :, 0], [0, 10, 20, 30])
    np.testing.assert_allclose(corners[:, 0, 1], [-2, -1, 0, 1, 2])


def test_the_box_of_the_config_bounds_the_histograms(run, monkeypatch):
    from bnn_jax.analysis import run_plots

    seen = []
    monkeypatch.setattr(run_plots, "_draw_histograms", lambda path, records, bounds: seen.append(bounds))
    for box, bounds in (((-3.0, 0.5), (-3.0, 0.5)), (None, (-1.0, 1.0))):
        config = replace(CONFIG, optim=replace(CONFIG.optim, latent_box=box))
        plot_run(run(*steps(count=2), *diagnostics(), config=config))
        assert seen.pop() == bounds


def test_layers_are_in_the_order_of_their_numbers():
    assert layer_names(diagnostics()) == list(LAYERS)


def test_a_series_leaves_out_what_is_no_number():
    records = diagnostics()
    assert len(series(records, None, "gradient_cosine")[0]) == 0
    assert len(series(records, "another", "flips")[0]) == 0
    np.testing.assert_array_equal(series(records, "block/conv1", "histogram")[1][1], [1, 2, 3, 40])


def test_a_folder_without_a_run_is_refused(tmp_path, run):
    with pytest.raises(UsageError, match=r"`workdir` \(=.*\) holds no run: there is no .*config\.json"):
        plot_run(tmp_path)
    with pytest.raises(UsageError, match=r"`workdir` \(=.*\) holds no training steps yet; run bnn-jax train with"):
        plot_run(run())


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[1]", '{"step": 3}', '{"kind": "train", "loss": 1, "accuracy": 1, "learning_rate": 1}'),
        *('{"kind": "evaluation", "step": 3, "epoch": 1}', '{"kind": "diagnostics", "step": 3}'),
    ],
)
def test_damaged_metrics_are_named(run, line):
    folder = run(*steps())
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged: it holds a line that is no record; remove that"):
        plot_run(folder)


def test_a_picture_that_cannot_be_written_leaves_nothing(run, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunError, match=r"cannot write .*curves\.png \(.+\); name another folder with `--output`"):
        plot_run(run(*steps()), output=tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "a file"


def test_a_run_that_is_named_twice_is_drawn_once_by_its_name(run, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(run_plots, "_draw_overlay", lambda path, of_runs: drawn.update(of_runs))
    first, second = run(*steps(), *evaluations()), tmp_path.with_name(f"{tmp_path.name}_second")
    shutil.copytree(first, second)
    (second / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations()[:1]))
    plot_runs([first, first, second], output=tmp_path)
    assert {name: len(records) for name, records in drawn.items()} == {first.name: 2, second.name: 1}


def test_no_run_is_told():
    with pytest.raises(UsageError, match="`workdirs` must name the folder of a run, or several; as runs/mine"):
        plot_runs([])

"""Comparisons: what diverges is kept as such; settings of a row are those in which rows differ."""

from dataclasses import replace

from bnn_jax.training.config import Config, ModelConfig, OptimConfig
from bnn_jax.training.sweep import compare, optimizer_cells

SGD = OptimConfig("sgd", learning_rate=0.1)
CONFIG = Config(
    "test", epochs=1, batch_size=256, loss="cross_entropy", model=ModelConfig("resnet6", width=4), optim=SGD
)


def test_a_diverged_run_is_told_and_not_run_again(tmp_path):
    cells = {"good": CONFIG, "bad": replace(CONFIG, optim=replace(SGD, learning_rate=1e30))}
    first = compare(cells, tmp_path, seeds=(0,))
    good, bad = (row["runs"][0] for row in first["rows"])
    assert 0 <= good["test_accuracy_last"] <= 1
    assert bad["test_accuracy_last"] is None
    assert "became" in bad["diverged"]
    assert "lower `optim.learning_rate`" in bad["diverged"]
    assert [row["settings"] for row in first["rows"]] == [{"learning_rate": 0.1}, {"learning_rate": 1e30}]
    records = (tmp_path / "bad" / "seed0" / "metrics.jsonl").stat().st_mtime_ns
    assert compare(cells, tmp_path, seeds=(0,)) == first
    assert (tmp_path / "bad" / "seed0" / "metrics.jsonl").stat().st_mtime_ns == records


def test_deep_frank_wolfe_has_no_cell_for_a_smooth_loss():
    optimizers = (OptimConfig("dfw"), SGD)
    hinge = "smoothed_multiclass_hinge"
    cells = optimizer_cells(CONFIG, optimizers=optimizers, losses=(hinge, "multiclass_hinge", "cross_entropy"))
    assert {label: (cell.optim.name, cell.loss) for label, cell in cells.items()} == {
        "dfw": ("dfw", hinge),
        "sgd": ("sgd", hinge),
        "dfw-multiclass_hinge": ("dfw", "multiclass_hinge"),
        "sgd-multiclass_hinge": ("sgd", "multiclass_hinge"),
        "sgd-cross_entropy": ("sgd", "cross_entropy"),
    }

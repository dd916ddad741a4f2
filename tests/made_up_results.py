"""Results that are made up, for the tests of reports and pictures."""

from bnn_jax.sweeps.results import CELL, Results, Row

DATA = {"name": "digits", "note": "Real 8x8 digits.", "train": 1077, "validation": 360, "test": 361}
PROVENANCE = {
    "date": "2026-11-20T10:00:00+00:00",
    "python": "3.11.7",
    "platform": "Linux",
    "versions": {"jax": "0.10.2", "optax": "0.2.8"},
    "device": {"platform": "gpu", "kind": "Big GPU", "count": 2},
    "cpu": {"cores": 2, "model": "Some CPU"},
    "git": {"commit": "0123456789abcdef", "dirty": True},
}


def a_run(seed, best, last=None, *, loss=0.05, time=10.0, **more):
    """A run of two epochs, with the keys that a result has."""
    return {
        "seed": seed,
        "epochs": 2,
        "best_epoch": 2,
        "validation_accuracy_best": best,
        "test_accuracy_best": best,
        "test_accuracy_last": best if last is None else last,
        "train_loss_last": loss,
        "step_time_ms": time,
        "max_abs_latent": 1.0 + seed / 10,
        "share_on_bounds": 0.1 * (seed + 1),
        "curve": {"epoch": [1, 2], "validation_accuracy": [0.5, best]},
        "gamma": None,
    } | more


def diverge(run):
    """Make a run one that diverged; returns it."""
    kept = {name: run[name] for name in ("seed", "epochs")}
    run.update(dict.fromkeys(run) | kept | {"diverged": "The loss became NaN in epoch 2."})
    return run


def a_row(label, runs, **more):
    return Row(**{"label": label, "optimizer": label, "loss": "multiclass_hinge", "runs": runs} | more)


def a_comparison(*rows, **more):
    return Results(**{"name": "compare_digits", "datasets": [DATA], "rows": list(rows)} | more)


def a_grid(axes, accuracies):
    """A grid whose cells have these accuracies of their seeds, None for one that diverged."""
    cells = [
        a_row(
            f"cell {index}",
            [
                diverge(a_run(seed, 0.0)) if accuracy is None else a_run(seed, accuracy, loss=0.5, time=1.0)
                for seed, accuracy in enumerate(of_cell)
            ],
            settings={name: values[index % len(values)] for name, values in axes.items()},
            steps=100,
        )
        for index, of_cell in enumerate(accuracies)
    ]
    config = {"model": {"name": "resnet6"}, "optim": {"name": "adam"}, "epochs": 2}
    return a_comparison(*cells, name="sweep", compared=CELL, axes=axes, config=config)

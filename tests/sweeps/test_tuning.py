"""The choice of settings: a grid that goes on, ranges and choices, one budget, on accuracies that a formula gives."""

import math
from dataclasses import replace

import numpy as np
import pytest
from made_up_results import a_run

from bnn_jax.analysis.report import write_report
from bnn_jax.errors import UsageError
from bnn_jax.sweeps import comparison, tuning
from bnn_jax.sweeps.comparison import compare
from bnn_jax.sweeps.grid import scalar_options
from bnn_jax.sweeps.tuning import TUNING_SEED, best_of, next_trials, tune_cells
from bnn_jax.training.config import Config, ModelConfig, OptimConfig, without_tuning
from bnn_jax.training.validation import validate

CONFIG = validate(Config("test", 5, 32, loss="cross_entropy", model=ModelConfig("resnet6"), optim=OptimConfig("sgd")))


def cell(tune, *, budget=8, optimizer="sgd", **changes):
    return replace(CONFIG, optim=OptimConfig(optimizer, tune=tune), tune_trials=budget, **changes)


def peak(best, *, width=10.0):
    """Accuracy over the learning rate: highest at `best`, falling with the distance in factors of `width`."""
    return lambda optim: math.exp(-((math.log(optim.learning_rate / best) / math.log(width)) ** 2))


@pytest.fixture
def trained(monkeypatch):
    """Stands in for the engine: a trial has the accuracy that `trained.accuracy` gives of its optimizer's settings."""

    class Trained:
        runs, calls, accuracy = [], 0, staticmethod(peak(1.0))

        def __call__(self, runs, **_):
            self.runs = [*self.runs, *runs]
            self.calls += 1
            return [{"validation_accuracy_best": self.accuracy(run.config.optim)} for run in runs]

    engine = Trained()
    monkeypatch.setattr(tuning, "run_all", engine)
    return engine


def rates_of(record, row=0):
    return [trial["learning_rate"] for trial in record["rows"][row]["trials"]]


@pytest.mark.parametrize(
    ("grid", "best", "tried"),
    [
        ((0.1, 0.3, 1.0), 25.0, [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]),
        ((0.1, 1.0, 10.0), 0.002, [0.1, 1.0, 10.0, 0.01, 0.001, 0.0001]),
        ((0.01, 0.02, 0.04), 0.3, [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64]),
        ((0.1, 0.3, 1.0), 0.3, [0.1, 0.3, 1.0]),
    ],
)
def test_a_grid_goes_on_by_its_ratio_until_its_best_value_is_inside(trained, tmp_path, grid, best, tried):
    trained.accuracy = peak(best)
    record, cells = tune_cells({"sgd": cell({"learning_rate": grid})}, tmp_path)
    assert rates_of(record) == tried
    nearest = min(tried, key=lambda rate: abs(math.log(rate / best)))
    assert record["rows"][0]["chosen"] == {"learning_rate": nearest}
    assert cells["sgd"].optim.learning_rate == nearest
    assert grid[0] <= nearest <= grid[-1] or not grid[0] <= best <= grid[-1]


def test_a_grid_ends_with_the_budget(trained, tmp_path):
    trained.accuracy = peak(1e9)
    grids = {"a": (0.1, 1.0, 10.0), "b": (1e8, 1e9, 1e10)}
    cells = {label: cell({"learning_rate": grid}, budget=5) for label, grid in grids.items()}
    record, _ = tune_cells(cells, tmp_path)
    assert rates_of(record) == [0.1, 1.0, 10.0, 100.0, 1000.0]
    assert rates_of(record, 1) == [1e8, 1e9, 1e10]
    assert trained.calls == 3  # the first trials of both rows together, and two more of one


def test_a_grid_of_whole_numbers_and_one_with_zero(trained, tmp_path):
    trained.accuracy = lambda optim: optim.inner_steps / 100
    steps = cell({"inner_steps": (1, 2, 4)}, optimizer="dfw", budget=5, loss="multiclass_hinge")
    record, _ = tune_cells({"dfw": steps}, tmp_path)
    assert [trial["inner_steps"] for trial in record["rows"][0]["trials"]] == [1, 2, 4, 8, 16]
    trained.accuracy = lambda optim: -optim.weight_decay
    record, _ = tune_cells({"sgd": cell({"weight_decay": (0.0, 1e-5, 1e-4)})}, tmp_path)
    assert [trial["weight_decay"] for trial in record["rows"][0]["trials"]] == [0.0, 1e-5, 1e-4]


def test_rates_in_whole_numbers_are_real_ones(trained, tmp_path):
    trained.accuracy = peak(0.05)
    record, cells = tune_cells({"sgd": cell({"learning_rate": (1, 3, 10)})}, tmp_path)
    assert rates_of(record) == [1.0, 3.0, 10.0, 0.3, 0.1, 0.03, 0.01]
    assert all(type(rate) is float for rate in rates_of(record))
    assert type(cells["sgd"].optim.learning_rate) is float
    points = [trial["learning_rate"] for trial in next_trials({"learning_rate": (1.0, 10.0)}, [], budget=8)]
    record, _ = tune_cells({"sgd": cell({"learning_rate": [1, 10]})}, tmp_path)
    assert rates_of(record)[:4] == points and any(rate % 1 for rate in points)
    trained.accuracy = lambda optim: -optim.max_gradient_norm
    record, _ = tune_cells({"sgd": cell({"max_gradient_norm": (1, 3, 10)}, budget=4)}, tmp_path)
    assert record["rows"][0]["chosen"] == {"max_gradient_norm": 0.3}


@pytest.mark.parametrize("grid", [tuple(np.logspace(-1, 1, 3)), np.logspace(-1, 1, 3), np.array([0.1, 1, 10])])
def test_numbers_of_numpy_are_a_grid_and_a_range(trained, tmp_path, grid):
    trained.accuracy = peak(0.002)
    record, cells = tune_cells({"sgd": cell({"learning_rate": grid})}, tmp_path)
    assert rates_of(record) == [0.1, 1.0, 10.0, 0.01, 0.001, 0.0001]
    assert type(cells["sgd"].optim.learning_rate) is float
    ends = (np.float64(0.1), np.float64(10))
    assert next_trials({"learning_rate": ends}, [], budget=8) == next_trials(
        {"learning_rate": (0.1, 10.0)}, [], budget=8
    )


def test_whole_numbers_go_on_to_none_that_is_there(trained, tmp_path):
    trained.accuracy = lambda optim: -optim.inner_steps
    steps = cell({"inner_steps": (1, 2, 3)}, optimizer="dfw", loss="multiclass_hinge")
    record, _ = tune_cells({"dfw": steps}, tmp_path)
    assert [trial["inner_steps"] for trial in record["rows"][0]["trials"]] == [1, 2, 3]


def test_a_grid_does_not_go_on_past_what_is_allowed(trained, tmp_path):
    trained.accuracy = lambda optim: optim.momentum
    record, _ = tune_cells({"sgd": cell({"momentum": (0.8, 0.88, 0.96)})}, tmp_path)
    assert [trial["momentum"] for trial in record["rows"][0]["trials"]] == [0.8, 0.88, 0.96]


SPACE = {"learning_rate": (0.01, 1.0), "weight_decay": (0.0, 1e-5, 1e-4), "schedule": ("constant", "cosine")}


def test_several_settings_are_tried_within_one_budget_the_same_for_each_row(trained, tmp_path):
    def accuracy(optim):
        return peak(0.5)(optim) * (1.0 if optim.schedule == "cosine" else 0.8) * (1 - 1e4 * optim.weight_decay)

    trained.accuracy = accuracy
    record, cells = tune_cells({"a": cell(SPACE, budget=16), "b": cell(SPACE, budget=16)}, tmp_path)
    trials = record["rows"][0]["trials"]
    assert trials == record["rows"][1]["trials"]
    assert len(trials) == record["budget"] == 16
    settings = [tuple(trial[name] for name in SPACE) for trial in trials]
    assert len(set(settings)) == 16
    rates, decays, schedules = (set(values) for values in zip(*settings[:8]))
    assert all(0.01 <= rate < 1 for rate in rates)
    assert {math.floor(math.log(rate / 0.01) / math.log(100) * 4) for rate in rates} == {0, 1, 2, 3}  # spread out
    assert decays == {0.0, 1e-5, 1e-4}
    assert schedules == {"constant", "cosine"}
    chosen = cells["a"].optim
    assert (chosen.schedule, chosen.weight_decay) == ("cosine", 0.0)
    assert 0.3 < chosen.learning_rate < 0.8


def test_a_range_is_left_where_the_best_lies_beyond(trained, tmp_path):
    trained.accuracy = peak(30.0)
    record, cells = tune_cells({"sgd": cell({"learning_rate": (0.01, 1.0)})}, tmp_path)
    assert len(rates_of(record)) == 8
    assert max(rates_of(record)[:4]) < 1 < cells["sgd"].optim.learning_rate


def test_a_choice_is_tried_once(trained, tmp_path):
    record, _ = tune_cells({"sgd": cell({"schedule": ("constant", "cosine")})}, tmp_path)
    assert sorted(trial["schedule"] for trial in record["rows"][0]["trials"]) == ["constant", "cosine"]


def test_rows_of_other_budgets_are_refused(trained, tmp_path):
    rates = {"learning_rate": (0.1, 1.0, 10.0)}
    for name, values in (("budget", (4, 5)), ("tune_epochs", (None, 1))):
        cells = {label: cell(rates, **{name: value}) for label, value in zip("ab", values)}
        field = name.replace("budget", "tune_trials")
        with pytest.raises(UsageError, match=rf"`{field}` \(=.*'a': {values[0]}, .*\) must be the same for every row"):
            tune_cells(cells, tmp_path)
    assert trained.calls == 0


def test_settings_that_do_not_go_together_are_not_tried(trained, tmp_path):
    space = {"schedule": ("cosine", "exponential"), "schedule_options.final_share": (0.0, 0.1, 0.2)}
    trained.accuracy = lambda optim: optim.schedule_options["final_share"]
    record, _ = tune_cells({"sgd": cell(space)}, tmp_path)  # an exponential one cannot fall to 0
    tried = {(trial["schedule"], trial["schedule_options.final_share"]) for trial in record["rows"][0]["trials"]}
    assert len(tried) == 8
    assert {schedule for schedule, _ in tried} == {"cosine", "exponential"}
    assert ("cosine", 0.0) in tried
    assert ("exponential", 0.0) not in tried
    with pytest.raises(UsageError, match=r"`optim.schedule_options` .* is not known; there is no option to set"):
        tune_cells({"sgd": cell(space | {"schedule": ("cosine", "constant")})}, tmp_path)


def test_a_diverged_trial_is_the_worst():
    tried = [({"learning_rate": rate}, accuracy) for rate, accuracy in ((0.1, 0.0), (0.3, None), (1.0, None))]
    assert best_of(tried) == {"learning_rate": 0.1}
    assert next_trials({"learning_rate": (0.1, 0.3, 1.0)}, tried, budget=8) == [{"learning_rate": 0.03}]
    assert best_of([(settings, None) for settings, _ in tried]) == {"learning_rate": 0.1}


def test_trials_are_runs_of_one_seed_whose_folders_name_their_settings(trained, tmp_path):
    space = {"learning_rate": (0.1, 1.0, 10.0), "regularizer_strength": (1e-6, 1e-4), "options.nesterov": (False, True)}
    tune_cells({"sgd": cell(space, regularizer="manhattan")}, tmp_path)
    for run in trained.runs:
        config = run.config
        folder = f"learning_rate={config.optim.learning_rate},regularizer_strength={config.regularizer_strength},"
        folder += f"options.nesterov={config.optim.options['nesterov']}"
        assert run.workdir == tmp_path / "sgd" / folder
        assert (config.seed, config.epochs) == (TUNING_SEED, 5)  # the final length
        assert config == without_tuning(config)  # another budget finds the trials that are there
    tune_cells({"sgd": cell({"learning_rate": (0.1, 1.0, 10.0)}, tune_epochs=2)}, tmp_path)
    assert trained.runs[-1].config.epochs == 2


def test_a_row_that_ends_at_the_edge_says_so_in_its_report(trained, tmp_path, monkeypatch):
    """The optimum of both rows lies beyond their grid: the budget takes one of them there."""
    trained.accuracy = lambda optim: peak(25.0 if optim.name == "sgd" else 1e6)(optim)
    monkeypatch.setattr(comparison, "run_all", lambda runs, **_: [a_run(run.config.seed, 0.9) for run in runs])
    cells = {name: cell({"learning_rate": (0.1, 0.3, 1.0)}, optimizer=name, tune_epochs=1) for name in ("sgd", "adam")}
    results = compare(cells, tmp_path, seeds=(0, 1), tune=True)
    assert [row.settings["learning_rate"] for row in results.rows] == [30.0, 300.0]
    write_report(results, tmp_path)
    report = (tmp_path / "report.md").read_text()
    edge = "learning_rate=300 is at the edge of what was tried with the budget of 8 trials"
    assert f"- adam: {edge}; a better value may lie beyond\n" in report
    assert "sgd: learning_rate" not in report
    assert "| adam | learning_rate=300 | yes, learning_rate at the edge |" in report
    assert "| sgd | learning_rate=30 | yes | 99.37 |" in report
    assert "at most 8 trials for each optimizer; a trial: seed 1000, 1 epoch, where the runs have 2." in report


def test_none_is_a_choice_among_numbers(trained, tmp_path, monkeypatch):
    trained.accuracy = lambda optim: optim.ema_decay or 0.0
    monkeypatch.setattr(comparison, "run_all", lambda runs, **_: [a_run(run.config.seed, 0.9) for run in runs])
    cells = {"sgd": cell({"ema_decay": (None, 0.9, 0.99)})}
    results = compare(cells, tmp_path, seeds=(0,), tune=True)
    write_report(results, tmp_path)
    assert results.tuning["rows"][0]["chosen"] == {"ema_decay": 0.99}
    assert "ema_decay=0.99 is at the edge" in (tmp_path / "report.md").read_text()


def test_no_other_setting_that_trials_share_can_be_tuned():
    assert set(tuning.NOT_TUNED) <= set(scalar_options())


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({}, r"`optim.tune` \(=\{\}\) is empty; name what to tune of sgd, as learning_rate 0.1 0.3 1"),
        ({"learning_rat": (1, 2, 3)}, r"`optim.tune` \(='learning_rat'\) is not known; did you mean 'learning_rate'\?"),
        ({"epochs": (1, 2, 4)}, r"`optim.tune` \(='epochs'\) names what all trials share or what changes no accuracy"),
        ({"data.split_seed": (1, 2, 4)}, r"`optim.tune` \(='data.split_seed'\) names what all trials share"),
        ({"learning_rate": (1.0, 0.1)}, r"`optim.tune` \(=\{'learning_rate': \(1.0, 0.1\)\}\) must be 0 < low < high"),
        ({"weight_decay": (0.0, 0.1)}, r"must be 0 < low < high where it has two numbers, or have three or more"),
        ({"learning_rate": (0.1, 1.0, 1.0)}, r"must have values that differ; leave one out"),
        ({"learning_rate": ()}, r"`optim.tune` \(=\{'learning_rate': \(\)\}\) must have at least one value; leave it"),
        ({"learning_rate": ([1], [2])}, r"`optim.learning_rate` \(=(\[1\]|\(1,\))\) must be a number"),
        (
            {"learning_rate": (1, 2, 3), "optim.learning_rate": (1, 2)},
            r"must not name a setting twice, with and without",
        ),
        ({"name": ("sgd", "adam")}, r"`optim.tune` \(='name'\) names what all trials share"),
        ({"learning_rate": (-1.0, 1.0, 2.0)}, r"`optim.learning_rate` \(=-1.0\) must be positive"),
        ({"schedule": ("constant", "cosin")}, r"`optim.schedule` \(='cosin'\) is not known; did you mean 'cosine'"),
        ({"options.nesterof": (True, False)}, r"`optim.options` \(='nesterof'\) is not known"),
        (
            {"learning_rate": (1, 2, 3, 4)},
            r"`tune_trials` \(=3\) must be at least 4, for so many values of",
        ),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_runs(trained, tmp_path, tune, message):
    with pytest.raises(UsageError, match=message):
        compare({"sgd": cell(tune, budget=3)}, tmp_path, seeds=(0,), tune=True)
    assert trained.calls == 0


def test_tuning_where_runs_without_it_lie_is_refused_before_anything_runs(trained, tmp_path):
    (folder := tmp_path / "sgd" / "seed1").mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    cells = {"sgd": cell({"learning_rate": (0.1, 1.0, 10.0)})}
    with pytest.raises(UsageError) as refused:
        compare(cells, tmp_path, seeds=(0, 1), tune=True)
    assert str(refused.value) == (
        f"`tune` (=True) is for runs whose settings trials have chosen, and {folder} holds one without trials; "
        "choose another `workdir`, or leave `tune` out"
    )
    assert trained.calls == 0

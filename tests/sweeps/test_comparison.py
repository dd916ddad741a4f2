"""Sweeps: the same results however the runs are trained; what diverges is kept; finished runs are not run again."""

import json
import re
import weakref
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from made_up_results import a_run

from bnn_jax.analysis.report import write_report
from bnn_jax.errors import UsageError
from bnn_jax.losses import cross_entropy
from bnn_jax.models import LeNet
from bnn_jax.names import name_of
from bnn_jax.sweeps import comparison, engine, throughput, tuning
from bnn_jax.sweeps.comparison import compare, sweep
from bnn_jax.sweeps.engine import Run, dataset_of, recorded_result, run_all
from bnn_jax.sweeps.grid import grid_cells, parse_axes, split_axes
from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig
from bnn_jax.training.experiment import ImageInfo
from bnn_jax.training.members import Diverged
from bnn_jax.training.run_folder import DamagedFileWarning, claim_workdir
from bnn_jax.training.validation import validate

SGD = OptimConfig("sgd", learning_rate=0.1)
CONFIG = validate(
    Config("test", epochs=1, batch_size=256, loss="cross_entropy", model=ModelConfig("resnet6", width=4), optim=SGD)
)
CELLS = {"good": CONFIG, "bad": replace(CONFIG, optim=replace(SGD, learning_rate=1e30))}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison on the CPU, where auto is one run after another; what it told follows its results."""
    workdir, told = tmp_path_factory.mktemp("compared"), []
    return workdir, compare(CELLS, workdir, seeds=(0,), tell=told.append), told


@pytest.mark.full
def test_a_diverged_run_is_told_and_not_run_again(compared):
    workdir, first, _ = compared
    good, bad = (row.runs[0] for row in first.rows)
    assert 0 <= good["test_accuracy_last"] <= 1
    assert bad["test_accuracy_last"] is None
    assert "became" in bad["diverged"]
    assert "lower `optim.learning_rate`" in bad["diverged"]
    assert [row.settings for row in first.rows] == [{"learning_rate": 0.1}, {"learning_rate": 1e30}]
    records = (workdir / "bad" / "seed0" / "metrics.jsonl").stat().st_mtime_ns
    assert compare(CELLS, workdir, seeds=(0,)) == first
    assert (workdir / "bad" / "seed0" / "metrics.jsonl").stat().st_mtime_ns == records


@pytest.mark.full
def test_each_result_is_told_when_its_run_has_ended(compared):
    _, results, (_, good, bad) = compared
    accuracy = 100 * results.rows[0].runs[0]["validation_accuracy_best"]
    assert good == f"good seed 0: validation accuracy {accuracy:.2f} %, at its best (1 of 2 runs)"
    assert bad == "bad seed 0: diverged (2 of 2 runs)"


@pytest.mark.full
def test_processes_give_what_one_after_another_gives(compared, tmp_path):
    runs, told = [Run(label, config, tmp_path / label) for label, config in CELLS.items()], []
    everything = run_all(runs, execution="processes", processes=2, tell=told.append)
    assert sorted(line.split(":")[0] for line in told) == ["bad", "good"]
    for found, row in zip(everything, compared[1].rows, strict=True):
        wanted = row.runs[0]
        assert found.keys() == wanted.keys()
        for name in ("validation_accuracy_best", "test_accuracy_best", "test_accuracy_last", "train_loss_last"):
            assert found[name] == (None if wanted[name] is None else pytest.approx(wanted[name], abs=1e-5))
        assert found.get("diverged", "").split(" of ")[0] == wanted.get("diverged", "").split(" of ")[0]


@pytest.mark.full
def test_an_error_in_a_process_is_the_error_of_the_sweep(tmp_path):
    config = replace(CONFIG, data=DataConfig("digits", validation_examples=5000))
    with pytest.raises(UsageError, match="validation_examples"):
        run_all([Run("run", config, tmp_path)], execution="processes")


def test_the_grid_has_every_combination_and_typed_values():
    argv = [
        "--optim.learning-rate",
        "1",
        "0.1",
        "--seeds",
        "2",
        "--data.flip",
        "True",
        "False",
        "--optim.momentum",
        "0",
    ]
    texts, rest = split_axes(argv)
    assert rest == ["--seeds", "2", "--optim.momentum", "0"]
    cells = grid_cells(CONFIG, parse_axes(CONFIG, texts))
    assert {label: (cell.optim.learning_rate, cell.data.flip) for label, (cell, _) in cells.items()} == {
        "learning_rate=1.0,flip=True": (1.0, True),
        "learning_rate=1.0,flip=False": (1.0, False),
        "learning_rate=0.1,flip=True": (0.1, True),
        "learning_rate=0.1,flip=False": (0.1, False),
    }
    assert replace(cells["learning_rate=0.1,flip=False"][0], optim=SGD, data=DataConfig()) == CONFIG
    # A list is one value of an option that takes a list.
    assert split_axes(["--optim.latent-box", "-1", "1"]) == ({}, ["--optim.latent-box", "-1", "1"])


def test_lists_are_values_too_and_name_folders_that_can_be_read_back():
    labels = list(
        grid_cells(replace(CONFIG, model=ModelConfig("bnn_convnet")), {"model.options.stage_sizes": [[1, 1], [2, 2]]})
    )
    assert labels == ["model.options.stage_sizes=(1, 1)", "model.options.stage_sizes=(2, 2)"]


def test_options_of_optimizers_losses_and_schedules_are_axes_too():
    argv = "--optim.options.threshold 1e-6 1 --loss-options.smoothing 0.1 0.2 --optim.schedule-options.stages 3"
    texts, rest = split_axes(argv.split())
    assert rest == ["--optim.schedule-options.stages", "3"]
    config = replace(CONFIG, optim=replace(CONFIG.optim, options={"adaptivity_rate": 0.1}))
    cells = grid_cells(config, parse_axes(config, texts))
    label = "optim.options.threshold=1e-06,loss_options.smoothing=0.2"
    assert len(cells) == 4
    assert cells[label][0].optim.options == {"adaptivity_rate": 0.1, "threshold": 1e-6}
    assert cells[label][0].loss_options == {"smoothing": 0.2}
    assert config.optim.options == {"adaptivity_rate": 0.1}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--seed 1 2", r"`--seed` \(=1 2\) is the first seed; `--seeds` says how many"),
        ("--epochs 1 2 --epochs 3 4", r"`--epochs` \(=3 4\) is given twice; give all of its values once"),
        ("--epochs 1 2 --epochs 3", r"`--epochs` \(=1 2\) is given twice; give all of its values once"),
        ("--optim.momentum 0 0.0", r"`--optim.momentum` \(=0 0.0\) must have values that differ"),
        ("--tune-trials 4 8", r"`--tune-trials` \(=4 8\) is for `--tune` of a comparison, not for a grid; leave it"),
        ("--optim.tune.learning_rate 1 3", r"`--optim.tune.learning_rate` \(=1 3\) is for `--tune` of a comparison"),
    ],
)
def test_axes_that_make_no_grid(argv, message):
    with pytest.raises(UsageError, match=message):
        parse_axes(CONFIG, split_axes(argv.split())[0])


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"optim.lr": (0.1,)}, r"`axes` \(='optim.lr'\) is not known; did you mean"),
        ({"optim.name.first": (1,)}, r"`axes` \(='optim.name.first'\) is not known"),
        ({"seed": (1, 2)}, r"`axes` \(='seed'\) must be of other settings; name the seeds with `seeds`"),
        ({"tune_trials": (4, 8)}, r"`axes` \(='tune_trials'\) is for the tuning of a comparison, not for a grid"),
        ({"epochs": ()}, r"`axes` \(=\{'epochs': \(\)\}\) must have at least one value of each option"),
        ({"epochs": (1, 2, 1)}, r"`axes` \(=\{'epochs': 1\}\) must have values that are written differently"),
    ],
)
def test_axes_in_python_that_make_no_grid(axes, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        sweep(CONFIG, axes, tmp_path, seeds=(0,))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"optim.learning_rat": 1.0},
            r"^`overrides` \(='optim.learning_rat'\) is not known; did you mean 'optim.learning",
        ),
        ({"seed": 1}, r"^`overrides` \(='seed'\) must be of other settings; name the seeds with `seeds`$"),
        ({"optim.momentum": 0.1}, r"^`overrides` \(='optim.momentum'\) is among the axes; leave one out$"),
    ],
)
def test_overrides_in_python_that_hold_in_no_cell(overrides, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        sweep(CONFIG, {"optim.momentum": (0.0, 0.9)}, tmp_path, seeds=(0,), overrides=overrides)


def test_the_record_has_the_overrides_and_plain_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(comparison, "run_all", found_at_once)
    axes = {"optim.momentum": np.array([0.0, 0.5]), "batch_size": np.arange(32, 34)}
    overrides = {"epochs": 2, "optim.learning_rate": np.float64(0.5)}
    results = sweep(CONFIG, axes, tmp_path, seeds=np.arange(2), overrides=overrides)
    write_report(results, tmp_path)
    assert (results.config["epochs"], results.config["optim"]["learning_rate"]) == (2, 0.5)
    assert [row.label for row in results.rows][:2] == ["momentum=0.0,batch_size=32", "momentum=0.0,batch_size=33"]
    assert [run["seed"] for run in results.rows[0].runs] == [0, 1]


def test_a_name_to_import_stands_in_labels_as_it_was_typed():
    assert list(grid_cells(CONFIG, {"loss": ("mine.py:loss", "cross_entropy")})) == [
        "loss=mine.py:loss",
        "loss=cross_entropy",
    ]


def test_settings_of_several_values_are_axes_in_python():
    cells = grid_cells(CONFIG, {"optim.latent_box": ((-1.0, 1.0), None), "optim.train_only": ((), ("head/*",))})
    assert [cell.optim.train_only for cell, _ in cells.values()] == [(), ("head/*",)] * 2


@pytest.mark.parametrize(
    ("seeds", "rule"), [((), "have at least one; as 0 1 2"), ((0, 1, 0), "differ from each other")]
)
def test_seeds_differ_and_there_is_one(seeds, rule, tmp_path):
    for run in (lambda: sweep(CONFIG, {}, tmp_path, seeds=seeds), lambda: compare(CELLS, tmp_path, seeds=seeds)):
        with pytest.raises(UsageError, match=re.escape(f"`seeds` (={list(seeds)}) must {rule}")):
            run()


def test_a_comparison_has_a_row(tmp_path):
    with pytest.raises(UsageError, match=r"`cells` \(=\{\}\) must have at least one row"):
        compare({}, tmp_path, seeds=(0,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"execution": "vmaped"}, r"`execution` \(='vmaped'\) is not known; did you mean 'vmapped'\?"),
        ({"processes": 0}, r"`processes` \(=0\) must be at least 1; leave it out"),
        ({"group_size": 0}, r"`group_size` \(=0\) must be at least 1; leave it out"),
    ],
)
def test_ways_that_there_are_not(tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        run_all([Run("run", CONFIG, tmp_path)], **arguments)


def test_a_folder_of_another_run_is_refused(tmp_path):
    claim_workdir(CONFIG, tmp_path)
    engine._record_diverged(Run("run", CONFIG, tmp_path), "it diverged")
    assert run_all([Run("run", CONFIG, tmp_path)])[0]["diverged"] == "it diverged"
    with pytest.raises(UsageError, match=r"`seed` is 7 now, but .* holds a run with 0; .*, move that folder away, or"):
        run_all([Run("run", replace(CONFIG, seed=7), tmp_path)])


def test_what_a_diverged_run_has_found_is_kept_until_it_is_trained_again(tmp_path):
    claim_workdir(CONFIG, tmp_path)
    run, record = Run("run", CONFIG, tmp_path), {"kind": "evaluation", "epoch": 1, "validation_accuracy": 0.25}
    record |= {"validation_loss": 2.0, "train_loss": 2.5, "train_accuracy": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    engine._record_diverged(run, "it diverged")
    assert recorded_result(run)["curve"] == {name: [value] for name, value in record.items() if name != "kind"}
    (tmp_path / "diverged.json").write_text('{"epochs": 1')
    with pytest.warns(DamagedFileWarning):
        assert recorded_result(run) is None
    claim_workdir(CONFIG, tmp_path)
    assert not (tmp_path / "diverged.json").exists()


def found_at_once(runs, **_):
    """In the place of the engine."""
    return [a_run(run.config.seed, 0.5) for run in runs]


def test_rows_that_differ_in_augmentation_have_one_set_and_are_described_as_tuned(monkeypatch, tmp_path):
    monkeypatch.setattr(comparison, "run_all", found_at_once)
    monkeypatch.setattr(tuning, "run_all", found_at_once)
    tuned = replace(CONFIG, optim=replace(SGD, tune={"model.width": (8, 16, 32)}), tune_trials=3)
    cells = {"plain": tuned, "flipped": replace(tuned, data=DataConfig(flip=True))}

    def describe(label, cell, data):
        return {"columns": {"of": f"{label}: {cell.model.width} on {data['num_classes']}"}}

    results = compare(cells, tmp_path, seeds=(0,), tune=True, describe=describe)
    assert [data["name"] for data in results.datasets] == ["digits"]
    assert [row.columns["of"] for row in results.rows] == ["plain: 8 on 10", "flipped: 8 on 10"]
    assert [row.settings["data.flip"] for row in results.rows] == [False, True]
    assert results.config["model"]["width"] == 8 != CONFIG.model.width
    grid = sweep(CONFIG, {"data.flip": (True, False)}, tmp_path, seeds=(0,))
    assert [data["name"] for data in grid.datasets] == ["digits"]


def own_loss(logits, labels):
    return cross_entropy(logits, labels)


def test_things_are_axes_by_their_records(monkeypatch, tmp_path):
    monkeypatch.setattr(comparison, "run_all", found_at_once)
    small = lambda logits, labels: 0.1 * cross_entropy(logits, labels)
    axes = {"loss": (own_loss, "cross_entropy", small), "model.name": (LeNet(10), LeNet)}
    monkeypatch.setattr(comparison, "validate", lambda config: config)  # LeNet takes no images of digits
    results = sweep(replace(CONFIG, model=ModelConfig()), axes, tmp_path, seeds=(0,))
    write_report(results, tmp_path)
    labels = [row.label for row in results.rows]
    assert len(set(labels)) == 6 and not any(" at 0x" in label or "/" in label for label in labels)
    assert results.axes["loss"][:2] == [name_of(own_loss), "cross_entropy"]
    assert results.axes["loss"][2].startswith("in memory: <lambda> ")
    assert results.rows[0].settings["loss"] == results.rows[0].loss == name_of(own_loss)
    assert results.axes["model.name"][0].startswith("in memory: LeNet ")
    assert results.axes["model.name"][1] == name_of(LeNet)


def test_a_set_is_loaded_once_whatever_is_done_to_its_batches(monkeypatch):
    loaded, datasets = [], {}
    monkeypatch.setattr(engine, "load_data", lambda data: loaded.append(data) or object())
    first = dataset_of(DataConfig(), datasets)
    assert dataset_of(DataConfig(flip=True, crop_padding=2), datasets) is first
    assert dataset_of(DataConfig(split_seed=1, flip=True), datasets) is not first
    assert [data.split_seed for data in loaded] == [0, 1]


def test_arrays_in_memory_are_those_of_every_trial_and_row(monkeypatch, tmp_path):
    arrays = np.random.default_rng(0).integers(0, 256, (50, 6, 5, 1), dtype=np.uint8), np.arange(50, dtype=np.int32) % 5
    used = []

    def found(runs, *, datasets, **_):
        used.extend(dataset_of(run.config.data, datasets) for run in runs)
        return [a_run(run.config.seed, 0.5) for run in runs]

    monkeypatch.setattr(comparison, "run_all", found)
    monkeypatch.setattr(tuning, "run_all", found)
    tuned = replace(CONFIG, optim=replace(SGD, tune={"data.flip": (False, True)}), tune_trials=4)
    results = compare({"row": tuned}, tmp_path, seeds=(0,), tune=True, data=arrays)
    assert len(results.tuning["rows"][0]["trials"]) == 2 and len({id(dataset) for dataset in used}) == 1
    grid = sweep(CONFIG, {"data.flip": (True, False)}, tmp_path, seeds=(0,), data=arrays)
    assert results.config["data"]["name"] == grid.config["data"]["name"] != "digits"
    sizes = replace(tuned, optim=replace(SGD, tune={"data.image_size": (4, 5, 6)}))
    with pytest.raises(UsageError, match=r"`optim.tune` \(='data.image_size'\) is for data on disk, not for arrays in"):
        compare({"row": sizes}, tmp_path, seeds=(0,), tune=True, data=arrays)


@pytest.mark.parametrize("changes", [{"validation_examples": 100}, {"split_seed": 1}, {"name": "mnist"}])
def test_rows_on_other_images_are_refused(changes, tmp_path):
    ((name, value),) = changes.items()
    before = getattr(CONFIG.data, name)
    text = re.escape(
        f"`data.{name}` (={{'a': {before!r}, 'b': {value!r}}}) must be the same for every row, or their acc"
    )
    with pytest.raises(UsageError, match=text):
        compare({"a": CONFIG, "b": replace(CONFIG, data=replace(CONFIG.data, **changes))}, tmp_path, seeds=(0,))


class Array(np.ndarray):
    """One that can be referred to weakly."""

    __hash__ = object.__hash__


@pytest.fixture
def groups(monkeypatch):
    """The sizes of the groups that are mapped; more than three do not fit in memory."""
    sizes, made = [], weakref.WeakSet()

    def train_together(configs, workdirs, *, data, on_progress):
        assert not made  # what a larger group needed is free again
        sizes.append(len(configs))
        if len(configs) > 3:
            for_all = np.zeros(1).view(Array)
            made.add(for_all)
            raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        for config, workdir in zip(configs, workdirs):
            workdir.mkdir(parents=True, exist_ok=True)
            claim_workdir(config, workdir)
        return [Diverged("it diverged")] * len(configs)

    monkeypatch.setattr(engine, "train_together", train_together)
    return sizes


@pytest.mark.parametrize(("group_size", "sizes"), [(None, [5, 2, 3, 1]), (2, [2, 2, 1, 1])])
def test_groups_are_of_one_program_and_fit_in_memory(tmp_path, groups, group_size, sizes):
    other = replace(CONFIG, loss="multiclass_hinge")
    configs = [*(replace(CONFIG, seed=seed) for seed in range(5)), other]
    runs = [Run(f"run {index}", config, tmp_path / str(index)) for index, config in enumerate(configs)]
    told = []
    found = run_all(runs, execution="vmapped", group_size=group_size, tell=told.append)
    assert groups == sizes
    assert sorted(line.split(":")[0] for line in told) == [run.title for run in runs]
    assert [run["seed"] for run in found] == [0, 1, 2, 3, 4, 0]


def test_the_device_decides_once_what_auto_is(monkeypatch, tmp_path):
    info, measured = ImageInfo((8, 8, 1), 10, (0.0,), (1.0,)), []

    def time_steps(config, info, *, members):
        measured.append(members)
        return {"sequential_ms": 3.0, "vmapped_ms": 1.0}

    assert throughput.choose_execution(CONFIG, info, members=8)[0] == "sequential"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(throughput, "time_steps", time_steps)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for members in (8, 20, 1, 2):
        execution, why = throughput.choose_execution(CONFIG, info, members=members)
        assert execution == ("sequential" if members == 1 else "vmapped")
    assert why == "3 ms a step, 1 ms with 2 runs mapped"
    assert measured == [8, 2]
    assert len(json.loads((tmp_path / "bnn_jax" / "sweep_times.json").read_text())) == 2
    (tmp_path / "bnn_jax" / "sweep_times.json").write_text("damaged")
    assert throughput.choose_execution(CONFIG, info, members=8)[0] == "vmapped"
    assert measured == [8, 2, 8]


@pytest.mark.full
def test_times_of_steps_alone_and_mapped():
    info = ImageInfo((8, 8, 1), 10, (8.0,), (5.0,))
    config = replace(CONFIG, batch_size=4, model=replace(CONFIG.model, width=2))
    found = throughput.time_steps(config, info, members=2, steps=2, repeats=3)
    seconds = {execution: sorted(times)[1] for execution, times in found["seconds"].items()}
    assert found["sequential_ms"] == pytest.approx(1e3 * seconds["sequential"] / 2)
    assert found["vmapped_ms"] == pytest.approx(1e3 * seconds["vmapped"] / 4)

"""Stages: what is taken over, who teaches, that resuming changes no bit, and what is refused."""

import json
import shutil
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from small_sets import brightness_set

from bnn_jax.errors import UsageError
from bnn_jax.optim import OPTIMIZERS
from bnn_jax.stages.stage import Stage, replace_stage, run_stages
from bnn_jax.stages.teachers import fingerprint, load_network
from bnn_jax.stages.warm_start import TRANSFERS, by_name
from bnn_jax.training.callbacks import CSVLogger
from bnn_jax.training.config import Config, DistillationConfig, ModelConfig, OptimConfig
from bnn_jax.training.experiment import ImageInfo, make_experiment
from bnn_jax.training.loop import train
from bnn_jax.training.metrics import read_metrics
from bnn_jax.training.programs import Teacher
from bnn_jax.training.step import init_state, train_step
from bnn_jax.training.validation import validate

SMALL = {"stage_sizes": (1,)}
MODEL = ModelConfig("resnet6", width=4, input_quantizer="ste_sign", kernel_quantizer="xnor", options=SMALL)
REAL = replace(MODEL, input_quantizer="full_precision", kernel_quantizer="full_precision")
SGD = OptimConfig("sgd", 0.05, latent_box=None)
CONFIG = Config("test", epochs=2, batch_size=16, scan_steps=2, loss="cross_entropy", model=REAL, optim=SGD)
INFO = ImageInfo((8, 8, 1), 3, (120.0,), (60.0,))
TAUGHT = DistillationConfig({"attention": 2.0, "similarity": 1.0}, label_weight=0.5, temperature=0.5, queue_size=40)
STAGES = [
    Stage("real", CONFIG),
    Stage(
        "binary",
        replace(CONFIG, model=MODEL, distillation=TAUGHT, epochs=1),
        initialise_from="real",
        teacher="real",
    ),
    Stage(
        "norm",
        replace(CONFIG, model=MODEL, epochs=1, optim=replace(SGD, train_only=("*norm*",))),
        initialise_from="binary",
        which="last",
    ),
]


@pytest.fixture(scope="module")
def dataset():
    return brightness_set(64)


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """The three stages run without an interruption: folder, results and what was announced."""
    workdir, told = tmp_path_factory.mktemp("stages"), []
    return workdir, run_stages(STAGES, workdir, data=dataset, announce=told.append), told


def variables_of(workdir, dataset, which="last"):
    return flatten_dict(load_network(workdir, dataset, which=which).variables, sep="/")


def test_a_stage_starts_from_the_variables_of_the_one_before(finished, dataset):
    """With a frozen kernel the values are those of the stage before, under their new name."""
    workdir, results, told = finished
    assert list(results) == ["real", "binary", "norm"]
    assert told == [
        "stage 1/3 real: starts from random weights",
        f"stage 2/3 binary: takes {len(variables_of(workdir / 'real', dataset))} variables from real; taught by real",
        f"stage 3/3 norm: takes {len(variables_of(workdir / 'binary', dataset))} variables from binary",
    ]
    record = json.loads((workdir / "binary" / "stage.json").read_text())
    assert "params/stage1_block1/conv1/latent_kernel" in record["carried"]
    assert record["initialised"] == {}
    assert record["unused"] == []
    best = load_network(workdir / "real", dataset).variables
    assert (
        record["teacher"] == record["initialise_from"] == {"run": "real", "which": "best", "sha256": fingerprint(best)}
    )


def test_frozen_parameters_keep_every_bit_while_the_others_move(finished, dataset):
    workdir, _, _ = finished
    before, after = (variables_of(workdir / name, dataset) for name in ("binary", "norm"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name.startswith("params/") and "norm" not in name:
            np.testing.assert_array_equal(value, after[name], err_msg=name)
        else:
            assert (value != after[name]).any(), name


def test_the_record_of_a_taught_step_has_the_parts_of_its_objective(finished):
    workdir, _, _ = finished
    for record in read_metrics(workdir / "binary" / "metrics.jsonl"):
        if record["kind"] == "train":
            parts = 2 * record["distillation_attention"] + record["distillation_similarity"]
            assert record["objective"] == pytest.approx(0.5 * record["loss"] + parts, rel=1e-5)
            assert record["distillation_attention"] > 0
    for path in (workdir / "binary" / "checkpoints").glob("*.json"):
        leaves = [leaf["name"] for leaf in json.loads(path.read_text())["leaves"]]
        assert len([leaf for leaf in leaves if leaf.endswith(".head.kernel")]) == 3  # state, momentum, best: no teacher
        assert sum("keys" in leaf for leaf in leaves) == 1


class Stop(Exception):
    """Stands for a process that ends without a chance to save."""


def test_stopping_between_and_within_stages_changes_no_bit(finished, dataset, tmp_path):
    whole, results, _ = finished

    def stop_after(calls):
        left = iter(range(calls))

        def on_progress(done, total, text):
            if next(left, None) is None:
                raise Stop

        return on_progress

    for calls in (1, 3, 3, 2, 99):  # within real, within it again, within binary, within norm
        try:
            broken = run_stages(STAGES, tmp_path, data=dataset, on_progress=stop_after(calls))
        except Stop:
            assert calls < 99
    timeless = lambda result: {k: v for k, v in result.items() if "time" not in k}
    for stage in STAGES:
        assert timeless(broken[stage.name]) == timeless(results[stage.name])
        assert (tmp_path / stage.name / "stage.json").read_text() == (whole / stage.name / "stage.json").read_text()
        for which in ("best", "last"):
            hashes = {
                fingerprint(load_network(w / stage.name, dataset, which=which).variables) for w in (whole, tmp_path)
            }
            assert len(hashes) == 1


def test_a_finished_recipe_is_not_run_again(finished, dataset):
    workdir, results, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    again = run_stages(STAGES, workdir, data=dataset, on_progress=lambda *_: pytest.fail("a stage was run again"))
    assert again == results
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}


def test_what_is_for_one_stage_is_refused(finished, dataset, tmp_path):
    workdir, _, _ = finished
    with pytest.raises(UsageError, match=r"^`path` \(=.*all.csv\) of CSVLogger is for one run alone; leave it out"):
        run_stages(STAGES, workdir, data=dataset, callbacks=[CSVLogger(tmp_path / "all.csv")])
    assert run_stages(STAGES, workdir, data=dataset, callbacks=[CSVLogger()]) == finished[1]
    with pytest.raises(UsageError, match=r"^`callbacks` \(=.*\) must be a list of callbacks; as \[CSVLogger\(\)\]$"):
        run_stages(STAGES, workdir, data=dataset, callbacks=CSVLogger())
    config = replace(STAGES[1].config, init_from="runs/other")
    began = [Stage("binary", config, initialise_from=str(workdir / "real"), teacher=str(workdir / "real"))]
    with pytest.raises(UsageError, match=r"^`init_from` \(='runs/other'\) does not go with `initialise_from` \(="):
        run_stages(began, tmp_path, data=dataset)


def test_a_changed_stage_or_predecessor_is_refused(finished, dataset, tmp_path):
    workdir, _, _ = finished
    for name in ("real", "binary"):
        (tmp_path / name).mkdir()
        for path in (workdir / name).rglob("*"):
            copy = tmp_path / name / path.relative_to(workdir / name)
            copy.mkdir(exist_ok=True) if path.is_dir() else copy.write_bytes(path.read_bytes())
    changed = [STAGES[0], replace(STAGES[1], config=replace(STAGES[1].config, batch_size=8))]
    with pytest.raises(UsageError, match=r"`batch_size` is 8 now, but .*binary holds a run with 16; choose another"):
        run_stages(changed, tmp_path, data=dataset)
    with pytest.raises(
        UsageError,
        match=r"`initialise_from` of stage 'binary' is not what .*binary was begun with: the last variables of real "
        r"with hash \w{8} now, the best variables of real with hash \w{8} then; remove .*binary to run the stage anew",
    ):
        run_stages([STAGES[0], replace(STAGES[1], which="last")], tmp_path, data=dataset)
    whole = (tmp_path / "binary" / "stage.json").read_text()
    (tmp_path / "binary" / "stage.json").unlink()
    run_stages(STAGES, tmp_path, data=dataset)
    assert (tmp_path / "binary" / "stage.json").read_text() == whole  # the checkpoint holds it too
    moved = tmp_path / "moved"
    (tmp_path / "real").rename(moved)
    results = run_stages(replace_stage(STAGES[:2], "real", moved), tmp_path, data=dataset)
    assert results["binary"] == finished[1]["binary"]  # the same run, told by its hash
    (tmp_path / "binary" / "stage.json").unlink()
    shutil.rmtree(tmp_path / "binary" / "checkpoints")
    with pytest.raises(UsageError, match=r"`workdir` holds a run in .*binary that is no stage"):
        run_stages(STAGES[:2], tmp_path, data=dataset)


def test_a_finished_run_elsewhere_takes_the_place_of_a_stage(finished, dataset, tmp_path):
    workdir, results, _ = finished
    stages = replace_stage(STAGES[:2], "real", workdir / "real")
    assert [stage.name for stage in stages] == ["binary"]
    assert stages[0].teacher == stages[0].initialise_from == str(workdir / "real")
    assert run_stages(stages, tmp_path, data=dataset)["binary"]["curve"] == results["binary"]["curve"]
    with pytest.raises(UsageError, match=r"`stage` \(='reel'\) is not known; did you mean 'real'\?"):
        replace_stage(STAGES, "reel", workdir)


def test_stages_that_led_to_the_replaced_one_alone_are_left_out(tmp_path):
    """As Bi-Real Net's first two before clip; a teacher that a later stage has too stays."""
    chain = [Stage("relu", CONFIG), Stage("leaky_clip", CONFIG, "relu"), Stage("clip", CONFIG, "leaky_clip")]
    chain += [Stage("alone", CONFIG), Stage("binary", CONFIG, "clip")]
    stages = replace_stage(chain, "clip", tmp_path)
    assert [(stage.name, stage.initialise_from) for stage in stages] == [("alone", None), ("binary", str(tmp_path))]
    taught = [Stage("teacher", CONFIG), Stage("inputs", CONFIG, teacher="teacher")]
    taught += [Stage("binary", CONFIG, "inputs", "teacher")]
    stages = replace_stage(taught, "inputs", tmp_path)
    assert [stage.name for stage in stages] == ["teacher", "binary"]
    with pytest.raises(UsageError, match=r"^`stage` \(='binary'\) leaves nothing to train, for all other stages only"):
        replace_stage(taught, "binary", tmp_path)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], r"`stages` is empty"),
        ([STAGES[0], STAGES[0]], r"`name` \(='real'\) must be new"),
        ([Stage("a/b", CONFIG)], r"`name` \(='a/b'\) must be new and made of letters"),
        (
            [Stage("a", CONFIG, initialise_from="b")],
            r"`initialise_from` \(='b'\) of stage 'a' must be an earlier stage \(none\) or the folder of a",
        ),
        ([STAGES[1]], r"`initialise_from` \(='real'\) of stage 'binary' must be an earlier stage"),
        ([STAGES[0], replace(STAGES[1], transfer="by_nam")], r"`transfer of stage 'binary'` .* did you mean 'by_name'"),
        (
            [STAGES[0], replace(STAGES[1], which="first")],
            r"`which` \(='first'\) of stage 'binary' must be best or last",
        ),
        (
            [STAGES[0], replace(STAGES[1], teacher=None)],
            r"`teacher` \(=None\) of stage 'binary' must be given exactly if",
        ),
        ([STAGES[0], replace(STAGES[2], initialise_from="real", teacher="real")], r"`teacher` \(='real'\) of stage"),
        ([Stage("a", replace(CONFIG, epochs=0))], r"`epochs` \(=0\) must be at least 1"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(stages, message, dataset, tmp_path):
    with pytest.raises(UsageError, match=message):
        run_stages(stages, tmp_path, data=dataset)
    assert not list(tmp_path.iterdir())


def test_losses_of_a_teacher_need_one_and_the_reverse(dataset, tmp_path):
    with pytest.raises(UsageError, match=r"`distillation\.losses` \(=attention, similarity\) needs a teacher"):
        train(STAGES[1].config, tmp_path, data=dataset)
    with pytest.raises(UsageError, match=r"`distillation\.losses` \(={}\) must name what to learn from the teacher"):
        train(CONFIG, tmp_path, data=dataset, teacher=Teacher(REAL, {}))


@pytest.mark.parametrize(("name", "inner_steps"), [*((name, 1) for name in OPTIMIZERS), ("dfw", 2)])
def test_every_optimizer_trains_a_part(name, inner_steps):
    """Traced: the state after a step is of the kind of the one before, and holds nothing of frozen parameters."""
    loss = "multiclass_hinge" if name == "dfw" else "cross_entropy"
    optim = OptimConfig(name, 0.1, train_only=("*norm*",), inner_steps=inner_steps)
    config = validate(replace(CONFIG, model=MODEL, optim=optim, loss=loss))
    experiment = make_experiment(config, INFO, total_steps=4, learning_rate=0.1)
    state = jax.eval_shape(partial(init_state, experiment), jnp.uint32(0))
    images, labels = jnp.zeros((4, 8, 8, 1), jnp.uint8), jnp.zeros(4, jnp.int32)
    after, metrics = jax.eval_shape(partial(train_step, experiment), state, images, labels)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert ("gamma" in metrics) == (name == "dfw")
    assert all(leaf.size <= 4 for leaf in jax.tree.leaves(state.opt_state))


def test_a_pattern_that_matches_nothing_is_refused(dataset, tmp_path):
    config = replace(CONFIG, optim=replace(SGD, train_only=("*nrm*",)))
    with pytest.raises(
        UsageError, match=r"^`optim.train_only` \(='\*nrm\*'\) matches none of the \d+ parameters; their names"
    ):
        train(config, tmp_path, data=dataset)


# ---- what is taken over


def shapes_of(model, classes=3):
    info = INFO._replace(num_classes=classes)
    experiment = make_experiment(replace(CONFIG, model=model), info, total_steps=4, learning_rate=0.1)
    state = jax.eval_shape(partial(init_state, experiment), jnp.uint32(0))
    return experiment, {"params": state.params, **state.model_state}


def filled(shapes, value=0.5):
    """Arrays that tell which value is whose."""
    flat = flatten_dict(shapes, sep="/")
    return {
        name: value + jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape) / 7 + number
        for number, (name, leaf) in enumerate(flat.items())
    }


def nested(flat):
    return unflatten_dict(flat, sep="/")


def test_wider_layers_are_initialised_and_reported():
    _, source = shapes_of(REAL)
    _, target = shapes_of(replace(MODEL, options={"stage_sizes": (2,)}), classes=5)
    start = by_name(nested(filled(source)), target)
    assert start.initialised["params/head/kernel"] == "of shape (4, 3), here (4, 5)"
    assert start.initialised["params/stage1_block2/conv1/latent_kernel"] == "not there"
    assert set(start.unused) == {"params/head/kernel", "params/head/bias"}
    assert set(start.names) | set(start.initialised) == set(flatten_dict(target, sep="/"))
    left_out = TRANSFERS["without_head"](nested(filled(source)), source)
    assert left_out.initialised == {"params/head/kernel": "left out", "params/head/bias": "left out"}


def test_learned_scales_start_from_the_kernel_that_is_taken_over():
    """BNN+ starts its scales at the median magnitude of the pretrained filters, not of random ones."""
    _, source = shapes_of(REAL)
    source = filled(source)
    experiment, target = shapes_of(replace(MODEL, kernel_quantizer="bnn_plus"))
    start = by_name(nested(source), target)
    state = init_state(experiment, jnp.uint32(3), start.variables)
    layer = state.params["stage1_block1"]["conv1"]
    kernel = np.asarray(source["params/stage1_block1/conv1/kernel"])
    np.testing.assert_array_equal(layer["latent_kernel"], kernel)
    expected = np.median(np.abs(kernel).reshape(-1, 4), axis=0)
    np.testing.assert_allclose(layer["kernel_quantizer"]["scale"].ravel(), expected, rtol=1e-6)
    np.testing.assert_array_equal(state.model_state["batch_stats"]["norm"]["mean"], source["batch_stats/norm/mean"])


def test_ternary_training_starts_from_kernels_of_magnitude_one():
    _, source = shapes_of(REAL)
    source = filled(source, value=-3.0)
    _, target = shapes_of(replace(MODEL, kernel_quantizer="ttq"))
    start = flatten_dict(TRANSFERS["normalized"](nested(source), target).variables, sep="/")
    kernel = np.asarray(source["params/stage1_block1/conv2/kernel"], np.float64)
    np.testing.assert_allclose(
        start["params/stage1_block1/conv2/latent_kernel"], kernel / np.abs(kernel).max(), rtol=1e-6
    )
    np.testing.assert_array_equal(start["params/stem/kernel"], source["params/stem/kernel"])


def test_nothing_to_take_over_is_an_error(finished, dataset, tmp_path):
    workdir, _, _ = finished
    stage = Stage("lost", CONFIG, str(workdir / "real"), transfer=lambda source, target: by_name({}, target))
    with pytest.raises(
        UsageError,
        match=r"`initialise_from` \(=.*\) of stage 'lost' has nothing to take over: .* params/.* is not there",
    ):
        run_stages([stage], tmp_path, data=dataset)


# ---- the taught step


def test_the_teacher_is_an_argument_and_only_the_network_moves(dataset):
    """Plain SGD on the distribution loss moves the last bias by -rate mean(p_s - p_t), in closed form."""
    taught = DistillationConfig({"distribution": 3.0}, label_weight=0.0)
    config = replace(CONFIG, distillation=taught, optim=replace(SGD, momentum=0.0))
    experiment = make_experiment(config, INFO, total_steps=4, learning_rate=0.05, teacher=REAL)
    state = init_state(experiment, jnp.uint32(0))
    other = init_state(experiment, jnp.uint32(1))
    teacher = {"params": other.params, **other.model_state}
    images, labels = jnp.asarray(dataset.train.images[:8]), jnp.asarray(dataset.train.labels[:8])
    after, metrics = jax.jit(partial(train_step, experiment))(state, images, labels, teacher)

    x = (images.astype(jnp.float32) - 120) / 60
    variables = {"params": state.params, **state.model_state}
    (own, _), _ = experiment.model.apply(variables, x, train=True, mutable=["batch_stats"])
    wanted, _ = experiment.model.apply(teacher, x, train=False)
    own, wanted = (np.asarray(logits, np.float64) for logits in (own, wanted))
    p_s, p_t = (np.exp(f) / np.exp(f).sum(1, keepdims=True) for f in (own, wanted))
    expected = -0.05 * 3 * (p_s - p_t).mean(0)
    np.testing.assert_allclose(after.params["head"]["bias"] - state.params["head"]["bias"], expected, atol=1e-6)
    assert float(metrics["distillation_distribution"]) == pytest.approx(-(p_t * np.log(p_s)).sum(1).mean(), rel=1e-5)
    assert float(metrics["objective"]) == pytest.approx(3 * float(metrics["distillation_distribution"]), rel=1e-6)


def test_layers_that_start_afresh_are_named_rightly():
    source = {"params": {"conv": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}}}
    assert by_name(source, source, leave_out=["params/head"]).names == ("params/conv/kernel",)
    assert by_name(source, source, leave_out=["params/head/bias"]).names == ("params/conv/kernel", "params/head/kernel")
    with pytest.raises(UsageError, match=r"^`leave_out` \(='params/hed'\) is not known; did you mean 'params/head'\?"):
        by_name(source, source, leave_out=["params/hed"])
    with pytest.raises(UsageError, match=r"^`leave_out` \(='params/head'\) must be a list; as \('params/head',\)$"):
        by_name(source, source, leave_out="params/head")


def test_boxed_variables_are_known_by_their_values():
    plain = {"params": {"conv": {"kernel": jnp.arange(2.0)}}}
    boxed = [{"params": {"conv": {"kernel": nn.Partitioned(jnp.arange(2.0), (None,))}}} for _ in range(2)]
    assert len({fingerprint(variables) for variables in (plain, *boxed)}) == 1
    assert by_name(boxed[0], boxed[1]).names == ("params/conv/kernel",)

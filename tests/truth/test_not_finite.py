"""Numbers that are not finite are seen: no code, mask, step, evaluation or file makes a plausible number of them."""

import math
import re
import shutil
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_sets import brightness_set, write_npz

from bnn_jax.errors import RunError, UsageError
from bnn_jax.estimators import ESTIMATORS, make_sign, sign
from bnn_jax.finite import all_finite, leaf_name
from bnn_jax.optim import OPTIMIZERS, latent_box, make_optimizer
from bnn_jax.quantizers import (
    ACTIVATION_QUANTIZERS,
    GRADIENT_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    binary,
    dequantize,
    make_quantizer,
    with_estimator,
)
from bnn_jax.schedules import make_schedule
from bnn_jax.training import loop
from bnn_jax.training.checkpoint import CheckpointWarning, restore_checkpoint, save_checkpoint
from bnn_jax.training.config import Config, ModelConfig, OptimConfig
from bnn_jax.training.evaluation import evaluate_run
from bnn_jax.training.loop import Diverged, train, train_together
from bnn_jax.training.members import steps_done
from bnn_jax.training.metrics import first_diverged, read_metrics
from bnn_jax.training.programs import initial_state, programs_of, state_shapes
from bnn_jax.training.run_folder import save_run
from bnn_jax.training.validation import validate

SHAPE, WHERE = (2, 2, 3, 4), (1, 0, 2, 1)
QUANTIZERS = [(table, name) for table in (WEIGHT_QUANTIZERS, ACTIVATION_QUANTIZERS) for name in table]
OPTIONS = [
    (WEIGHT_QUANTIZERS, "binary_connect", {"stochastic": True}),
    (WEIGHT_QUANTIZERS, "dorefa", {"bits": 1}),
    (WEIGHT_QUANTIZERS, "xnor", {"center": True, "gradient": "diagonal"}),
]
REAL_IN_TRAINING = ("post_training", "inq")
CASES = [(t, n, {}) for t, n in QUANTIZERS if n != "full_precision" and n not in ESTIMATORS] + OPTIONS


def with_nan():
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    x[WHERE] = np.nan
    return jnp.asarray(x)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_code_and_the_slope_of_nan_are_nan(name):
    x = with_nan()

    @jax.jit
    def run(x, cotangent):
        codes, pullback = jax.vjp(ESTIMATORS[name], x)
        return codes, *pullback(cotangent)

    codes, slope = run(x, jnp.ones_like(x))
    _, passed_on = run(jnp.full_like(x, 9.0), x)  # where the masks are 0
    assert jnp.isnan(passed_on[WHERE])
    np.testing.assert_array_equal(jnp.isnan(codes), jnp.isnan(x))
    assert jnp.isnan(slope[WHERE])


def test_sign_is_that_of_other_libraries_at_nan_and_plus_one_at_both_zeros():
    x = jnp.array([jnp.nan, 0.0, -0.0, jnp.inf, -jnp.inf])
    for dtype in (jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(np.asarray(sign(x.astype(dtype)), np.float32), [np.nan, 1, 1, 1, -1])


@pytest.mark.parametrize("parameter", ["threshold", "width"])
def test_a_parameter_that_is_nan_makes_codes_nan(parameter):
    x = jnp.array([-1.0, 2.0])
    values = jax.jit(lambda value: ESTIMATORS["heaviside"](x, **{parameter: value}))(jnp.nan)
    assert jnp.isnan(values).all()


@pytest.mark.parametrize(("table", "name", "options"), CASES)
def test_what_a_quantizer_makes_of_nan_is_nan_forward_and_backward(table, name, options):
    quantizer, x, key = make_quantizer(table, name, **options), with_nan(), jax.random.key(0)
    healthy = jnp.where(jnp.isnan(x), 0.5, x)
    parameters = quantizer.init(key, healthy) if quantizer.init else {}
    state = (quantizer.init_state(key, healthy),) if quantizer.init_state else ()

    def values(x, train):
        wanted = {"train": train, "progress": 0.5, "key": key if train else None}
        given = {name: wanted[name] for name in quantizer.wants} | parameters
        found = quantizer.apply(x, *state, **given)
        return dequantize(found[0] if state else found)

    @jax.jit
    def run(x):
        trained, pullback = jax.vjp(lambda x: values(x, True), x)
        return values(x, False), trained, *pullback(jnp.ones_like(x))

    evaluated, trained, gradient = run(x)
    assert jnp.isnan(evaluated[WHERE]) and jnp.isnan(trained[WHERE])
    assert jnp.isnan(gradient[WHERE]) or name in REAL_IN_TRAINING


def test_a_gradient_quantizer_passes_nan_on():
    quantize = make_quantizer(GRADIENT_QUANTIZERS, "dorefa")
    _, pullback = jax.vjp(lambda y: quantize(y, jax.random.key(0)), jnp.ones(SHAPE))
    assert jnp.isnan(pullback(with_nan())[0][WHERE])


ADAM = OptimConfig("adam", 0.01)
MODEL = ModelConfig("mnist_mlp", width=4, options={"hidden_layers": 1, "input_dropout": 0.0, "hidden_dropout": 0.0})
CONFIG = Config("test", epochs=2, batch_size=16, scan_steps=3, model=MODEL, optim=ADAM)
LATENT = "dense1/latent_kernel"


@pytest.fixture(scope="module")
def dataset():
    return brightness_set(80, 20, 20)


def with_number(tree, path, value):
    """A tree with another number in the array at the end of a path."""
    found = []

    def put(at, leaf):
        if not leaf_name(at).endswith(path):
            return leaf
        found.append(path)
        return leaf.at[(0,) * leaf.ndim].set(value)

    changed = jax.tree_util.tree_map_with_path(put, tree)
    assert found == [path]
    return changed


def break_step(monkeypatch, number, path, value):
    """Let the state after the step of this number hold another number; of several members that of the first."""

    def broken(train, *arguments, **keywords):
        state, metrics = train(*arguments, **keywords)
        return (with_number(state, path, value) if steps_done(state) >= number else state), metrics

    made = loop._Job
    wrapped = lambda programs: programs._replace(train=partial(broken, programs.train))
    monkeypatch.setattr(loop, "_Job", lambda members, programs, *rest: made(members, wrapped(programs), *rest))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (f"params/{LATENT}", np.nan, rf"the parameter {LATENT} \(1 NaN of 256\)"),
        ("batch_stats/norm1/var", np.nan, r"the network's state batch_stats/norm1/var \(1 NaN of 4\)"),
        ("batch_stats/norm1/mean", np.inf, r"the network's state batch_stats/norm1/mean \(1 infinite of 4\)"),
        (f"mu/{LATENT}", 1e30, rf"the optimizer's state \S+/mu/{LATENT} \(1 too large to square of 256\)"),
    ],
)
def test_a_state_that_breaks_stops_the_run(tmp_path, dataset, monkeypatch, path, value, told):
    break_step(monkeypatch, 3, path, value)
    with pytest.raises(Diverged, match=rf"`state` became non-finite at step 3 \(epoch 1\) of .*, first in {told}; "):
        train(CONFIG, tmp_path, data=dataset)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "checkpoints").exists()


def test_an_evaluation_in_training_that_is_not_finite_stops_the_run(tmp_path, dataset, monkeypatch):
    """The state is finite: a variance below zero shows in evaluation alone."""
    break_step(monkeypatch, 5, "batch_stats/norm1/var", -1.0)
    told = r"`validation_accuracy` became nan at step 5 \(epoch 1\) of .*, first in the output of norm1 \(\d+ NaN"
    with pytest.raises(Diverged, match=told):
        train(CONFIG, tmp_path, data=dataset)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("optimizer", "became"),
    [
        (ADAM, "`state` became non-finite"),
        (OptimConfig("dfw", 0.1), r"`refused` became 1 \(an update that is not finite was not made\)"),
    ],
)
def test_a_slope_that_is_nan_stops_the_run_and_names_the_gradient(tmp_path, dataset, monkeypatch, optimizer, became):
    """The loss stays finite: Adam would hold NaN parameters, Deep Frank-Wolfe refuse every update."""
    slope = make_sign(lambda x: jnp.where(x < -1.5, jnp.nan, 1.0))
    monkeypatch.setitem(ACTIVATION_QUANTIZERS, "nan_below", partial(with_estimator, binary, slope))
    config = replace(CONFIG, model=replace(MODEL, input_quantizer="nan_below"), optim=optimizer)
    where = r"the gradient of norm1/bias \(\d NaN of 4\)"
    with pytest.raises(Diverged, match=rf"{became} at step 1 \(epoch 1\) of .*, first in {where}; "):
        train(config, tmp_path, data=dataset)


class Scaled(nn.Module):
    """Returns its width too, as a plain number."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x), x.shape[-1]


class TellsItsWidth(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        y, width = Scaled()(x.reshape(len(x), -1))
        return y / width


def test_a_layer_may_return_plain_numbers_when_a_run_diverges(tmp_path, dataset):
    optim = OptimConfig("sgd", 1e38, latent_box=None)
    config = replace(CONFIG, model=ModelConfig(TellsItsWidth), optim=optim)
    with pytest.raises(Diverged, match=r"at step 1 \(epoch 1\) of .*, first in the parameter Scaled_0/Dense_0/"):
        train(config, tmp_path, data=dataset)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_starts_from_what_would_stop_a_run(name):
    params = {"dense": {"latent_kernel": jnp.full((4, 3), 0.5), "bias": jnp.zeros(3)}}
    settings = {"learning_rate": make_schedule("constant", 0.1, 1), "box": latent_box(), "total_steps": 1}
    assert all_finite(make_optimizer(name, **settings).init(params))


def test_only_the_member_that_breaks_stops(tmp_path, dataset, monkeypatch):
    configs = [replace(CONFIG, seed=seed, epochs=1) for seed in (0, 1)]
    break_step(monkeypatch, 3, f"params/{LATENT}", np.nan)
    broken, healthy = train_together(configs, [tmp_path / "a", tmp_path / "b"], data=dataset)
    assert re.search(rf"`state` became non-finite at step 3 .*, first in the parameter {LATENT} ", str(broken))
    assert healthy["test_accuracy_last"] >= 0


@pytest.mark.parametrize(
    ("record", "found"),
    [
        ({"loss": 2.0**24, "refused": 0}, None),
        ({"loss": 3e33, "objective": 1.0}, (1, "`loss` became 3e+33 (above 2^24)")),
        ({"loss": 1.0, "objective": 1e8}, (1, "`objective` became 1e+08 (above 2^24)")),
        ({"gamma": 0.0, "refused": 1}, (1, "`refused` became 1 (an update that is not finite was not made)")),
        ({"gamma": 0.0, "refused": 0}, None),
        ({"accuracy": math.nan}, (1, "`accuracy` became nan")),
    ],
)
def test_what_counts_as_diverged(record, found):
    assert first_diverged([{"loss": 1.0}, record]) == found


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("params/head_norm/bias", np.nan, "the parameter head_norm/bias (1 NaN of 3)"),
        (f"params/{LATENT}", np.nan, f"the parameter {LATENT} (1 NaN of 256)"),
        ("batch_stats/norm1/var", np.nan, "the network's state batch_stats/norm1/var (1 NaN of 4)"),
        ("batch_stats/norm1/var", -1.0, "the output of norm1 ("),
    ],
)
def test_an_evaluation_of_nan_is_no_accuracy(dataset, path, value, where):
    programs = programs_of(validate(CONFIG), dataset)
    state = with_number(programs.init(np.uint32(0)), path, value)
    found = programs.evaluate(state.params, state.model_state, dataset.test.images, dataset.test.labels)
    assert np.isnan(found["accuracy"]) and found["examples"] == 20
    told = programs.first_non_finite_output(state.params, state.model_state, [dataset.test.images])
    assert told.startswith(where)


def test_a_warm_start_that_is_not_finite_is_refused(dataset):
    warm_start = {"params": {"dense1": {"latent_kernel": jnp.full((64, 4), jnp.inf)}}}
    told = (
        rf"`warm_start` must be finite; got params/{LATENT} \(256 infinite of 256\); give the variables of a run that"
    )
    with pytest.raises(UsageError, match=told):
        initial_state(programs_of(validate(CONFIG), dataset), 0, warm_start=warm_start)


def test_a_finished_run_whose_network_is_not_finite_is_refused(tmp_path, dataset):
    """As a program that does not watch would have left it: the newest checkpoint holds what the manifest says."""
    config = replace(CONFIG, epochs=1, data=replace(CONFIG.data, name=write_npz(dataset, tmp_path / "data.npz")))
    train(config, tmp_path / "run")
    programs, folder = programs_of(validate(config), dataset), tmp_path / "run" / "checkpoints"
    saved = restore_checkpoint(folder, state_shapes(programs))
    broken = with_number(saved.state, f"best/params/{LATENT}", np.nan)
    shutil.rmtree(folder)
    with pytest.raises(
        RunError, match=rf"`state` must be finite; got best/params/{LATENT} \(1 NaN of 256\); it is not"
    ):
        save_run(config, tmp_path / "run", broken)
    assert not folder.exists()
    save_checkpoint(folder, 5, broken, metadata=saved.metadata)
    with (
        pytest.warns(CheckpointWarning, match=r"it is not finite, first in best\.params"),
        pytest.raises(RunError, match=r"none of the 1 checkpoints .* it is not finite, first in .*latent_kernel \(1 "),
    ):
        evaluate_run(tmp_path / "run")
    shutil.rmtree(folder)
    negative = with_number(saved.state, "best/model_state/batch_stats/norm1/var", -1.0)
    save_checkpoint(folder, 5, negative, metadata=saved.metadata)
    with pytest.raises(RunError, match=r"logits are not finite on the test split, first in the output of norm1 \("):
        evaluate_run(tmp_path / "run")

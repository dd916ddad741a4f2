"""The training step: augmentation aside, what it computes, and that the linear oracle is the network's Jacobian."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnn_jax.estimators import ESTIMATORS
from bnn_jax.losses import LOSSES, augmented_margins, multiclass_hinge
from bnn_jax.models import MODELS
from bnn_jax.optim import OPTIMIZERS, bound_statistics, latent_box
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS
from bnn_jax.regularizers import REGULARIZERS
from bnn_jax.schedules import SCHEDULES
from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig
from bnn_jax.training.epoch import Batches, epoch_permutation, evaluate
from bnn_jax.training.experiment import ImageInfo, hyper_parameters, make_experiment
from bnn_jax.training.programs import make_programs
from bnn_jax.training.step import Targets, _linear_oracle, init_state, train_step
from bnn_jax.training.validation import validate

INFO = ImageInfo((8, 8, 1), 3, (100.0,), (50.0,))
CONFIG = Config("test", epochs=12, batch_size=8, model=ModelConfig("resnet6", width=4), data=DataConfig(crop_padding=1))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 24).astype(np.int32)
    images = rng.integers(0, 60, (24, 8, 8, 1))
    for image, label in zip(images, labels):
        image[2 * label : 2 * label + 4] += 150  # a band whose height tells the class
    return jnp.asarray(images, jnp.uint8), jnp.asarray(labels)


def experiment_of(config, total_steps=10):
    return make_experiment(config, INFO, total_steps=total_steps, learning_rate=config.optim.learning_rate)


def test_quantizers_are_told_how_often_they_are_called_in_an_epoch():
    """`rbnn` adapts its rotations once an epoch: every 10 steps of 2 parts each."""
    model = replace(CONFIG.model, kernel_quantizer="rbnn")
    config = validate(replace(CONFIG, epochs=2, accumulate_steps=2, model=model))
    quantizer = experiment_of(config, total_steps=20).model.kernel_quantizer
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 4)), jnp.float32)
    state, adapted = quantizer.init_state(jax.random.key(0), w), []
    parameters = quantizer.init(jax.random.key(0), w) if quantizer.init else {}
    apply = jax.jit(lambda w, state: quantizer.apply(w, state, train=True, progress=0.5, **parameters))
    for _ in range(41):
        _, after = apply(w, state)
        adapted.append(any((after[name] != state[name]).any() for name in after if name != "calls"))
        state = after
    first, second, third = np.flatnonzero(adapted)
    assert (second - first, third - second) == (20, 20)


def train_epoch(programs, state, data, epoch, config):
    batches = Batches(*data, programs.epoch_permutation(state.seed, np.int32(epoch)))
    return programs.train(state, batches, hyper_parameters(config))


SETTINGS = {
    "dfw": OptimConfig("dfw", learning_rate=0.3),
    "dfw, 3 inner steps": OptimConfig("dfw", learning_rate=0.3, inner_steps=3),
    "dfw, no box": OptimConfig("dfw", learning_rate=0.3, latent_box=None),
    "adam": OptimConfig("adam", learning_rate=0.05, schedule="cosine"),
    "sgd": OptimConfig("sgd", learning_rate=0.1, schedule="linear", weight_decay=1e-4),
    "polyak_sgd": OptimConfig("polyak_sgd", learning_rate=0.1),
    "momo": OptimConfig("momo", learning_rate=1.0),
    "adam, latent scale": OptimConfig("adam", learning_rate=0.05, scale_latent=True),
    "bnew": OptimConfig("bnew", learning_rate=0.05),
}


LONG = ("dfw, no box", "polyak_sgd", "momo", "adam, latent scale", "sgd", "dfw, 3 inner steps")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.full if n in LONG else ()) for n in SETTINGS])
def test_every_optimizer_lowers_the_loss_and_keeps_the_box(name, data):
    config = replace(CONFIG, optim=SETTINGS[name])
    programs = make_programs(config, INFO, examples=24)
    state, losses = programs.init(np.uint32(0)), []
    for epoch in range(1, 13):
        state, metrics = train_epoch(programs, state, data, epoch, config)
        losses.append(float(metrics["loss"].mean()))
        assert np.isfinite(losses[-1])
    assert np.mean(losses[-3:]) < 0.7 * losses[0]
    assert int(state.step) == 36
    if config.optim.latent_box is not None:
        assert float(bound_statistics(state.params, box=latent_box(-1, 1))["max_abs_latent"]) <= 1.0
    common = {"loss", "objective", "accuracy", "learning_rate"}
    assert set(metrics) == common | ({"gamma", "search_iterations", "refused"} if name.startswith("dfw") else set())
    if name.startswith("dfw"):
        assert ((metrics["gamma"] >= 0) & (metrics["gamma"] <= 1)).all()


@pytest.mark.parametrize(
    ("inputs", "kernel"), [("full_precision", "full_precision"), ("ste_sign", "xnor"), ("full_precision", "ttq")]
)
@pytest.mark.full
def test_every_precision_of_the_network_takes_a_step(inputs, kernel, data):
    options = {"stage_sizes": (1, 1, 1)}
    model = ModelConfig("resnet20", width=2, input_quantizer=inputs, kernel_quantizer=kernel, options=options)
    experiment = experiment_of(replace(CONFIG, model=model))
    state = jax.jit(partial(init_state, experiment))(jnp.uint32(0))
    after, metrics = jax.jit(lambda s: train_step(experiment, s, data[0][:8], data[1][:8]))(state)
    assert np.isfinite(float(metrics["loss"]))
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(after.params)}
    assert ("latent_kernel" in names) == (kernel != "full_precision")
    assert ("positive_scale" in names) == (kernel == "ttq")
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.params, state.params)
    still = [jax.tree_util.keystr(path) for path, flag in jax.tree_util.tree_leaves_with_path(moved) if not flag]
    assert not still, f"no gradient: {still}"


@pytest.mark.full
def test_the_oracle_of_a_smooth_network_linearises_it(data):
    """Its pushforward is the Jacobian, taken row by row, times the direction; at zero it gives the hinge's gradient."""
    model = ModelConfig("resnet6", width=4, input_quantizer="full_precision", kernel_quantizer="full_precision")
    experiment = experiment_of(replace(CONFIG, model=model, data=DataConfig()))
    state = jax.jit(partial(init_state, experiment))(jnp.uint32(0))
    x, labels = (data[0][:8].astype(jnp.float32) - 100) / 50, data[1][:8]

    def network(params):
        variables = {"params": params} | state.model_state
        return experiment.model.apply(variables, x, train=True, mutable=["batch_stats"])[0][0]

    key = jax.random.key(1)
    leaves, treedef = jax.tree.flatten(state.params)
    direction = treedef.unflatten(
        [jax.random.normal(jax.random.fold_in(key, i), w.shape) for i, w in enumerate(leaves)]
    )

    @jax.jit
    def found(params, distance):
        logits, pullback = jax.vjp(network, params)
        (pushed,) = jax.vjp(lambda u: pullback(u)[0], jnp.zeros_like(logits))[1](direction)
        displacement = jax.tree.map(lambda d: distance * d, direction)
        return logits, pushed, *_linear_oracle(logits, Targets((labels,), (1.0,)), pullback)(displacement)

    @jax.jit
    def expected(params):
        jacobian = jax.jacrev(network)(params)
        products = jax.tree.map(lambda j, d: jnp.tensordot(j, d, d.ndim), jacobian, direction)
        loss, gradient = jax.value_and_grad(lambda p: multiclass_hinge(network(p), labels).mean())(params)
        return sum(jax.tree.leaves(products)), gradient, loss

    logits, pushed, gradient, offset = found(state.params, 0.0)
    product, slope, loss = expected(state.params)
    np.testing.assert_allclose(pushed, product, rtol=1e-3, atol=1e-3)
    chex.assert_trees_all_close(gradient, slope, rtol=1e-3, atol=1e-4)
    assert float(offset) == pytest.approx(float(loss), rel=1e-5)

    *_, offset = found(state.params, 0.3)
    active = np.asarray(augmented_margins(logits + 0.3 * pushed, labels)).argmax(1)
    margins = np.asarray(augmented_margins(logits, labels))
    assert float(offset) == pytest.approx(margins[np.arange(8), active].mean(), rel=1e-5)


def test_the_oracle_of_a_binary_network_is_the_transpose_of_its_gradient(data):
    experiment = experiment_of(replace(CONFIG, data=DataConfig()))
    state = jax.jit(partial(init_state, experiment))(jnp.uint32(0))
    x = (data[0][:8].astype(jnp.float32) - 100) / 50

    def network(params):
        variables = {"params": params} | state.model_state
        return experiment.model.apply(variables, x, train=True, mutable=["batch_stats"])[0][0]

    @jax.jit
    def products(params):
        logits, pullback = jax.vjp(network, params)
        v = jax.tree.map(lambda w: jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), params)
        u = jnp.sin(jnp.arange(logits.size, dtype=jnp.float32)).reshape(logits.shape)
        (pushed,) = jax.vjp(lambda u: pullback(u)[0], jnp.zeros_like(logits))[1](v)
        transposed = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(pullback(u)[0]), jax.tree.leaves(v)))
        return jnp.vdot(u, pushed), transposed

    pushed, transposed = products(state.params)
    assert float(pushed) == pytest.approx(float(transposed), rel=1e-4)


@pytest.mark.full
def test_evaluation_counts_every_example_once(data):
    experiment = experiment_of(CONFIG)
    state = jax.jit(partial(init_state, experiment))(jnp.uint32(0))
    x = (np.asarray(data[0], np.float32) - 100) / 50
    variables = {"params": state.params} | state.model_state
    logits, _ = experiment.model.apply(variables, jnp.asarray(x), train=False)
    expected = {
        "accuracy": (np.asarray(logits).argmax(1) == np.asarray(data[1])).mean(),
        "loss": float(multiclass_hinge(logits, data[1]).mean()),
        "examples": 24,
    }
    for count in (24, 23):  # one batch; and, below, several with a remainder
        found = evaluate(experiment, state.params, state.model_state, data[0][:count], data[1][:count])
        if count == 24:
            assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-5)
    repeated = [jnp.concatenate([d] * 25)[:599] for d in data]
    found = evaluate(experiment, state.params, state.model_state, *repeated)
    correct = np.concatenate([np.asarray(logits).argmax(1) == np.asarray(data[1])] * 25)[:599]
    assert float(found["accuracy"]) == pytest.approx(correct.mean(), rel=1e-6)


def test_epoch_permutation_is_a_permutation_by_seed_and_epoch():
    seed = jax.random.key_data(jax.random.key(5))
    orders = [np.asarray(epoch_permutation(seed, jnp.int32(e), examples=50, batch_size=8)) for e in (1, 2, 1)]
    assert orders[0].shape == (6, 8)
    assert len(set(orders[0].ravel().tolist())) == 48
    np.testing.assert_array_equal(orders[0], orders[2])
    assert (orders[0] != orders[1]).any()


def test_seeds_differ_and_programs_are_shared():
    """Neither another seed nor another learning rate compiles again."""
    programs = make_programs(replace(CONFIG, seed=1), INFO, examples=24)
    other = replace(CONFIG, seed=2, optim=replace(CONFIG.optim, learning_rate=0.1))
    assert make_programs(other, INFO, examples=24) is programs
    first, second = (programs.init(np.uint32(seed)) for seed in (1, 2))
    kernel = lambda state: np.asarray(state.params["stem"]["kernel"])
    assert (kernel(first) != kernel(second)).any()
    assert (np.asarray(first.seed) != np.asarray(second.seed)).any()


def leaves_named(params, name):
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == name]


def test_bop_keeps_every_latent_weight_at_plus_or_minus_one(data):
    config = replace(
        CONFIG,
        model=replace(CONFIG.model, kernel_quantizer="binary"),
        optim=OptimConfig("bop", learning_rate=0.02),
    )
    programs = make_programs(config, INFO, examples=24)
    state = programs.init(np.uint32(0))
    for epoch in (1, 2):
        state, metrics = train_epoch(programs, state, data, epoch, config)
    assert np.isfinite(metrics["loss"]).all()
    for latent in leaves_named(state.params, "latent_kernel"):
        np.testing.assert_array_equal(jnp.abs(latent), 1)


def test_a_regularizer_adds_its_gradient_and_reports_its_penalty(data):
    """With plain SGD the parameters after a step differ by -rate * lambda * dR/dw, in closed form for 1 - w^2."""
    plain = replace(CONFIG, optim=OptimConfig("sgd", learning_rate=0.1, momentum=0.0))
    images, labels = data[0][:8], data[1][:8]
    regularized = replace(plain, regularizer="tang", regularizer_strength=0.01)
    start = jax.jit(partial(init_state, experiment_of(plain)))(0)

    @jax.jit
    def both(state):
        return [train_step(experiment_of(config), state, images, labels) for config in (plain, regularized)]

    (without, _), (with_it, metrics) = both(start)
    latent = [np.asarray(leaf, np.float64) for leaf in leaves_named(start.params, "latent_kernel")]
    assert float(metrics["penalty"]) == pytest.approx(0.01 * sum((1 - w**2).sum() for w in latent), rel=1e-5)
    pairs = zip(*(leaves_named(state.params, "latent_kernel") for state in (without, with_it)), latent)
    for before, after, w in pairs:
        np.testing.assert_allclose(after - before, 0.1 * 0.01 * 2 * w, atol=1e-6)
    for before, after in zip(leaves_named(without.params, "kernel"), leaves_named(with_it.params, "kernel")):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("name", ["polyak_sgd", "momo"])
@pytest.mark.full
def test_a_step_size_from_the_loss_is_of_all_that_is_differentiated(data, name):
    """Polyak's step along g is (L + penalty) / |g|, where the bound does not act."""
    config = replace(CONFIG, loss="cross_entropy", regularizer="manhattan", regularizer_strength=1e-3)
    config = validate(replace(config, optim=OptimConfig(name, 1e6, momentum=0.0, latent_box=None)))
    experiment = experiment_of(config)
    images, labels = data[0][:8], data[1][:8]
    state = jax.jit(partial(init_state, experiment))(0)

    def gradient_of(state):
        sgd = optax.with_extra_args_support(optax.sgd(1.0))
        after, _ = train_step(
            experiment._replace(optimizer=sgd), state.replace(opt_state=sgd.init(state.params)), images, labels
        )
        return jax.tree.map(jnp.subtract, state.params, after.params)

    moved, metrics = jax.jit(partial(train_step, experiment))(state, images, labels)
    length = optax.tree.norm(jax.tree.map(jnp.subtract, state.params, moved.params))
    value = float(metrics["objective"] + metrics["penalty"])
    assert float(metrics["penalty"]) > 0.1 * value
    assert float(length * optax.tree.norm(jax.jit(gradient_of)(state))) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize(("inputs", "kernel"), [("tbn", "lq_net"), ("gumbel_sign", "inq"), ("pact", "rbnn")])
@pytest.mark.full
def test_states_randomness_and_schedules_of_quantizers_travel_through_training(inputs, kernel, data):
    model = replace(CONFIG.model, input_quantizer=inputs, kernel_quantizer=kernel)
    config = replace(CONFIG, model=model, optim=OptimConfig("adam", learning_rate=0.01))
    programs = make_programs(config, INFO, examples=24)

    def run(seed):
        state = programs.init(np.uint32(seed))
        for epoch in (1, 2):
            state, metrics = train_epoch(programs, state, data, epoch, config)
        assert np.isfinite(metrics["loss"]).all()
        return state

    first, again = run(0), run(0)
    chex.assert_trees_all_equal(first, again)
    start = programs.init(np.uint32(0)).model_state.get("quantizer_state", {})
    moved = [
        jnp.any(a != b) for a, b in zip(*map(jax.tree.leaves, (start, first.model_state.get("quantizer_state", {}))))
    ]
    assert len(moved) > 0
    assert any(moved)
    assert np.isfinite(programs.evaluate(first.params, first.model_state, *data)["loss"])


@pytest.mark.parametrize(
    ("table", "name", "other"),
    [
        (ACTIVATION_QUANTIZERS, "ste_sign", "approx_sign"),
        (WEIGHT_QUANTIZERS, "xnor", "binary"),
        (ESTIMATORS, "swish_sign", "tanh_sign"),
        (MODELS, "resnet6", "resnet20"),
        (OPTIMIZERS, "dfw", "adam"),
        (SCHEDULES, "constant", "cosine"),
        (LOSSES, "smoothed_multiclass_hinge", "cross_entropy"),
        (REGULARIZERS, "tang", "manhattan"),
    ],
)
def test_another_thing_under_the_same_name_is_compiled_anew(monkeypatch, table, name, other):
    model = replace(CONFIG.model, kernel_quantizer="xnor", kernel_quantizer_options={"estimator": "swish_sign"})
    config = replace(CONFIG, model=model, regularizer="tang")
    before = make_programs(config, INFO, examples=24)
    assert make_programs(config, INFO, examples=24) is before
    monkeypatch.setitem(table, name, table[other])
    assert make_programs(config, INFO, examples=24) is not before

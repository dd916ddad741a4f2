"""Settings of training that papers use: averaged weights, mixed images, accumulation, the five largest logits."""

from dataclasses import replace
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_sets import brightness_set
from transforms import scanned

from bnn_jax.data import augment
from bnn_jax.losses import cross_entropy, multiclass_hinge
from bnn_jax.optim import latent_box, make_optimizer
from bnn_jax.stages.teachers import load_network
from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig
from bnn_jax.training.epoch import end_epoch, evaluate, first_state
from bnn_jax.training.experiment import ImageInfo, hyper_parameters, make_experiment
from bnn_jax.training.loop import train
from bnn_jax.training.programs import program_key
from bnn_jax.training.step import Targets, _linear_oracle, augmented_batch, forward, init_state, train_step

INFO = ImageInfo((4, 4, 1), 3, (100.0,), (50.0,))
SGD = OptimConfig("sgd", 0.1, momentum=0.0, latent_box=None)
CONFIG = Config("test", epochs=1, batch_size=8, loss="cross_entropy", optim=SGD, scan_steps=2)
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.integers(0, 256, (8, 4, 4, 1)), jnp.uint8)
LABELS = jnp.asarray(RNG.integers(0, 3, 8))


class Linear(nn.Module):
    """A network whose logits are linear in its weights; with a norm before them if asked."""

    classes: int = 3
    norm: bool = False
    latent: bool = False

    @nn.compact
    def __call__(self, x, *, train, progress=0.0):
        x = x.reshape(len(x), -1)
        x = nn.BatchNorm(not train, momentum=0.5, name="norm")(x) if self.norm else x
        return LatentHead(name="head")(x) if self.latent else nn.Dense(self.classes, name="head")(x)


class LatentHead(nn.Module):
    """Three outputs of weights that are named as those of a quantized layer."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("latent_kernel", nn.initializers.lecun_normal(), (x.shape[1], 3))


def experiment_of(config=CONFIG, *, classes=3, norm=False):
    experiment = make_experiment(config, INFO._replace(num_classes=classes), total_steps=10)
    return experiment._replace(model=Linear(classes, norm))


def step_of(experiment):
    return jax.jit(partial(train_step, experiment))


def start_of(experiment):
    return jax.jit(partial(init_state, experiment))(jnp.uint32(0))


# ---- numbers that are traced


def test_numbers_of_the_optimizer_are_arguments_of_one_program():
    """vmap maps over them; None, which leaves a part out, is another program."""
    numbers = {"latent_weight_decay": 1e-3, "weight_decay": 1e-4, "max_gradient_norm": 1.0, "ema_decay": 0.9}
    config = replace(CONFIG, model=ModelConfig("lenet"), optim=replace(SGD, **numbers))
    others = {"latent_weight_decay": 0.1, "weight_decay": 0.2, "max_gradient_norm": 0.5, "ema_decay": 0.5}
    assert program_key(config) == program_key(replace(config, optim=replace(SGD, **others)))
    for left_out in ("max_gradient_norm", "ema_decay"):
        without = replace(config, optim=replace(config.optim, **{left_out: None}))
        assert program_key(without) != program_key(config)
        assert hyper_parameters(config).keys() - hyper_parameters(without).keys() == {left_out}

    def averages(hyper):
        experiment = make_experiment(config, INFO, total_steps=10, **hyper)._replace(model=Linear(latent=True))
        state = init_state(experiment, jnp.uint32(0))
        for _ in range(2):
            state, _ = train_step(experiment, state, IMAGES, LABELS)
        return state.evaluated[0]["head"]["latent_kernel"]

    alone = [hyper_parameters(replace(config, optim=replace(SGD, **values))) for values in (numbers, others)]
    together = jax.jit(jax.vmap(averages))({name: np.stack([one[name] for one in alone]) for name in alone[0]})
    for index, hyper in enumerate(alone):
        np.testing.assert_allclose(together[index], jax.jit(averages)(hyper), rtol=1e-5, atol=1e-6)
    assert (together[0] != together[1]).any()


# ---- from the config to the step


def gradient_of(experiment, state, images=IMAGES, labels=LABELS):
    """Of the linear network's cross-entropy, in float64: x' (p - onehot) / n."""
    x = (np.asarray(images, np.float64).reshape(len(images), -1) - 100) / 50
    kernel, bias = (np.asarray(state.params["head"][name], np.float64) for name in ("kernel", "bias"))
    logits = x @ kernel + bias
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = p / p.sum(1, keepdims=True) - np.eye(3)[np.asarray(labels)]
    return {"head": {"kernel": x.T @ p / len(x), "bias": p.mean(0)}}


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"schedule": "milestones", "schedule_options": {"at_shares": 0.2, "factor": 0.1}}, [0.1, 0.1, 0.01, 0.01]),
        ({"schedule": "linear"}, [0.1, 0.09, 0.08, 0.07]),
        ({"warmup_share": 0.2, "warmup_start_share": 0.25}, [0.025, 0.0625, 0.1, 0.1]),
    ],
)
def test_steps_have_the_rates_of_the_schedule(settings, rates):
    """Without momentum a step is the rate times the gradient, in float64."""
    experiment = experiment_of(replace(CONFIG, optim=replace(SGD, **settings)))
    state, step = start_of(experiment), step_of(experiment)
    for rate in rates:
        gradient = gradient_of(experiment, state)["head"]
        after, metrics = step(state, IMAGES, LABELS)
        for name, own in gradient.items():
            new, old = (np.asarray(s.params["head"][name], np.float64) for s in (after, state))
            np.testing.assert_allclose(new - old, -rate * own, rtol=1e-3, atol=1e-7)
        assert float(metrics["learning_rate"]) == pytest.approx(rate)
        state = after


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.7},
        {"weight_decay": 0.2},
        {"latent_weight_decay": 0.3},
        {"weight_decay": 0.2, "latent_weight_decay": 0.3, "decay_only": ("norm/*",)},
        {"scale_latent": True},
        {"max_gradient_norm": 0.1},
        {"adaptive_clipping": 0.01},
        {"latent_box": (-0.1, 0.1)},
        {"options": {"nesterov": True}, "momentum": 0.9},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_of_the_optimizer_reach_it(settings):
    """Two steps with a setting are those of an optimizer made with it by hand, and not those without."""
    optim = replace(SGD, **settings)
    experiment, plain = (experiment_of(replace(CONFIG, optim=one)) for one in (optim, SGD))
    own = {name: value for name, value in settings.items() if name not in ("options", "latent_box")}
    box = latent_box(*optim.latent_box) if optim.latent_box else None
    by_hand = make_optimizer("sgd", learning_rate=0.1, box=box, **{"momentum": 0.0} | own, **optim.options)
    gradients = jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=(2, *x.shape)), jnp.float32), LATENT)
    found, expected, other = (
        scanned(optimizer, LATENT, gradients)[0] for optimizer in (experiment.optimizer, by_hand, plain.optimizer)
    )
    chex.assert_trees_all_equal(found, expected)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(other)))


LATENT = {
    "conv": {"latent_kernel": jnp.asarray(RNG.uniform(-0.5, 0.5, (3, 4)), jnp.float32)},
    "norm": {"scale": jnp.ones(4)},
    "head": {"kernel": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32)},
}


def test_the_regularizer_has_the_strength_of_its_schedule():
    settings = {"regularizer": "tang", "regularizer_strength": 0.01, "regularizer_schedule": "linear"}
    experiment = experiment_of(replace(CONFIG, **settings))
    first, sixth = (float(experiment.penalty(LATENT, jnp.int32(step))) for step in (0, 5))
    assert first > 0 and sixth == pytest.approx(0.5 * first)


class Progress(nn.Module):
    """Its logits are how far training is, and a random number of its own."""

    @nn.compact
    def __call__(self, x, *, train, progress):
        drawn = jax.random.uniform(self.make_rng("quantizer"), (len(x), 1))
        bias = self.param("bias", nn.initializers.zeros, (1, 1))
        return jnp.concatenate([jnp.full((len(x), 1), progress), drawn, drawn + bias], 1)


def test_networks_are_told_how_far_training_is_and_draw_anew_each_step():
    experiment = experiment_of()._replace(model=Progress())
    state = start_of(experiment)
    outputs = {}
    for step in (0, 5, 5):
        at_step = state.replace(step=jnp.int32(step))
        key, x, _ = augmented_batch(experiment, at_step, IMAGES, LABELS)
        logits, _ = forward(experiment, at_step, at_step.params, x, key)
        assert (logits[:, 0] == step / 10).all()
        outputs.setdefault(step, []).append(np.asarray(logits[:, 1]))
    assert (outputs[5][0] == outputs[5][1]).all() and (outputs[5][0] != outputs[0][0]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_augmented_as_the_config_says_anew_each_step(channels):
    settings = {"crop_padding": 1, "flip": True, "smallest_area": 0.5, "lighting_std": 0.1 if channels == 3 else 0.0}
    info = ImageInfo((4, 4, channels), 3, (100.0,) * channels, (50.0,) * channels)
    config = replace(CONFIG, data=DataConfig(**settings))
    experiment = make_experiment(config, info, total_steps=10)._replace(model=Linear())
    images = jnp.asarray(RNG.integers(0, 256, (8, 4, 4, channels)), jnp.uint8)
    state, batches = start_of(experiment), []
    for step in (0, 1):
        key, x, targets = augmented_batch(experiment, state.replace(step=jnp.int32(step)), images, LABELS)
        plain = (images.astype(jnp.float32) - 100) / 50
        own = {"padding": 1, "flip": True, "smallest_area": 0.5, "lighting_std": settings["lighting_std"]}
        np.testing.assert_allclose(x, augment(key, plain, **own, pixel_std=info.std), rtol=1e-5, atol=1e-5)
        assert (x != plain).any() and targets.shares == (1.0,) and (targets.labels[0] == LABELS).all()
        batches.append(x)
    assert (batches[0] != batches[1]).any()


# ---- averaged weights


@pytest.mark.usefixtures("standard_dtypes")
def test_the_average_is_the_exponential_one_of_parameters_and_statistics_without_bias():
    """optax's, of what every step left; the state of the run itself goes on without it."""
    config = replace(CONFIG, optim=replace(SGD, ema_decay=0.8))
    averaging, plain = experiment_of(config, norm=True), experiment_of(norm=True)
    state, other = start_of(averaging), start_of(plain)
    reference = optax.ema(0.8, debias=True)
    kept = lambda state: {"params": state.params, **state.model_state}
    chex.assert_trees_all_equal(state.evaluated, (state.params, state.model_state))
    reference_state = reference.init(kept(state))
    for _ in range(4):
        state, _ = step_of(averaging)(state, IMAGES, LABELS)
        other, _ = step_of(plain)(other, IMAGES, LABELS)
        expected, reference_state = reference.update(kept(state), reference_state)
        chex.assert_trees_all_close(state.average, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal((state.params, state.model_state), other.evaluated)
    assert other.average is None
    params, model_state = state.evaluated
    chex.assert_trees_all_equal({"params": params, **model_state}, state.average)
    best, _ = end_epoch(averaging, first_state(other).best, state, jnp.float32(0.5), jnp.int32(1))
    chex.assert_trees_all_equal(best.evaluated, state.evaluated)


def test_of_equal_epochs_the_earliest_is_the_best():
    experiment = experiment_of()
    state = start_of(experiment)
    later = state.replace(params=jax.tree.map(jnp.ones_like, state.params))
    best = first_state(state).best
    for number, (own, accuracy) in enumerate([(state, 0.5), (later, 0.5), (later, 0.4)], start=1):
        best, _ = end_epoch(experiment, best, own, jnp.float32(accuracy), jnp.int32(number))
    assert int(best.epoch) == 1
    chex.assert_trees_all_equal(best.params, state.params)


def test_states_of_quantizers_are_the_newest_ones():
    state = start_of(experiment_of())
    states = {"quantizer_state": {"frozen": jnp.ones(2, bool)}}
    state = state.replace(model_state=states, average={"params": jax.tree.map(jnp.zeros_like, state.params)})
    params, model_state = state.evaluated
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(params))
    assert model_state == states


@pytest.mark.long
@pytest.mark.full
def test_what_is_evaluated_saved_and_handed_on_is_the_average(tmp_path):
    """A run that stops learning at once, from far away: its average lags behind its last weights."""
    dataset = brightness_set(48)
    model = ModelConfig("resnet6", width=4, options={"stage_sizes": (1,)})
    optim = OptimConfig("sgd", 0.3, ema_decay=0.9)
    config = replace(CONFIG, epochs=2, batch_size=16, model=model, optim=optim)
    result = train(config, tmp_path / "run", data=dataset)
    plain = train(replace(config, optim=replace(optim, ema_decay=None)), tmp_path / "plain", data=dataset)
    assert [r["train_loss_last"] for r in (result, plain)] == [plain["train_loss_last"]] * 2
    networks = {name: load_network(tmp_path / name, dataset, which="last").variables for name in ("run", "plain")}
    head = {name: np.asarray(variables["params"]["head"]["kernel"]) for name, variables in networks.items()}
    assert np.abs(head["run"] - head["plain"]).max() > 1e-3
    mean = {name: np.asarray(variables["batch_stats"]["norm"]["mean"]) for name, variables in networks.items()}
    assert (mean["run"] != mean["plain"]).any()
    info = ImageInfo(dataset.image_shape, dataset.num_classes, dataset.mean, dataset.std)
    variables = dict(networks["run"])
    params = variables.pop("params")
    experiment = make_experiment(config, info, total_steps=6)
    found = evaluate(experiment, params, variables, *map(jnp.asarray, (dataset.test.images, dataset.test.labels)))
    assert result["test_accuracy_last"] == pytest.approx(float(found["accuracy"]))


# ---- mixed images


def test_mixed_images_have_the_loss_of_mixed_labels():
    """For the cross-entropy that is the loss of the mixed one-hot rows, in float64."""
    logits = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)
    others = LABELS[::-1]
    found = Targets((LABELS, others), (0.3, 0.7)).mean_of(cross_entropy, logits)
    wide = np.asarray(logits, np.float64)
    rows = 0.3 * np.eye(3)[LABELS] + 0.7 * np.eye(3)[others]
    log_p = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    assert float(found) == pytest.approx(-(rows * log_p).sum(axis=1).mean(), rel=1e-6)


def test_labels_of_mixed_images_have_the_shares_of_their_images():
    """Of images that are 50 times their number all over: the mixture tells whose they are."""
    experiment = experiment_of(replace(CONFIG, data=DataConfig(mixup_alpha=1.0)))
    images = jnp.broadcast_to((30 * jnp.arange(8, dtype=jnp.uint8))[:, None, None, None], (8, 4, 4, 1))
    _, x, targets = augmented_batch(experiment, start_of(experiment), images, jnp.arange(8))
    (own, others), (share, rest) = targets
    pixels = (30 * np.arange(8) - 100) / 50
    mixed = np.asarray(share) * pixels[np.asarray(own)] + np.asarray(rest) * pixels[np.asarray(others)]
    np.testing.assert_allclose(x[:, 0, 0, 0], mixed.ravel(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(share + rest, 1, rtol=1e-6)
    assert sorted(others.tolist()) == own.tolist() == list(range(8)) and (others != own).any()
    assert not np.allclose(share, 0.5, atol=0.01)


def test_a_step_on_mixed_images_learns_from_both_labels():
    experiment = experiment_of(replace(CONFIG, data=DataConfig(mixup_alpha=1.0)))
    state = start_of(experiment)
    after, metrics = step_of(experiment)(state, IMAGES, LABELS)
    plain, without = step_of(experiment_of())(state, IMAGES, LABELS)
    assert float(metrics["objective"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    assert float(metrics["loss"]) != pytest.approx(float(without["loss"]), rel=1e-3)
    assert (after.params["head"]["kernel"] != plain.params["head"]["kernel"]).any()


def test_the_oracle_of_mixed_hinge_losses_is_their_piece_of_the_linear_network():
    """On a linear network offset + gradient . d is the mixed loss at w + d, wherever that is."""
    experiment = experiment_of()
    state = start_of(experiment)
    x = (IMAGES.astype(jnp.float32) - 100) / 50
    targets = Targets((LABELS, LABELS[::-1]), (0.3, 0.7))
    network = lambda params: experiment.model.apply({"params": params}, x, train=True)
    logits, pullback = jax.vjp(network, state.params)
    oracle = jax.jit(_linear_oracle(logits, targets, pullback))
    for seed in range(3):
        key = jax.random.key(seed)
        move = jax.tree.map(lambda w, key=key: 3 * jax.random.normal(key, w.shape), state.params)
        gradient, offset = oracle(move)
        value = offset + sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, move))))
        moved = network(jax.tree.map(jnp.add, state.params, move))
        assert float(value) == pytest.approx(float(targets.mean_of(multiclass_hinge, moved)), rel=1e-4)


# ---- accumulation

ACCUMULATED = {
    "sgd": {},
    "dfw": {"loss": "smoothed_multiclass_hinge", "optim": OptimConfig("dfw", 1.0)},
    "mixed": {"data": DataConfig(mixup_alpha=0.4)},
    "regularized": {"regularizer": "tang", "regularizer_strength": 0.01},
}


@pytest.mark.parametrize("name", ACCUMULATED)
def test_a_step_in_parts_is_the_step_on_the_whole_batch(name):
    """Where nothing depends on the batch but the loss; Deep Frank-Wolfe gets the loss of all of it."""
    config = replace(CONFIG, **ACCUMULATED[name])
    whole, parts = experiment_of(config), experiment_of(replace(config, accumulate_steps=4))
    state = start_of(whole)
    expected, found = (step_of(experiment)(state, IMAGES, LABELS) for experiment in (whole, parts))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_parts_have_statistics_of_their_own_one_after_another():
    """With a norm: the mean of the parts' gradients, and the running means that they leave in turn."""
    config = replace(CONFIG, batch_size=4)
    one, parts = experiment_of(config, norm=True), experiment_of(replace(config, accumulate_steps=2), norm=True)
    state = start_of(one)
    halves = [(IMAGES[row::2], LABELS[row::2]) for row in range(2)]
    steps = [step_of(one)(state, *half)[0].params for half in halves]
    second = step_of(one)(step_of(one)(state, *halves[0])[0], *halves[1])[0]
    found, _ = step_of(parts)(state, IMAGES, LABELS)
    chex.assert_trees_all_close(found.params, jax.tree.map(lambda a, b: (a + b) / 2, *steps), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(found.model_state, second.model_state, rtol=1e-5)


# ---- the five largest


@pytest.mark.parametrize("examples", [7, 260])
def test_the_five_largest_logits_are_counted_from_a_hundred_classes_on(examples):
    experiment = experiment_of(classes=100)
    state = start_of(experiment)
    images = jnp.asarray(RNG.integers(0, 256, (examples, 4, 4, 1)), jnp.uint8)
    labels = jnp.asarray(RNG.integers(0, 100, examples))
    found = evaluate(experiment, state.params, {}, images, labels)
    kernel, bias = (np.asarray(state.params["head"][name], np.float64) for name in ("kernel", "bias"))
    logits = (np.asarray(images, np.float64).reshape(examples, -1) - 100) / 50 @ kernel + bias
    order = np.argsort(-logits, axis=1, kind="stable")
    expected = (order[:, :5] == np.asarray(labels)[:, None]).any(axis=1).mean()
    assert float(found["top5_accuracy"]) == pytest.approx(expected, abs=1e-6)
    assert float(found["accuracy"]) == pytest.approx((order[:, 0] == np.asarray(labels)).mean(), abs=1e-6)
    assert set(evaluate(experiment_of(), start_of(experiment_of()).params, {}, IMAGES, LABELS)) == {
        "loss",
        "accuracy",
        "examples",
    }


@pytest.mark.full
def test_a_network_that_tells_nothing_apart_has_no_more_than_five_of_a_hundred():
    experiment = experiment_of(classes=100)
    params = jax.tree.map(jnp.zeros_like, start_of(experiment).params)
    images = jnp.zeros((100, 4, 4, 1), jnp.uint8)
    found = evaluate(experiment, params, {}, images, jnp.arange(100))
    assert float(found["top5_accuracy"]) == pytest.approx(0.05)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*has 3 of 100 classes")
def test_the_five_largest_are_in_the_record_and_the_result(tmp_path):
    dataset = brightness_set(48)
    dataset = replace(dataset, num_classes=100)
    config = replace(CONFIG, batch_size=16, model=ModelConfig("resnet6", width=4, options={"stage_sizes": (1,)}))
    result = train(config, tmp_path, data=dataset)
    for which in ("best", "last"):
        variables = dict(load_network(tmp_path, dataset, which=which).variables)
        info = ImageInfo(dataset.image_shape, 100, dataset.mean, dataset.std)
        experiment, params = make_experiment(config, info, total_steps=3), variables.pop("params")
        tested = jnp.asarray(dataset.test.images), jnp.asarray(dataset.test.labels)
        found = evaluate(experiment, params, variables, *tested)
        assert result[f"test_top5_accuracy_{which}"] == pytest.approx(float(found["top5_accuracy"]))

"""Laws of the table of optimizers: boxes, dtypes, traced rates, options, and what an optimizer goes with."""

import inspect
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms import scanned, training_step

from bnn_jax.errors import UsageError
from bnn_jax.optim import (
    OPTIMIZERS,
    bop,
    deep_frank_wolfe,
    latent_box,
    make_optimizer,
    overcome_silent_weights,
    push_to_bounds,
    with_options,
)
from bnn_jax.schedules import constant

RNG = np.random.default_rng(0)
PARAMS = {
    "conv": {"latent_kernel": jnp.asarray(RNG.uniform(-1, 1, (3, 4)), jnp.float32)},
    "head": {"kernel": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32)},
}
GRADIENTS = jax.tree.map(lambda w: jnp.asarray(RNG.normal(size=(4, *w.shape)), jnp.float32), PARAMS)
OTHER_OPTIONS = {
    "dfw": {"epsilon": 1.0, "target": 0.3, "target_share": 0.9},
    "adam": {"b2": 0.5, "eps": 0.1, "decoupled": False},
    "sgd": {"nesterov": True},
    "polyak_sgd": {"f_min": 0.7},
    "momo": {"lower_bound": 0.7, "adapt_lower_bound": True},
    "bop": {"threshold": 5.0, "adaptivity_rate": 1.0},
    "ovsw": {"least_ratio": 9.0, "penalty": 0.1, "flip_momentum": 1.0, "flip_threshold": 0.9},
    "bnew": {"rate": 0.1, "steps_per_epoch": 2, "freeze_from": 0.25, "order": "after"},
}


def made(optimizer, learning_rate=0.1, **settings):
    common = {"learning_rate": constant(learning_rate, 1), "box": latent_box(), "total_steps": 6}
    return make_optimizer(optimizer, weight_decay=0.01, **common, **settings)


def options_of(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_stay_in_their_box_in_their_dtype_and_a_step_is_compiled_once(name, dtype):
    optimizer = made(name)
    params, gradients = jax.tree.map(lambda x: x.astype(dtype), (PARAMS, GRADIENTS))
    step, state = training_step(optimizer), optimizer.init(params)
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype), (params, state))
    for gradient in [jax.tree.map(lambda g, row=row: g[row], gradients) for row in range(4)]:
        before = params
        params, state = step(params, state, gradient)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), (params, state)) == kinds
        assert np.abs(np.asarray(params["conv"]["latent_kernel"], np.float32)).max() <= 1
        assert (params["head"]["kernel"] != before["head"]["kernel"]).any()
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rate_momentum_and_decay_may_be_traced(name):
    """One program for all values, under vmap too; a learning rate of 0.1 is that of the plain number."""

    @jax.jit
    def kernels(rates, momentum, weight_decay):
        def one(rate):
            settings = {"momentum": momentum, "weight_decay": weight_decay, "box": latent_box(), "total_steps": 6}
            optimizer = make_optimizer(name, learning_rate=constant(rate, 1), **settings)
            return scanned(optimizer, PARAMS, GRADIENTS)[0]["head"]["kernel"]

        return jax.vmap(one)(rates)

    rates = jnp.array([0.1, 0.001])
    together = kernels(rates, 0.9, 0.01)
    assert np.ptp(together, axis=0).max() > 0
    np.testing.assert_allclose(
        together[0], scanned(made(name), PARAMS, GRADIENTS)[0]["head"]["kernel"], rtol=1e-5, atol=1e-6
    )
    kernels(rates + 1, 0.5, 0.0)
    assert kernels._cache_size() == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_option_changes_what_the_optimizer_does(name):
    assert OTHER_OPTIONS[name].keys() == options_of(OPTIMIZERS[name].make).keys()
    run = partial(scanned, params=PARAMS, gradients=GRADIENTS)
    rate = 1.0 if name == "ovsw" else 0.1  # which counts changes of signs
    default = run(made(name, rate))[0]
    for option, value in OTHER_OPTIONS[name].items():
        changed = run(made(name, rate, **{option: value}))[0]
        assert any((a != b).any() for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(default))), option


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("dfw", deep_frank_wolfe),
        ("adam", optax.adamw),
        ("sgd", optax.sgd),
        ("polyak_sgd", optax.polyak_sgd),
        ("momo", optax.contrib.momo),
        ("bop", bop),
        ("ovsw", overcome_silent_weights),
        ("bnew", push_to_bounds),
    ],
)
def test_options_default_to_what_the_function_takes_by_itself(name, function):
    own = {"decoupled": True} if name == "adam" else {}  # optax has a function for each
    assert options_of(OPTIMIZERS[name].make).items() <= (options_of(function) | own).items()


DECAYS = {"conv/latent_kernel": 0.3, "head/kernel": 0.2, "head/bias": 0.0}


def numpy_steps(name, w, gradients, decay):
    """Three steps of rate 0.1, momentum 0.9, in float64, from the formulas of the papers."""
    m = v = np.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        if name == "sgd":
            m = 0.9 * m + g + decay * w
            w = w - 0.1 * m
        else:
            coupled = name == "coupled adam"
            g = g + decay * w if coupled else g
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            w = w - 0.1 * (step if coupled else step + decay * w)
    return w


@pytest.mark.parametrize("name", ["sgd", "adam", "coupled adam", "bnew"])
def test_latent_and_other_weights_have_their_own_decay_and_patterns_spare_the_rest(name):
    params = {**PARAMS, "head": {**PARAMS["head"], "bias": jnp.ones(2)}}
    gradients = {**GRADIENTS, "head": {**GRADIENTS["head"], "bias": jnp.ones((4, 2)).cumsum(axis=0)}}
    gradients = jax.tree.map(lambda g: g[:3], gradients)
    options = {"decoupled": False} if name == "coupled adam" else {"rate": 0.0} if name == "bnew" else {}
    optimizer = make_optimizer(
        name.split()[-1],
        learning_rate=constant(0.1, 1),
        box=(-1e9, 1e9) if name == "bnew" else None,
        total_steps=1000,
        weight_decay=0.2,
        latent_weight_decay=0.3,
        decay_only=("*kernel",),
        **options,
    )
    found = scanned(optimizer, params, gradients)[0]
    for path, decay in DECAYS.items():
        layer, leaf = path.split("/")
        wide = [np.asarray(tree[layer][leaf], np.float64) for tree in (params, gradients)]
        np.testing.assert_allclose(found[layer][leaf][-1], numpy_steps(name, *wide, decay), rtol=1e-5, atol=1e-6)


def test_deep_frank_wolfe_decays_latent_and_other_weights_inside_its_proximal_problem():
    """One step without a box and momentum, in float64: r enters the step size as well as the step."""
    decays = {"weight_decay": 0.2, "latent_weight_decay": 0.3}
    optimizer = make_optimizer("dfw", learning_rate=constant(0.1, 1), momentum=0.0, **decays)
    found = scanned(optimizer, PARAMS, GRADIENTS)[0]
    w, g, after = (
        [np.asarray(tree["conv"]["latent_kernel"], np.float64), np.asarray(tree["head"]["kernel"], np.float64)]
        for tree in (PARAMS, jax.tree.map(lambda x: x[0], GRADIENTS), jax.tree.map(lambda x: x[0], found))
    )
    r = [0.3 * w[0], 0.2 * w[1]]
    loss, eta = 1.0, 0.1
    pull, square = sum((a * b).sum() for a, b in zip(g, r)), sum((a * a).sum() for a in g)
    gamma = np.clip((loss - eta * pull) / (eta * square + 1e-5), 0, 1)
    for before, gradient, decay, moved in zip(w, g, r, after):
        np.testing.assert_allclose(moved, before - eta * (decay + gamma * gradient), rtol=1e-5, atol=1e-6)


def test_a_pattern_of_decay_that_matches_nothing_is_refused_before_the_first_step():
    optimizer = make_optimizer("sgd", learning_rate=constant(0.1, 1), decay_only=("*kernal",))
    with pytest.raises(
        ValueError, match=r"^`decay_only` \(='\*kernal'\) matches none of the 2 parameters; their names"
    ):
        optimizer.init(PARAMS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_a_rate_that_is_0_at_first(name):
    """As in a warm-up: the bound of polyak_sgd's step, and Bop's adaptivity, are in proportion to the given peak."""
    rising = lambda step: 0.1 * jnp.minimum(step, 2) / 2
    settings = {"learning_rate": rising, "peak": 0.1, "box": latent_box(), "total_steps": 6}
    moved = scanned(make_optimizer(name, **settings), PARAMS, GRADIENTS)[0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))
    np.testing.assert_array_equal(moved["head"]["kernel"][0], PARAMS["head"]["kernel"])
    assert (moved["head"]["kernel"][1] != moved["head"]["kernel"][0]).any()


def numpy_of_both(tree):
    return np.concatenate([np.asarray(tree[layer][leaf], np.float64).ravel() for layer, leaf in LEAVES])


LEAVES = (("conv", "latent_kernel"), ("head", "kernel"))
FALLING = lambda step: jnp.float32(0.3) * 0.1**step  # from above Polyak's step size to below it


def numpy_polyak(w, gradients, *, f_min, momentum):
    """Loizou et al., 2021, with a heavy ball: m <- momentum m + min((L - f_min) / |g|^2, rate) g, in float64."""
    m, path = np.zeros_like(w), []
    for step, g in enumerate(gradients):
        m = momentum * m + min((1.0 - f_min) / (g @ g), 0.3 * 0.1**step) * g
        w = w - m
        path.append(w)
    return path


def numpy_momo(w, gradients, *, lower_bound, momentum):
    """Schaipp et al., 2024, algorithm 1, in float64: averages start from the first step's."""
    path = []
    for step, g in enumerate(gradients):
        keep, rate = (0.0 if step == 0 else momentum), 0.3 * 0.1**step
        if step == 0:
            d, f, inner = np.zeros_like(w), 0.0, 0.0
        d, f = keep * d + (1 - keep) * g, keep * f + (1 - keep) * 1.0
        inner = keep * inner + (1 - keep) * (g @ w)
        w = w - min(rate, max(f - inner - lower_bound + d @ w, 0.0) / (d @ d)) * d
        path.append(w)
    return path


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_step_sizes_from_the_loss_are_those_of_the_papers(momentum):
    """With a rate that falls: the quotient is of the gradient itself, the rate its bound alone."""
    w = numpy_of_both(PARAMS)
    gradients = [numpy_of_both(jax.tree.map(lambda g, step=step: g[step], GRADIENTS)) for step in range(4)]
    settings = {"learning_rate": FALLING, "peak": 0.3, "momentum": momentum}
    expected = {
        "polyak_sgd": numpy_polyak(w, gradients, f_min=0.4, momentum=momentum),
        "momo": numpy_momo(w, gradients, lower_bound=0.4, momentum=momentum),
    }
    assert 0.003 < (1 - 0.4) / max(g @ g for g in gradients) < 0.3  # both sides of the minimum are taken
    options = {"polyak_sgd": {"f_min": 0.4}, "momo": {"lower_bound": 0.4}}
    for name, path in expected.items():
        found = scanned(make_optimizer(name, **settings, **options[name]), PARAMS, GRADIENTS)[0]
        for step, wanted in enumerate(path):
            own = numpy_of_both(jax.tree.map(lambda leaf, step=step: leaf[step], found))
            np.testing.assert_allclose(own, wanted, rtol=1e-5, atol=1e-6, err_msg=f"{name} {step}")


@pytest.mark.parametrize(("name", "option"), [("polyak_sgd", "f_min"), ("momo", "lower_bound")])
def test_a_loss_below_that_of_the_optimum_moves_nothing(name, option):
    optimizer = make_optimizer(name, learning_rate=0.3, momentum=0.0, **{option: 2.0})
    gradient = jax.tree.map(lambda g: g[0], GRADIENTS)
    updates, _ = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS, value=jnp.float32(1.0))
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(PARAMS))


def test_bops_adaptivity_falls_and_rises_with_the_rate():
    rising = lambda step: 0.1 * jnp.minimum(step, 2) / 2
    settings = {"threshold": 0.01, "adaptivity_rate": 0.2, "box": latent_box()}
    optimizer = make_optimizer("bop", learning_rate=rising, peak=0.1, **settings)
    signs = {**PARAMS, "conv": {"latent_kernel": jnp.sign(PARAMS["conv"]["latent_kernel"])}}
    found = np.asarray(scanned(optimizer, signs, GRADIENTS)[0]["conv"]["latent_kernel"], np.float64)
    w, m = np.asarray(signs["conv"]["latent_kernel"], np.float64), 0.0
    for step, gradient in enumerate(np.asarray(GRADIENTS["conv"]["latent_kernel"], np.float64)):
        adaptivity = 0.2 * min(step, 2) / 2
        m = (1 - adaptivity) * m + adaptivity * gradient
        w = np.where((np.abs(m) >= 0.01) & (np.sign(m) == np.sign(w)), -w, w)
        np.testing.assert_array_equal(found[step], w)
    assert (found[0] == signs["conv"]["latent_kernel"]).all() and (found[-1] != found[0]).any()
    with pytest.raises(ValueError, match=r"^`peak` \(=0\.0\) must be positive; give the highest value of"):
        make_optimizer("bop", learning_rate=rising, **settings)


def numpy_clipped(gradients, params, norm=None, adaptive=None):
    """One step's gradients, clipped in float64; `head` is the last layer."""
    g = {
        path: np.asarray(gradients[path[0]][path[1]], np.float64)
        for path in [("conv", "latent_kernel"), ("head", "kernel")]
    }
    if norm is not None:
        size = np.sqrt(sum((x**2).sum() for x in g.values()))
        g = {path: x * min(1.0, norm / size) for path, x in g.items()}
    if adaptive is not None:
        x, w = g["conv", "latent_kernel"], np.asarray(params["conv"]["latent_kernel"], np.float64)
        largest = adaptive * np.maximum(np.sqrt((w**2).sum(axis=0)), 1e-3)
        g["conv", "latent_kernel"] = x * np.minimum(1.0, largest / np.sqrt((x**2).sum(axis=0)))
    return g


@pytest.mark.parametrize(
    ("clipping", "expected"),
    [
        ({"max_gradient_norm": 0.5}, {"norm": 0.5}),
        ({"max_gradient_norm": 1e3}, {"norm": 1e3}),
        ({"adaptive_clipping": 0.02}, {"adaptive": 0.02}),
        ({"max_gradient_norm": 2.0, "adaptive_clipping": 0.3}, {"norm": 2.0, "adaptive": 0.3}),
    ],
)
def test_gradients_are_clipped_before_decay_and_momentum(clipping, expected):
    """A step of SGD with rate 1 and coupled decay: w - (clipped gradient + decay w)."""
    decays = {"weight_decay": 0.25, "latent_weight_decay": 0.25}
    optimizer = make_optimizer("sgd", learning_rate=constant(1.0, 1), momentum=0.0, **decays, **clipping)
    found = scanned(optimizer, PARAMS, GRADIENTS)[0]
    clipped = numpy_clipped(jax.tree.map(lambda g: g[0], GRADIENTS), PARAMS, **expected)
    for (layer, leaf), g in clipped.items():
        np.testing.assert_allclose(found[layer][leaf][0], 0.75 * PARAMS[layer][leaf] - g, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 1, 1, 6), (2, 3, 2, 3, 4), (3, 4)])
def test_adaptive_clipping_is_by_output_channel_whatever_the_rank(shape):
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=shape), 10 * rng.normal(size=shape) ** 3
    params, gradients = ({"conv": {"latent_kernel": jnp.asarray(x, jnp.float32)}} for x in (w, g))
    optimizer = make_optimizer("sgd", learning_rate=constant(1.0, 1), momentum=0.0, adaptive_clipping=0.1)
    found, _ = optimizer.update(gradients, optimizer.init(params), params, value=1.0)
    flat_w, flat_g = w.reshape(-1, shape[-1]), g.reshape(-1, shape[-1])
    largest = 0.1 * np.maximum(np.linalg.norm(flat_w, axis=0), 1e-3)
    wanted = -flat_g * np.minimum(1.0, largest / np.linalg.norm(flat_g, axis=0))
    np.testing.assert_allclose(found["conv"]["latent_kernel"], wanted.reshape(shape), rtol=1e-5)


def test_an_optimizer_is_made_from_a_name_or_a_record():
    record = OPTIMIZERS["sgd"]._replace(make=lambda settings, *, sign=1.0: optax.scale(sign))
    optimizer = made(record, sign=-2.0)
    updates, _ = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, value=1.0)
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda w: -2 * w, PARAMS))
    by_record, by_name = (scanned(made(which), PARAMS, GRADIENTS)[0] for which in (OPTIMIZERS["sgd"], "sgd"))
    chex.assert_trees_all_equal(by_record, by_name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamm", {}, r"`optimizer` \(='adamm'\) is not known; did you mean 'adam'\?"),
        ("bop", {"treshold": 1.0}, r"`options` \(='treshold'\) is not known; did you mean 'threshold'\?"),
        ("bnew", {"steps_per_epoch": 1.5}, r"`steps_per_epoch` \(=1\.5\) must be a whole number"),
    ],
)
def test_unknown_names_and_options_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        made(name, **options)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("momo", {"latent_weight_decay": 1e-4}, r"`latent_weight_decay` \(=0.0001\) is for dfw, adam, .*; leave"),
        ("bop", {"latent_weight_decay": np.float32(0.5)}, r"`latent_weight_decay` \(=0.5\) is for dfw, adam, "),
        ("bop", {"latent_weight_decay": jnp.float32(0.5)}, r"`latent_weight_decay` \(=0.5\) is for dfw, adam, "),
        ("bop", {"decay_only": ("*kernel",)}, r"`decay_only` \(=\('\*kernel',\)\) is for dfw, adam"),
        ("dfw", {"scale_latent": True}, r"`scale_latent` \(=True\) is for adam, sgd"),
    ],
)
def test_what_an_optimizer_would_ignore_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(name, learning_rate=constant(0.1, 1), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"learning_rate": -1.0},
            r"^`learning_rate` \(=-1\.0\) must be positive; give a positive number or",
        ),
        ({"momentum": 1.0}, r"^`momentum` \(=1\.0\) must be in \[0, 1\); 0\.9 is usual$"),
        ({"learning_rate": "0.1"}, r"^`learning_rate` \(='0\.1'\) must be a number or a schedule$"),
        ({"weight_decay": None}, r"^`weight_decay` \(=None\) must be a number$"),
        ({"momentum": lambda step: 0.9}, r"^`momentum` \(=.*\) must be a number$"),
        ({"weight_decay": -1.0}, r"^`weight_decay` \(=-1\.0\) must not be negative; 0 decays nothing$"),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer("sgd", **{"learning_rate": 0.1} | settings)


def test_a_number_is_a_rate_that_stays():
    by_number, by_schedule = (make_optimizer("sgd", learning_rate=rate) for rate in (0.1, constant(0.1, 1)))
    chex.assert_trees_all_equal(*(scanned(made, PARAMS, GRADIENTS)[0] for made in (by_number, by_schedule)))


def test_options_may_be_called_as_settings_are():
    """optax.sgd has a momentum of its own, which is no setting of the table's."""
    own = make_optimizer(with_options("optax:sgd", {"momentum": 0.5}), learning_rate=0.1)
    chex.assert_trees_all_equal(*(scanned(made, PARAMS, GRADIENTS)[0] for made in (own, optax.sgd(0.1, momentum=0.5))))
    with pytest.raises(ValueError, match=r"^`momentum` \(=0\.5\) is for the optimizers of the table; bind that"):
        make_optimizer("optax:sgd", learning_rate=0.1, momentum=0.5)
    with pytest.raises(UsageError, match=r"`options` \(='momentun'\) is not known; did you mean 'momentum'"):
        with_options("optax:sgd", {"momentun": 0.5})


def test_trees_without_decayed_or_with_boxed_parameters():
    """Latent weights alone, none at all, and those in a box of Flax's that names their axes."""
    latent = {"conv": PARAMS["conv"]}
    for params in (latent, {}):
        for name in OPTIMIZERS:
            made(name).init(params)
    kernel = nn.Partitioned(jnp.full((3, 4), 0.5), (None, "model"))
    params = {"conv": {"latent_kernel": kernel}, "head": {"kernel": jnp.full((4, 2), 0.5)}}
    optimizer = make_optimizer("sgd", learning_rate=10.0, box=latent_box())
    moved, _ = training_step(optimizer)(params, optimizer.init(params), jax.tree.map(jnp.ones_like, params))
    assert moved["conv"]["latent_kernel"].value.tolist() == [[-1.0] * 4] * 3
    assert moved["head"]["kernel"].tolist() == [[-9.5] * 2] * 4


def test_bnew_needs_a_box_and_an_end():
    with pytest.raises(ValueError, match=r"`box` and `total_steps` must be given for bnew"):
        make_optimizer("bnew", learning_rate=constant(0.1, 1))


def test_the_table_says_what_goes_with_what():
    """What the config refuses by these records is in tests/training/test_config.py."""
    assert [name for name, optimizer in OPTIMIZERS.items() if optimizer.takes_inner_steps] == ["dfw"]
    assert [name for name, optimizer in OPTIMIZERS.items() if optimizer.exact_step] == ["dfw"]
    assert [name for name, optimizer in OPTIMIZERS.items() if not optimizer.separate_decay] == ["momo", "bop"]
    assert [name for name, optimizer in OPTIMIZERS.items() if optimizer.takes_clipping] == [
        "adam",
        "sgd",
        "bop",
        "bnew",
    ]
    scaled = [name for name, optimizer in OPTIMIZERS.items() if optimizer.takes_scale_latent]
    for name in scaled:
        plain, larger = (
            scanned(made(name, learning_rate=1e-3, scale_latent=scale), PARAMS, GRADIENTS)[0]["conv"]["latent_kernel"][
                0
            ]
            for scale in (False, True)
        )
        moved = (larger - PARAMS["conv"]["latent_kernel"]) / (plain - PARAMS["conv"]["latent_kernel"])
        np.testing.assert_allclose(np.median(moved), np.sqrt(7 / 1.5), rtol=0.05)
    assert scaled == ["adam", "sgd", "polyak_sgd", "momo"]

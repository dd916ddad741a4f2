"""Bop: which weights flip, that they are binary at all times, and how it behaves as a transform of optax."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transforms import scanned, training_step

from bnn_jax.optim.bop import bop, bop_on_latent

NETWORK = {
    "conv": {"latent_kernel": jnp.array([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]]), "bias": jnp.array([0.5, -0.25])},
    "head": {"kernel": jnp.array([[0.3], [2.0]])},
}


def twin(w, gradients, threshold, rates):
    """The published rule, one weight at a time, in float64.

    Returns:
      The weights after each step, each step's flips, and how near |m| ever was to the threshold.
    """
    w, m = [float(x) for x in w], [0.0] * len(w)
    path, flips, margin = [], [], np.inf
    for gradient, gamma in zip(gradients, rates):
        flipped = 0
        for i, g in enumerate(gradient):
            m[i] = (1 - gamma) * m[i] + gamma * float(g)
            margin = min(margin, abs(abs(m[i]) - threshold))
            if m[i] != 0 and abs(m[i]) >= threshold and (m[i] > 0) == (w[i] > 0):
                w[i], flipped = -w[i], flipped + 1
        path.append(list(w))
        flips.append(flipped)
    return path, flips, margin


def run(optimizer, w, gradients):
    """The weights and flips of each step, and the last state."""
    path, states = scanned(optimizer, w, gradients)
    return np.asarray(path), np.asarray(states.flips), jax.tree.map(lambda x: x[-1], states)


# ---- the rule


@pytest.mark.parametrize(("threshold", "gamma"), [(0.0, 1.0), (0.02, 0.1), (0.3, 0.5), (1e9, 0.5)])
def test_it_equals_the_scalar_twin_over_many_steps(threshold, gamma):
    rng = np.random.default_rng(0)
    w, gradients = rng.choice([-1.0, 1.0], 50).astype(np.float32), rng.normal(size=(30, 50)).astype(np.float32)
    expected, expected_flips, margin = twin(w, gradients, threshold, [gamma] * 30)
    assert margin > 1e-6  # so float32 decides as float64 does
    path, flips, state = run(bop(threshold=threshold, adaptivity_rate=gamma), jnp.asarray(w), gradients)
    np.testing.assert_array_equal(path, expected)
    np.testing.assert_array_equal(flips, expected_flips)
    assert (sum(expected_flips) > 0) == (threshold < 1e9)
    assert int(state.count) == 30


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_weights_are_binary_and_dtypes_kept_whatever_the_gradients_are(dtype, data):
    size, steps = 6, 4
    numbers = st.floats(-(2.0**100), 2.0**100, width=32)
    gradients = jnp.asarray(data.draw(hnp.arrays(np.float32, (steps, size), elements=numbers)), dtype)
    w = jnp.asarray(data.draw(hnp.arrays(np.float32, size, elements=st.sampled_from([-1.0, 1.0]))), dtype)
    optimizer = bop(threshold=data.draw(st.sampled_from([0.0, 1e-6, 0.5])), adaptivity_rate=0.25)
    state, update, before = optimizer.init(w), jax.jit(optimizer.update), w
    for gradient in gradients:
        updates, state = update(gradient, state, before)
        after = optax.apply_updates(before, updates)
        assert after.dtype == updates.dtype == before.dtype
        assert set(np.asarray(updates, np.float32)) <= {-2.0, 0.0, 2.0}
        assert set(np.asarray(after, np.float32)) <= {-1.0, 1.0}
        assert int(state.flips) == int((np.asarray(after) != np.asarray(before)).sum())
        before = after


def test_the_threshold_is_inclusive_and_zero_asks_for_nothing():
    w = jnp.array([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    gradient = jnp.array([0.5, np.nextafter(np.float32(0.5), np.float32(0)), -0.5, -0.5, 0.5, -0.0])
    updates, state = bop(threshold=0.5, adaptivity_rate=1.0).update(gradient, bop().init(w), w)
    np.testing.assert_array_equal(updates, [-2, 0, 0, 2, 0, 0])
    assert int(state.flips) == 2
    still, state = bop(threshold=0.0, adaptivity_rate=1.0).update(jnp.zeros(6), bop().init(w), w)
    np.testing.assert_array_equal(still, np.zeros(6))
    assert int(state.flips) == 0


def test_a_steady_gradient_flips_when_its_average_reaches_the_threshold():
    gamma, threshold, g = 0.1, 0.5, 1.0
    first = int(np.ceil(np.log(1 - threshold / g) / np.log(1 - gamma)))  # m_t = g (1 - (1 - gamma)^t)
    path, flips, _ = run(bop(threshold=threshold, adaptivity_rate=gamma), jnp.ones(1), jnp.full((12, 1), g))
    np.testing.assert_array_equal(path[:, 0], [1.0] * (first - 1) + [-1.0] * (13 - first))
    assert flips.sum() == 1


def test_small_rates_count_in_bfloat16_too():
    """1e-4 of a gradient is below the resolution of a bfloat16 average."""
    w = jnp.ones(1, jnp.bfloat16)
    gradients = jnp.full((3000, 1), 1.0, jnp.bfloat16)
    expected, _, _ = twin([1.0], np.ones((3000, 1)), 0.2, [1e-4] * 3000)
    path, _, state = run(bop(threshold=0.2, adaptivity_rate=1e-4), w, gradients)
    assert state.momentum.dtype == jnp.float32
    assert abs(int((path > 0).sum()) - sum(step[0] > 0 for step in expected)) <= 2
    assert path[-1] == -1


# ---- weights that are not binary in the beginning


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_first_update_makes_any_weight_its_sign_exactly(dtype):
    rng = np.random.default_rng(1)
    wide = rng.normal(size=100_000) * 10.0 ** rng.uniform(-8, 1.5, 100_000)
    edges = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0, 1e-30, -1e-30, 255.0, -255.0]
    w = jnp.asarray(np.concatenate([np.clip(wide, -255, 255), edges]), dtype)
    signs = np.where(np.asarray(w, np.float64) < 0, -1, 1)
    not_binary = np.abs(np.asarray(w, np.float64)) != 1
    gradient = 5 * jnp.asarray(signs, dtype)  # asks every weight to flip
    optimizer = bop(threshold=1e-3, adaptivity_rate=0.5)
    for update in (optimizer.update, jax.jit(optimizer.update)):
        updates, state = update(gradient, optimizer.init(w), w)
        landed = optax.apply_updates(w, updates)
        np.testing.assert_array_equal(np.asarray(landed, np.float64), np.where(not_binary, signs, -signs))
        again, state = update(gradient, state, landed)
        flipped = np.asarray(optax.apply_updates(landed, again), np.float64)
        np.testing.assert_array_equal(flipped, -signs)  # all ask; those that flipped before agree with their m now
        assert int(state.flips) == not_binary.sum()


# ---- a schedule, hyper-parameters, transformations


def test_a_schedule_of_the_rate_is_read_at_the_count():
    rng = np.random.default_rng(2)
    w, gradients = rng.choice([-1.0, 1.0], 40).astype(np.float32), rng.normal(size=(20, 40)).astype(np.float32)
    schedule = optax.exponential_decay(0.5, 10, 0.1)
    rates = [0.5 * 0.1 ** (t / 10) for t in range(20)]
    expected, flips, margin = twin(w, gradients, 0.05, rates)
    assert margin > 1e-6
    path, scanned_flips, _ = run(bop(threshold=0.05, adaptivity_rate=schedule), jnp.asarray(w), gradients)
    np.testing.assert_array_equal(path, expected)
    np.testing.assert_array_equal(scanned_flips, flips)


def test_injected_hyperparameters_can_be_changed_without_a_new_trace():
    optimizer = optax.inject_hyperparams(bop)(threshold=0.1, adaptivity_rate=1.0)
    w, gradient = jnp.array([1.0, 1.0]), jnp.array([0.2, 2.0])

    @jax.jit
    def update(state):
        return optimizer.update(gradient, state, w)[0]

    state = optimizer.init(w)
    np.testing.assert_array_equal(update(state), [-2, -2])
    state.hyperparams["threshold"] = jnp.float32(1.0)
    np.testing.assert_array_equal(update(state), [0, -2])
    state.hyperparams["adaptivity_rate"] = jnp.float32(0.25)
    np.testing.assert_array_equal(update(state), [0, 0])
    assert update._cache_size() == 1


def test_vmap_over_thresholds_equals_the_loop():
    w, gradient = jnp.array([1.0, -1.0, 1.0]), jnp.array([0.2, -0.5, 2.0])
    thresholds = jnp.array([0.1, 0.3, 1.0, 5.0])

    def update(threshold):
        optimizer = bop(threshold=threshold, adaptivity_rate=1.0)
        return optimizer.update(gradient, optimizer.init(w), w)

    together, states = jax.jit(jax.vmap(update))(thresholds)
    np.testing.assert_array_equal(states.flips, [3, 2, 1, 0])
    for i, threshold in enumerate(thresholds):
        np.testing.assert_array_equal(together[i], update(threshold)[0])


@pytest.mark.usefixtures("standard_dtypes")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_survives_multi_steps_and_finds_the_mean_gradient(dtype):
    w = jnp.array([1.0, -1.0], dtype)
    optimizer = optax.MultiSteps(bop(threshold=0.5, adaptivity_rate=1.0), every_k_schedule=2)
    state = optimizer.init(w)
    for gradient, expected in (([2.0, 0.0], [0, 0]), ([0.0, -0.5], [-2, 0])):
        updates, state = jax.jit(optimizer.update)(jnp.array(gradient, dtype), state, w)
        np.testing.assert_array_equal(np.asarray(updates, np.float32), expected)


def test_tree_map_params_finds_the_momentum():
    optimizer = bop()
    state = optax.tree.map_params(optimizer, lambda m: m + 1, optimizer.init(NETWORK))
    chex.assert_trees_all_equal(state.momentum, jax.tree.map(jnp.ones_like, NETWORK))
    assert int(state.count) == int(state.flips) == 0


# ---- Bop on the latent weights, another optimizer on the rest


@pytest.mark.usefixtures("standard_dtypes")
def test_the_rest_is_trained_as_by_the_other_optimizer_alone():
    gradient = jax.tree.map(lambda w: jnp.cos(3 * w) + 1, NETWORK)
    optimizer, adam = bop_on_latent(optax.adam(0.1), threshold=1e-5), optax.adam(0.1)
    step = training_step(optimizer)
    params, state = NETWORK, optimizer.init(NETWORK)
    alone, adam_state = NETWORK, adam.init(NETWORK)
    w = NETWORK["conv"]["latent_kernel"]
    flat = np.asarray(gradient["conv"]["latent_kernel"]).ravel()
    expected, flips, _ = twin(w.ravel(), [flat] * 15, 1e-5, [1e-4] * 15)
    for t in range(15):
        params, state = step(params, state, gradient)
        updates, adam_state = adam.update(gradient, adam_state)
        alone = optax.apply_updates(alone, updates)
        np.testing.assert_array_equal(params["conv"]["latent_kernel"].ravel(), expected[t])
        assert int(optax.tree.get(state, "flips")) == flips[t]
        np.testing.assert_allclose(params["conv"]["bias"], alone["conv"]["bias"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(params["head"]["kernel"], alone["head"]["kernel"], rtol=1e-5, atol=1e-6)
    assert sum(flips) == 3  # the weights that were +1: every gradient is positive
    assert step._cache_size() == 1


def test_the_loss_reaches_the_other_optimizer():
    optimizer = bop_on_latent(optax.polyak_sgd(max_learning_rate=10.0, f_min=0.0))
    params = {"layer": {"latent_kernel": jnp.ones((1, 1)), "bias": jnp.array([3.0])}}
    gradient = jax.tree.map(lambda w: 2 * w, params)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params, value=9.0)
    np.testing.assert_allclose(updates["layer"]["bias"], [-9.0 / 6.0**2 * 6.0], rtol=1e-5)


@pytest.mark.parametrize("params", [{"head": {"kernel": jnp.ones(2)}}, {"conv": {"latent_kernel": jnp.ones(2)}}])
def test_networks_of_one_kind_of_weights_work(params):
    optimizer = bop_on_latent(optax.sgd(0.5), threshold=0.0)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    step = -2.0 if "conv" in params else -0.5
    np.testing.assert_array_equal(jax.tree.leaves(updates)[0], [step, step])
    assert int(optax.tree.get(state, "flips")) == (2 if "conv" in params else 0)


# ---- errors


@pytest.mark.parametrize("optimizer", [bop, lambda **options: bop_on_latent(optax.sgd(0.1), **options)])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"threshold": -1e-9}, r"^`threshold` \(=-1e-09\) must not be negative; 1e-6 is usual$"),
        ({"threshold": float("nan")}, r"^`threshold` \(=nan\) must not be negative"),
        ({"adaptivity_rate": 1.5}, r"^`adaptivity_rate` \(=1.5\) must be in \[0, 1\]; 1e-4 is usual$"),
        ({"adaptivity_rate": -0.1}, r"^`adaptivity_rate` \(=-0.1\) must be in \[0, 1\]"),
    ],
)
def test_values_out_of_range_are_refused(optimizer, options, text):
    with pytest.raises(ValueError, match=text):
        optimizer(**options)


def test_bop_needs_the_parameters():
    w = jnp.ones(2)
    with pytest.raises(ValueError, match=r"`params` must be given to `update`: Bop changes weights by their sign"):
        bop().update(w, bop().init(w))

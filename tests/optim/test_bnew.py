"""The push of BNEW: its closed form, its twin, exactness at the bounds, and how it behaves as a transform of optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transforms import scanned, training_step

from bnn_jax.optim.bnew import push_to_bounds
from bnn_jax.optim.latent import latent_box

UNIT = (-1.0, 1.0)
ORDERS = ("before", "after")


def twin(w, updates, *, total_steps, rate, steps_per_epoch=1, freeze_from=0.98, order, lower=-1.0, upper=1.0):
    """The published rule, one weight at a time, in float64; the weights after each step."""
    w, path = [float(x) for x in w], []
    for t, update in enumerate(updates):
        r = rate * (t // steps_per_epoch + 1) / (total_steps / steps_per_epoch)
        for i, u in enumerate(update):
            if t >= freeze_from * total_steps or (freeze_from < 1 and t == total_steps - 1):
                w[i] = lower if w[i] < 0 else upper
            elif order == "before":
                w[i] = min(max(w[i] + 2 * r * w[i], lower), upper)
                w[i] = min(max(w[i] + float(u), lower), upper)
            else:
                w[i] = w[i] + float(u)
                w[i] = min(max(w[i] + 2 * r * w[i], lower), upper)
        path.append(list(w))
    return np.array(path)


def path_of(optimizer, w, updates):
    """The weights after each step."""
    return scanned(optimizer, w, updates)[0]


# ---- the rule


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "options",
    [
        {"total_steps": 40, "rate": 0.2},
        {"total_steps": 40, "rate": 0.2, "steps_per_epoch": 10, "freeze_from": 0.75},
        {"total_steps": 100, "rate": 1e-4, "freeze_from": 1.0},
    ],
    ids=str,
)
def test_it_equals_the_scalar_twin_over_many_steps(order, options):
    rng = np.random.default_rng(0)
    w, updates = rng.uniform(-1, 1, 60).astype(np.float32), rng.normal(0, 0.1, (40, 60)).astype(np.float32)
    path = path_of(push_to_bounds(UNIT, order=order, **options), jnp.asarray(w), updates)
    np.testing.assert_allclose(path, twin(w, updates, order=order, **options), rtol=0, atol=3e-5)
    assert (np.abs(path[-1]) == 1).all() == (options["total_steps"] == 40)  # a run of 40 steps has no 98 %


@pytest.mark.parametrize("order", ORDERS)
def test_without_a_gradient_weights_grow_by_the_closed_form_and_stick(order):
    rate, steps = 0.1, 20
    w = np.array([0.01, -0.2, 0.5, -0.9, 1.0, 0.0])
    factors = np.cumprod([1 + 2 * rate * (e + 1) / steps for e in range(steps)])
    expected = np.clip(factors[:, None] * w[None], -1, 1)
    optimizer = push_to_bounds(UNIT, total_steps=steps, rate=rate, freeze_from=1.0, order=order)
    path = np.asarray(path_of(optimizer, jnp.asarray(w, jnp.float32), jnp.zeros((steps, 6))))
    np.testing.assert_allclose(path, expected, rtol=1e-5)
    np.testing.assert_array_equal(np.abs(path) == 1, np.abs(expected) == 1)
    assert {0.5, -0.9} <= set(np.float64(w)[np.abs(path[-1]) == 1])


def test_the_two_orders_differ_as_their_formulas():
    options = {"total_steps": 1, "rate": 0.25, "freeze_from": 1.0}
    w, u = jnp.array([0.5, 0.9, -0.4]), jnp.array([0.1, -0.5, -0.2])
    before, _ = push_to_bounds(UNIT, **options).update(u, push_to_bounds(UNIT, **options).init(w), w)
    after, _ = push_to_bounds(UNIT, order="after", **options).update(u, push_to_bounds(UNIT, **options).init(w), w)
    np.testing.assert_allclose(w + before, [0.85, 0.5, -0.8], rtol=1e-6)
    np.testing.assert_allclose(w + after, [0.9, 0.6, -0.9], rtol=1e-6)


def test_stairs_are_constant_in_an_epoch():
    optimizer = push_to_bounds(UNIT, total_steps=6, rate=0.5, steps_per_epoch=3, freeze_from=1.0)
    path = np.asarray(path_of(optimizer, jnp.full(1, 1e-3), jnp.zeros((6, 1))))[:, 0]
    growth = path / np.concatenate([[1e-3], path[:-1]])
    np.testing.assert_allclose(growth, [1.5, 1.5, 1.5, 2.0, 2.0, 2.0], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("order", ORDERS)
def test_from_the_freeze_on_weights_are_their_sign_exactly_and_stay(dtype, order):
    rng = np.random.default_rng(1)
    w = np.concatenate([rng.uniform(-1, 1, 20_000) * 10.0 ** rng.uniform(-7, 0, 20_000), [0.0, -0.0, 1.0, -1.0, 1e-30]])
    w = jnp.asarray(w, dtype)
    updates = jnp.asarray(rng.normal(0, 0.3, (4, w.size)), dtype)
    path = path_of(push_to_bounds(UNIT, total_steps=4, rate=0.01, freeze_from=0.25, order=order), w, updates)
    assert path.dtype == dtype
    path = np.asarray(path, np.float64)
    assert set(np.abs(path[0])) != {1.0}
    for frozen in path[1:]:
        np.testing.assert_array_equal(frozen, np.where(path[0] < 0, -1, 1))


def test_an_end_that_is_no_power_of_two_is_reached_in_two_steps():
    rng = np.random.default_rng(2)
    low, high = -0.3, 0.7
    w = rng.uniform(low, high, 50_000).astype(np.float32)
    path = path_of(push_to_bounds((low, high), total_steps=9, freeze_from=0.0), jnp.asarray(w), jnp.zeros((2, w.size)))
    ends = np.where(w < 0, np.float32(low), np.float32(high))
    np.testing.assert_allclose(path[0], ends, rtol=2e-7)
    assert np.all((np.float32(low) <= path[0]) & (path[0] <= np.float32(high)))
    np.testing.assert_array_equal(path[1], ends)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("order", ORDERS)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_weights_are_inside_their_box_whatever_the_updates_are(dtype, order, data):
    numbers = st.floats(-(2.0**60), 2.0**60, width=32)
    updates = jnp.asarray(data.draw(hnp.arrays(np.float32, (3, 5), elements=numbers)), dtype)
    lower, upper = (data.draw(st.floats(low, low + 1.5)) for low in (-2.0, -0.25))
    lower, upper = (0.0 if abs(bound) < 1e-30 else bound for bound in (lower, upper))  # XLA flushes subnormals
    bounds = (min(lower, upper), max(lower, upper))
    low, high = (float(jnp.asarray(b, dtype)) for b in bounds)
    inside = st.floats(0, 1).map(lambda share: low + share * (high - low))
    w = jnp.asarray(np.clip(data.draw(hnp.arrays(np.float64, 5, elements=inside)), low, high), dtype)
    optimizer = push_to_bounds(
        bounds,
        total_steps=3,
        rate=data.draw(st.sampled_from([0.0, 1e-4, 3.0])),
        freeze_from=data.draw(st.sampled_from([0.5, 1.0])),
        order=order,
    )
    state = optimizer.init(w)
    for update in updates:
        update, state = optimizer.update(update, state, w)
        assert update.dtype == w.dtype
        w = optax.apply_updates(w, update)
        assert np.all((low <= np.asarray(w, np.float64)) & (np.asarray(w, np.float64) <= high))


# ---- in a chain, as a transform


@pytest.mark.usefixtures("standard_dtypes")
def test_only_boxed_parameters_are_pushed_and_the_chain_is_traced_once():
    params = {
        "conv": {"latent_kernel": jnp.array([[0.5, -0.25]]), "bias": jnp.array([0.5, 3.0])},
        "head": {"kernel": jnp.array([[2.0]])},
    }
    gradient = jax.tree.map(lambda w: jnp.sin(5 * w), params)
    adam = optax.adam(0.02)
    optimizer = optax.chain(adam, push_to_bounds(latent_box(), total_steps=50, rate=0.05, freeze_from=0.5))
    step = training_step(optimizer)
    state, alone, adam_state, proposed = optimizer.init(params), params, adam.init(params), []
    w = np.asarray(params["conv"]["latent_kernel"])[0]
    for _ in range(30):
        params, state = step(params, state, gradient)
        updates, adam_state = adam.update(gradient, adam_state)
        alone = optax.apply_updates(alone, updates)
        proposed.append(updates["conv"]["latent_kernel"][0])
        np.testing.assert_allclose(params["conv"]["bias"], alone["conv"]["bias"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(params["head"]["kernel"], alone["head"]["kernel"], rtol=1e-4, atol=1e-5)
        path = twin(w, proposed, total_steps=50, rate=0.05, freeze_from=0.5, order="before")
        np.testing.assert_allclose(params["conv"]["latent_kernel"][0], path[-1], rtol=1e-4, atol=1e-5)
    assert set(np.abs(path[-1])) == {1.0}
    assert step._cache_size() == 1


def test_injected_hyperparameters_can_be_changed_without_a_new_trace():
    static = ("total_steps", "steps_per_epoch")
    optimizer = optax.inject_hyperparams(push_to_bounds, static_args=static)(UNIT, total_steps=2, rate=0.5)
    w = jnp.array([0.25, -0.5])

    @jax.jit
    def update(state):
        return w + optimizer.update(jnp.zeros(2), state, w)[0]

    state = optimizer.init(w)
    np.testing.assert_allclose(update(state), [0.375, -0.75])
    state.hyperparams["rate"] = jnp.float32(1.0)
    np.testing.assert_allclose(update(state), [0.5, -1.0])
    state.hyperparams["freeze_from"] = jnp.float32(0.0)
    np.testing.assert_array_equal(update(state), [1.0, -1.0])
    assert update._cache_size() == 1


def test_vmap_over_rates_equals_the_loop():
    w, u, rates = jnp.array([0.3, -0.6]), jnp.array([0.1, 0.1]), jnp.array([0.0, 0.1, 10.0])

    def update(rate):
        optimizer = push_to_bounds(UNIT, total_steps=3, rate=rate)
        return optimizer.update(u, optimizer.init(w), w)[0]

    together = jax.jit(jax.vmap(update))(rates)
    np.testing.assert_allclose(together, jnp.stack([update(rate) for rate in rates]), rtol=1e-6)
    np.testing.assert_allclose(together[0], u, rtol=1e-6)


@pytest.mark.usefixtures("standard_dtypes")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_survives_multi_steps(dtype):
    w = jnp.array([0.5, -0.25], dtype)
    optimizer = optax.MultiSteps(push_to_bounds(UNIT, total_steps=4, rate=1.0), every_k_schedule=2)
    state = optimizer.init(w)
    for expected in ([0.0, 0.0], [0.25, -0.125]):  # the factor 1 + 2/4 in every second call
        updates, state = jax.jit(optimizer.update)(jnp.zeros_like(w), state, w)
        assert updates.dtype == dtype
        np.testing.assert_array_equal(np.asarray(updates, np.float32), expected)


# ---- errors


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"total_steps": 0}, r"^`total_steps` \(=0\) must be at least 1$"),
        ({"steps_per_epoch": 0}, r"^`steps_per_epoch` \(=0\) must be at least 1$"),
        ({"rate": -0.1}, r"^`rate` \(=-0.1\) must not be negative; 1e-4 is usual$"),
        ({"rate": float("nan")}, r"^`rate` \(=nan\) must not be negative"),
        ({"freeze_from": 1.5}, r"^`freeze_from` \(=1.5\) must be in \[0, 1\], a share of `total_steps`$"),
        ({"order": "both"}, r"""^`order` \(='both'\) must be "before" or "after" the step of the optimizer$"""),
    ],
)
def test_values_out_of_range_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        push_to_bounds(UNIT, **{"total_steps": 10} | options)


@pytest.mark.parametrize(
    ("box", "text"),
    [
        (
            (-np.inf, 1.0),
            r"^`box` must have finite bounds to push to, or None for a free parameter; got \(-inf, 1.0\)$",
        ),
        ((1.0, -1.0), "`box` must have lower <= upper"),
        ({"other": UNIT}, "it does not fit the parameters"),
    ],
)
def test_a_wrong_box_is_refused(box, text):
    with pytest.raises(ValueError, match=text):
        push_to_bounds(box, total_steps=10).init({"w": jnp.ones(2)})


def test_the_push_needs_the_parameters():
    optimizer = push_to_bounds(UNIT, total_steps=10)
    with pytest.raises(ValueError, match=r"`params` must be given to `update`: the push is about parameters"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))

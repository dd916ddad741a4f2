"""What a caller of Deep Frank-Wolfe can rely on: weights inside the box to the bit, the state, errors by their text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnn_jax.optim.deep_frank_wolfe import DeepFrankWolfeState, deep_frank_wolfe

# ---- inside the box exactly


def box_of(bounds, dtype):
    """Bounds as the parameter's dtype rounds them, in float64."""
    return [np.asarray(jnp.asarray(b, dtype)).astype(np.float64) for b in bounds]


@pytest.mark.default_flags
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("jitted", [True, False])
def test_every_weight_is_inside_its_bounds_exactly_after_the_update(dtype, jitted):
    rng, size = np.random.default_rng(41), 40_000
    lower, upper = np.sort(rng.uniform(-1, 1, (2, size)) * 10.0 ** rng.integers(-2, 1, size), axis=0)
    for i, (low, high) in enumerate([(-0.3, 0.7), (0.1, 0.1), (-1.0, 1.0), (0.0, 1 / 3), (1e-3, 1e-3)]):
        lower[i * 4000 : (i + 1) * 4000], upper[i * 4000 : (i + 1) * 4000] = low, high
    bounds = (jnp.asarray(lower, jnp.float32), jnp.asarray(upper, jnp.float32))
    low, high = box_of(bounds, dtype)
    w = rng.normal(size=size)
    # From outside no update reaches a box that is narrower than the spacing of the weights there.
    outside = (high - low > 0.1) & (rng.random(size) < 0.5)
    params = jnp.asarray(np.where(outside, w, np.clip(w, low, high)), dtype)
    gradients = jnp.asarray(rng.normal(size=(12, size)) * 10.0 ** rng.uniform(-3, 2, (12, size)), dtype)
    optimizer = deep_frank_wolfe(0.3, 0.9, box=bounds)

    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params, value=1e5)
        return optax.apply_updates(params, updates), updates, state

    step, state, reached = jax.jit(step) if jitted else step, optimizer.init(params), 0
    for gradient in gradients if jitted else gradients[:2]:
        new, updates, state = step(params, state, gradient)
        for landed in (new, optax.apply_updates(params, updates)):
            values = np.asarray(landed).astype(np.float64)
            assert np.all((low <= values) & (values <= high))
        reached = max(reached, np.mean((values == low) | (values == high)))
        params = new
    assert 0.2 < reached < 1


def test_an_everyday_box_of_python_numbers_holds_exactly():
    rng = np.random.default_rng(42)
    optimizer = deep_frank_wolfe(1.0, 0.9, box=(-0.3, 0.7))
    params = jnp.asarray(rng.normal(size=5000), jnp.float32)

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params, value=3.0)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    gradients = jnp.asarray(rng.normal(size=(50, 5000)), jnp.float32)
    _, trajectory = jax.jit(lambda carry: jax.lax.scan(step, carry, gradients))((params, optimizer.init(params)))
    assert trajectory.min() == np.float32(-0.3)
    assert trajectory.max() == np.float32(0.7)


# ---- the state, the wrong calls


def test_the_search_ends_in_time_at_the_root_also_for_absurd_scales():
    """Three weights, everything over many decades: D' has cliffs and plateaus, on which Newton's method fails."""
    rng, shape = np.random.default_rng(43), (30_000, 3)
    lower = rng.normal(size=shape) * 10.0 ** rng.uniform(-2, 1, shape)
    upper = lower + 10.0 ** rng.uniform(-6, 1, shape)
    w = rng.normal(size=shape) * 10.0 ** rng.uniform(-2, 2, shape)
    gradient = rng.normal(size=shape) * 10.0 ** rng.uniform(-4, 9, shape)
    eta, decay = 10.0 ** rng.uniform(-8, 6, shape[0]), 10.0 ** rng.uniform(-6, 0, shape[0])
    w, gradient, lower, upper, eta, decay = (x.astype(np.float32) for x in (w, gradient, lower, upper, eta, decay))
    half = np.arange(shape[0]) % 2 == 0
    w[half] = np.clip(w[half], lower[half], upper[half])

    def slope(gamma, loss):
        """D' and the sum of the absolute terms that float32 rounds on the way, in float64."""
        decayed, towards = decay[:, None].astype(np.float64) * w, gamma[:, None] * gradient
        step = -eta[:, None] * (decayed + towards)
        moved = np.clip(step, lower.astype(np.float64) - w, upper.astype(np.float64) - w)
        terms = np.where(moved == step, eta[:, None] * (np.abs(decayed) + np.abs(towards)), np.abs(moved))
        return loss + (gradient * moved).sum(axis=1), loss + (np.abs(gradient) * terms).sum(axis=1)

    loss = -slope(10.0 ** rng.uniform(-9, 0, shape[0]), 0.0)[0]  # a root at that gamma
    loss = np.where(loss > 0, loss, 1.0).astype(np.float32)

    @jax.jit
    @jax.vmap
    def search(w, gradient, lower, upper, eta, decay, loss):
        optimizer = deep_frank_wolfe(eta, 0.0, decay, box=(lower, upper), epsilon=0.0)
        return optimizer.update(gradient, optimizer.init(w), w, value=loss)[1]

    state = search(w, gradient, lower, upper, eta, decay, loss)
    gamma, iterations = np.asarray(state.gamma, np.float64), np.asarray(state.search_iterations)
    assert 25 < iterations.max() <= 60
    assert np.mean((gamma > 0) & (gamma < 1)) > 0.3
    before, scale = slope(gamma * (1 - 4e-6), loss)
    after, _ = slope(gamma * (1 + 4e-6), loss)
    assert np.all((before >= -5e-7 * scale)[gamma > 0])
    assert np.all((after <= 5e-7 * scale)[gamma < 1])


def test_gamma_does_not_leave_the_unit_interval_by_rounding():
    rng, size = np.random.default_rng(44), 20_000
    eta, gradient = rng.uniform(0.1, 1, size).astype(np.float32), rng.uniform(0.1, 1, (size, 3)).astype(np.float32)
    root = 1 + rng.uniform(-2, 2, size) * np.finfo(np.float32).eps
    loss = (root * eta * np.sum(gradient.astype(np.float64) ** 2, axis=1)).astype(np.float32)

    @jax.jit
    @jax.vmap
    def gamma_of(eta, gradient, loss):
        optimizer = deep_frank_wolfe(eta, box=(-9.0, 9.0), epsilon=0.0)
        params = jnp.zeros(3)
        return optimizer.update(gradient, optimizer.init(params), params, value=loss)[1].gamma

    gamma = np.asarray(gamma_of(eta, gradient, loss))
    assert gamma.max() == 1
    assert 1 - 1e-6 < gamma.min() < 1


def test_the_state_counts_and_reports_the_search():
    params = {"w": jnp.zeros(3)}
    optimizer = deep_frank_wolfe(1.0)
    state = optimizer.init(params)
    assert isinstance(state, DeepFrankWolfeState)
    for count in range(3):
        assert int(state.count) == count
        _, state = optimizer.update({"w": jnp.ones(3)}, state, params, value=0.3)
        assert int(state.search_iterations) == 0  # closed form
        assert float(state.gamma) == pytest.approx(0.3 / (3 + 1e-5), rel=1e-6)
    boxed = deep_frank_wolfe(1.0, box=(-1.0, 1.0))
    _, state = boxed.update({"w": jnp.ones(3)}, boxed.init(params), params, value=0.3)
    assert 1 <= int(state.search_iterations) <= 3


def test_each_parameter_has_its_own_decay():
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones(3), "d": jnp.ones(())}}
    optimizer = deep_frank_wolfe(0.1, 0.0, lambda params: {"a": 0.5, "b": {"c": 0.0, "d": 0.25}})
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params, value=0.0)
    np.testing.assert_allclose(updates["a"], -0.05, rtol=1e-6)
    assert not np.any(updates["b"]["c"])
    np.testing.assert_allclose(updates["b"]["d"], -0.025, rtol=1e-6)


@pytest.mark.parametrize("place", ["loss", "gradient", "parameter", "velocity"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("box", [None, (-1.0, 1.0)], ids=["free", "box"])
@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_an_update_that_is_not_finite_is_refused_and_counted(box, value, place, decay):
    optimizer = deep_frank_wolfe(0.1, weight_decay=decay, box=box)
    params = jnp.array([0.5, -0.5])
    state = optimizer.init(params)
    _, state = optimizer.update(params, state, params, value=0.2)
    assert int(state.refused) == 0
    bad = {"loss": 0.2, "gradient": params, "parameter": params, "velocity": state.velocity}
    bad[place] = value if place == "loss" else bad[place].at[0].set(value)
    state = state._replace(velocity=bad["velocity"])
    updates, after = optimizer.update(bad["gradient"], state, bad["parameter"], value=bad["loss"])
    np.testing.assert_array_equal(updates, 0)
    assert (int(after.refused), float(after.gamma), int(after.count)) == (1, 0, 2)
    np.testing.assert_array_equal(after.velocity, state.velocity)
    assert float(after.loss_average) == float(state.loss_average)


@pytest.mark.parametrize("refused", [1, 3])
def test_refused_updates_leave_the_mean_of_the_losses_as_it_is(refused):
    optimizer, params = deep_frank_wolfe(0.5, epsilon=0.0, target_share=0.8), jnp.array([0.5, -0.5])
    fresh = state = optimizer.init(params)
    for _ in range(refused):
        _, state = optimizer.update(params, state, params, value=np.nan)
    for loss in (2.0, 1.0):
        _, fresh = optimizer.update(2 * params, fresh, params, value=loss)
        _, state = optimizer.update(2 * params, state, params, value=loss)
        assert float(state.gamma) == float(fresh.gamma)
    mean = (0.99 * 2.0 + 1.0) / 1.99
    assert float(state.gamma) == pytest.approx((1.0 - 0.8 * mean) / (0.5 * 2.0) if 0.8 * mean < 1 else 0, abs=1e-6)


def test_the_target_follows_the_running_mean_of_the_loss():
    params, target, share = jnp.zeros(3), 0.1, 0.6
    optimizer = deep_frank_wolfe(1.0, momentum=0.0, epsilon=0.0, target=target, target_share=share)
    state, losses = optimizer.init(params), [0.9, 0.5, 0.7, 0.2]
    update = jax.jit(lambda state, loss: optimizer.update(jnp.ones(3), state, params, value=loss)[1])
    for count in range(1, len(losses) + 1):
        state = update(state, losses[count - 1])
        ages = 0.99 ** np.arange(count)[::-1]
        mean = ages @ losses[:count] / ages.sum()
        aim = target + share * (mean - target)
        assert float(state.gamma) == pytest.approx(np.clip((losses[count - 1] - aim) / 3, 0, 1), rel=1e-5, abs=1e-7)


def test_the_target_may_have_a_schedule():
    optimizer = deep_frank_wolfe(1.0, epsilon=0.0, target=lambda step: jnp.where(step == 0, 0.0, 0.3))
    params = jnp.zeros(2)
    _, state = optimizer.update(jnp.ones(2), optimizer.init(params), params, value=0.5)
    assert float(state.gamma) == pytest.approx(0.25)
    _, state = optimizer.update(jnp.ones(2), state, params, value=0.5)
    assert float(state.gamma) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"learning_rate": 0.0}, r"`learning_rate` \(=0.0\) must be positive; 1.0 is a good first choice"),
        ({"learning_rate": -1}, r"`learning_rate` \(=-1\) must be positive"),
        ({"learning_rate": float("nan")}, r"`learning_rate` \(=nan\) must be positive"),
        ({"momentum": 1.0}, r"`momentum` \(=1.0\) must be in \[0, 1\)"),
        ({"momentum": -0.1}, r"`momentum` \(=-0.1\) must be in \[0, 1\)"),
        ({"weight_decay": -1e-4}, r"`weight_decay` \(=-0.0001\) must not be negative"),
        ({"epsilon": -1.0}, r"`epsilon` \(=-1.0\) must not be negative"),
        ({"target": -0.5}, r"`target` \(=-0.5\) must not be negative; 0 is the loss of a perfect fit"),
        ({"target_share": 1.0}, r"`target_share` \(=1.0\) must be in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        deep_frank_wolfe(**({"learning_rate": 1.0} | arguments))


def test_wrong_calls_are_named():
    params = jnp.ones(2)
    optimizer = deep_frank_wolfe(1.0)
    call = functools.partial(optimizer.update, params, optimizer.init(params))
    with pytest.raises(ValueError, match=r"`params` and the loss, `value=loss`, must be given"):
        call(params)
    with pytest.raises(ValueError, match=r"`params` and the loss, `value=loss`, must be given"):
        call(value=1.0)
    with pytest.raises(ValueError, match=r"`value` must be the scalar mean loss of the batch; got shape \(2,\)"):
        call(params, value=jnp.ones(2))
    with pytest.raises(ValueError, match=r"`inner_steps` \(=0\) must be 1"):
        call(params, value=1.0, inner_steps=0)
    with pytest.raises(ValueError, match=r"`inner_steps` \(=2\) must be 1, or more together with an `oracle`"):
        call(params, value=1.0, inner_steps=2)
    with pytest.raises(ValueError, match="`box` must have lower <= upper"):
        deep_frank_wolfe(1.0, box=(1.0, -1.0)).init(params)

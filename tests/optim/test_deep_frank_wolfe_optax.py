"""Deep Frank-Wolfe as a citizen of optax and JAX: wrappers and transformations of functions."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnn_jax.optim.deep_frank_wolfe import deep_frank_wolfe
from bnn_jax.optim.latent import latent_box

VARIANTS = {
    "free": {},
    "box": {"box": (-20.0, 20.0)},
    "decayed box": {"box": (-20.0, 20.0), "weight_decay": 1e-6},
}
NETWORK = {
    "conv": {"latent_kernel": jnp.linspace(-1.2, 1.2, 12).reshape(3, 4), "bias": jnp.ones(4)},
    "head": {"kernel": jnp.linspace(-1.0, 2.0, 8).reshape(4, 2)},
}
GRADIENT = jax.tree.map(lambda w: jnp.cos(7 * w) / 4, NETWORK)


assert_close = partial(chex.assert_trees_all_close, rtol=1e-6, atol=1e-7)


def jitted_step(optimizer, objective):
    """A jitted training step on an objective."""

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(gradient, state, params, value=value, of_no_concern=1)
        return optax.apply_updates(params, updates), state

    return step


# ---- what optax asks of every contributed optimizer


def parabola(dtype=jnp.float32):
    target = jnp.array([1.0, -1.0, 1.0], dtype)
    return jnp.array([-1.0, 10.0, 1.0], dtype), target, lambda w: jnp.sum((w - target) ** 2)


def rosenbrock():
    return jnp.zeros(2), jnp.ones(2), lambda w: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2


def matrix_parabola():
    target = jnp.array([[3.0, -2.0], [1.0, 4.0]])
    return jnp.zeros((2, 2)), target, lambda w: jnp.sum((w - target) ** 2)


def mixed_parabola():
    target = (jnp.array([1.0, -1.0, 2.0]), jnp.array([[1.0, 0.0], [-1.0, 1.0]]))
    start = jax.tree.map(jnp.zeros_like, target)
    return start, target, lambda w: sum(jnp.sum((a - b) ** 2) for a, b in zip(w, target))


@pytest.mark.parametrize("variant", ["free", "box"])
@pytest.mark.parametrize("target", [parabola, rosenbrock, matrix_parabola, mixed_parabola])
def test_it_converges_on_the_four_targets_of_optax(target, variant):
    params, final, objective = target()
    optimizer = deep_frank_wolfe(0.1, **VARIANTS[variant])
    step = jitted_step(optimizer, objective)

    def several(carry, _):
        return step(*carry), None

    (params, state), _ = jax.lax.scan(several, (params, optimizer.init(params)), length=3000)
    assert_close(params, final, rtol=3e-2, atol=3e-2)
    assert int(state.count) == 3000


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_accepts_extra_arguments_and_is_traced_once(variant):
    params, _, objective = rosenbrock()
    optimizer = deep_frank_wolfe(1e-3, **VARIANTS[variant])
    step = jitted_step(optimizer, objective)
    state = optimizer.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == 1
    assert int(state.count) == 3


def test_tree_map_params_finds_the_velocity():
    optimizer = deep_frank_wolfe(1.0)
    state = optax.tree.map_params(optimizer, lambda z: z + 1, optimizer.init(NETWORK))
    assert_close(state.velocity, jax.tree.map(jnp.ones_like, NETWORK))
    assert float(state.gamma) == 0
    assert int(state.count) == 0


@pytest.mark.parametrize("box", [None, (-1.0, 1.0), latent_box()], ids=["free", "pair", "function"])
def test_inject_hyperparams_changes_nothing_but_lets_the_rate_change(box):
    static = ("box",) if callable(box) else ()
    factory = optax.inject_hyperparams(deep_frank_wolfe, static_args=static)
    injected = factory(learning_rate=0.1, weight_decay=0.01, box=box)

    @jax.jit
    def plain_update(rate):
        plain = deep_frank_wolfe(rate, weight_decay=0.01, box=box)
        return plain.update(GRADIENT, plain.init(NETWORK), NETWORK, value=0.2)

    @jax.jit
    def injected_update(state):
        return injected.update(GRADIENT, state, NETWORK, value=0.2)

    state = jax.jit(injected.init)(NETWORK)
    for rate in (0.1, 3.0):
        state.hyperparams["learning_rate"] = jnp.asarray(rate)
        updates, new_state = injected_update(state)
        assert_close((updates, new_state.inner_state), plain_update(rate), rtol=1e-5)


@pytest.mark.usefixtures("standard_dtypes")
@pytest.mark.parametrize(
    ("dtype", "x64"),
    [("bfloat16", False), ("float16", False), ("float32", False), ("float32", True), ("float64", True)],
)
@pytest.mark.parametrize("variant", ["free", "box"])
def test_dtypes_are_kept_also_under_cond(dtype, x64, variant):
    with jax.enable_x64(x64):
        params, _, objective = parabola(dtype)
        optimizer = deep_frank_wolfe(0.1, **VARIANTS[variant])
        other_dtype = jnp.bfloat16 if dtype == "float16" else jnp.float16

        @jax.jit
        def step(params, state, skip):
            value, gradient = jax.value_and_grad(objective)(params)
            updates, state = jax.lax.cond(
                skip,
                lambda: (jnp.zeros_like(gradient), state),
                lambda: optimizer.update(gradient, state, params, value=value.astype(other_dtype)),
            )
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        dtypes = jax.tree.map(lambda x: x.dtype, (params, state))
        for skip in (False, True, False):
            params, state = step(params, state, skip)
            assert jax.tree.map(lambda x: x.dtype, (params, state)) == dtypes
        assert int(state.count) == 2
        assert float(state.gamma) == 1


@pytest.mark.usefixtures("standard_dtypes")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_survives_multi_steps(dtype):
    params = jnp.array([1.0, 2.0], dtype)
    optimizer = optax.MultiSteps(deep_frank_wolfe(0.1, box=(-1.0, 1.0)), every_k_schedule=4)
    updates, _ = jax.jit(lambda w: optimizer.update(2 * w, optimizer.init(w), w, value=5.0))(params)
    assert updates.dtype == params.dtype
    assert not np.any(updates)


@pytest.mark.usefixtures("standard_dtypes")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_schedule_is_read_at_the_count(variant):
    scheduled = deep_frank_wolfe(optax.piecewise_constant_schedule(0.01, {2: 0.1}), **VARIANTS[variant])
    params, _, objective = parabola()
    step = jitted_step(scheduled, objective)
    state = scheduled.init(params)
    for rate in (0.01, 0.01, 0.001):
        constant = deep_frank_wolfe(rate, **VARIANTS[variant])
        value, gradient = jax.value_and_grad(objective)(params)
        expected, state_expected = constant.update(gradient, state, params, value=value)
        expected = optax.apply_updates(params, expected)
        params, state = step(params, state)
        assert_close((params, state), (expected, state_expected))


# ---- compositions


def test_chains_hand_the_loss_through():
    plain = deep_frank_wolfe(0.5, box=latent_box())

    def first_update(optimizer):
        return jax.jit(lambda: optimizer.update(GRADIENT, optimizer.init(NETWORK), NETWORK, value=0.2))()

    expected, _ = first_update(plain)
    chained = optax.chain(optax.identity(), plain)
    named = optax.named_chain(("first", optax.identity()), ("dfw", plain))
    guarded = optax.apply_if_finite(plain, max_consecutive_errors=3)
    for optimizer in (chained, named, guarded):
        updates, state = first_update(optimizer)
        assert_close(updates, expected)
        assert float(optax.tree.get(state, "gamma")) > 0


# ---- transformations


def test_vmap_over_learning_rates_equals_the_loop():
    rates = jnp.array([1e-4, 0.03, 1.0, 300.0])

    def update(rate):
        optimizer = deep_frank_wolfe(rate, 0.9, 1e-3, box=latent_box())
        return optimizer.update(GRADIENT, optimizer.init(NETWORK), NETWORK, value=0.2)

    together = jax.jit(jax.vmap(update))(rates)
    scheduled = jax.jit(jax.vmap(lambda rate: update(lambda count: rate * 0.5 ** (count / 10))))(rates)
    assert len(set(together[1].search_iterations.tolist())) > 1
    single = jax.jit(update)
    for i, rate in enumerate(rates):
        alone = single(rate)
        for batched in (together, scheduled):
            assert_close(jax.tree.map(lambda x, i=i: x[i], batched), alone)


def test_a_new_learning_rate_does_not_retrace():
    @jax.jit
    def update(rate):
        optimizer = deep_frank_wolfe(rate, box=(-1.0, 1.0))
        return optimizer.update(GRADIENT, optimizer.init(NETWORK), NETWORK, value=0.2)[1].gamma

    gammas = [float(update(rate)) for rate in (1e-4, 3.0, 300.0)]
    assert update._cache_size() == 1
    assert gammas[0] == 1
    assert gammas[0] > gammas[1] > gammas[2] > 0


def test_a_scan_equals_single_steps_and_single_steps_equal_eager_ones():
    params, _, objective = mixed_parabola()
    optimizer = deep_frank_wolfe(0.2, 0.9, 1e-3, box=((-0.5, 1.5), None))
    step = jitted_step(optimizer, objective)
    start = (params, optimizer.init(params))
    scanned, _ = jax.lax.scan(lambda carry, _: (step(*carry), None), start, length=10)
    single, eager = start, start
    for _ in range(10):
        single = step(*single)
    for _ in range(3):
        value, gradient = jax.value_and_grad(objective)(eager[0])
        updates, state = optimizer.update(gradient, eager[1], eager[0], value=value)
        eager = (optax.apply_updates(eager[0], updates), state)
    assert_close(scanned, single, rtol=1e-4, atol=1e-5)
    assert_close(eager, step(*step(*step(*start))), rtol=1e-4, atol=1e-5)


def test_where_gamma_is_1_it_is_nesterovs_sgd():
    """With a loss so large that nothing is held back, and no bound reached; optax's sgd is the oracle."""
    dfw, sgd = deep_frank_wolfe(0.3), optax.sgd(0.3, momentum=0.9, nesterov=True)
    ours, theirs = NETWORK, NETWORK
    state, other = dfw.init(NETWORK), sgd.init(NETWORK)
    for number in range(20):
        gradient = jax.tree.map(lambda w, n=number: jnp.cos(7 * w + n) / 4, NETWORK)
        updates, state = dfw.update(gradient, state, ours, value=jnp.array(1e3))
        assert state.gamma == 1
        ours = optax.apply_updates(ours, updates)
        updates, other = sgd.update(gradient, other, theirs)
        theirs = optax.apply_updates(theirs, updates)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)

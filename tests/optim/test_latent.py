"""Boxes: their forms and their errors, what keeps other optimizers inside, what is reported about them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transforms import training_step

from bnn_jax.optim import deep_frank_wolfe, latent_learning_rate_scale, scale_latent_updates
from bnn_jax.optim.latent import bound_statistics, is_latent, keep_in_box, latent_box, resolve_box

PARAMS = {
    "conv": {"latent_kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.zeros(4)},
    "head": {"kernel": jnp.zeros((4, 2))},
}  # leaves in order: conv bias, conv latent_kernel, head kernel


# ---- labels


def test_only_the_leaves_named_latent_kernel_are_latent():
    tree = {
        "latent_kernel": {"kernel": 0.0},
        "layers": [{"latent_kernel": 0.0}, {"latent_kernel_": 0.0, "scale": (0.0,)}],
    }
    assert is_latent(tree) == {
        "latent_kernel": {"kernel": False},
        "layers": [{"latent_kernel": True}, {"latent_kernel_": False, "scale": (False,)}],
    }


@pytest.mark.parametrize("params", [jnp.ones(3), [jnp.ones(3)], (), {}], ids=str)
def test_trees_without_names_have_no_latent_leaves(params):
    assert not any(jax.tree.leaves(is_latent(params)))
    assert resolve_box(latent_box(), params) == [None] * len(jax.tree.leaves(params))


# ---- forms of a box


PAIR = (-1.0, 1.0)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (None, [None, None, None]),
        (PAIR, [PAIR, PAIR, PAIR]),
        ({"conv": PAIR, "head": None}, [PAIR, PAIR, None]),
        ({"conv": {"bias": None, "latent_kernel": PAIR}, "head": {"kernel": (0, 2)}}, [None, PAIR, (0, 2)]),
        (latent_box(), [None, PAIR, None]),
        (latent_box(-0.5, 2.0), [None, (-0.5, 2.0), None]),
        (lambda params: {"conv": None, "head": PAIR}, [None, None, PAIR]),
        ((-np.inf, np.inf), [(-np.inf, np.inf)] * 3),
        ((0.1, 0.1), [(0.1, 0.1)] * 3),
    ],
)
def test_a_box_is_none_a_pair_a_prefix_tree_or_a_function(box, expected):
    assert resolve_box(box, PARAMS) == expected


def test_parameters_in_lists_and_tuples_have_boxes_too():
    one, other = jnp.zeros(3), jnp.zeros(2)
    assert resolve_box([PAIR, None], [one, other]) == [PAIR, None]
    assert resolve_box((None, PAIR), (one, other)) == [None, PAIR]
    assert resolve_box((PAIR, PAIR), (one, other)) == [PAIR, PAIR]
    assert resolve_box([None, PAIR], [one, [other, {"a": one}]]) == [None, PAIR, PAIR]
    assert resolve_box(PAIR, (one, other)) == [PAIR, PAIR]  # a pair of numbers is one box
    assert resolve_box(PAIR, one) == [PAIR]


def test_bounds_may_be_arrays_that_broadcast():
    per_filter = np.full((1, 1, 1, 4), 0.5)
    box = {"conv": {"bias": (-jnp.ones(4), 1.0), "latent_kernel": (-per_filter, per_filter)}, "head": None}
    params = PARAMS | {"conv": jax.tree.map(lambda w: w + 3, PARAMS["conv"])}
    optimizer = keep_in_box(box)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    landed = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(landed["conv"]["latent_kernel"], np.full((3, 3, 2, 4), 0.5))
    np.testing.assert_array_equal(landed["conv"]["bias"], np.ones(4))
    np.testing.assert_array_equal(landed["head"]["kernel"], params["head"]["kernel"])


@pytest.mark.parametrize(
    ("box", "text"),
    [
        ({"conv": PAIR}, r"it does not fit the parameters: .*so the symmetric difference on key sets is head$"),
        ({"conv": PAIR, "head": None, "tail": None}, r"it does not fit the parameters: .* is tail$"),
        ([-1.0, 1.0], r"must be None, a pair \(lower, upper\) or a prefix tree .* it does not fit"),
        ((-1.0, 0.0, 1.0), "it does not fit the parameters"),
        ((None, 1.0), "it does not fit the parameters"),
        ({"conv": {"bias": {"deeper": None}, "latent_kernel": None}, "head": None}, "it does not fit the parameters"),
        (0.5, r"`box` must have leaves None or \(lower, upper\); got 0.5"),
        ({"conv": -1.0, "head": None}, r"`box` must have leaves None or \(lower, upper\); got -1.0"),
        ("unit", r"`box` must have leaves None or \(lower, upper\); got 'unit'"),
        ((1.0, -1.0), r"`box` must have lower <= upper; got \(1.0, -1.0\)"),
        ((float("nan"), 1.0), r"`box` must have lower <= upper; got \(nan, 1.0\)"),
        (
            {"conv": {"bias": (np.zeros(4), np.array([1, 1, -1, 1])), "latent_kernel": None}, "head": None},
            "lower <= up",
        ),
        (
            {"conv": {"bias": (0.0, np.ones(3)), "latent_kernel": None}, "head": None},
            r"`box` must have bounds that broadcast to their parameter's shape \(4,\); got \(3,\)",
        ),
        (
            {"conv": {"bias": (np.zeros((2, 4)), 1.0), "latent_kernel": None}, "head": None},
            r"`box` must have bounds that broadcast to their parameter's shape \(4,\); got \(2, 4\)",
        ),
    ],
)
@pytest.mark.parametrize("transform", [keep_in_box, lambda box: deep_frank_wolfe(1.0, box=box)], ids=["keep", "dfw"])
def test_a_wrong_box_is_refused_when_the_optimizer_is_initialised(transform, box, text):
    with pytest.raises(ValueError, match=text) as error:
        transform(box).init(PARAMS)
    assert "\n" not in str(error.value)


def test_the_box_is_checked_under_jit_as_far_as_it_is_known():
    with pytest.raises(ValueError, match="lower <= upper"):
        jax.jit(keep_in_box((1.0, -1.0)).init)(PARAMS)
    traced = jax.jit(lambda low, high: keep_in_box((low, high)).update(PARAMS, (), PARAMS)[0])
    np.testing.assert_array_equal(traced(0.5, 2.0)["head"]["kernel"], np.full((4, 2), 0.5))


# ---- other optimizers inside the box


OPTIMIZERS = {"sgd": optax.sgd(0.5, momentum=0.9), "adam": optax.adam(0.2)}


@pytest.mark.usefixtures("standard_dtypes")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bounds", [(-0.3, 0.7), (0.0, 1 / 3), (0.1, 0.1)])
def test_keep_in_box_projects_what_the_optimizer_proposes(name, bounds):
    rng = np.random.default_rng(0)
    start = np.clip(rng.normal(size=3000), *np.float32(bounds)).astype(np.float32)
    params = {"in": {"latent_kernel": start}, "out": {"kernel": start}}
    kept = optax.chain(OPTIMIZERS[name], keep_in_box(latent_box(*bounds)))
    free = OPTIMIZERS[name]

    @jax.jit
    def step(params, state, gradient):
        proposed, _ = free.update(gradient, state[0], params)
        updates, state = kept.update(gradient, state, params)
        return optax.apply_updates(params, updates), optax.apply_updates(params, proposed), state

    state, low, high = kept.init(params), *np.float32(bounds)
    for _ in range(5):
        gradient = jax.tree.map(lambda w: rng.normal(size=w.shape).astype(np.float32), params)
        params, proposed, state = step(params, state, gradient)
        inside, expected = params["in"]["latent_kernel"], np.clip(proposed["in"]["latent_kernel"], low, high)
        assert np.min(inside) == low  # some land on the bounds, none beyond
        assert np.max(inside) == high
        np.testing.assert_allclose(inside, expected, rtol=0, atol=2e-7)
        np.testing.assert_array_equal(params["out"]["kernel"], proposed["out"]["kernel"])


@pytest.mark.usefixtures("standard_dtypes")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_keep_in_box_is_exact_for_adversarial_boxes(dtype):
    rng, size = np.random.default_rng(1), 100_000
    lower, upper = np.sort(rng.uniform(-1, 1, (2, size)) * 10.0 ** rng.integers(-3, 1, size), axis=0).astype(np.float32)
    low, high = (np.asarray(jnp.asarray(b, dtype)).astype(np.float64) for b in (lower, upper))
    params = jnp.asarray(np.clip(rng.normal(size=size), low, high), dtype)
    optimizer = keep_in_box((jnp.asarray(lower), jnp.asarray(upper)))
    proposed = jnp.asarray(rng.normal(size=size) * 10.0 ** rng.uniform(-4, 3, size), dtype)
    for update in (optimizer.update, jax.jit(optimizer.update)):
        updates, _ = update(proposed, optax.EmptyState(), params)
        assert updates.dtype == params.dtype
        landed = np.asarray(optax.apply_updates(params, updates)).astype(np.float64)
        assert np.all((low <= landed) & (landed <= high))
        assert np.mean((landed == low) | (landed == high)) > 0.3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_from_far_outside_a_narrow_box_a_few_updates_arrive(dtype):
    rng = np.random.default_rng(2)
    low = jnp.asarray(rng.uniform(-0.1, 0.1, 5000), dtype)
    params = jnp.asarray(rng.normal(size=5000), dtype)
    optimizer = keep_in_box((low, low))
    for _ in range(4):  # each gains the digits that the last one could not represent
        updates, _ = optimizer.update(jnp.zeros_like(params), optax.EmptyState(), params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params, low)


def test_keep_in_box_needs_the_parameters():
    with pytest.raises(ValueError, match=r"`params` must be given to `update`"):
        keep_in_box(PAIR).update(PARAMS, optax.EmptyState())


# ---- BinaryConnect's layer-wise learning-rate scale


@pytest.mark.parametrize(
    ("shape", "fan_in", "fan_out"),
    [
        ((8192, 1024), 8192, 1024),
        ((3, 3, 128, 256), 9 * 128, 9 * 256),
        ((5, 1, 3, 7), 15, 35),
        ((4, 3, 2), 12, 8),
        ((3, 3, 1, 64), 9, 576),
    ],
)
def test_the_learning_rate_scale_is_that_of_the_published_formula(shape, fan_in, fan_out):
    assert latent_learning_rate_scale(shape) == pytest.approx(1 / np.sqrt(1.5 / (fan_in + fan_out)), rel=1e-12)


@pytest.mark.usefixtures("standard_dtypes")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_final_update_of_latent_weights_is_scaled_before_the_clip(dtype):
    """updates[w] = clip(w + scale (optimizer's w - w)), in float64, beside a jitted chain."""
    rng = np.random.default_rng(3)
    start = {
        "conv": {"latent_kernel": rng.uniform(-1, 1, (3, 3, 2, 4)), "bias": rng.normal(size=4)},
        "head": {"kernel": rng.normal(size=(4, 2))},
    }
    params = jax.tree.map(lambda w: jnp.asarray(w, dtype), start)
    adam = optax.adam(0.05)
    optimizer = optax.chain(adam, scale_latent_updates(), keep_in_box(latent_box()))
    step = training_step(optimizer)
    state, adam_state = optimizer.init(params), adam.init(params)
    scale = np.sqrt((9 * 2 + 9 * 4) / 1.5)  # 6
    tolerance = {"float32": 2e-6, "bfloat16": 2e-2}[dtype]
    for _ in range(4):
        gradient = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), dtype), params)
        proposed, adam_state = adam.update(gradient, adam_state)
        expected = jax.tree.map(lambda w, u: np.asarray(w, np.float64) + np.asarray(u, np.float64), params, proposed)
        w, u = (np.asarray(tree["conv"]["latent_kernel"], np.float64) for tree in (params, proposed))
        expected["conv"]["latent_kernel"] = np.clip(w + scale * u, -1, 1)
        params, state = step(params, state, gradient)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        chex.assert_trees_all_close(jax.tree.map(np.float64, params), expected, rtol=1e-7, atol=tolerance)
    assert np.max(np.abs(np.asarray(params["conv"]["latent_kernel"], np.float64))) == 1
    assert step._cache_size() == 1


def test_a_latent_weight_without_inputs_and_features_has_no_scale():
    with pytest.raises(ValueError, match=r"^`shape` \(=\(4,\)\) must end in the axes \(inputs, features\)"):
        scale_latent_updates().update({"latent_kernel": jnp.ones(4)}, optax.EmptyState())


# ---- statistics


def test_bound_statistics_count_the_latent_weights_that_lie_on_their_box():
    params = {
        "one": {"latent_kernel": jnp.array([-1.0, 1.0, 0.999, 0.0]), "bias": jnp.array([1.0, 9.0])},
        "two": {"latent_kernel": jnp.array([[-1.0], [0.5]])},
    }
    statistics = bound_statistics(params, latent_box())
    assert float(statistics["share_on_bounds"]) == pytest.approx(3 / 6)
    assert float(statistics["max_abs_latent"]) == 1.0
    assert float(bound_statistics(params, None)["share_on_bounds"]) == 0
    assert float(bound_statistics(params, {"one": None, "two": PAIR})["share_on_bounds"]) == pytest.approx(1 / 6)


def test_one_latent_weight_is_all_of_them():
    statistics = bound_statistics({"latent_kernel": jnp.ones(1)}, PAIR)
    assert float(statistics["share_on_bounds"]) == 1


def test_bound_statistics_compare_in_the_dtype_of_the_weights():
    bounds = (np.array([-0.3, -0.3, -0.3]), np.array([0.7, 0.7, 0.7]))
    for dtype in ("bfloat16", "float16", "float32"):
        params = {"latent_kernel": jnp.asarray([-0.3, 0.7, 0.1], dtype)}
        statistics = bound_statistics(params, {"latent_kernel": bounds})
        assert float(statistics["share_on_bounds"]) == pytest.approx(2 / 3)


def test_bound_statistics_are_zero_without_latent_weights():
    statistics = jax.jit(lambda params: bound_statistics(params, PAIR))({"head": {"kernel": jnp.ones(3)}})
    assert statistics == {"max_abs_latent": 0.0, "share_on_bounds": 0.0}

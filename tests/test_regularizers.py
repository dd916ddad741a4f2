"""Regularizers against scalar twins and their optimality, and their sum over a network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bnn_jax.regularizers import (
    REGULARIZERS,
    clipping_penalty,
    euclidean,
    l2,
    manhattan,
    penalty,
    scaled_tang,
    tang,
)
from bnn_jax.schedules import milestones
from bnn_jax.training.diagnostics import latent_kernels


def sgn(x):
    return -1.0 if x < 0 else 1.0


def tent(x):
    return float(np.sign(x))


# name: (w, a) -> (R, dR/dw, dR/da) of one weight, written from the published formulas
TWINS = {
    "manhattan": lambda w, a: (abs(a - abs(w)), -tent(a - abs(w)) * sgn(w), tent(a - abs(w))),
    "euclidean": lambda w, a: ((a - abs(w)) ** 2, -2 * (a - abs(w)) * sgn(w), 2 * (a - abs(w))),
    "tang": lambda w, a: (1 - w**2, -2 * w, 0.0),
    "clipped_tang": lambda w, a: (1 - w**2, -2 * w, 0.0) if abs(w) <= 1 else (0.0, 0.0, 0.0),
    "scaled_tang": lambda w, a: (a**2 - w**2, -2 * w, 2 * a) if abs(w) <= a else (0.0, 0.0, 0.0),
    "l2": lambda w, a: (w**2, 2 * w, 0.0),
}
ONE = np.float32(1)


@pytest.fixture(scope="module")
def w():
    """A kernel with weights at 0, at -0, at the scales of :func:`scales` and one unit beside them."""
    w = np.random.default_rng(0).normal(size=(3, 3, 5, 4)).astype(np.float32)
    w[0, 0, 0], w[0, 0, 1], w[0, 0, 2], w[0, 0, 3] = 0.0, -0.0, [0.5, 1.0, 1.5, -0.25], [-0.5, -1.0, -1.5, 0.25]
    w[0, 1, 0], w[0, 1, 1] = np.nextafter(ONE, np.float32(2)), np.nextafter(-ONE, np.float32(0))
    return w


@pytest.fixture(scope="module")
def scales():
    return np.array([0.5, 1.0, 1.5, -0.25], np.float32).reshape(1, 1, 1, 4)


def sums_of(name, w, scale):
    """R, dR/dw and dR/da by loops over scalars in float64; dR/da of the scale's shape."""
    full = np.broadcast_to(np.asarray(scale, np.float64), w.shape)
    one = [TWINS[name](x, a) for x, a in zip(w.astype(np.float64).ravel(), full.ravel())]
    value, dw, da = (np.array(part).reshape(w.shape) for part in zip(*one))
    return value.sum(), dw, da.sum(tuple(range(w.ndim - 1)), keepdims=True) if np.ndim(scale) else da.sum()


def test_every_regularizer_has_a_twin():
    assert set(REGULARIZERS) == set(TWINS)


# ---- laws of the table


@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_value_and_gradients_equal_the_scalar_twin(name, per_feature, w, scales):
    scale = scales if per_feature else np.float32(1.0)
    value, (dw, da) = jax.value_and_grad(REGULARIZERS[name], argnums=(0, 1))(jnp.asarray(w), jnp.asarray(scale))
    expected, expected_dw, expected_da = sums_of(name, w, scale)
    assert value.shape == ()
    assert float(value) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(dw, expected_dw, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(da, expected_da, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", REGULARIZERS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_weights_and_scales(name, data):
    numbers = st.floats(-3, 3, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30)
    w = data.draw(hnp.arrays(np.float32, (3, 2), elements=numbers))
    scale = data.draw(hnp.arrays(np.float32, (1, 2), elements=numbers))
    value, (dw, da) = jax.value_and_grad(REGULARIZERS[name], argnums=(0, 1))(jnp.asarray(w), jnp.asarray(scale))
    expected, expected_dw, expected_da = sums_of(name, w, scale)
    assert float(value) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(dw, expected_dw, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(da, expected_da, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_gradients_equal_finite_differences_away_from_the_kinks(name):
    """Central differences of the float64 value; no |w| is within the step of 0, of 1 or of its scale."""
    w = np.array([[0.3, -0.7, 1.4], [-1.2, 0.9, -0.2], [0.65, -1.7, 0.05]])
    scale, step = np.array([[0.5, 0.8, 1.1]]), 1e-6
    with jax.enable_x64(True):
        function = jax.jit(REGULARIZERS[name])
        gradients = jax.grad(REGULARIZERS[name], argnums=(0, 1))(jnp.asarray(w), jnp.asarray(scale))
        for position, gradient in enumerate(gradients):
            for index in np.ndindex(gradient.shape):
                up, down = [w.copy(), scale.copy()], [w.copy(), scale.copy()]
                up[position][index] += step
                down[position][index] -= step
                slope = (float(function(*up)) - float(function(*down))) / (2 * step)
                assert float(gradient[index]) == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_bfloat16_jit_vmap_and_second_call(name, w, scales):
    function = REGULARIZERS[name]
    slopes = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
    value, (dw, da) = slopes(jnp.asarray(w, jnp.bfloat16), jnp.asarray(scales))
    assert value.dtype == dw.dtype == jnp.bfloat16
    assert da.dtype == jnp.float32
    rounded = np.asarray(jnp.asarray(w, jnp.bfloat16), np.float64)
    expected, expected_dw, _ = sums_of(name, rounded, scales)
    assert float(value) == pytest.approx(expected, rel=0.01, abs=0.5)
    np.testing.assert_allclose(np.asarray(dw, np.float64), expected_dw, rtol=0.01, atol=0.01)
    jitted = jax.jit(lambda w, scale: function(w, scale))
    assert float(jitted(w, scales)) == pytest.approx(float(function(w, scales)), rel=1e-6)
    jitted(w + 1, scales - 1)
    assert jitted._cache_size() == 1
    both = jnp.stack([jnp.asarray(w), -2 * jnp.asarray(w)])
    each = [float(function(one, scales)) for one in both]
    np.testing.assert_allclose(jax.vmap(function, in_axes=(0, None))(both, scales), each, rtol=1e-5)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_one_scale_is_the_default(name, w):
    assert float(REGULARIZERS[name](w)) == pytest.approx(float(REGULARIZERS[name](w, 1.0)))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", REGULARIZERS)
def test_other_shapes_and_dtypes_are_refused(name):
    text = r"^`scale` must be a scalar or one value a feature, shape \(1, 1, 1, 4\); got \({}\)$"
    for shape, shown in (((4,), "4,"), ((1, 1, 1, 3), "1, 1, 1, 3"), ((3, 3, 2, 4), "3, 3, 2, 4")):
        with pytest.raises(ValueError, match=text.format(shown)):
            REGULARIZERS[name](jnp.ones((3, 3, 2, 4)), jnp.ones(shape))
    with pytest.raises(TypeError, match=r"^`w` must be a floating-point array; got int32; convert it with `.astype`$"):
        REGULARIZERS[name](jnp.arange(3))


# ---- what each is for


@pytest.mark.parametrize(("regularizer", "optimum"), [(manhattan, np.median), (euclidean, np.mean)])
def test_the_best_scale_is_the_median_or_the_mean_of_the_magnitudes(regularizer, optimum):
    w = np.random.default_rng(1).normal(size=(3, 3, 5, 4)).astype(np.float32)  # 45 weights: the median is one of them
    best = optimum(np.abs(w).reshape(-1, 4), axis=0).astype(np.float32)

    def error(scale, feature):
        return float(regularizer(jnp.asarray(w[..., feature]).reshape(-1, 1), jnp.asarray(scale)))

    for feature in range(4):
        for epsilon in (-0.3, -0.02, 0.02, 0.3):
            assert error(best[feature] + epsilon, feature) > error(best[feature], feature)
    slope = jax.grad(regularizer, argnums=1)(jnp.asarray(w), jnp.asarray(best).reshape(1, 1, 1, 4))
    np.testing.assert_allclose(slope, np.zeros((1, 1, 1, 4)), atol=1e-4)


@pytest.mark.parametrize("regularizer", [manhattan, euclidean])
def test_nothing_pulls_at_weights_on_the_scale_and_zero_goes_up(regularizer):
    on_scale = jax.grad(regularizer)(jnp.array([[0.75, -2.0], [-0.75, 2.0]]), jnp.array([[0.75, 2.0]]))
    np.testing.assert_array_equal(on_scale, np.zeros((2, 2)))
    at_zero = jax.grad(regularizer)(jnp.array([0.0, -0.0]), 0.5)
    np.testing.assert_array_equal(at_zero, [-1.0, -1.0])


@pytest.mark.parametrize("regularizer", [manhattan, euclidean])
def test_descent_ends_at_binary_weights(regularizer):
    w = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, 200), jnp.float32)
    end = jax.lax.fori_loop(0, 400, lambda _, v: v - 0.01 * jax.grad(regularizer)(v, 0.5), w)
    np.testing.assert_allclose(end, np.where(np.asarray(w) < 0, -0.5, 0.5), atol=0.011)


def test_tang_pushes_away_from_zero_and_only_inside_when_clipped():
    w = jnp.array([-1.5, -1.0, -0.5, 0.5, 1.0, 1.5])
    np.testing.assert_array_equal(-jax.grad(tang)(w), [-3, -2, -1, 1, 2, 3])
    np.testing.assert_array_equal(-jax.grad(lambda w: tang(w, clipped=True))(w), [0, -2, -1, 1, 2, 0])


def test_scaled_tang_is_continuous_at_the_scale():
    for scale in (0.3, 1.0, 2.5):
        inside, outside = np.float32(scale) * np.float32(1 - 1e-6), np.float32(scale) * np.float32(1 + 1e-6)
        assert float(scaled_tang(jnp.array([inside]), scale)) == pytest.approx(0, abs=1e-4)
        assert float(scaled_tang(jnp.array([outside]), scale)) == 0


# ---- over a network


NETWORK = {
    "stem": {"kernel": jnp.full((2, 2), 9.0)},
    "block": {
        "conv": {
            "latent_kernel": jnp.array([[0.5, -2.0], [1.0, 0.25]]),
            "kernel_quantizer": {"scale": jnp.array([[2.0, 0.5]])},
            "input_quantizer": {"clipping_level": jnp.array(8.0)},
            "bias": jnp.ones(2),
        },
        "dense": {"latent_kernel": jnp.array([[-0.25]]), "input_quantizer": {"clipping_level": jnp.array(-3.0)}},
        "ternary": {"latent_kernel": jnp.array([[3.0]]), "kernel_quantizer": {"positive_scale": jnp.array(7.0)}},
    },
    "clipping_level": jnp.array(100.0),
    "scale": jnp.array(100.0),
}


@pytest.mark.parametrize("name", REGULARIZERS)
def test_the_penalty_sums_over_latent_weights_with_the_scale_of_their_layer(name):
    layers = NETWORK["block"]
    expected = sum(
        sums_of(name, np.asarray(layers[layer]["latent_kernel"]), scale)[0]
        for layer, scale in (("conv", np.array([[2.0, 0.5]])), ("dense", 1.0), ("ternary", 1.0))
    )
    value, gradient = jax.jit(lambda params: jax.value_and_grad(penalty)(params, REGULARIZERS[name]))(NETWORK)
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(expected, rel=1e-6)
    _, dw, da = sums_of(name, np.asarray(layers["conv"]["latent_kernel"]), np.array([[2.0, 0.5]]))
    np.testing.assert_allclose(gradient["block"]["conv"].pop("latent_kernel"), dw, rtol=1e-6)
    np.testing.assert_allclose(gradient["block"]["conv"].pop("kernel_quantizer")["scale"], da, rtol=1e-6)
    for layer in ("dense", "ternary"):
        _, dw, _ = sums_of(name, np.asarray(layers[layer]["latent_kernel"]), 1.0)
        np.testing.assert_allclose(gradient["block"][layer].pop("latent_kernel"), dw, rtol=1e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_the_clipping_penalty_decays_clipping_levels_alone():
    value, gradient = jax.value_and_grad(clipping_penalty)(NETWORK)
    assert float(value) == 8.0**2 + 3.0**2
    assert float(gradient["block"]["conv"].pop("input_quantizer")["clipping_level"]) == 16
    assert float(gradient["block"]["dense"].pop("input_quantizer")["clipping_level"]) == -6
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("params", [{}, {"head": {"kernel": jnp.ones(3)}}, jnp.ones(3), [jnp.ones(3)]], ids=str)
def test_networks_without_latent_weights_have_no_penalty(params):
    for value in (penalty(params, l2), clipping_penalty(params)):
        assert float(value) == 0
        assert value.dtype == jnp.float32


def test_a_bfloat16_network_is_summed_in_float32():
    params = {str(i): {"latent_kernel": jnp.full((16, 16), 1.0, jnp.bfloat16)} for i in range(5)}
    params["small"] = {"latent_kernel": jnp.full((1, 1), 1.0, jnp.bfloat16)}
    value, gradient = jax.value_and_grad(penalty)(params, l2)
    assert float(value) == 5 * 256 + 1  # 1281 is no bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}


def test_a_scale_of_another_shape_is_refused_in_a_network():
    layer = {"latent_kernel": jnp.ones((2, 3)), "kernel_quantizer": {"scale": jnp.ones(3)}}
    with pytest.raises(
        ValueError, match=r"`scale` must be a scalar or one value a feature, shape \(1, 3\); got \(3,\)"
    ):
        penalty({"layer": layer}, manhattan)


# ---- a strength that falls


def test_a_scheduled_strength_scales_the_gradient_without_a_new_trace():
    strength = milestones(1e-2, 10)

    @jax.jit
    def gradient(params, step):
        return jax.grad(lambda params: strength(step) * penalty(params, euclidean))(params)

    params = {"conv": {"latent_kernel": jnp.array([[0.25]])}}
    for step, factor in ((0, 1e-2), (5, 1e-3), (9, 1e-4)):
        slope = gradient(params, jnp.int32(step))["conv"]["latent_kernel"]
        np.testing.assert_allclose(slope, [[-2 * 0.75 * factor]], rtol=1e-5)
    assert gradient._cache_size() == 1


def test_boxed_weights_are_regularized_as_plain_ones():
    """Flax's boxes name the axes of a parameter."""
    layer = {"latent_kernel": jnp.array([[0.5], [-2.0]]), "kernel_quantizer": {"scale": jnp.array([[1.5]])}}
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None, None)), {"conv": layer})
    assert penalty(boxed, "manhattan") == penalty({"conv": layer}, "manhattan") > 0
    level = {"conv": {"input_quantizer": {"clipping_level": nn.Partitioned(jnp.array(8.0), ())}}}
    assert clipping_penalty(level) == 64
    assert latent_kernels(boxed).keys() == {"conv"}

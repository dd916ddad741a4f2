"""PReLU and RPReLU: values and every derivative against scalar formulas, corners included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.layers import PReLU, RPReLU

CHANNELS = 3
SLOPES = np.array([0.25, -0.5, 2.0])
POSITIVE = np.array([1.0, 0.5, -1.5])
CORNERS = np.array([0.0, 0.75, -1.0])
HEIGHTS = np.array([0.0, -2.0, 0.5])


def inputs():
    x = np.random.default_rng(0).normal(size=(2, 4, 2, CHANNELS)).astype(np.float32)
    x[0, 0, 0], x[0, 0, 1], x[1, 0, 0] = 0.0, -0.0, CORNERS
    return x


def prelu(x, channel):
    """(value, {parameter: derivative, "x": derivative})"""
    if x > 0:
        return x, {"x": 1.0, "slope": 0.0}
    return SLOPES[channel] * x, {"x": SLOPES[channel], "slope": x}


def two_slopes(x, channel):
    if x > 0:
        return POSITIVE[channel] * x, {"x": POSITIVE[channel], "slope": 0.0, "positive_slope": x}
    return SLOPES[channel] * x, {"x": SLOPES[channel], "slope": x, "positive_slope": 0.0}


def rprelu(x, channel):
    moved = x - CORNERS[channel]
    slope = 1.0 if moved > 0 else SLOPES[channel]
    derivatives = {"x": slope, "input_shift": -slope, "output_shift": 1.0, "slope": 0.0 if moved > 0 else moved}
    return slope * moved + HEIGHTS[channel], derivatives


VALUES = {"slope": SLOPES, "positive_slope": POSITIVE, "input_shift": CORNERS, "output_shift": HEIGHTS}
LAYERS = [(PReLU(), prelu), (PReLU(both_slopes=True), two_slopes), (RPReLU(), rprelu)]


@pytest.mark.parametrize(("layer", "scalar"), LAYERS, ids=["prelu", "two slopes", "rprelu"])
def test_values_and_derivatives(layer, scalar):
    x, g = inputs(), np.random.default_rng(1).normal(size=(2, 4, 2, CHANNELS)).astype(np.float32)
    names = set(layer.init(jax.random.key(0), x)["params"])
    params = {name: jnp.asarray(VALUES[name], jnp.float32) for name in names}

    @jax.jit
    def run(params, x, g):
        y, pull = jax.vjp(lambda params, x: layer.apply({"params": params}, x), params, x)
        return y, *pull(g)

    y, dparams, dx = run(params, x, jnp.asarray(g))
    expected = {name: np.zeros(CHANNELS) for name in names}
    for index in np.ndindex(x.shape):
        value, derivatives = scalar(float(x[index]), index[-1])
        np.testing.assert_allclose(y[index], value, rtol=1e-6)
        np.testing.assert_allclose(dx[index], derivatives.pop("x") * g[index], rtol=1e-6)
        for name, derivative in derivatives.items():
            expected[name][index[-1]] += derivative * g[index]
    assert set(derivatives) == names
    for name in names:
        np.testing.assert_allclose(dparams[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "start"),
    [
        (PReLU(), {"slope": 0.25}),
        (PReLU(initial_slope=0.1), {"slope": 0.1}),
        (PReLU(both_slopes=True), {"slope": 0.25, "positive_slope": 1.0}),
        (RPReLU(initial_slope=1.0), {"slope": 1.0, "input_shift": 0.0, "output_shift": 0.0}),
    ],
)
def test_parameters_at_the_start(layer, start):
    params = layer.init(jax.random.key(0), jnp.ones((2, 5)))["params"]
    assert set(params) == set(start)
    for name, value in start.items():
        np.testing.assert_array_equal(params[name], np.full(5, value, np.float32))


@pytest.mark.parametrize("layer", [PReLU(both_slopes=True), RPReLU()])
def test_the_dtype_is_kept(layer):
    y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 3), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

"""Schedules, and what EDE, DIR-Net, Gumbel and Fourier estimators have beside the laws of all."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from bnn_jax.estimators import (
    ESTIMATORS,
    dir_sign,
    ede_schedule,
    fda_schedule,
    fda_sign,
    gumbel_schedule,
    gumbel_sign,
    rbnn_schedule,
    sign,
)


def derivative_of(estimator, x):
    return jax.grad(lambda x: estimator(x).sum())(x)


@pytest.mark.parametrize("name", [name for name, estimator in ESTIMATORS.items() if estimator.schedule])
def test_a_new_schedule_value_does_not_recompile(name):
    x, estimator = jnp.linspace(-0.9, 0.9, 31), ESTIMATORS[name]
    slope = jax.jit(lambda x, progress: derivative_of(partial(estimator, **estimator.schedule(progress)), x))
    early, late = slope(x, 0.0), slope(x, 1.0)
    assert slope._cache_size() == 1
    assert late[15] > early[15] + 0.5  # sharper at zero
    expected = derivative_of(partial(estimator, **estimator.schedule(1.0)), x)
    np.testing.assert_allclose(late, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),  # at progress 0, 1/2 and 1
    [
        (ede_schedule, {"t": [0.1, 1, 10], "k": [10, 1, 1]}),
        (partial(ede_schedule, t_min=1e-3), {"t": [1e-3, 0.1, 10], "k": [1000, 10, 1]}),
        (rbnn_schedule, {"t": [0.01, 0.1**0.5, 10], "k": [100, 10**0.5, 1]}),
        (partial(rbnn_schedule, activations=True), {"t": [1, 1, 10], "k": [1, 1, 1]}),
        (gumbel_schedule, {"temperature": [1, 0.3**0.5, 0.3]}),
        (fda_schedule, {"terms": [10, 14, 19]}),
    ],
)
def test_schedules_at_both_ends_and_half_way(schedule, expected):
    values = jax.vmap(schedule)(jnp.array([0.0, 0.5, 1.0]))
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-5)


SLOPE_OF_FDA_SIGN = jax.jit(lambda x, terms: derivative_of(partial(fda_sign, terms=terms), x))


@pytest.mark.parametrize("terms", [1.0, 10.0, 19.0, 1000.0])
def test_fourier_slope_next_to_zero(terms):
    x = jnp.array([0.0, 1e-38, 1e-20, 1e-8, 1e-5])
    series = lambda v: 0.4 / math.pi * sum(math.cos((2 * i + 1) * 0.1 * v) for i in range(int(terms)))
    np.testing.assert_allclose(SLOPE_OF_FDA_SIGN(x, terms), [series(float(v)) for v in x], rtol=2e-6)


@pytest.mark.parametrize("eps", [0.05, 0.1, 0.5])
def test_a_share_of_the_weights_keeps_learning_in_dir_sign(eps):
    w = np.random.default_rng(1).normal(size=(50, 40)).astype(np.float32)
    t = min(1000.0, 1 / np.quantile(np.abs(w).astype(np.float64), eps))
    slope = np.asarray(derivative_of(partial(dir_sign, t=1000.0, k=2.0, eps=eps), jnp.asarray(w)))
    np.testing.assert_allclose(slope, 2 * t * (1 - np.tanh(t * w.astype(np.float64)) ** 2), rtol=1e-4, atol=1e-5)
    assert (slope >= 0.41997 * 2 * t).mean() == pytest.approx(eps, abs=1e-3)
    zeros = derivative_of(partial(dir_sign, t=3.0), jnp.zeros(8))
    np.testing.assert_allclose(zeros, 3.0)


MAGNITUDES = {
    "normal": np.random.default_rng(0).normal(size=(7, 143)),
    "ties": np.random.default_rng(0).integers(0, 4, 1000) / 2 + 0.5,
    "two": np.array([0.25, -3.0]),
    "one": np.array([-0.7]),
    "scalar": np.array(-0.7),
    "spread": 10.0 ** np.linspace(-30, 30, 61),
    "half_zero": np.r_[np.zeros(50), np.linspace(0.1, 1, 50)],
}


SLOPE_OF_DIR_SIGN = jax.jit(jax.grad(lambda w, eps: dir_sign(w, t=1e6, eps=eps).sum()))


@pytest.mark.parametrize("eps", [1e-3, 0.1, 0.25, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("name", MAGNITUDES)
def test_the_bound_of_dir_sign_is_the_quantile(name, eps):
    w = MAGNITUDES[name].astype(np.float32)
    quantile = np.quantile(np.abs(w).astype(np.float64), eps)
    u = 1e6 if quantile == 0 else min(1e6, 1 / quantile)
    slope = SLOPE_OF_DIR_SIGN(w, eps)
    expected = u / np.cosh(np.minimum(u * np.abs(w.astype(np.float64)), 300)) ** 2
    np.testing.assert_allclose(slope, expected, rtol=2e-4, atol=1e-30)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("x", [-1.0, -0.25, 0.0, 0.5, 2.0])
def test_gumbel_is_positive_with_probability_sigmoid_2x(x, dtype):
    draws = gumbel_sign(jnp.full(200_000, x, dtype), key=jax.random.key(3)).astype(jnp.float32)
    p = 1 / (1 + math.exp(-2 * x))
    assert abs(float((draws > 0).mean()) - p) < 5 * math.sqrt(p * (1 - p) / draws.size)  # fails once in a million keys


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_gumbel_gradient_averages_to_the_integral_over_the_noise(temperature):
    x, n = 0.4, 200_000
    slopes = derivative_of(partial(gumbel_sign, key=jax.random.key(5), temperature=temperature), jnp.full(n, x))
    sech = lambda z: 1 / math.cosh(z)
    weighted = lambda noise: sech((x + noise / 2) / temperature) ** 2 / temperature * (sech(noise / 2) / 2) ** 2
    mean = integrate.quad(weighted, -40, 40, points=[-2 * x])[0]
    assert abs(float(slopes.mean()) - mean) < 5 * float(slopes.std()) / math.sqrt(n)


def test_gumbel_codes_and_gradient_share_one_logistic_draw():
    """|x + L/2| read off the gradient, with the sign of the codes, gives back a logistic sample."""
    x = jnp.full(20_000, 0.3)
    estimator = partial(gumbel_sign, key=jax.random.key(7), temperature=2.0)
    distance = 2.0 * np.arctanh(np.sqrt(1 - np.clip(2.0 * np.asarray(derivative_of(estimator, x), np.float64), 0, 1)))
    noise = 2 * (np.asarray(estimator(x)) * distance - 0.3)
    assert stats.kstest(noise, "logistic").pvalue > 1e-3


def test_gumbel_without_sampling_differs_in_the_forward_value_alone():
    x = jnp.linspace(-3, 3, 601)
    sampled, plain = (partial(gumbel_sign, key=jax.random.key(9), temperature=0.7, sampled=s) for s in (True, False))
    np.testing.assert_array_equal(plain(x), np.where(np.asarray(x) < 0, -1, 1))
    assert (sampled(x) != plain(x)).any()
    slopes = [jax.grad(lambda x, e=estimator: e(x).sum())(x) for estimator in (sampled, plain)]
    np.testing.assert_allclose(*slopes, rtol=1e-5, atol=1e-6)


def test_gumbel_draws_anew_for_each_key_alone():
    x = jnp.linspace(-1, 1, 256)
    first, again, other = (gumbel_sign(x, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first != sign(x)).any()

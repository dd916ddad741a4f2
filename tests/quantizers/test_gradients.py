"""Gradient quantizers: the backward pass against the published formula, its bounds and its mean."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.quantizers.gradients import GRADIENT_QUANTIZERS, dorefa_gradient

SHAPE = (4, 3, 2)


@pytest.fixture(scope="module")
def g():
    g = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32) * np.array([[[1e-4]], [[1.0]], [[1e4]], [[3.0]]])
    g[3, 0, 0] = 0.0
    return g.astype(np.float32)


def quantized(g, key, bits):
    return jax.vjp(lambda y: dorefa_gradient(y, key, bits=bits), jnp.zeros_like(g))[1](jnp.asarray(g))[0]


def test_every_entry_of_the_table_is_the_identity_forward(g):
    for factory in (make for name, make in GRADIENT_QUANTIZERS.items() if name != "full_precision"):
        np.testing.assert_array_equal(factory(bits=3)(jnp.asarray(g), jax.random.key(0)), g)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_levels_and_bound(g, bits):
    n, largest = 2**bits - 1, np.abs(g).max((1, 2), keepdims=True).astype(np.float64)
    for seed in range(5):
        found = np.asarray(quantized(g, jax.random.key(seed), bits), np.float64)
        assert (np.abs(found - g) <= 2 * largest / n * (1 + 1e-5)).all()
        level = (found / (2 * largest) + 0.5) * n
        np.testing.assert_allclose(level, np.round(level), atol=1e-3)
        assert level.min() > -0.5 and level.max() < n + 0.5
        peak = np.abs(g) == largest
        np.testing.assert_allclose(found[peak], g[peak], rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_unbiased_at_five_standard_errors(g, bits):
    """24 elements at 5 standard errors: a sound quantizer fails with probability below 2e-5."""
    draws = 4000
    keys = jax.random.split(jax.random.key(7), draws)
    found = np.asarray(jax.jit(jax.vmap(lambda key: quantized(g, key, bits)))(keys), np.float64)
    # Two neighbouring levels, 2m/n apart: the standard deviation is at most m/n.
    largest = np.abs(g).max((1, 2), keepdims=True).astype(np.float64)
    standard_error = largest / (2**bits - 1) / np.sqrt(draws)
    assert (np.abs(found.mean(0) - g) <= 5 * standard_error + 1e-5 * largest).all()
    interior = np.abs(g) < 0.5 * largest
    assert (found.std(0)[interior] > 0).all()


def test_each_example_has_its_own_largest_gradient(g):
    key = jax.random.key(3)
    scaled = g * np.array([1.0, 8.0, 1.0, 0.25], np.float32).reshape(4, 1, 1)
    found, other = quantized(g, key, 3), quantized(scaled, key, 3)
    np.testing.assert_allclose(other, found * np.array([1.0, 8.0, 1.0, 0.25]).reshape(4, 1, 1), rtol=1e-5)


def test_noise_of_one_draw_is_uniform_and_differs_between_elements_and_keys():
    g = np.full((1, 20_001), 0.3, np.float32)
    g[0, 0] = 1.0
    up = np.asarray(quantized(g, jax.random.key(0), 1))[0, 1:] > 0
    # P(up) = g/(2m) + 1/2 = 0.65, within five standard errors
    assert up.mean() == pytest.approx(0.65, abs=5 * np.sqrt(0.65 * 0.35 / up.size))
    assert (up != (np.asarray(quantized(g, jax.random.key(1), 1))[0, 1:] > 0)).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zero_stays_zero_and_extremes_are_finite(dtype):
    g = jnp.array([[0.0, 0.0], [1e4, -1e4], [1e-30, 0.0]], dtype)
    found = quantized(g, jax.random.key(0), 2)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found[0], np.float32), [0, 0])
    np.testing.assert_array_equal(np.asarray(found[1], np.float32), np.asarray(g[1], np.float32))
    assert np.isfinite(np.asarray(found, np.float32)).all()


def test_jit_scan_and_second_call(g):
    jitted = jax.jit(partial(quantized, bits=3))
    keys = jax.random.split(jax.random.key(1), 2)
    _, scanned = jax.lax.scan(lambda carry, key: (carry, quantized(jnp.asarray(g), key, 3)), 0, keys)
    for i in range(2):
        np.testing.assert_allclose(jitted(g, keys[i]), quantized(g, keys[i], 3), rtol=1e-6)
        np.testing.assert_allclose(scanned[i], quantized(g, keys[i], 3), rtol=1e-6)
    assert jitted._cache_size() == 1


@pytest.mark.usefixtures("unchecked")
def test_error_texts():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"`bits` \(=0\) must be at least 1"):
        GRADIENT_QUANTIZERS["dorefa"](bits=0)
    with pytest.raises(ValueError, match=r"`bits` \(=9\) must be at most 8 in bfloat16"):
        dorefa_gradient(jnp.ones((2, 2), jnp.bfloat16), key, bits=9)
    with pytest.raises(ValueError, match=r"`y` \(of shape \(\)\) must have the examples on its first axis"):
        dorefa_gradient(jnp.ones(()), key)
    with pytest.raises(TypeError, match=r"`y` must be a floating-point array; got int32"):
        dorefa_gradient(jnp.ones((2, 2), jnp.int32), key)

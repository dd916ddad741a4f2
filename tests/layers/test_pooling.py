"""Pooling against numpy and flax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.layers import avg_pool_2x2, batch_norm, max_pool


@pytest.mark.parametrize("window", [(2, 2), (3, 2)])
@pytest.mark.parametrize("side", [6, 7])
def test_tiles_equal_numpy_and_the_first_of_equal_values_gets_the_gradient(window, side):
    x = np.random.default_rng(0).integers(-2, 3, (2, side, side, 3)).astype(np.float32)
    g = np.random.default_rng(1).normal(size=(2, side // window[0], side // window[1], 3)).astype(np.float32)

    @jax.jit
    def run(x, g):
        y, pullback = jax.vjp(lambda x: max_pool(x, window), x)
        return y, *pullback(g)

    y, found = run(jnp.asarray(x), jnp.asarray(g))
    expected, gradient = np.zeros_like(g), np.zeros_like(x)
    for b, i, j, c in np.ndindex(g.shape):
        tile = x[b, i * window[0] : (i + 1) * window[0], j * window[1] : (j + 1) * window[1], c]
        expected[b, i, j, c] = tile.max()
        row, column = np.unravel_index(tile.argmax(), tile.shape)
        gradient[b, i * window[0] + row, j * window[1] + column, c] = g[b, i, j, c]
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(found, gradient)


def test_overlapping_windows_equal_flax():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 7, 7, 2)), jnp.float32)
    found = max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    np.testing.assert_array_equal(found, nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))))


@pytest.mark.parametrize("level", [0, 3])
def test_gradient_of_a_computed_maximum_is_finite(level):
    """XLA may compute the pooled values twice, with and without fused multiply-add."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 16, 8)), jnp.float32)

    def loss(x):
        y, _, _ = batch_norm(x, jnp.ones(8), jnp.zeros(8))
        return (nn.relu(max_pool(y)) ** 2).sum()

    gradient = jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": level})(x)
    assert jnp.isfinite(gradient).all() and (gradient != 0).any()


@pytest.mark.parametrize("shape", [(4, 6), (5, 6), (3, 3), (1, 1)])
def test_halve_takes_the_means_of_what_is_there(shape):
    x = np.random.default_rng(1).normal(size=(2, *shape, 3)).astype(np.float32)
    expected = [[x[:, i : i + 2, j : j + 2].mean((1, 2)) for j in range(0, shape[1], 2)] for i in range(0, shape[0], 2)]
    found = avg_pool_2x2(jnp.asarray(x))
    np.testing.assert_allclose(found, np.moveaxis(expected, 2, 0), rtol=1e-5, atol=1e-6)

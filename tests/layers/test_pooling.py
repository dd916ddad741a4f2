"""Pooling against numpy and flax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

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


@pytest.mark.parametrize(("window", "strides", "padding"), [(3, 2, 1), (3, 1, 0), (2, 1, (0, 1)), (2, 3, 0), (4, 2, 1)])
def test_overlapping_windows_and_their_gradient_equal_flax(window, strides, padding):
    x = jnp.asarray(np.random.default_rng(0).integers(-3, 4, (2, 9, 8, 2)), jnp.float32)
    pads = ((padding, padding),) * 2 if isinstance(padding, int) else (padding,) * 2
    sizes = (window, window), (strides, strides), pads

    @jax.jit
    def run(x, g):
        results = []
        for pool in (lambda x: max_pool(x, window, strides=strides, padding=pads), lambda x: nn.max_pool(x, *sizes)):
            y, pullback = jax.vjp(pool, x)
            results.append((y, *pullback(g)))
        return results

    g = np.random.default_rng(1).integers(-9, 10, nn.max_pool(x, *sizes).shape).astype(np.float32)
    (found, gradient), (expected, of_flax) = run(x, g)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(gradient, of_flax)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.int8])
def test_maxima_keep_the_dtype(dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(-100, 0, (1, 4, 4, 2)), dtype)
    found = max_pool(x, 2, padding=1)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found[0, 0, 0], x[0, 0, 0])  # beside the padding alone


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_value_that_is_not_a_number_is_not_lost(place):
    x = jnp.zeros((1, 4, 4, 1)).at[(0, *place, 0)].set(jnp.nan)
    np.testing.assert_array_equal(jnp.isnan(jax.jit(max_pool)(x))[0, :, :, 0], [[True, False], [False, False]])


@pytest.mark.parametrize(("platform", "scatters"), [("cpu", False), ("cuda", False), ("tpu", True)])
def test_the_gradient_on_a_gpu_has_a_deterministic_form(platform, scatters):
    gradient = jax.jit(jax.grad(lambda x: max_pool(x, 3, strides=2, padding=1).sum()))
    text = export.export(gradient, platforms=(platform,))(jnp.zeros((1, 8, 8, 2))).mlir_module()
    assert ("select_and_scatter" in text) == scatters


def test_a_window_larger_than_the_image_has_no_result():
    assert max_pool(jnp.zeros((1, 2, 5, 3)), (3, 2)).shape == (1, 0, 2, 3)


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

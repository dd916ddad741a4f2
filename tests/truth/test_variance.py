"""Variances where the mean is large beside the deviation, against float64; and where there is nothing to vary."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.data.sources import pixel_statistics
from bnn_jax.layers import BatchNorm, batch_norm
from bnn_jax.layers.norm import by_first_rows, by_passes
from bnn_jax.quantizers.standardized import standardize

RATIOS = (0.0, 3.0, 7.9, 100.0, 1000.0, 3000.0, 1e4)
SHAPES = ((16, 8, 8, 4), (64, 4), (8, 16, 4))


def far_from_zero(ratio: float, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Standard deviation 1 about `ratio` and, in every second channel, about its opposite."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) + ratio * (-1.0) ** np.arange(shape[-1])).astype(np.float32)


def normalized_in_float64(x, scale, bias, g, epsilon=1e-5):
    """y, mean, variance and the gradients to x, scale and bias, by the chain rule in float64."""
    x, scale, bias, g = (np.asarray(a, np.float64) for a in (x, scale, bias, g))
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    mean, variance = x.mean(axes), x.var(axes)
    standardized = (x - mean) / np.sqrt(variance + epsilon)
    dscale, dbias = (g * standardized).sum(axes), g.sum(axes)
    dx = scale / np.sqrt(variance + epsilon) * (g - dbias / count - standardized * dscale / count)
    return scale * standardized + bias, mean, variance, dx, dscale, dbias


@jax.jit
def normalized(x, scale, bias, g):
    def run(x, scale, bias):
        y, *statistics = batch_norm(x, scale, bias)
        return y, statistics

    y, pullback, statistics = jax.vjp(run, x, scale, bias, has_aux=True)
    return y, *statistics, *pullback(g)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ratio", RATIOS)
def test_batch_norm_and_its_gradients_keep_their_digits(ratio, shape):
    x, g = far_from_zero(ratio, shape), far_from_zero(0.0, shape, seed=1)
    scale, bias = np.linspace(0.5, 2, shape[-1], dtype=np.float32), np.ones(shape[-1], np.float32)
    names = ("y", "mean", "variance", "dx", "dscale", "dbias")
    for name, found, expected in zip(
        names, normalized(x, scale, bias, g), normalized_in_float64(x, scale, bias, g), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("statistics", [by_passes, by_first_rows])
def test_both_ways_to_the_statistics_agree_with_float64(statistics, ratio):
    x = far_from_zero(ratio, SHAPES[0])
    found = jax.jit(statistics)(x)
    x = x.astype(np.float64)
    np.testing.assert_allclose(found.center + found.offset, x.mean((0, 1, 2)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.variance, x.var((0, 1, 2)), rtol=2e-5)
    offset = x.mean((0, 1, 2)) - np.asarray(found.center, np.float64)
    np.testing.assert_allclose(found.offset, offset, atol=1e-6)


def test_a_first_row_unlike_the_rest_costs_few_digits():
    x = far_from_zero(0.0, SHAPES[0])
    x[:, 0] += 1e4
    np.testing.assert_allclose(jax.jit(by_first_rows)(x).variance, x.astype(np.float64).var((0, 1, 2)), rtol=2e-6)


@pytest.mark.parametrize("ratio", [1000.0, 1e4])
def test_bfloat16_activations_keep_what_their_dtype_holds(ratio):
    x = jnp.asarray(64 * far_from_zero(ratio / 64, SHAPES[0]), jnp.bfloat16)
    y, _, variance, *_ = normalized(x, jnp.ones(4), jnp.zeros(4), jnp.ones_like(x))
    double = np.asarray(x, np.float64)
    np.testing.assert_allclose(variance, double.var((0, 1, 2)), rtol=2e-5)
    expected = (double - double.mean((0, 1, 2))) / np.sqrt(double.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=2**-8)


@partial(jax.jit, static_argnums=0)
def trained(norm, variables, x):
    y, updated = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    return y, updated["batch_stats"]


def test_the_first_step_and_one_after_the_mean_jumped_are_as_exact():
    """And the running statistics are of biased variances: those of n values divided by n."""
    norm, shape = BatchNorm(momentum=0.8), (6, 4)
    variables = norm.init(jax.random.key(0), jnp.zeros(shape), train=False)
    mean, variance = np.zeros(4), np.ones(4)
    for step, ratio in enumerate((3000.0, 3000.0, -1e4, 0.0)):
        x = far_from_zero(ratio, shape, seed=step)
        y, statistics = trained(norm, variables, x)
        variables |= {"batch_stats": statistics}
        x = x.astype(np.float64)
        mean, variance = 0.8 * mean + 0.2 * x.mean(0), 0.8 * variance + 0.2 * x.var(0)
        np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(statistics["mean"], mean, rtol=1e-6)
        np.testing.assert_allclose(statistics["var"], variance, rtol=2e-5)


def test_members_that_vmap_maps_have_each_its_own_center():
    x = np.stack([far_from_zero(ratio, (32, 4)) for ratio in (0.0, 1e4)])
    found = jax.jit(jax.vmap(lambda x: batch_norm(x, jnp.ones(4), jnp.zeros(4))[0]))(x)
    double = x.astype(np.float64)
    expected = (double - double.mean(1, keepdims=True)) / np.sqrt(double.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("ratio", [0.0, 1e4])
def test_standardized_weights_keep_their_digits(ratio):
    w = far_from_zero(ratio, (3, 3, 8, 4))
    double = w.astype(np.float64)
    expected = (double - double.mean((0, 1, 2))) / double.std((0, 1, 2), ddof=1)
    np.testing.assert_allclose(standardize(w), expected, atol=1e-3)


def test_the_deviation_of_bright_pixels_is_exact():
    images = np.random.default_rng(0).integers(254, 256, (50, 8, 8, 3), dtype=np.uint8)
    mean, std = pixel_statistics(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, images.std((0, 1, 2)), rtol=1e-9)


# ---- one value of each channel


@pytest.mark.parametrize("shape", [(1, 5), (1, 1, 1, 5), (5,)], ids=str)
def test_one_value_a_channel_cannot_be_normalized(shape, unchecked):
    x, sentence = jnp.ones(shape), r"`x.shape` \(=\(.*5,?\)\) must hold at least two values of each channel"
    with pytest.raises(ValueError, match=sentence):
        batch_norm(x, jnp.ones(5), jnp.zeros(5))
    with pytest.raises(ValueError, match=sentence):
        jax.grad(lambda x: batch_norm(x, jnp.ones(5), jnp.zeros(5))[0].sum())(x)
    norm = BatchNorm(name="norm3")
    variables = norm.init(jax.random.key(0), x, train=True)
    np.testing.assert_allclose(norm.apply(variables, x, train=False), x, rtol=1e-5)
    with pytest.raises(ValueError, match=f"{sentence}.* in layer 'norm3'; train on larger batches"):
        norm.apply(variables, x, train=True, mutable=["batch_stats"])


@pytest.mark.parametrize("shape", [(2, 5), (1, 1, 2, 5)], ids=str)
def test_two_values_are_enough(shape):
    y, _, _ = batch_norm(jnp.arange(10.0).reshape(shape), jnp.ones(5), jnp.zeros(5))
    np.testing.assert_allclose(np.abs(y), 1, rtol=1e-5)

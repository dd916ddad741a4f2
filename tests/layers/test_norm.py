"""Batch normalization against Flax's, whose gradient is autodiff's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.layers import BatchNorm, batch_norm


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).normal(1.0, 3.0, size=(4, 5, 6, 7)), jnp.float32)


@pytest.mark.parametrize("shape", [(4, 5, 6, 7), (24, 35)])
def test_forward_gradient_and_running_statistics_equal_flax(x, shape):
    x = x.reshape(shape)
    ours, theirs = BatchNorm(momentum=0.8), nn.BatchNorm(use_running_average=False, momentum=0.8, epsilon=1e-5)
    rng = np.random.default_rng(1)
    params = {name: jnp.asarray(rng.normal(size=shape[-1:]), jnp.float32) for name in ("scale", "bias")}
    stats = ours.init(jax.random.key(0), x, train=False)["batch_stats"]
    g = jnp.asarray(rng.normal(size=shape), jnp.float32)

    def run(module, **kwargs):
        def f(params, x):
            y, updated = module.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"], **kwargs)
            return (y * g).sum(), (y, updated["batch_stats"])

        (_, aux), gradients = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(params, x)
        return aux, gradients

    for a, b in zip(jax.tree.leaves(run(ours, train=True)), jax.tree.leaves(run(theirs))):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def test_gradient_by_finite_differences_in_float64():
    rng = np.random.default_rng(2)
    x, g, scale, bias = rng.normal(size=(6, 2)), rng.normal(size=(6, 2)), np.array([0.5, -2.0]), np.array([0.1, 0.2])

    def loss(x):
        return (((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * scale + bias) * g).sum()

    steps = [1e-6 * np.eye(x.size)[index].reshape(x.shape) for index in range(x.size)]
    expected = [(loss(x + step) - loss(x - step)) / 2e-6 for step in steps]
    for dtype, rtol, atol in (("float32", 2e-4, 1e-4), ("float64", 1e-7, 1e-8)):
        with jax.enable_x64(dtype == "float64"):
            ours = lambda weights, *arrays: (batch_norm(*arrays)[0] * weights).sum()
            arrays = (jnp.asarray(array, dtype) for array in (g, x, scale, bias))
            found = jax.jit(jax.grad(ours, argnums=(1, 2, 3)))(*arrays)
        np.testing.assert_allclose(np.ravel(found[0]), expected, rtol=rtol, atol=atol)
        np.testing.assert_allclose(found[2], g.sum(0), rtol=rtol)
        assert {gradient.dtype.name for gradient in found} == {dtype}


@pytest.mark.usefixtures("standard_dtypes")
def test_running_statistics_of_float64_stay_float32():
    with jax.enable_x64(True):
        x = np.random.default_rng(3).normal(size=(6, 2))
        expected, x, module = (
            (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5),
            jnp.asarray(x),
            BatchNorm(param_dtype=jnp.float64),
        )
        y, updated = module.apply(module.init(jax.random.key(0), x, train=True), x, train=True, mutable=["batch_stats"])
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
        assert y.dtype == jnp.float64 and {leaf.dtype.name for leaf in jax.tree.leaves(updated)} == {"float32"}


def test_evaluation_uses_the_running_statistics(x):
    module = BatchNorm()
    variables = {
        "params": {"scale": jnp.full(7, 2.0), "bias": jnp.full(7, 1.0)},
        "batch_stats": {"mean": jnp.full(7, 3.0), "var": jnp.full(7, 4.0)},
    }
    expected = (np.asarray(x, np.float64) - 3) / np.sqrt(4 + 1e-5) * 2 + 1
    np.testing.assert_allclose(module.apply(variables, x, train=False), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_constant_channels_stay_finite(dtype):
    x = jnp.full((4, 3), 1000.0, dtype)
    normalize = jax.jit(lambda x: batch_norm(x, jnp.ones(3), jnp.zeros(3)))
    y, _, variance = normalize(x)
    assert y.dtype == dtype
    assert (variance >= 0).all()
    assert jnp.isfinite(jax.jit(jax.grad(lambda x: normalize(x)[0].sum()))(x)).all()


def test_no_examples_are_refused_in_training():
    """They would make the running statistics NaN."""
    x = jnp.ones((0, 4, 4, 3))
    variables = BatchNorm().init(jax.random.key(0), x, train=False)
    with pytest.raises(ValueError, match=r"`x.shape` \(=\(0, 4, 4, 3\)\) must hold at least two values of each"):
        BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])

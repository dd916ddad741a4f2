"""Invariants of codes and scales, and trained ternary quantization against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.quantizers import Quantized, bases, dequantize, trained_ternary, validate


@pytest.fixture(scope="module")
def w():
    w = np.random.default_rng(0).normal(size=(3, 3, 5, 7)).astype(np.float32)
    w[0, 0, 0, :4] = [0.0, -0.0, 1.0, -1.0]
    return w


def test_validate_names_what_does_not_hold():
    with pytest.raises(ValueError, match=r"`codes` must lie in \(-1, 1\); got 0\.5 among 2 codes"):
        validate(Quantized(jnp.array([1.0, 0.5]), jnp.ones(())), (-1, 1))
    with pytest.raises(
        ValueError,
        match=r"`scale` must be a scalar, or one value a feature, shape \(1, 3\), or an example, shape \(2, 1\); "
        r"got \(2, 3\)",
    ):
        validate(Quantized(jnp.ones((2, 3)), jnp.ones((2, 3))), (-1, 1))


def test_several_bases_mean_their_sum():
    pair = (Quantized(jnp.array([1.0, -1.0]), jnp.array(2.0)), Quantized(jnp.array([0.0, 1.0]), jnp.array([0.5, 0.25])))
    np.testing.assert_array_equal(dequantize(pair), [2.0, -1.75])
    assert bases(pair) is pair
    assert bases(pair[0]) == (pair[0],)


SLOPES_OF_TTQ = jax.jit(
    jax.grad(lambda w, p, n, g: (dequantize(trained_ternary(w, p, n, threshold=0.2)) * g).sum(), argnums=(0, 1, 2))
)


@pytest.mark.parametrize(("positive", "negative"), [(1.0, 1.0), (0.3, 2.0), (2.0, 1e-30), (0.0, 0.7), (-0.5, 0.2)])
def test_trained_ternary_forward_and_gradient(w, positive, negative):
    g = np.random.default_rng(2).normal(size=w.shape)

    p, n = jnp.float32(positive), jnp.float32(negative)
    delta = np.float32(0.2) * np.abs(w).max()
    up, down = w > delta, w < -delta
    value = np.where(up, positive, np.where(down, -negative, 0.0))
    np.testing.assert_allclose(dequantize(trained_ternary(jnp.asarray(w), p, n, threshold=0.2)), value, rtol=1e-6)
    dw, dp, dn = SLOPES_OF_TTQ(w, p, n, g.astype(np.float32))
    np.testing.assert_allclose(dw, g * np.where(up, positive, np.where(down, negative, 1.0)), rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(dp, g[up].sum(), rtol=1e-4)
    np.testing.assert_allclose(dn, -g[down].sum(), rtol=1e-4)


def test_trained_ternary_threshold_out_of_range():
    with pytest.raises(ValueError, match=r"`threshold` \(=1\.5\) must be in \[0, 1\)"):
        trained_ternary(jnp.ones(3), jnp.ones(()), jnp.ones(()), threshold=1.5)

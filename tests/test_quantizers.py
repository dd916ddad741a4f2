"""Codes, scales and gradients of the quantizers, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.quantizers import (
    ACTIVATION_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    Quantized,
    bases,
    dequantize,
    trained_ternary,
    validate,
    xnor,
)

CODE_SETS = {"binary": (-1, 1), "xnor": (-1, 1), "ttq": (-1, 0, 1)}


@pytest.fixture(scope="module")
def w():
    w = np.random.default_rng(0).normal(size=(3, 3, 5, 7)).astype(np.float32)
    w[0, 0, 0, :4] = [0.0, -0.0, 1.0, -1.0]
    return w


def quantize(name, w, table=WEIGHT_QUANTIZERS):
    quantizer = table[name]
    parameters = quantizer.init(jax.random.key(0), w) if quantizer.init else {}
    return quantizer.apply(w, **parameters)


def test_every_weight_quantizer_is_checked():
    assert {name for name, quantizer in WEIGHT_QUANTIZERS.items() if quantizer is not None} == set(CODE_SETS)


@pytest.mark.parametrize("name", CODE_SETS)
def test_invariants_of_weights(name, w):
    quantized = quantize(name, jnp.asarray(w))
    validate(quantized, CODE_SETS[name])
    for base in bases(quantized):
        assert base.codes.shape == w.shape
        assert base.codes.dtype == base.scale.dtype == jnp.float32


@pytest.mark.parametrize("name", [name for name, q in ACTIVATION_QUANTIZERS.items() if q is not None])
def test_invariants_of_activations(name, w):
    quantized = quantize(name, jnp.asarray(w), ACTIVATION_QUANTIZERS)
    validate(quantized, (-1, 1))
    np.testing.assert_array_equal(quantized.codes, np.where(w < 0, -1, 1))


def test_validate_names_what_does_not_hold():
    with pytest.raises(ValueError, match=r"`codes` must lie in \(-1, 1\); got 0\.5 among 2 codes"):
        validate(Quantized(jnp.array([1.0, 0.5]), jnp.ones(())), (-1, 1))
    with pytest.raises(
        ValueError, match=r"`scale` must be a scalar or one value a feature, shape \(1, 2\); got \(2, 1\)"
    ):
        validate(Quantized(jnp.ones((2, 2)), jnp.ones((2, 1))), (-1, 1))


def test_xnor_scale_is_the_least_squares_optimum(w):
    quantized = xnor(jnp.asarray(w))
    w64, codes, alpha = w.astype(np.float64), np.where(w < 0, -1.0, 1.0), np.asarray(quantized.scale, np.float64)
    np.testing.assert_allclose(alpha, np.abs(w64).mean((0, 1, 2), keepdims=True), rtol=1e-6)
    error = ((w64 - alpha * codes) ** 2).sum((0, 1, 2))
    n = w[..., 0].size
    np.testing.assert_allclose(error, (w64**2).sum((0, 1, 2)) - n * alpha.ravel() ** 2, rtol=1e-5)
    for epsilon in (-1e-2, 1e-2):
        assert (((w64 - (alpha + epsilon) * codes) ** 2).sum((0, 1, 2)) > error).all()


def test_xnor_gradient_is_exact_under_the_estimator(w):
    g = np.random.default_rng(1).normal(size=w.shape)
    gradient = jax.grad(lambda w: (dequantize(xnor(w)) * g.astype(np.float32)).sum())(jnp.asarray(w))
    w64, n = w.astype(np.float64), w[..., 0].size
    signs, alpha = np.where(w < 0, -1.0, 1.0), np.abs(w64).mean((0, 1, 2), keepdims=True)
    expected = alpha * g * (np.abs(w64) <= 1) + signs / n * (g * signs).sum((0, 1, 2), keepdims=True)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("positive", "negative"), [(1.0, 1.0), (0.3, 2.0), (2.0, 1e-30), (0.0, 0.7), (-0.5, 0.2)])
def test_ternary_forward_and_gradient(w, positive, negative):
    g = np.random.default_rng(2).normal(size=w.shape)

    def loss(w, p, n):
        return (dequantize(trained_ternary(w, p, n, threshold=0.2)) * g.astype(np.float32)).sum()

    p, n = jnp.float32(positive), jnp.float32(negative)
    delta = np.float32(0.2) * np.abs(w).max()
    up, down = w > delta, w < -delta
    value = np.where(up, positive, np.where(down, -negative, 0.0))
    np.testing.assert_allclose(dequantize(trained_ternary(jnp.asarray(w), p, n, threshold=0.2)), value, rtol=1e-6)
    dw, dp, dn = jax.grad(loss, argnums=(0, 1, 2))(jnp.asarray(w), p, n)
    np.testing.assert_allclose(dw, g * np.where(up, positive, np.where(down, negative, 1.0)), rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(dp, g[up].sum(), rtol=1e-4)
    np.testing.assert_allclose(dn, -g[down].sum(), rtol=1e-4)


def test_ternary_threshold_out_of_range():
    with pytest.raises(ValueError, match=r"`threshold` \(=1\.5\) must be in \[0, 1\)"):
        trained_ternary(jnp.ones(3), jnp.ones(()), jnp.ones(()), threshold=1.5)


@pytest.mark.parametrize("name", CODE_SETS)
def test_jit_vmap_and_bfloat16(name, w):
    apply = lambda w: dequantize(quantize(name, w))
    np.testing.assert_allclose(jax.jit(apply)(jnp.asarray(w)), apply(jnp.asarray(w)), rtol=1e-6)
    both = jnp.stack([jnp.asarray(w), -2 * jnp.asarray(w)])
    np.testing.assert_allclose(jax.vmap(apply)(both)[1], apply(both[1]), rtol=1e-6)
    for base in bases(quantize(name, jnp.asarray(w, jnp.bfloat16))):
        assert base.codes.dtype == base.scale.dtype == jnp.bfloat16

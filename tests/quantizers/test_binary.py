"""Sign codes: optimal scales, gradients, drawn signs and what evaluation sees.  For twins see test_binary_twins."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bnn_jax.quantizers.binary import (
    binary_connect,
    binary_connect_weights,
    full_latent,
    magnitude_aware,
    mean_magnitude,
    post_training,
    post_training_weights,
    without_scale,
    xnor,
)
from bnn_jax.quantizers.codes import dequantize

# Multiples of 1/64 are exact in float32, and so are their sums: equality can be asked for where it is meant.
KERNELS = hnp.arrays(np.float32, (2, 2, 3, 4), elements=st.integers(-256, 256).map(lambda i: i / 64))
QUICK = settings(max_examples=20, deadline=None)


def normal(seed, shape=(3, 3, 5, 7)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@partial(jax.jit, static_argnums=0)
def gradient_of(quantize, w, g):
    return jax.grad(lambda w: (dequantize(quantize(w)) * g).sum())(w)


XNOR = {
    (gradient, center): partial(xnor, gradient=gradient, center=center)
    for gradient in ("exact", "diagonal")
    for center in (False, True)
}


@QUICK
@given(KERNELS)
def test_xnor_scale_is_the_least_squares_optimum(w):
    codes, alpha = (np.asarray(part, np.float64) for part in xnor(jnp.asarray(w)))
    w = w.astype(np.float64)
    error = lambda scale: ((w - scale * codes) ** 2).sum((0, 1, 2))
    # ||w - alpha sign(w)||^2 = ||w||^2 - n alpha^2, and it grows to either side
    np.testing.assert_allclose(error(alpha), (w**2).sum((0, 1, 2)) - 12 * alpha.ravel() ** 2, rtol=1e-5, atol=1e-5)
    for step in (-1e-2, 1e-2):
        assert (error(alpha + step) > error(alpha)).all()


@QUICK
@given(KERNELS, st.sampled_from(["exact", "diagonal"]))
def test_centered_xnor_is_xnor_of_centered_weights(w, gradient):
    w = jnp.asarray(w)
    centered = w - w.mean(2, keepdims=True)
    for found, expected in zip(xnor(w, center=True), xnor(centered)):
        np.testing.assert_array_equal(found, expected)
    g = normal(1, w.shape)
    found = gradient_of(XNOR[gradient, True], w, g)
    # a mean over the input channels is taken out of the gradient as of the weights
    np.testing.assert_allclose(np.asarray(found).sum(2), 0, atol=1e-4)
    inner = np.asarray(gradient_of(XNOR[gradient, False], centered, g))
    np.testing.assert_allclose(found, inner - inner.mean(2, keepdims=True), atol=1e-5)


def test_centering_brings_the_factor_one_minus_one_over_channels():
    w, g = normal(2, (1, 1, 5, 1)), jnp.zeros((1, 1, 5, 1)).at[0, 0, 3, 0].set(1.0)
    inner = gradient_of(XNOR["diagonal", False], w - w.mean(2, keepdims=True), g)
    found = gradient_of(XNOR["diagonal", True], w, g)
    assert inner[0, 0, 3, 0] != 0
    np.testing.assert_allclose(found[0, 0, 3, 0], (1 - 1 / 5) * inner[0, 0, 3, 0], rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 3, 1, 4), (1, 4), (4,)])
def test_centering_of_one_channel_is_refused(shape):
    text = r"`center` \(=True\) needs weights of two input channels at least, .*; leave it out, or keep that layer real"
    with pytest.raises(ValueError, match=text):
        xnor(jnp.ones(shape), center=True)


def test_gradients_of_the_xnor_variants_differ_as_published():
    w, g = jnp.array([[0.5], [-2.0]]), jnp.array([[1.0], [3.0]])
    # alpha = 1.25, n = 2: exact alpha g 1{|w| <= 1} + sign(w)/n sum(g sign(w)); diagonal g (alpha 1{|w| <= 1} + 1/n)
    np.testing.assert_allclose(gradient_of(xnor, w, g).ravel(), [1.25 - 1.0, 1.0])
    diagonal = gradient_of(XNOR["diagonal", False], w, g)
    np.testing.assert_allclose(diagonal.ravel(), [1.25 + 0.5, 1.5], rtol=1e-6)
    np.testing.assert_allclose(gradient_of(magnitude_aware, w, g).ravel(), [1.0, 0.0])
    larq = gradient_of(partial(magnitude_aware, scaled_gradient=True), w, g)
    np.testing.assert_allclose(larq.ravel(), [1.25, 0.0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_tiny_scale_is_divided_out(dtype):
    w = jnp.full((4, 1), 1e-30, dtype)
    np.testing.assert_allclose(gradient_of(magnitude_aware, w, jnp.ones_like(w)).astype(jnp.float32), 1, rtol=1e-2)
    zero = jnp.zeros((4, 1), dtype)
    np.testing.assert_array_equal(gradient_of(magnitude_aware, zero, jnp.ones_like(zero)), 0)


def test_without_scale_gives_none_to_the_scale():
    codes, scale = jnp.ones((2, 3)), jnp.array([[2.0, 0.0, -4.0]])
    g = jnp.ones((2, 3))
    to_codes, to_scale = jax.grad(lambda c, s: (without_scale(c, s) * g).sum(), argnums=(0, 1))(codes, scale)
    np.testing.assert_array_equal(to_codes, [[0.5, 1.0, -0.25]] * 2)
    np.testing.assert_array_equal(to_scale, 0)


def test_the_derivative_of_mean_magnitude_at_zero():
    w = jnp.array([[0.0], [-0.0], [-3.0], [2.0]])
    np.testing.assert_array_equal(jax.grad(lambda w: mean_magnitude(w).sum())(w).ravel(), [0.25, 0.25, -0.25, 0.25])


@pytest.mark.parametrize("magnitude", [1.0, 0.5])
def test_drawn_signs_are_unbiased(magnitude):
    """Monte Carlo: each mean within five standard errors, a false alarm in fewer than one of 10^4 runs."""
    w = magnitude * jnp.array([-1.5, -1.0, -0.6, -0.0, 0.3, 0.9, 1.0, 2.0], jnp.float32)
    draws = 20_000
    quantizer = binary_connect(stochastic=True, magnitude=magnitude)
    draw = lambda key: dequantize(quantizer.apply(w, train=True, key=key))
    drawn = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), draws)), np.float64)
    assert set(np.unique(drawn)) == {-magnitude, magnitude}
    expected = np.clip(np.asarray(w, np.float64), -magnitude, magnitude)
    standard_error = np.sqrt((magnitude**2 - expected**2) / draws)
    assert (np.abs(drawn.mean(0) - expected) <= 5 * standard_error + 1e-12).all()


def test_drawn_signs_in_bfloat16_are_unbiased():
    """The probability 0.50390625 is halfway between multiples of 2^-7, the steps of a uniform bfloat16."""
    w, draws = jnp.full(1_000_000, 2.0**-7, jnp.bfloat16), 1_000_000
    drawn = binary_connect_weights(w, stochastic=True, train=True, key=jax.random.key(1)).codes
    mean = np.asarray(drawn, np.float64).mean()
    assert abs(mean - 2.0**-7) < 5 / np.sqrt(draws)


@pytest.mark.parametrize("stochastic", [False, True])
def test_binary_connect_passes_the_gradient_unchanged(stochastic):
    w, g = 3 * normal(3), normal(4)
    quantize = lambda w: binary_connect_weights(
        w, magnitude=0.25, stochastic=stochastic, train=True, key=jax.random.key(0)
    )
    np.testing.assert_allclose(gradient_of(quantize, w, g), g, rtol=1e-6)
    assert set(np.unique(quantize(w).codes)) == {-1.0, 1.0}


def test_what_evaluation_sees():
    w = normal(5)
    np.testing.assert_array_equal(dequantize(binary_connect(stochastic=True).apply(w, train=False, key=None)), w)
    np.testing.assert_array_equal(dequantize(binary_connect().apply(w)), np.where(w < 0, -1, 1))
    np.testing.assert_array_equal(dequantize(post_training().apply(w, train=False)), np.where(w < 0, -1, 1))
    np.testing.assert_array_equal(dequantize(post_training(scaled=True).apply(w, train=False)), dequantize(xnor(w)))


def test_post_training_trains_real_weights():
    w, g = normal(6), normal(7)
    quantize = lambda w: post_training_weights(w, train=True, scaled=True)
    np.testing.assert_array_equal(dequantize(quantize(w)), w)
    np.testing.assert_array_equal(gradient_of(quantize, w, g), g)


def test_full_latent_sums_the_gradients_of_both_branches():
    w, g, h = normal(8), normal(9), normal(10)

    def loss(w):
        quantized, real = full_latent(w, train=True)
        return (dequantize(quantized) * g).sum() + (real**2 * h).sum()

    expected = np.asarray(gradient_of(xnor, w, g), np.float64) + 2 * np.asarray(w, np.float64) * h
    np.testing.assert_allclose(jax.grad(loss)(w), expected, rtol=1e-5, atol=1e-6)
    quantized, real = full_latent(w)
    assert real is None
    np.testing.assert_array_equal(dequantize(quantized), dequantize(xnor(w)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: xnor(normal(0), gradient="full"), r"`gradient` \(='full'\) must be 'exact' or 'diagonal'"),
        (lambda: xnor(jnp.ones(3), center=True), r"`center` \(=True\) needs weights of two input channels at least"),
        (
            lambda: xnor(normal(0), as_released=True),
            r"`as_released` \(=True\) needs `center=True`; the authors' programs",
        ),
        (lambda: binary_connect(magnitude=0.0), r"`magnitude` \(=0\.0\) must be positive; 1\.0 is usual"),
        (
            lambda: binary_connect_weights(jnp.ones(2), magnitude=float("nan")),
            r"`magnitude` \(=nan\) must be positive; 1\.0 is usual",
        ),
        (
            lambda: binary_connect_weights(jnp.ones(2), stochastic=True, train=True),
            r"`key` \(=None\) must be a `jax\.random\.key` in stochastic training; evaluation needs none",
        ),
    ],
)
def test_error_texts(call, message):
    with pytest.raises(ValueError, match=message):
        call()

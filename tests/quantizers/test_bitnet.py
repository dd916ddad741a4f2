"""BitNet's quantizers against float64 twins written from the papers' formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.quantizers import dequantize
from bnn_jax.quantizers.bitnet import bitnet_activations, bitnet_b158_weights, bitnet_weights


def one_bit(w):
    """Sign(W - alpha) with alpha = (1/nm) sum W, and beta = (1/nm) |W|_1."""
    return np.where(w - w.sum() / w.size > 0, 1, -1), np.abs(w).sum() / w.size


def ternary(w, epsilon=1e-5):
    """RoundClip(W / (gamma + epsilon), -1, 1), gamma = (1/nm) sum |W|."""
    scale = np.abs(w).sum() / w.size + epsilon
    return np.maximum(-1, np.minimum(1, np.rint(w / scale))), scale


def by_token(x, bits=8, epsilon=1e-5):
    """Clip(Round(x Q / absmax), -Q, Q) of every row, Q = 2^(b-1) - 1."""
    q = 2 ** (bits - 1) - 1
    largest = np.maximum(np.abs(x).max(axis=-1, keepdims=True), epsilon)
    return np.clip(np.rint(x * q / largest), -q, q), largest / q


def drawn(shape=(40, 48), seed=0):
    return np.random.default_rng(seed).normal(0.1, 0.7, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("function", "twin"),
    [(bitnet_weights, one_bit), (bitnet_b158_weights, ternary), (bitnet_activations, by_token)],
)
def test_codes_scale_and_gradient_are_the_papers(function, twin):
    x, g = drawn(), drawn(seed=1)
    codes, scale = twin(x.astype(np.float64))
    found = function(jnp.asarray(x))
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_allclose(found.scale, scale, rtol=1e-6)
    assert set(np.unique(codes)) >= {-1, 1}
    gradient = jax.grad(lambda x: (dequantize(function(x)) * g).sum())(jnp.asarray(x))
    np.testing.assert_allclose(gradient, g, rtol=2e-6)


@pytest.mark.parametrize("bits", [2, 4])
def test_fewer_bits_of_each_example_of_any_rank(bits):
    """An example is an index of the first axis."""
    x = drawn((3, 2, 5))
    codes, scale = by_token(x.astype(np.float64).reshape(3, 10), bits)
    found = bitnet_activations(jnp.asarray(x), bits=bits)
    np.testing.assert_array_equal(found.codes, codes.reshape(x.shape))
    np.testing.assert_allclose(found.scale, scale[:, :, None], rtol=1e-6)
    assert (np.abs(found.codes).max((1, 2)) == 2 ** (bits - 1) - 1).all()


def test_zeros_have_codes_and_a_gradient():
    for function in (bitnet_b158_weights, bitnet_activations):
        quantized, pullback = jax.vjp(lambda x, f=function: dequantize(f(x)), jnp.zeros((2, 3)))
        np.testing.assert_array_equal(quantized, 0)
        np.testing.assert_allclose(pullback(jnp.ones((2, 3)))[0], 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: bitnet_activations(jnp.ones((1, 2)), bits=1), r"`bits` \(=1\) must be at least 2; 8 is the authors'"),
        (lambda: bitnet_activations(jnp.ones((1, 2)), epsilon=0.0), r"`epsilon` \(=0.0\) must be positive"),
        (lambda: bitnet_b158_weights(jnp.ones((1, 2)), epsilon=-1.0), r"`epsilon` \(=-1.0\) must be positive"),
        (lambda: bitnet_activations(jnp.ones((1, 2), jnp.bfloat16), bits=12), r"`bits` \(=12\) must be at most 8"),
    ],
)
def test_impossible_options_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()

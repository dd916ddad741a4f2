"""Learned scales and proxies: where they start, and what they reduce to.  For twins see test_binary_twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.quantizers.binary import xnor
from bnn_jax.quantizers.codes import dequantize
from bnn_jax.quantizers.learned_scale import INITIAL_SCALES, learned_scale, proxy, proxy_weights, state_aware


@pytest.fixture(scope="module")
def w():
    return jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 5)), jnp.float32)


def started(quantizer, w):
    return quantizer.init(jax.random.key(0), w)


# The regularizers of BNN+, R1 = sum |alpha - |w||, R2 = sum (alpha - |w|)^2, and the pinball loss of a quantile.
LOSSES = {
    "median": lambda alpha, w: np.abs(alpha - w),
    "mean": lambda alpha, w: (alpha - w) ** 2,
    "percentile75": lambda alpha, w: np.where(w > alpha, 0.75 * (w - alpha), 0.25 * (alpha - w)),
}


@pytest.mark.parametrize("initial", LOSSES)
def test_the_initial_scale_minimizes_its_loss(w, initial):
    alpha = np.asarray(started(learned_scale(initial=initial), w)["scale"], np.float64)
    assert alpha.shape == (1, 1, 1, 5)
    magnitude = np.abs(np.asarray(w, np.float64))
    loss = lambda alpha: LOSSES[initial](alpha, magnitude).sum((0, 1, 2))
    for step in (-0.05, 0.05):  # a quantile of evenly many weights is any point between two of them
        assert (loss(alpha + step) >= loss(alpha) - 1e-5).all()
        assert (loss(alpha + 10 * step) > loss(alpha) + 0.1).all()


@pytest.mark.parametrize("initial", INITIAL_SCALES)
def test_the_initial_scale_is_one_value_a_filter_in_the_weights_dtype(w, initial):
    expected = {
        "ones": lambda m: np.ones(5),
        "mean": lambda m: m.mean((0, 1, 2)),
        "median": lambda m: np.quantile(m, 0.5, axis=(0, 1, 2)),
        "percentile75": lambda m: np.quantile(m, 0.75, axis=(0, 1, 2)),
    }[initial](np.abs(np.asarray(w, np.float64)))
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)):
        scale = started(learned_scale(initial=initial), w.astype(dtype))["scale"]
        assert scale.dtype == dtype
        np.testing.assert_allclose(scale.astype(jnp.float32).ravel(), expected, rtol=tolerance)


def test_a_learned_scale_from_the_mean_starts_as_xnor(w):
    quantizer = learned_scale(initial="mean")
    np.testing.assert_array_equal(dequantize(quantizer.apply(w, **started(quantizer, w))), dequantize(xnor(w)))


@pytest.mark.parametrize("mixing", ["fan_in", "features"])
def test_a_proxy_starts_as_xnor(w, mixing):
    quantizer = proxy(mixing=mixing)
    parameters = started(quantizer, w)
    assert parameters["basis"].shape == {"fan_in": (36, 36), "features": (5, 5)}[mixing]
    np.testing.assert_array_equal(dequantize(quantizer.apply(w, **parameters)), dequantize(xnor(w)))


def test_a_proxy_that_permutes_filters_permutes_codes_and_scales(w):
    order = np.array([3, 0, 4, 1, 2])
    permuted = proxy_weights(w, jnp.eye(5)[order], mixing="features")
    np.testing.assert_array_equal(dequantize(permuted), dequantize(xnor(w))[..., order])


def test_the_two_states_start_at_plus_and_minus_one(w):
    quantizer = state_aware()
    np.testing.assert_array_equal(dequantize(quantizer.apply(w, **started(quantizer, w))), np.where(w < 0, -1, 1))


def test_error_texts(w):
    with pytest.raises(ValueError, match=r"`initial` \(='medium'\) is not known; did you mean 'median'\?"):
        learned_scale(initial="medium")
    with pytest.raises(ValueError, match=r"`estimator` \(='swish'\) is not known; did you mean 'swish_sign'\?"):
        learned_scale("swish")
    with pytest.raises(ValueError, match=r"`mixing` \(='rows'\) must be 'fan_in' or 'features'"):
        proxy_weights(w, jnp.eye(5), mixing="rows")
    with pytest.raises(
        ValueError, match=r"`basis` \(of shape \(5, 5\)\) must have shape \(36, 36\) for mixing 'fan_in'"
    ):
        proxy_weights(w, jnp.eye(5))

"""The dead band of c-sign: its width, what it keeps, and the state that it carries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, make_quantizer
from bnn_jax.quantizers.binary import magnitude_aware
from bnn_jax.quantizers.certainty import c_sign, c_sign_weights, dead_band
from bnn_jax.quantizers.codes import dequantize


def normal(seed, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=(3, 3, 4, 5)), jnp.float32)


def test_the_band_of_one_half_is_1_17741_deviations():
    w = normal(0)
    sigma = np.asarray(w, np.float64).std()
    assert float(dead_band(w, jnp.float32(0.5))) == pytest.approx(1.17741 * sigma, rel=1e-5)
    assert float(dead_band(w, jnp.float32(1.0))) == 0


def test_codes_and_state_of_two_training_steps_follow_the_twin():
    quantizer = c_sign()
    w = normal(1)
    state = quantizer.init_state(jax.random.key(0), w)
    previous = np.where(np.asarray(w) < 0, -1.0, 1.0)
    np.testing.assert_array_equal(state["codes"], previous)
    step = jax.jit(lambda w, state, progress: quantizer.apply(w, state, train=True, progress=progress))
    kept = []
    for seed, progress in ((2, 0.1), (3, 0.6)):
        w = normal(seed)
        w64 = np.asarray(w, np.float64)
        uncertainty = np.exp(-(w64**2) / (2 * w64.var()))
        sign = np.where(w64 < 0, -1.0, 1.0)
        previous = np.where(uncertainty > 0.5 + 0.5 * progress, previous, sign)
        quantized, state = step(w, state, jnp.float32(progress))
        np.testing.assert_array_equal(quantized.codes, previous)
        np.testing.assert_array_equal(state["codes"], previous)
        assert float(state["progress"]) == pytest.approx(progress)
        kept.append((previous != sign).mean())
    assert kept[0] > kept[1] > 0


def test_evaluation_leaves_the_state_and_uses_the_progress_of_training():
    quantizer = c_sign()
    w, later = normal(4), normal(5)
    _, state = quantizer.apply(w, quantizer.init_state(jax.random.key(0), w), train=True, progress=0.25)
    evaluated, after = quantizer.apply(later, state, train=False, progress=1.0)
    trained, _ = quantizer.apply(later, state, train=True, progress=0.25)
    np.testing.assert_array_equal(evaluated.codes, trained.codes)
    assert (np.asarray(evaluated.codes) != np.where(later < 0, -1, 1)).any()
    assert after is state


def test_at_the_end_it_is_the_plain_sign_with_the_magnitude_aware_gradient():
    w, g = normal(6), normal(7)
    state = {"codes": -jnp.sign(w), "progress": jnp.zeros(())}
    final = lambda w: dequantize(c_sign_weights(w, state, train=True, progress=1.0)[0])
    plain = lambda w: dequantize(magnitude_aware(w))
    np.testing.assert_array_equal(final(w), plain(w))
    gradient = lambda f: jax.grad(lambda w: (f(w) * g).sum())(w)
    np.testing.assert_array_equal(gradient(final), gradient(plain))


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.8, 0.5), (0.5, 1.5)])
def test_thresholds_must_be_in_order(start, end):
    with pytest.raises(ValueError, match=rf"`start` and `end` \(={start}, {end}\) must satisfy 0 < start <= end <= 1"):
        c_sign(start=start, end=end)


@pytest.mark.parametrize("table", [WEIGHT_QUANTIZERS, ACTIVATION_QUANTIZERS])
@pytest.mark.parametrize("name", ["c_sign", "adabin"])
def test_estimators_of_other_codes_are_refused_where_the_quantizer_makes_signs(table, name):
    if name in table:
        with pytest.raises(ValueError, match=r"`estimator` \(=\(0, 1\)\) must have the codes \(-1, 1\) here"):
            make_quantizer(table, name, estimator="heaviside")

"""Ternary weights and activations against float64 numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bnn_jax.quantizers.codes import dequantize
from bnn_jax.quantizers.ternary import (
    scaled_ternary_activations,
    tbn,
    tbn_v2,
    ternary_activations,
    trained_ternary,
    twn,
)

RNG = np.random.default_rng(0)
W = RNG.normal(0.1, 0.7, (3, 3, 5, 6)).astype(np.float32)
G = RNG.normal(size=W.shape).astype(np.float32)


def gradient_of(function, x, g=G):
    return jax.jit(jax.grad(lambda x: (dequantize(function(x)) * jnp.asarray(g)).sum()))(jnp.asarray(x))


def twn_twin(w, threshold, axes):
    w = w.astype(np.float64)
    delta = threshold * np.abs(w).mean(axes, keepdims=True)
    above = np.abs(w) > delta
    scale = (np.abs(w) * above).sum(axes, keepdims=True) / above.sum(axes, keepdims=True)
    return np.sign(w) * above, scale, np.abs(np.abs(w) - delta).min()


@pytest.mark.parametrize(("threshold", "per_channel"), [(0.7, False), (0.7, True), (0.0, True), (1.5, False)])
def test_twn_codes_and_scale(threshold, per_channel):
    codes, scale, margin = twn_twin(W, threshold, (0, 1, 2) if per_channel else None)
    assert margin > 1e-6
    quantized = twn(jnp.asarray(W), threshold=threshold, per_channel=per_channel)
    np.testing.assert_array_equal(quantized.codes, codes)
    np.testing.assert_allclose(quantized.scale, scale if per_channel else scale.item(), rtol=1e-6)


VALUE_OF_TWN = jax.jit(lambda w: dequantize(twn(w)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32, allow_subnormal=False), min_size=12, max_size=12))
def test_twn_of_any_weights(entries):
    w = np.array(entries, np.float32)
    magnitude = np.abs(w.astype(np.float64))
    assume((np.abs(magnitude - 0.7 * magnitude.mean()) > 1e-5 * magnitude.max()).all())
    codes, scale, _ = twn_twin(w, 0.7, None)
    np.testing.assert_allclose(VALUE_OF_TWN(w), codes * scale, rtol=1e-5)


@pytest.mark.parametrize("per_channel", [False, True])
def test_twn_scale_is_the_least_squares_optimum(per_channel):
    quantized = twn(jnp.asarray(W), per_channel=per_channel)
    w, codes = W.astype(np.float64), np.asarray(quantized.codes, np.float64)
    scale, axes = np.asarray(quantized.scale, np.float64), (0, 1, 2) if per_channel else None
    error = ((w - scale * codes) ** 2).sum(axes)
    for epsilon in (-1e-2, 1e-2):
        assert (((w - (scale + epsilon) * codes) ** 2).sum(axes) > error).all()


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("clip_value", [np.inf, 1.0, 0.3])
def test_twn_gradient_is_the_identity_within_the_clip(clip_value, per_channel):
    w = W.copy()
    w[0, 0, 0] = [1, -1, 0, np.nextafter(np.float32(1), np.float32(2)), 0.3, -0.3]
    gradient = gradient_of(partial(twn, clip_value=clip_value, per_channel=per_channel), w)
    np.testing.assert_allclose(gradient, G * (np.abs(w) <= np.float32(clip_value)), rtol=1e-6)


def test_twn_of_zeros_receives_its_gradient():
    w = jnp.asarray(np.where(np.arange(6) == 2, 0, W))
    quantized = twn(w, per_channel=True)
    np.testing.assert_array_equal(dequantize(quantized)[..., 2], 0)
    np.testing.assert_allclose(gradient_of(partial(twn, per_channel=True), w), G, rtol=1e-6)


def test_trained_ternary_with_the_scales_of_twn_is_twn():
    quantized = twn(jnp.asarray(W))
    threshold = 0.7 * np.abs(W.astype(np.float64)).mean() / np.abs(W).max()
    both = trained_ternary(jnp.asarray(W), quantized.scale, quantized.scale, threshold=float(threshold))
    np.testing.assert_array_equal(dequantize(both), dequantize(quantized))


def test_a_traced_threshold_does_not_recompile():
    jitted = jax.jit(lambda w, threshold: dequantize(twn(w, threshold=threshold)))
    for threshold in (0.7, 0.9):
        codes, scale, _ = twn_twin(W, threshold, None)
        np.testing.assert_allclose(jitted(jnp.asarray(W), threshold), codes * scale, rtol=1e-5)
    assert jitted._cache_size() == 1


DELTA = np.float32(0.375)
STEPS = np.float32([0, 0.1, 0.375, 0.5, 0.75, 1.0, 1.3, 1e4])
STEPS = np.concatenate([STEPS, np.nextafter(STEPS, np.float32(9e9)), np.nextafter(STEPS[1:], np.float32(0))])
KINKS = np.concatenate([STEPS[(STEPS == 0) | (STEPS > 1e-30)], -STEPS[(STEPS == 0) | (STEPS > 1e-30)]])


def steps_twin(x, delta):
    return 1.0 if x >= delta else -1.0 if x <= -delta else 0.0


def triangles_twin(x, delta):
    return 2 * abs(np.fmod(x / delta + 3, 2) - 1) if abs(x) <= 2 * delta else 0.0


@pytest.mark.parametrize(
    ("function", "scale", "derivative"),
    [
        (ternary_activations, 1.0, lambda x, delta: float(abs(x) <= 1)),
        (scaled_ternary_activations, 2 * float(DELTA), triangles_twin),
    ],
)
def test_ternary_activations_value_and_gradient(function, scale, derivative):
    twin = [[scale * steps_twin(float(x), float(DELTA)), derivative(float(x), float(DELTA))] for x in KINKS]
    value, slope = np.transpose(twin)
    quantize = partial(function, delta=jnp.asarray(DELTA))
    np.testing.assert_allclose(dequantize(quantize(jnp.asarray(KINKS))), value, rtol=1e-6)
    np.testing.assert_allclose(gradient_of(quantize, KINKS, np.ones_like(KINKS)), slope, atol=2e-6)


@pytest.mark.parametrize("delta", [0.2, 1.0, 5.0])
def test_area_of_the_triangles_is_the_height_of_the_steps(delta):
    x = np.linspace(-15, 15, 300_001, dtype=np.float32)
    slope = gradient_of(partial(scaled_ternary_activations, delta=jnp.float32(delta)), x, np.ones_like(x))
    area = np.trapezoid(np.asarray(slope, np.float64), x.astype(np.float64))
    assert area == pytest.approx(4 * delta, rel=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("make", "scaled"), [(tbn, False), (tbn_v2, True)])
def test_running_delta(make, scaled, dtype):
    quantizer = make(threshold=0.4, momentum=0.25)
    state = quantizer.init_state(jax.random.key(0), jnp.asarray(W))
    running = 0.7979 * 0.4
    assert state["delta"] == pytest.approx(running, rel=1e-6)
    step = jax.jit(quantizer.apply, static_argnames="train")
    for factor in (1.0, 3.0):
        x = jnp.asarray(factor * W, dtype)
        exact = np.asarray(x, np.float64)
        delta = 0.4 * np.abs(exact).mean()
        quantized, state = step(x, state, train=True)
        running = 0.75 * running + 0.25 * delta
        clear = np.abs(np.abs(exact) - delta) > 1e-5
        twin = np.vectorize(steps_twin)(exact, delta)
        np.testing.assert_array_equal(np.float32(quantized.codes)[clear], twin[clear])
        np.testing.assert_allclose(np.float32(quantized.scale), 2 * delta if scaled else 1, rtol=5e-3)
        assert state["delta"] == pytest.approx(running, rel=1e-5)
    assert state["delta"].dtype == jnp.float32
    quantized, kept = step(jnp.asarray(100 * W, dtype), state, train=False)
    assert kept["delta"] == state["delta"]
    twin = np.vectorize(steps_twin)(np.asarray(jnp.asarray(100 * W, dtype), np.float64), running)
    np.testing.assert_array_equal(np.float32(quantized.codes), twin)


def test_evaluation_of_an_example_does_not_depend_on_its_batch():
    for quantizer in (tbn(), tbn_v2()):
        state = quantizer.init_state(jax.random.key(0), jnp.asarray(W))
        evaluated = lambda x, q=quantizer, state=state: dequantize(q.apply(jnp.asarray(x), state, train=False)[0])
        np.testing.assert_array_equal(evaluated(W[:1]), evaluated(W)[:1])


def test_no_gradient_flows_through_delta():
    x = jnp.asarray(np.float32([[0.2, 10.0]]))
    quantizer = tbn_v2()
    state = quantizer.init_state(jax.random.key(0), x)
    gradient = gradient_of(lambda x: quantizer.apply(x, state, train=True)[0], x, np.ones((1, 2), np.float32))
    delta = 0.5 * 5.1
    np.testing.assert_allclose(gradient, [[triangles_twin(0.2, delta), triangles_twin(10.0, delta)]], rtol=1e-5)


@pytest.mark.parametrize("make", [tbn, tbn_v2])
def test_error_texts_of_the_activations(make):
    with pytest.raises(ValueError, match=r"`threshold` \(=-0\.5\) must be at least 0; 0\.5 is usual"):
        make(threshold=-0.5)
    with pytest.raises(ValueError, match=r"`momentum` \(=1\.5\) must be in \[0, 1\]; 0\.01 is usual"):
        make(momentum=1.5)


def test_error_texts_of_the_weights():
    with pytest.raises(ValueError, match=r"`threshold` \(=-1\) must be at least 0; 0\.7 is usual"):
        twn(jnp.ones(3), threshold=-1)
    with pytest.raises(ValueError, match=r"`clip_value` \(=0\) must be positive; 1\.0 is usual, infinity is the"):
        twn(jnp.ones(3), clip_value=0)

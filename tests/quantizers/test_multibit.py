"""Uniform quantizers of one to many bits, against scalar float64 twins written from the published formulas."""

import math
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from bnn_jax.quantizers import Quantized, dequantize, validate
from bnn_jax.quantizers.multibit import (
    HWGQ_STEPS,
    dorefa_activations,
    dorefa_weights,
    hwgq,
    pact,
    pact_activations,
    straight_through,
    wrpn_activations,
    wrpn_weights,
)

ONE = np.float32(1)
LEVEL = 2.5


def unit_value(x, bits):
    n = 2**bits - 1
    return round(n * min(max(x, 0.0), 1.0)) / n


def wrpn_value(w, bits):
    n = 2 ** (bits - 1) - 1
    return round(n * min(max(w, -1.0), 1.0)) / n


def pact_value(x, bits):
    n = 2**bits - 1
    return round(n * min(max(x, 0.0), LEVEL) / LEVEL) * LEVEL / n


def hwgq_value(x, bits):
    step = HWGQ_STEPS[bits]
    centres = [i * step for i in range(1, 2**bits)]
    if x <= 0:
        return 0.0
    for low, high in pairwise(centres):
        if x <= float(np.float32((low + high) / 2)):
            return low
    return centres[-1]


class Law(NamedTuple):
    """One elementwise quantizer: its codes, its twin of the value, its twin of the gradient, and where they bend."""

    function: object
    codes: object
    value: object
    slope: object
    kinks: object
    bits: tuple[int, ...]


UNIT_SLOPE = lambda x, bits: float(0 <= x <= 1)
LAWS = {
    "dorefa_activations": Law(
        dorefa_activations, lambda k: range(2**k), unit_value, UNIT_SLOPE, lambda k: (0, 1), (1, 2, 3, 8)
    ),
    "wrpn_activations": Law(
        wrpn_activations, lambda k: range(2**k), unit_value, UNIT_SLOPE, lambda k: (0, 1), (1, 2, 4)
    ),
    "wrpn_weights": Law(
        wrpn_weights,
        lambda k: range(1 - 2 ** (k - 1), 2 ** (k - 1)),
        wrpn_value,
        lambda w, k: float(abs(w) <= 1),
        lambda k: (-1, 1),
        (2, 3, 5),
    ),
    "pact": Law(
        partial(pact_activations, clipping_level=LEVEL),
        lambda k: range(2**k),
        pact_value,
        lambda x, k: float(0 < x < LEVEL),
        lambda k: (0, LEVEL),
        (1, 2, 4),
    ),
    "hwgq": Law(
        hwgq,
        lambda k: range(2**k),
        hwgq_value,
        lambda x, k: float(0 < x <= np.float32((2**k - 1) * HWGQ_STEPS[k])),
        lambda k: (0, (2**k - 1) * HWGQ_STEPS[k], *((i + 0.5) * HWGQ_STEPS[k] for i in range(1, 2**k - 1))),
        (1, 2, 3, 4),
    ),
}
CASES = [(name, bits) for name, law in LAWS.items() for bits in law.bits]
JITTED = {(name, bits): jax.jit(partial(LAWS[name].function, bits=bits)) for name, bits in CASES}


def grid(law, bits):
    """Round numbers, each kink and its neighbours, and large values; the ties of rounding lie on 0.5."""
    kinks = np.array(law.kinks(bits), np.float32)
    beside = [np.nextafter(kinks, np.float32(to)) for to in (-np.inf, np.inf)]
    ordinary = np.array([-2.9, -0.77, -0.5, -0.13, 0.11, 0.5, 0.63, 0.91, 1.24, 1.9, 3.1, -1e4, 1e4, -0.0])
    points = np.concatenate([kinks, *beside, ordinary]).astype(np.float32)
    return np.where(np.abs(points) < np.finfo(np.float32).tiny, np.sign(points) * np.finfo(np.float32).tiny, points)


def gradient_of(function, x, g):
    return jax.jit(jax.grad(lambda x: (dequantize(function(x)) * g).sum()))(x)


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_value_codes_and_gradient_equal_the_scalar_twin(name, bits):
    law, x = LAWS[name], grid(LAWS[name], bits)
    g = np.random.default_rng(bits).normal(size=x.shape).astype(np.float32)
    quantized = JITTED[name, bits](x)
    validate(quantized, tuple(law.codes(bits)))
    assert set(np.asarray(quantized.codes).astype(int)) >= {law.codes(bits)[0], law.codes(bits)[-1]}
    np.testing.assert_allclose(
        dequantize(quantized), [law.value(float(v), bits) for v in x], rtol=1e-6, atol=1e-7, err_msg=str(x)
    )
    slope = np.array([law.slope(float(v), bits) for v in x])
    gradient = gradient_of(JITTED[name, bits], jnp.asarray(x), g)
    np.testing.assert_allclose(gradient, slope * g, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "bits"), CASES)
@settings(max_examples=8, deadline=None)
@given(values=st.lists(st.floats(-3, 3, width=32), min_size=8, max_size=8))
def test_random_values_go_to_the_nearest_level_of_their_twin(name, bits, values):
    law, x = LAWS[name], np.array(values, np.float32)
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x)
    quantized = JITTED[name, bits](x)
    validate(quantized, tuple(law.codes(bits)))
    scale = float(quantized.scale)
    found = np.asarray(quantized.codes, np.float64) * scale
    expected = np.array([law.value(float(v), bits) for v in x])
    # float32 and float64 may round a near tie apart, to neighbours that are then equally near.
    apart = np.abs(found - expected) > 1e-6
    nudged = np.array([{law.value(float(v) * (1 + s), bits) for s in (-1e-6, 1e-6)} for v in x[apart]], object)
    assert all(np.isclose(f, list(both), atol=1e-6).any() for f, both in zip(found[apart], nudged))
    order = np.argsort(x, kind="stable")
    assert (np.diff(found[order]) >= -1e-6 * scale).all()


def dorefa_twin(w, bits):
    n, t = 2**bits - 1, np.tanh(w)
    return 2 * np.array([round(n * float(v)) / n for v in (t / (2 * np.abs(t).max()) + 0.5).ravel()]) - 1


@pytest.fixture
def w():
    return np.random.default_rng(0).normal(size=(3, 3, 2, 5)).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dorefa_weights_equal_their_twin(w, bits):
    quantized = jax.jit(partial(dorefa_weights, bits=bits))(w)
    validate(quantized, tuple(range(1 - 2**bits, 2**bits, 2)))
    w64 = w.astype(np.float64)
    np.testing.assert_allclose(dequantize(quantized).ravel(), dorefa_twin(w64, bits), rtol=1e-6)
    g = np.random.default_rng(1).normal(size=w.shape)
    t = np.tanh(w64)
    gradient = gradient_of(partial(dorefa_weights, bits=bits), jnp.asarray(w), g.astype(np.float32))
    np.testing.assert_allclose(gradient, g * (1 - t**2) / np.abs(t).max(), rtol=1e-5, atol=1e-7)


def test_dorefa_weights_may_differentiate_the_maximum(w):
    g = np.random.default_rng(1).normal(size=w.shape)
    surrogate = lambda w: (g * np.tanh(w) / np.abs(np.tanh(w)).max()).sum()
    gradient = gradient_of(partial(dorefa_weights, bits=2, max_gradient=True), jnp.asarray(w), g.astype(np.float32))
    w64, expected = w.astype(np.float64), np.zeros(w.shape)
    for index in np.ndindex(w.shape):
        bump = np.zeros(w.shape)
        bump[index] = 1e-6
        expected[index] = (surrogate(w64 + bump) - surrogate(w64 - bump)) / 2e-6
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_dorefa_weights_of_one_bit(w):
    quantized = dorefa_weights(jnp.asarray(w), bits=1)
    validate(quantized, (-1, 1))
    np.testing.assert_array_equal(quantized.codes, np.where(w < 0, -1, 1))
    assert quantized.scale.shape == ()
    assert float(jnp.abs(dequantize(quantized)).sum()) == pytest.approx(np.abs(w.astype(np.float64)).sum(), rel=1e-5)
    g = np.random.default_rng(1).normal(size=w.shape).astype(np.float32)
    np.testing.assert_allclose(gradient_of(partial(dorefa_weights, bits=1), jnp.asarray(10 * w), g), g, rtol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_dorefa_weight_zero_has_code_plus_one(bits):
    codes = dorefa_weights(jnp.array([0.0, -0.0, 1.0]), bits=bits).codes
    np.testing.assert_array_equal(codes[:2], [1, 1])


def test_wrpn_weights_of_one_bit_have_the_least_squares_scale_of_each_filter(w):
    quantized = wrpn_weights(jnp.asarray(w), bits=1)
    validate(quantized, (-1, 1))
    np.testing.assert_allclose(quantized.scale, np.abs(w).mean((0, 1, 2), keepdims=True), rtol=1e-6)
    error = lambda a: ((w - a * np.asarray(quantized.codes)) ** 2).sum((0, 1, 2))
    for epsilon in (-1e-2, 1e-2):
        assert (error(np.asarray(quantized.scale) + epsilon) > error(np.asarray(quantized.scale))).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("level", [0.3, 2.5])
def test_gradient_to_pact_level_is_that_of_the_clipping_alone(bits, level):
    level = float(np.float32(level))
    near = np.float32(level)
    x = np.array([-1.0, 0.0, 0.2, near, np.nextafter(near, ONE * 9), np.nextafter(near, -ONE), 7.0, 1e4], np.float32)
    g = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    loss = lambda x, level: (dequantize(pact_activations(x, level, bits=bits)) * g).sum()
    dx, dlevel = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(x), jnp.float32(level))
    np.testing.assert_allclose(dx, [gi * (0 < xi < level) for xi, gi in zip(x, g)], rtol=1e-5)
    assert float(dlevel) == pytest.approx(sum(gi for xi, gi in zip(x, g) if xi >= level), rel=1e-5)


@pytest.mark.parametrize("level", [0.0, -3.0])
def test_a_pact_level_that_left_its_range_gets_the_gradient_that_brings_it_back(level):
    x = jnp.array([-1.0, 0.5, 2.0])
    loss = lambda level: (dequantize(pact_activations(x, level)) * jnp.array([1.0, -2.0, -3.0])).sum()
    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.float32(level))
    assert abs(float(value)) < 1e-5
    assert float(gradient) == pytest.approx(-5.0, rel=1e-5)


def test_pact_owns_its_level():
    quantizer = pact(bits=4, clipping_level=8.0)
    parameters = quantizer.init(jax.random.key(0), jnp.ones(3, jnp.bfloat16))
    assert parameters["clipping_level"] == 8 and parameters["clipping_level"].dtype == jnp.bfloat16
    quantized = quantizer.apply(jnp.array([4.0, 9.0]), clipping_level=jnp.float32(8))
    np.testing.assert_array_equal(quantized.codes, [8, 15])


def half_gaussian_error(step, bits):
    """E (Q - x)^2 for x ~ N(0, 1) | x > 0 in closed form, from the moments of the normal on each cell."""
    n = 2**bits - 1
    edges = [0.0, *((i + 0.5) * step for i in range(1, n)), 50.0]
    error, pdf = 0.0, stats.norm.pdf
    for i, (low, high) in enumerate(pairwise(edges), 1):
        mass = stats.norm.cdf(high) - stats.norm.cdf(low)
        first = pdf(low) - pdf(high)
        second = mass + low * pdf(low) - high * pdf(high)
        error += 2 * (second - 2 * i * step * first + (i * step) ** 2 * mass)
    return error


@pytest.mark.parametrize("bits", HWGQ_STEPS)
def test_hwgq_steps_are_optimal_for_a_half_gaussian(bits):
    best = optimize.minimize_scalar(half_gaussian_error, bounds=(0.05, 1.2), args=(bits,), method="bounded")
    assert HWGQ_STEPS[bits] == pytest.approx(best.x, abs=1e-3)
    for step in np.linspace(0.05, 1.2, 24):
        assert half_gaussian_error(step, bits) >= half_gaussian_error(HWGQ_STEPS[bits], bits) - 1e-6
    if bits == 1:
        assert HWGQ_STEPS[1] == pytest.approx(math.sqrt(2 / math.pi), abs=5e-4)


def test_hwgq_of_two_bits_is_the_published_table():
    x = jnp.array([-1.0, 0.0, 0.01, 0.8, 0.81, 1.34, 1.35, 1.61, 1.62])
    np.testing.assert_allclose(
        dequantize(hwgq(x, bits=2)), [0, 0, 0.538, 0.538, 1.076, 1.076, 1.614, 1.614, 1.614], rtol=1e-6
    )
    np.testing.assert_allclose(gradient_of(hwgq, x, 1.0), [0, 0, 1, 1, 1, 1, 1, 1, 0], rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 8])
def test_bfloat16_holds_the_codes_of_float32(bits):
    x = jnp.linspace(-1.5, 1.5, 301).astype(jnp.bfloat16)
    for function in map(partial(jax.jit, static_argnames="bits"), (dorefa_activations, dorefa_weights, wrpn_weights)):
        half, full = function(x, bits=bits).codes, function(x.astype(jnp.float32), bits=bits).codes
        np.testing.assert_array_equal(np.asarray(half, np.float32), full)


def test_a_traced_clipping_level_does_not_recompile():
    apply = jax.jit(lambda x, level: dequantize(pact_activations(x, level, bits=4)))
    x = jnp.array([1.0, 4.0, 20.0])
    for level in (2.0, 5.0, 10.0):
        np.testing.assert_allclose(apply(x, level)[-1], level, rtol=1e-6)
    assert apply._cache_size() == 1


def test_products_of_codes_carry_the_gradient_of_the_real_product(w):
    """As a layer computes, scales after; against the product of the dequantized tensors."""
    x, kernel = jnp.asarray(w.reshape(-1, 6)), jnp.asarray(w.reshape(6, -1))
    g = jnp.asarray(np.random.default_rng(3).normal(size=(15, 15)).astype(np.float32))

    def layer(x, kernel, level):
        inputs, weights = pact_activations(x, level), dorefa_weights(kernel, bits=1)
        return (inputs.scale * weights.scale * (inputs.codes @ weights.codes) * g).sum()

    dx, dkernel, dlevel = jax.jit(jax.grad(layer, argnums=(0, 1, 2)))(x, kernel, jnp.float32(0.7))
    x64, kernel64 = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    weights = np.where(kernel64 < 0, -1, 1) * np.abs(kernel64).mean()
    level = float(np.float32(0.7))
    inputs = np.round(3 * np.clip(x64 / level, 0, 1)) * level / 3
    back = np.asarray(g, np.float64) @ weights.T
    np.testing.assert_allclose(dx, back * ((x64 > 0) & (x64 < level)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dlevel, back[x64 >= level].sum(), rtol=1e-4)
    np.testing.assert_allclose(dkernel, inputs.T @ np.asarray(g, np.float64), rtol=1e-4, atol=1e-5)


def test_straight_through_divides_out_the_largest_scale_and_survives_zeros():
    codes, x = jnp.array([1.0, -1.0]), jnp.array([0.3, -0.2])
    slope = jax.jit(jax.grad(lambda x, parts: dequantize(straight_through(x**2, parts, dtype=x.dtype)).sum()))
    for first, second in [(0.0, 2.0), (-3.0, 1e-30), (0.5, 0.5)]:
        parts = (Quantized(codes, jnp.float32(first)), Quantized(-codes, jnp.float32(second)))
        np.testing.assert_allclose(slope(x, parts), 2 * x, rtol=1e-6)
    loss = lambda x: dequantize(straight_through(x, Quantized(codes, jnp.float32(0)), dtype=x.dtype)).sum()
    np.testing.assert_array_equal(jax.grad(loss)(x), [0, 0])


@pytest.mark.parametrize("function", [dorefa_weights, dorefa_activations, wrpn_weights, wrpn_activations])
def test_bits_out_of_range(function):
    with pytest.raises(ValueError, match=r"`bits` \(=0\) must be at least 1; 2 is usual"):
        function(jnp.ones((2, 2)), bits=0)
    with pytest.raises(ValueError, match=r"`bits` \(=2\.5\) must be a whole number; 2 is usual"):
        function(jnp.ones((2, 2)), bits=2.5)
    with pytest.raises(
        ValueError, match=r"`bits` \(=9\) must be at most 8 in bfloat16, or codes are inexact; use a wid"
    ):
        function(jnp.ones((2, 2), jnp.bfloat16), bits=9)


@pytest.mark.usefixtures("unchecked")
def test_error_texts_of_pact_and_hwgq():
    with pytest.raises(ValueError, match=r"`clipping_level` \(=-1\.0\) must be positive; 8 to 10 is usual"):
        pact(clipping_level=-1.0)
    with pytest.raises(ValueError, match=r"`clipping_level` \(of shape \(3,\)\) must be a scalar, one a layer"):
        pact_activations(jnp.ones(3), jnp.ones(3))
    with pytest.raises(ValueError, match=r"`bits` \(=5\) must be one of \[1, 2, 3, 4\]; 2 is usual"):
        hwgq(jnp.ones(3), bits=5)

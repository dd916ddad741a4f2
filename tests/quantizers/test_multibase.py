"""ABC-Net and residual binarization against float64 numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnn_jax.quantizers.codes import dequantize
from bnn_jax.quantizers.multibase import abc_net, abc_net_activations, residual_binary, shifted_bases

RNG = np.random.default_rng(0)
W = RNG.normal(0.1, 0.7, (3, 3, 5, 6)).astype(np.float32)
G = RNG.normal(size=W.shape).astype(np.float32)

quantize = jax.jit(abc_net, static_argnames=("bases", "per_channel"))


def weighted(function, g):
    return lambda *args: (dequantize(function(*args)) * jnp.asarray(g)).sum()


def abc_shifts(m):
    return [0.0] if m == 1 else list(np.linspace(-1, 1, m))


def columns(quantized, per_channel):
    """A float64 matrix (n, bases) for every fit, and the scales beside it."""
    b = np.stack([np.asarray(base.codes, np.float64) for base in quantized], -1)
    a = np.stack([np.asarray(base.scale, np.float64).reshape(-1) for base in quantized], -1)
    features = a.shape[0] if per_channel else 1
    return np.moveaxis(b.reshape(-1, features, b.shape[-1]), 1, 0), a


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8])
def test_abc_net_codes(m, per_channel):
    w, axes = W.astype(np.float64), (0, 1, 2) if per_channel else None
    for base, u in zip(quantize(jnp.asarray(W), bases=m, per_channel=per_channel), abc_shifts(m), strict=True):
        moved = w - w.mean(axes, keepdims=True) + u * w.std(axes, keepdims=True)
        clear = np.abs(moved) > 1e-5
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(np.asarray(base.codes)[clear], np.where(moved < 0, -1, 1)[clear])


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8])
def test_abc_net_scales_are_the_least_squares_optimum(m, per_channel):
    quantized = quantize(jnp.asarray(W), bases=m, per_channel=per_channel)
    w = W.astype(np.float64).reshape(-1, W.shape[-1] if per_channel else 1)
    for i, (b, a) in enumerate(zip(*columns(quantized, per_channel))):
        np.testing.assert_allclose(a, np.linalg.lstsq(b, w[:, i], rcond=None)[0], rtol=1e-3, atol=1e-6)
        residual = w[:, i] - b @ a
        np.testing.assert_allclose(b.T @ residual / len(residual), 0, atol=1e-6)
        for step in 1e-2 * np.concatenate([np.eye(m), -np.eye(m)]):
            assert ((w[:, i] - b @ (a + step)) ** 2).sum() > (residual**2).sum()


def test_abc_net_with_one_base():
    (base,) = abc_net(jnp.asarray(W), bases=1)
    w = W.astype(np.float64)
    np.testing.assert_allclose(base.scale, (np.where(w < w.mean(), -1, 1) * w).mean(), rtol=1e-5)


COINCIDING = {
    "two values": np.repeat([-1.0, 1.0], 50),
    "two values apart from zero": np.repeat([0.5, 0.75], [30, 70]),
    "constant": np.full(20, -0.7),
    "one far away": np.append(np.zeros(100_000), 50.0),
    "one just beyond a threshold": np.append(np.tile([-1.0, 1.0], 5000), 0.01),
}


@pytest.mark.parametrize("m", [3, 5, 8])
@pytest.mark.parametrize("case", COINCIDING)
@pytest.mark.full
def test_abc_net_where_bases_coincide(case, m):
    w = COINCIDING[case].astype(np.float32)
    (b,), (a,) = columns(abc_net(jnp.asarray(w), bases=m), per_channel=False)
    assert np.linalg.matrix_rank(b) < m
    least = np.linalg.lstsq(b, w.astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(a, least, rtol=1e-3, atol=1e-5 * np.abs(w).max())
    np.testing.assert_allclose(b @ a, b @ least, atol=2e-3 * np.abs(w).max())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-100, 100, width=32, allow_subnormal=False), min_size=16, max_size=16),
    st.sampled_from([2, 3, 5]),
)
def test_abc_net_residual_is_orthogonal_to_every_base(entries, m):
    w = np.array(entries, np.float32)
    (b,), (a,) = columns(quantize(jnp.asarray(w), bases=m), per_channel=False)
    np.testing.assert_allclose(b.T @ (w.astype(np.float64) - b @ a), 0, atol=1e-4 * np.abs(w).max() + 1e-30)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("m", [1, 3, 4])
def test_abc_net_gradient_is_the_sum_of_the_scales_times_g(m, per_channel):
    function = partial(quantize, bases=m, per_channel=per_channel)
    alphas = sum(np.asarray(base.scale, np.float64) for base in function(jnp.asarray(W)))
    gradient = jax.jit(jax.grad(weighted(function, G)))(jnp.asarray(W))
    np.testing.assert_allclose(gradient, alphas * G, rtol=1e-5, atol=1e-6)


SHIFTS, SCALES = np.float32([0.75, 0.5, -0.25]), np.float32([0.5, -0.3, 1.2])
STEPS = np.float32([-1e4, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1e4])
KINKS = np.concatenate([STEPS, np.nextafter(STEPS, np.float32(9e9)), np.nextafter(STEPS, -np.float32(9e9))])
KINKS = KINKS[(KINKS == 0) | (np.abs(KINKS) > 1e-30)]


def test_shifted_bases_value_and_gradients():
    g = np.random.default_rng(1).normal(size=KINKS.shape).astype(np.float32)
    function = lambda x, shift, scale: shifted_bases(x, shift=shift, scale=scale)
    args = [jnp.asarray(a) for a in (KINKS, SHIFTS, SCALES)]
    h = (KINKS[:, None] + SHIFTS).astype(np.float64)
    codes = np.where(np.clip(h, 0, 1) >= 0.5, 1.0, -1.0)
    inside = (h >= 0) & (h <= 1)
    np.testing.assert_allclose(dequantize(function(*args)), codes @ SCALES.astype(np.float64), rtol=1e-6, atol=1e-6)
    dx, dshift, dscale = jax.jit(jax.grad(weighted(function, g), argnums=(0, 1, 2)))(*args)
    np.testing.assert_allclose(dx, g * (inside @ SCALES.astype(np.float64)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dshift, SCALES * (g.astype(np.float64) @ inside), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dscale, g.astype(np.float64) @ codes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("n", "spread", "thresholds"), [(1, 1.0, [0]), (2, 1.0, [-1, 1]), (3, 0.5, [-0.5, 0, 0.5]), (5, 1.0, None)]
)
def test_abc_net_activations_start_with_distinct_thresholds(n, spread, thresholds):
    parameters = abc_net_activations(bases=n, spread=spread).init(jax.random.key(0), jnp.ones((2, 3)))
    expected = np.linspace(-1, 1, n) if thresholds is None else thresholds
    np.testing.assert_allclose(0.5 - parameters["shift"], expected, atol=1e-6)
    assert len(set(np.asarray(parameters["shift"]).tolist())) == n
    np.testing.assert_allclose(parameters["scale"], np.full(n, 1 / n), rtol=1e-6)


def test_one_shifted_base_starts_as_the_sign():
    x = jnp.arange(-8, 9, dtype=jnp.float32).reshape(1, -1) / 4
    quantizer = abc_net_activations(bases=1)
    quantized = quantizer.apply(x, **quantizer.init(jax.random.key(0), x))
    np.testing.assert_array_equal(dequantize(quantized), np.where(x < 0, -1, 1))


def residual_twin(x, count, axes):
    parts, rest = [], x.astype(np.float64)
    for _ in range(count):
        a, codes = np.abs(rest).mean(axes, keepdims=True), np.where(rest < 0, -1.0, 1.0)
        parts.append((a, codes, rest))
        rest = rest - a * codes
    return parts


@pytest.mark.parametrize("per_example", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_residual_binary_value_and_gradient(count, per_example):
    function = jax.jit(partial(residual_binary, bases=count, per_example=per_example))
    parts = residual_twin(W, count, (1, 2, 3) if per_example else None)
    assert min(np.abs(np.abs(rest) - 1).min() for _, _, rest in parts) > 1e-6
    assert min(np.abs(rest).min() for _, _, rest in parts) > 1e-6
    np.testing.assert_allclose(dequantize(function(jnp.asarray(W))), sum(a * c for a, c, _ in parts), rtol=1e-5)
    expected = sum(a * (np.abs(rest) <= 1) for a, _, rest in parts) * G
    np.testing.assert_allclose(jax.jit(jax.grad(weighted(function, G)))(jnp.asarray(W)), expected, rtol=1e-4, atol=1e-6)


def test_residual_scales_are_optimal_and_the_error_decreases():
    rest = W.astype(np.float64)
    for base in residual_binary(jnp.asarray(W), bases=4):
        a, codes = np.asarray(base.scale, np.float64), np.asarray(base.codes, np.float64)
        error = ((rest - a * codes) ** 2).sum((1, 2, 3))
        for epsilon in (-1e-2, 1e-2):
            assert (((rest - (a + epsilon) * codes) ** 2).sum((1, 2, 3)) > error).all()
        before, rest = (rest**2).sum((1, 2, 3)), rest - a * codes
        assert (error < before).all()
        np.testing.assert_allclose(error, before - W[0].size * a.ravel() ** 2, rtol=1e-4)


def test_residual_of_an_example_does_not_depend_on_its_batch():
    whole = dequantize(residual_binary(jnp.asarray(W)))
    np.testing.assert_allclose(dequantize(residual_binary(jnp.asarray(W[:1]))), whole[:1], rtol=1e-6)
    tensor = partial(residual_binary, per_example=False)
    assert not np.allclose(dequantize(tensor(jnp.asarray(W[:1]))), dequantize(tensor(jnp.asarray(W)))[:1], rtol=1e-3)


@pytest.mark.parametrize("function", [abc_net, residual_binary, abc_net_activations])
def test_bases_below_one(function):
    arguments = () if function is abc_net_activations else (jnp.ones((2, 2)),)
    with pytest.raises(ValueError, match=r"`bases` \(=0\) must be at least 1; ABC-Net uses 1 to 5"):
        function(*arguments, bases=0)


@pytest.mark.usefixtures("unchecked")
def test_error_texts():
    with pytest.raises(ValueError, match=r"`spread` \(=0\) must be positive; at 0 all bases would stay equal"):
        abc_net_activations(spread=0)
    with pytest.raises(ValueError, match=r"`shift` \(of shape \(2,\)\) must be a vector of `scale`'s shape \(3,\)"):
        shifted_bases(jnp.ones(4), shift=jnp.ones(2), scale=jnp.ones(3))
    with pytest.raises(ValueError, match=r"`x` \(of shape \(4,\)\) must have an axis besides the examples; or set"):
        residual_binary(jnp.ones(4))
    with pytest.raises(TypeError, match=r"must be a floating-point array; got int32"):
        shifted_bases(jnp.arange(3), shift=jnp.ones(1), scale=jnp.ones(1))

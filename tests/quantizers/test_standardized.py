"""Libra-PB's balance and shift, RBNN's rotations, BN-free weights.  For twins see test_binary_twins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnn_jax.quantizers.codes import dequantize
from bnn_jax.quantizers.standardized import (
    Rotations,
    as_matrices,
    bn_free,
    libra_pb,
    nearest_factors,
    rbnn,
    rbnn_inputs,
    rbnn_weights,
    rotate,
    rotate_sweep,
    rotation_objective,
    standardize,
)


def normal(seed, shape=(3, 3, 4, 5)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("unbiased", [True, False])
def test_standardized_filters_have_mean_zero_and_deviation_one(unbiased):
    standardized = np.asarray(standardize(3 + 50 * normal(0), unbiased=unbiased), np.float64).reshape(36, 5)
    np.testing.assert_allclose(standardized.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(standardized.std(0, ddof=int(unbiased)), 1, rtol=1e-5)


def test_a_constant_filter_becomes_zero_with_the_scale_one():
    quantized = libra_pb(jnp.full((4, 2), 0.5))
    np.testing.assert_array_equal(standardize(jnp.full((4, 2), 0.5)), 0)
    np.testing.assert_array_equal(quantized.codes, 1)
    np.testing.assert_array_equal(quantized.scale, 1)


@pytest.mark.parametrize(("factor", "offset"), [(4.0, 0.0), (0.25, 1.0), (8.0, -16.0)])
def test_libra_pb_does_not_see_scale_and_offset(factor, offset):
    w = jnp.asarray(np.random.default_rng(1).integers(-64, 64, size=(3, 3, 4, 5)) / 64, jnp.float32)
    np.testing.assert_array_equal(dequantize(libra_pb(factor * w + offset)), dequantize(libra_pb(w)))


def test_libra_pb_balances_the_codes_and_shifts_by_powers_of_two():
    gaussian = normal(2, (400, 6))
    quantized = libra_pb(gaussian + 0.7)
    assert (np.abs(np.asarray(quantized.codes).sum(0)) < 5 * np.sqrt(400)).all()
    np.testing.assert_array_equal(quantized.scale, 1)  # mean|w^| = 0.798 rounds to 2^0
    heavy = gaussian**9  # mean|w^| far below 0.7071
    scale = np.asarray(libra_pb(heavy).scale, np.float64).ravel()
    hat = np.asarray(heavy, np.float64)
    hat = (hat - hat.mean(0)) / hat.std(0, ddof=1)
    np.testing.assert_array_equal(scale, 2.0 ** np.round(np.log2(np.abs(hat).mean(0))))
    assert (scale < 1).all()
    np.testing.assert_array_equal(libra_pb(heavy, shift=False).scale, 1)


@given(st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_nearest_factors(n):
    a, b = nearest_factors(n)
    assert a * b == n
    assert a <= b
    assert not any(n % c == 0 for c in range(a + 1, int(np.sqrt(n)) + 1))


@pytest.mark.parametrize(("n", "factors"), [(576, (24, 24)), (144, (12, 12)), (27, (3, 9)), (1, (1, 1))])
def test_nearest_factors_of_usual_kernels(n, factors):
    assert nearest_factors(n) == factors


def orthogonal(seed, n):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def sweep_twin(x, left, right):
    """The published alternation, filter by filter, in float64."""
    b = [np.where(left.T @ m @ right < 0, -1.0, 1.0) for m in x]
    u, _, vt = np.linalg.svd(sum(bi @ right.T @ m.T for bi, m in zip(b, x)))
    left = vt.T @ u.T
    u, _, vt = np.linalg.svd(sum(m.T @ left @ bi for bi, m in zip(b, x)))
    return left, u @ vt


def matrices(w, a, b):
    """Filter by filter, as `weight.view(filters, a, b)` of PyTorch's layout (filters, inputs, height, width)."""
    w = np.asarray(w, np.float64)
    return [np.moveaxis(w[..., f], -1, 0).reshape(a, b) for f in range(w.shape[-1])]


def test_rotate_acts_on_each_filter_as_a_matrix_and_keeps_its_length():
    w, left, right = normal(3), orthogonal(0, 6), orthogonal(1, 6)
    rotated = rotate(w, Rotations(jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32)))
    np.testing.assert_array_equal(as_matrices(w), np.stack(matrices(w, 6, 6)).astype(np.float32))
    for found, m in zip(matrices(rotated, 6, 6), matrices(w, 6, 6)):
        np.testing.assert_allclose(found, left.T @ m @ right, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(found), np.linalg.norm(m), rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (3, 3, 3, 16), (7, 16), (7, 4)])
def test_sweeps_keep_rotations_orthogonal_and_never_lower_the_objective(shape):
    w = normal(4, shape)
    a, b = nearest_factors(int(np.prod(shape[:-1])))
    rotations = Rotations(jnp.asarray(orthogonal(2, a), jnp.float32), jnp.asarray(orthogonal(3, b), jnp.float32))
    sweep = jax.jit(rotate_sweep)
    before = first = float(rotation_objective(w, rotations))
    expected = (orthogonal(2, a), orthogonal(3, b))
    unique = shape[-1] * a >= b  # with fewer rows than columns the best rotation is not
    for _ in range(3):
        rotations = sweep(w, rotations)
        expected = sweep_twin(matrices(w, a, b), *expected)
        for found, reference in zip(rotations, expected):
            np.testing.assert_allclose(found @ found.T, np.eye(len(found)), atol=1e-5)
            if unique:
                np.testing.assert_allclose(found, reference, atol=1e-3)
        after = float(rotation_objective(w, rotations))
        magnitudes = [np.abs(rotations.left.T @ m @ rotations.right).sum() for m in matrices(w, a, b)]
        np.testing.assert_allclose(after, sum(magnitudes), rtol=1e-5)
        assert after >= before * (1 - 1e-6)
        before = after
    assert after > first


def test_training_adapts_the_rotations_once_a_period_and_evaluation_never():
    quantizer = rbnn(period_steps=2)
    w = normal(5)
    parameters = quantizer.init(jax.random.key(0), w)
    state = quantizer.init_state(jax.random.key(1), w)
    for name in ("left", "right"):
        np.testing.assert_allclose(state[name] @ state[name].T, np.eye(6), atol=1e-5)
    train = jax.jit(lambda w, state: quantizer.apply(w, state, train=True, progress=0.5, **parameters))
    expected = tuple(np.asarray(state[name], np.float64) for name in ("left", "right"))
    for call, seed in enumerate((6, 7, 8)):
        w = normal(seed)
        if call % 2 == 0:
            wide = np.asarray(w, np.float64)
            hat = (wide - wide.mean((0, 1, 2))) / wide.std((0, 1, 2), ddof=1)
            for _ in range(3):
                expected = sweep_twin(matrices(hat, 6, 6), *expected)
        quantized, state = train(w, state)
        assert int(state["calls"]) == call + 1
        np.testing.assert_allclose(state["left"], expected[0], atol=1e-3)
        np.testing.assert_allclose(state["right"], expected[1], atol=1e-3)
        evaluated, after = quantizer.apply(w, state, train=False, progress=1.0, **parameters)
        assert after is state
        np.testing.assert_array_equal(evaluated.codes, quantized.codes)


def test_each_example_is_compared_with_its_own_mean():
    x = normal(13, (4, 5, 5, 3))
    apart = jnp.concatenate([rbnn_inputs(x[i : i + 1]).codes for i in range(4)])
    quantized = rbnn_inputs(x)
    np.testing.assert_array_equal(quantized.codes, apart)
    np.testing.assert_array_equal(quantized.codes, np.where(x >= x.mean((1, 2, 3), keepdims=True), 1, -1))
    np.testing.assert_array_equal(rbnn_inputs(8 * x).codes, quantized.codes)
    assert quantized.scale.shape == ()
    constant, gradient = jax.value_and_grad(lambda x: rbnn_inputs(x).codes.sum())(jnp.full((1, 6), 0.5))
    assert constant == 6
    np.testing.assert_array_equal(gradient, np.zeros((1, 6)))


def test_rbnn_starts_from_the_whole_rotation_and_the_mean_magnitude():
    w = normal(9)
    parameters = rbnn().init(jax.random.key(0), w)
    np.testing.assert_allclose(parameters["angle"], np.full((1, 1, 1, 5), np.pi / 2), rtol=1e-7)
    np.testing.assert_allclose(parameters["scale"], np.abs(w).mean((0, 1, 2), keepdims=True), rtol=1e-6)


def test_the_detached_gradient_vanishes_at_the_initial_angle():
    w = normal(10)
    state = rbnn().init_state(jax.random.key(0), w)

    def loss(w, angle, detach):
        quantized, _ = rbnn_weights(w, state, jnp.ones((1, 1, 1, 5)), angle, detach_rotation=detach)
        return (dequantize(quantized) * normal(11)).sum()

    angle = jnp.full((1, 1, 1, 5), jnp.pi / 2)
    gradient = lambda detach: np.abs(jax.jit(jax.grad(loss), static_argnums=2)(w, angle, detach)).max()
    assert gradient(True) < 1e-5
    assert gradient(False) > 1e-1


def test_bn_free_starts_with_a_gain_of_one_and_a_negative_gain_flips_the_codes():
    quantizer, w = bn_free(), normal(12)
    parameters = quantizer.init(jax.random.key(0), w)
    np.testing.assert_array_equal(parameters["gain"], np.ones((1, 1, 1, 5)))
    plain, flipped = (quantizer.apply(w, gain=gain) for gain in (parameters["gain"], -2 * parameters["gain"]))
    np.testing.assert_array_equal(flipped.codes, -plain.codes)
    np.testing.assert_allclose(flipped.scale, 2 * plain.scale, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: standardize(jnp.ones((1, 4))), r"`w` \(of shape \(1, 4\)\) must have a fan-in of at least 2"),
        (lambda: nearest_factors(0), r"`n` \(=0\) must be positive; it is the fan-in of a filter"),
        (lambda: bn_free(gamma=0.0), r"`gamma` \(=0\.0\) must be positive; 1\.0 is usual"),
        (lambda: rbnn(period_steps=0), r"`period_steps` \(=0\) must be positive; give the steps of an epoch"),
        (lambda: rbnn(sweeps=-1), r"`sweeps` \(=-1\) must be positive; 3 is the paper's"),
        (lambda: rbnn(t_min=0.0), r"`t_min` \(=0\.0\) must be positive"),
        (lambda: rbnn_inputs(jnp.ones((4, 1))), r"`x` \(of shape \(4, 1\)\) must have at least 2 values an example"),
    ],
)
def test_error_texts(call, message):
    with pytest.raises(ValueError, match=message):
        call()

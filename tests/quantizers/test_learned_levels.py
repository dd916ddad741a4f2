"""LQ-Nets: levels, basis updates and gradients, against float64 numpy that searches all levels."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnn_jax.quantizers import dequantize, validate
from bnn_jax.quantizers.learned_levels import lq_activations, lq_net, lq_net_activations, lq_weights

FEATURES = 3

quantize_weights = jax.jit(lq_weights, static_argnames="train")
quantize_activations = jax.jit(lq_activations, static_argnames="train")


def weights(seed=0, scale=0.1):
    return np.random.default_rng(seed).normal(scale=scale, size=(3, 3, 4, FEATURES)).astype(np.float32)


def activations(seed=0):
    return np.maximum(np.random.default_rng(seed).normal(size=(8, 4, 4, 5)), 0).astype(np.float32)


def state_of(quantizer, x):
    return quantizer.init_state(jax.random.key(0), jnp.asarray(x))


def nearest(x, v, low):
    """Values and codes (len(v), ...) of the level nearest to each x, by search through all of them."""
    table = np.array(list(product((low, 1), repeat=len(v))), np.float64)
    choice = np.abs(x.ravel()[:, None] - (table @ v)[None]).argmin(1)
    return (table @ v)[choice].reshape(x.shape), table[choice].T


def refit(x, v, codes):
    """0.9 v + 0.1 argmin_u |x - u.codes|^2 + 1e-4 |u - v|^2, as one least-squares problem with rows for the ridge."""
    rows = np.concatenate([codes.T, 1e-2 * np.eye(len(v))])
    return 0.9 * v + 0.1 * np.linalg.lstsq(rows, np.concatenate([x.ravel(), 1e-2 * v]), rcond=None)[0]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_two_training_steps_of_weights_equal_the_twin(bits):
    w = weights()
    state = state_of(lq_net(bits=bits), w)
    v = np.asarray(state["basis"], np.float64).reshape(bits, FEATURES)
    for step in range(2):
        w = weights(step)
        quantized, state = quantize_weights(jnp.asarray(w), state, train=True)
        validate(quantized, (-1, 1))
        assert {base.scale.shape for base in quantized} == {(1, 1, 1, FEATURES)}
        for f in range(FEATURES):
            value, codes = nearest(w[..., f].astype(np.float64), v[:, f], low=-1)
            np.testing.assert_allclose(dequantize(quantized)[..., f], value, rtol=1e-4, atol=1e-6)
            v[:, f] = refit(w[..., f].astype(np.float64), v[:, f], codes)
        np.testing.assert_allclose(state["basis"].reshape(bits, FEATURES), v, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_two_training_steps_of_activations_equal_the_twin(bits):
    state = state_of(lq_net_activations(bits=bits), activations())
    v = np.asarray(state["basis"], np.float64)
    for step in range(2):
        x = activations(step)
        quantized, state = quantize_activations(jnp.asarray(x), state, train=True)
        validate(quantized, (0, 1))
        value, codes = nearest(x.astype(np.float64), v, low=0)
        np.testing.assert_allclose(dequantize(quantized), value, rtol=1e-4, atol=1e-6)
        v = refit(x.astype(np.float64), v, codes)
        np.testing.assert_allclose(state["basis"], v, rtol=1e-4, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(
    basis=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=4),
    x=st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6),
)
def test_no_level_is_nearer(basis, x):
    v, x = np.array(basis, np.float32), np.array(x, np.float32)
    for function, low, state in [
        (quantize_activations, 0, {"basis": jnp.asarray(v)}),
        (quantize_weights, -1, {"basis": jnp.asarray(v).reshape(-1, 1, 1)}),
    ]:
        quantized, _ = function(jnp.asarray(x.reshape(6, 1)), state)
        validate(quantized, (low, 1))
        best, _ = nearest(x.astype(np.float64), v.astype(np.float64), low)
        found = np.abs(np.asarray(dequantize(quantized), np.float64).ravel() - x)
        np.testing.assert_allclose(found, np.abs(best - x), atol=2e-6)


def test_weights_of_one_bit_settle_at_the_mean_magnitude():
    w = jnp.asarray(weights())
    step = lambda state, _: (lq_weights(w, state, train=True)[1], None)
    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, length=300))(state_of(lq_net(bits=1), w))
    np.testing.assert_allclose(state["basis"][0], np.abs(w).mean((0, 1, 2), keepdims=True), rtol=1e-5)
    quantized, after = quantize_weights(w, state, train=True)
    np.testing.assert_array_equal(quantized[0].codes, np.where(w < 0, -1, 1))
    np.testing.assert_allclose(after["basis"], state["basis"], rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 3])
def test_each_step_lowers_the_quantization_error(bits):
    for quantizer, x, axes in [
        (lq_net(bits=bits), weights(scale=1.0), (0, 1, 2)),
        (lq_net_activations(bits=bits), activations(), None),
    ]:
        state, errors = state_of(quantizer, x), []
        apply = jax.jit(partial(quantizer.apply, train=True))
        for _ in range(15):
            quantized, state = apply(jnp.asarray(x), state)
            errors.append(((np.asarray(dequantize(quantized), np.float64) - x) ** 2).mean(axes))
        errors = np.array(errors)
        assert (np.diff(errors, axis=0) <= 1e-6 * errors[0]).all()
        assert (errors[-1] < 0.99 * errors[0]).all()


def test_ties_go_up_and_zero_has_code_plus_one():
    (base,), _ = quantize_weights(jnp.array([[0.0], [-0.0], [-1e-30]]), {"basis": jnp.full((1, 1, 1), 0.5)})
    np.testing.assert_array_equal(base.codes.ravel(), [1, 1, -1])
    x = np.array([0.25, np.nextafter(np.float32(0.25), np.float32(0)), 0.75, 1.25], np.float32)
    quantized, _ = quantize_activations(jnp.asarray(x), {"basis": jnp.array([0.5, 1.0])})
    np.testing.assert_array_equal(dequantize(quantized), [0.5, 0.0, 1.0, 1.5])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gradients(bits):
    g = np.random.default_rng(3).normal(size=(3, 3, 4, FEATURES)).astype(np.float32)
    w = weights()
    state = state_of(lq_net(bits=bits), w)
    loss = lambda w, train: (dequantize(lq_weights(w, state, train=train)[0]) * g).sum()
    for train in (False, True):
        gradient = jax.jit(jax.grad(loss), static_argnums=1)(jnp.asarray(w) * 100, train)
        np.testing.assert_allclose(gradient, g, rtol=1e-5)

    slope = jax.jit(jax.grad(lambda x, basis: dequantize(lq_activations(x, {"basis": basis})[0]).sum()))
    basis = state_of(lq_net_activations(bits=bits), w)["basis"]
    top = np.float32(sum(float(v) for v in basis))
    edge = [np.nextafter(top, np.float32(0)), np.nextafter(top, np.float32(9))]
    x = np.array([-2.0, 0.0, 0.1, 0.7, *edge, 3.0, 1e4], np.float32)
    # The sum of the basis may round to a neighbour of `top`: the edge is where the gradient ends, not one number.
    np.testing.assert_allclose(np.delete(slope(x, basis), [4, 5]), [1, 1, 1, 1, 0, 0], rtol=1e-5)
    exact = np.array(2.0 ** np.arange(bits), np.float32)
    x = np.float32(2**bits - 1) * np.array([1, 1 - 2**-20, 1 + 2**-20], np.float32)
    np.testing.assert_allclose(slope(x, exact), [1, 1, 0], rtol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_initial_bases(bits):
    w = np.zeros((3, 3, 4, FEATURES), np.float32)
    for fan, n in [("in", 36), ("out", 27)]:
        basis = np.asarray(state_of(lq_net(bits=bits, fan=fan), w)["basis"])
        assert basis.shape == (bits, 1, 1, 1, FEATURES)
        expected = [0.6745 * np.sqrt(2 / n) / 2 ** (bits - 1) * 2**i for i in range(bits)]
        np.testing.assert_allclose(basis[:, 0, 0, 0], np.outer(expected, np.ones(FEATURES)), rtol=1e-6)
    basis = state_of(lq_net_activations(bits=bits), w)["basis"]
    np.testing.assert_allclose(basis, [2 * 0.6745 / (2**bits - 1) * 2**i for i in range(bits)], rtol=1e-6)
    assert float(basis.sum()) == pytest.approx(1.349, rel=1e-6)
    for factory in (lq_net, lq_net_activations):
        assert state_of(factory(bits=bits), jnp.ones((4, 2), jnp.bfloat16))["basis"].dtype == jnp.float32


DEGENERATE = {
    "all zero": np.zeros((64, 2)),
    "all above the highest level": np.full((64, 2), 50.0),
    "two levels alone": np.where(np.arange(128).reshape(64, 2) % 2, 50.0, 0.0),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_what_a_batch_does_not_determine_stays(name):
    """Coinciding or unused codes make the Gram matrix singular: the new basis is the solution nearest to the old."""
    x = DEGENERATE[name]
    v = np.array([0.45, 0.9, 1.8])
    _, state = quantize_activations(jnp.asarray(x, jnp.float32), {"basis": jnp.asarray(v, jnp.float32)}, train=True)
    value, codes = nearest(x, v, 0)
    change = np.linalg.pinv(codes @ codes.T) @ codes @ (x - value).ravel()
    np.testing.assert_allclose(state["basis"], v + 0.1 * change, rtol=1e-5)


def test_error_texts():
    for factory in (lq_net, lq_net_activations):
        for bits in (0, 5, 1.5):
            with pytest.raises(ValueError, match=rf"`bits` \(={bits}\) must be a whole number from 1 to 4; 2 is usual"):
                factory(bits=bits)
    with pytest.raises(ValueError, match=r"`fan` \(='average'\) must be 'in' or 'out'; 'in' is usual"):
        lq_net(fan="average")
    with pytest.raises(
        ValueError, match=r"`state` \(basis \(2, 1, 5\)\) must hold \(K, 1, \.\.\., 1, features\) for `w`"
    ):
        lq_weights(jnp.ones((3, 4)), {"basis": jnp.ones((2, 1, 5))})
    with pytest.raises(ValueError, match=r"`state` \(basis \(2, 1\)\) must hold one vector \(K,\) a layer"):
        lq_activations(jnp.ones((3, 4)), {"basis": jnp.ones((2, 1))})

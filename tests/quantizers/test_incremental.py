"""INQ: powers of two against an exact search of the published rule, and the growing frozen set against a twin."""

from functools import partial
from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.quantizers import dequantize, validate
from bnn_jax.quantizers.incremental import ALEXNET_SHARES, SHARES, incremental, inq

SHAPE = (3, 3, 2, 4)
quantize = jax.jit(incremental, static_argnames=("bits", "shares", "train"))


def weights(seed=0):
    return np.random.default_rng(seed).normal(scale=0.2, size=SHAPE).astype(np.float32)


def state_of(w, **options):
    return inq(**options).init_state(jax.random.key(0), jnp.asarray(w))


def exponents(w, bits):
    """n1 = floor(log2(4s/3)) by counting, n2 = n1 + 1 - 2^(bits-2)."""
    s, n1 = float(np.abs(w).max()), 60
    while 0.75 * 2.0**n1 > s:
        n1 -= 1
    return n1, n1 + 1 - 2 ** (bits - 2)


def power_of_two(value, n1, n2):
    """The member b of {0, 2^n2, ..., 2^n1} with (a + b)/2 <= |value| < 3b/2, a the member below it."""
    members = [0.0, *(2.0**n for n in range(n2, n1 + 1))]
    for below, b in pairwise(members):
        if (below + b) / 2 <= abs(value) < 1.5 * b:
            return np.copysign(b, value)
    return 0.0 if abs(value) < members[1] else np.copysign(members[-1], value)


def quantized_twin(w, bits):
    n1, n2 = exponents(w, bits)
    return np.array([power_of_two(float(v), n1, n2) for v in w.ravel()]).reshape(w.shape)


def code_set(bits):
    powers = [2**n for n in range(2 ** (bits - 2))]
    return (*(-p for p in powers), 0, *powers)


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_evaluation_quantizes_everything_by_the_published_rule(bits, scale):
    w = weights() * np.float32(scale)
    quantized, _ = quantize(jnp.asarray(w), state_of(w), bits=bits)
    validate(quantized, code_set(bits))
    assert float(quantized.scale) == 2.0 ** exponents(w, bits)[1]
    np.testing.assert_array_equal(dequantize(quantized), quantized_twin(w, bits))


@pytest.mark.parametrize("bits", [2, 3, 5])
@pytest.mark.parametrize("largest", [1.0, 0.75, 0.7499, 1.4999, 1.5])
def test_thresholds_and_their_neighbours(bits, largest):
    edges = np.array([c * 2.0**n for n in range(-12, 1) for c in (0.5, 0.75, 1.0)], np.float32)
    edges = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(9))])
    w = np.concatenate([edges[edges < largest], -edges[edges < largest], [largest, 0.0]]).astype(np.float32)
    quantized, _ = quantize(jnp.asarray(w), state_of(w), bits=bits)
    np.testing.assert_array_equal(dequantize(quantized), quantized_twin(w, bits))


def test_the_default_five_bits_span_seven_octaves():
    """The authors' release: exponents M - 7 ... M."""
    w = np.array([1.0, 2.0**-7, 2.0**-8, 0.49 * 2.0**-7], np.float32)
    np.testing.assert_array_equal(dequantize(quantize(jnp.asarray(w), state_of(w))[0]), [1, 2.0**-7, 2.0**-7, 0])


def train_twin(steps, bits, shares):
    """The frozen values after each step, NaN where still real; n1 and n2 stay as at the first step."""
    frozen, history = np.full(SHAPE, np.nan), []
    n1, n2 = exponents(steps[0][0], bits)
    for w, progress in steps:
        share = shares[min(int(progress * len(shares)), len(shares) - 1)]
        missing = round(share * w.size) - np.isfinite(frozen).sum()
        candidates = sorted(np.flatnonzero(np.isnan(frozen)), key=lambda i: -abs(w.flat[i]))
        for i in candidates[: max(missing, 0)]:
            frozen.flat[i] = power_of_two(float(w.flat[i]), n1, n2)
        history.append(frozen.copy())
    return history


@pytest.mark.parametrize("shares", [SHARES, ALEXNET_SHARES, (1.0,), (0.25, 0.5, 1.0)])
@pytest.mark.parametrize("bits", [3, 5])
def test_the_frozen_set_grows_and_keeps_its_values_while_weights_change(bits, shares):
    progress = [0.0, 0.2, 0.3, 0.5, 0.4, 0.8, 0.9, 1.0]
    steps = [(weights(seed) * np.float32(1 + seed), p) for seed, p in enumerate(progress)]
    state, was_frozen = state_of(steps[0][0]), np.zeros(SHAPE, bool)
    apply = jax.jit(partial(incremental, bits=bits, shares=shares, train=True))
    for (w, p), twin in zip(steps, train_twin(steps, bits, shares)):
        (powers, real), state = apply(jnp.asarray(w), state, progress=jnp.float32(p))
        is_frozen = np.isfinite(twin)
        assert (is_frozen >= was_frozen).all()
        was_frozen = is_frozen
        np.testing.assert_array_equal(state["frozen"], is_frozen)
        validate(powers, code_set(bits))
        np.testing.assert_array_equal(powers.codes * powers.scale, np.where(is_frozen, twin, 0))
        np.testing.assert_array_equal(real.codes * real.scale, np.where(is_frozen, 0, w))
    assert apply._cache_size() == 1
    assert was_frozen.all()
    evaluated, after = quantize(jnp.asarray(weights(99)), state, bits=bits, shares=shares)
    np.testing.assert_array_equal(dequantize(evaluated), twin)
    chex.assert_trees_all_equal(after, state)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.5), (0.25, 0.75), (0.6, 0.875), (0.75, 1.0), (1.0, 1.0)])
def test_share_of_each_part_and_the_largest_weights_first(progress, share):
    w = weights()
    _, state = quantize(jnp.asarray(w), state_of(w), train=True, progress=progress)
    frozen = np.asarray(state["frozen"])
    assert frozen.sum() == round(share * w.size)
    if share < 1:
        assert np.abs(w)[frozen].min() >= np.abs(w)[~frozen].max()


def test_evaluation_in_between_keeps_what_is_frozen():
    w, moved = weights(), 5 * weights(1)
    (powers, _), state = quantize(jnp.asarray(w), state_of(w), train=True, progress=0.0)
    evaluated, _ = quantize(jnp.asarray(moved), state)
    validate(evaluated, code_set(5))
    frozen, (n1, n2) = np.asarray(state["frozen"]), exponents(w, 5)
    rest = np.array([power_of_two(float(v), n1, n2) for v in moved.ravel()]).reshape(SHAPE)
    np.testing.assert_array_equal(dequantize(evaluated), np.where(frozen, powers.codes * powers.scale, rest))


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_gradient_reaches_the_real_weights_alone(progress):
    w = jnp.asarray(weights())
    g = np.random.default_rng(5).normal(size=SHAPE).astype(np.float32)
    state = quantize(w, state_of(w), train=True, progress=progress)[1]
    loss = lambda w: (dequantize(quantize(w, state, train=True, progress=progress)[0]) * g).sum()
    np.testing.assert_array_equal(jax.grad(loss)(w), np.where(state["frozen"], 0, g))


def test_equal_magnitudes_freeze_to_the_exact_count():
    w = jnp.ones((4, 6)) * 0.3
    _, state = quantize(w, inq().init_state(None, w), train=True, progress=0.0)
    assert int(state["frozen"].sum()) == 12


@pytest.mark.usefixtures("standard_dtypes")
@pytest.mark.full
def test_weights_of_float64_are_quantized_as_those_of_float32():
    with jax.enable_x64(True):
        w = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)
        state = inq().init_state(None, w)
        (_, after), (_, wide_after) = (
            quantize(w.astype(dtype), state, train=True, progress=0.5) for dtype in (jnp.float32, jnp.float64)
        )
        assert after["frozen"].any()
        np.testing.assert_array_equal(wide_after["codes"], after["codes"])
        assert [leaf.dtype for leaf in jax.tree.leaves(wide_after)] == [leaf.dtype for leaf in jax.tree.leaves(state)]


def test_error_texts():
    for bits in (1, 7, 2.5):
        with pytest.raises(ValueError, match=rf"`bits` \(={bits}\) must be a whole number from 2 to 6; 5 is usual"):
            inq(bits=bits)
    for shares in ((), (0.5,), (0.5, 0.5, 1.0), (0.0, 1.0), (0.5, float("nan"), 1.0)):
        with pytest.raises(ValueError, match=r"`shares` \(=\(.*\)\) must be positive, increasing and end with 1"):
            inq(shares=shares)
    with pytest.raises(ValueError, match=r"`state` \(of shape \(3, 4\)\) must have the shape of `w`, \(4, 3\)"):
        incremental(jnp.ones((4, 3)), state_of(np.ones((3, 4))))

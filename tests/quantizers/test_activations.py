"""Activations with a threshold of their own and BinaryDuo's switch, against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnn_jax.quantizers.activations import (
    coupled,
    decouple,
    decoupled,
    rsign,
    shifted_sign,
    sparse,
    sparse_step,
    unbalanced,
)
from bnn_jax.quantizers.codes import dequantize
from bnn_jax.quantizers.quantizer import stateless

RNG = np.random.default_rng(0)
X = RNG.normal(0.2, 0.8, (2, 3, 4, 5)).astype(np.float32)
G = RNG.normal(size=X.shape).astype(np.float32)

# name -> quantizer, value of one x and its derivative with the parameters of the start
ENTRIES = {
    "rsign": (rsign(), lambda x: -1 if x < 0 else 1, lambda x: max(0, 2 - 2 * abs(x))),
    "rsign with another estimator": (
        rsign("ste_sign", clip_value=1.25),
        lambda x: -1 if x < 0 else 1,
        lambda x: abs(x) <= 1.25,
    ),
    "unbalanced": (
        unbalanced(),
        lambda x: -1 if x < 0.5 else 1,
        lambda x: abs(np.float32(x) - np.float32(0.5)) <= 1,
    ),
    "sparse": (sparse(), lambda x: x > 0, lambda x: -float(np.float32(0.3)) < x < 1),
    "coupled": (stateless(coupled), lambda x: np.floor(2 * np.clip(x, 0, 1) + 0.5) / 2, lambda x: 0 <= x <= 1),
    "decoupled": (stateless(decoupled), lambda x: x >= 0.5, lambda x: 0 <= x <= 1),
}
STEPS = np.float32([-1e4, -1.25, -1, -0.5, -0.3, 0, 0.1, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1e4])
KINKS = np.concatenate([STEPS, np.nextafter(STEPS, np.float32(9e9)), np.nextafter(STEPS, -np.float32(9e9)), [-0.0]])
KINKS = KINKS[(KINKS == 0) | (np.abs(KINKS) > 1e-30)].astype(np.float32)


def test_the_kinks_leave_out_one_value_alone():
    assert 0.25 in STEPS
    assert {np.nextafter(np.float32(0.25), np.float32(1)), np.nextafter(np.float32(0.25), np.float32(0))} <= set(KINKS)


@pytest.mark.parametrize("name", ENTRIES)
def test_value_and_gradient_equal_the_scalar_twin(name):
    quantizer, value, derivative = ENTRIES[name]

    @jax.jit
    def run(x):
        parameters = quantizer.init(jax.random.key(0), x) if quantizer.init else {}
        found, pull_back = jax.vjp(lambda x: dequantize(quantizer.apply(x, **parameters)), x)
        return found, pull_back(jnp.ones_like(x))[0]

    found, slope = run(jnp.asarray(KINKS).reshape(1, -1))
    np.testing.assert_array_equal(found, [[float(value(float(k))) for k in KINKS]])
    np.testing.assert_allclose(slope, [[float(derivative(float(k))) for k in KINKS]], atol=1e-6)


def test_gradient_of_the_learned_shift():
    shift = RNG.normal(size=(1, 1, 1, 5)).astype(np.float32)
    loss = lambda x, shift: (dequantize(rsign().apply(x, shift=shift)) * jnp.asarray(G)).sum()
    dx, dshift = jax.grad(loss, argnums=(0, 1))(jnp.asarray(X), jnp.asarray(shift))
    expected = G * np.maximum(0, 2 - 2 * np.abs(X.astype(np.float64) - shift))
    np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(dshift, -expected.sum((0, 1, 2), keepdims=True), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(shifted_sign(jnp.asarray(X), shift=jnp.asarray(shift)).codes, 2 * (shift <= X) - 1)


def test_rsign_passes_on_what_its_estimator_wants():
    x = jnp.asarray(X)
    quantizer = rsign("ede_sign")
    assert quantizer.wants == ("progress",)
    shift = quantizer.init(jax.random.key(0), x)["shift"]

    @jax.jit
    def slope(progress):
        return jax.grad(lambda x: quantizer.apply(x, shift=shift, progress=progress).codes.sum())(x)

    flat, steep = slope(0.0), slope(1.0)
    assert slope._cache_size() == 1
    x64 = X.astype(np.float64)
    np.testing.assert_allclose(flat, 1 - np.tanh(0.1 * x64) ** 2, rtol=1e-4)
    np.testing.assert_allclose(steep, 10 * (1 - np.tanh(10 * x64) ** 2), rtol=1e-3, atol=1e-5)
    parameters = rsign("swish_sign", trainable=True).init(jax.random.key(0), x)
    assert {name: value.shape for name, value in parameters.items()} == {"shift": (1, 1, 1, 5), "beta": ()}


@pytest.mark.parametrize("threshold", [-0.5, 0.25, 1.0])
def test_unbalanced_threshold(threshold):
    x = jnp.asarray(X)
    np.testing.assert_array_equal(unbalanced(threshold=threshold).apply(x).codes, np.where(threshold > X, -1, 1))


def test_share_of_unbalanced_activations():
    n = 40_000
    x = jax.random.normal(jax.random.key(1), (n, 1))
    share = float((unbalanced().apply(x).codes > 0).mean())
    p = 0.3085375  # 1 - Phi(0.5); the bound is five standard deviations, 1 chance in 10^6
    assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / n)


def test_gradients_of_the_learned_threshold_and_width():
    threshold, width = np.float32([[[[-0.2, 0.0, 0.1, 0.3, 0.5]]]]), np.float32([[[[0.5, 1.0, 1.5, 2.0, 3.0]]]])
    loss = lambda x, t, d: (dequantize(sparse_step(x, threshold=t, width=d)) * jnp.asarray(G)).sum()
    args = [jnp.asarray(a) for a in (X, threshold, width)]
    dx, dthreshold, dwidth = jax.grad(loss, argnums=(0, 1, 2))(*args)
    z, d = X.astype(np.float64) - threshold, width.astype(np.float64)
    ramp = G * ((-0.3 * d < z) & (z < d))
    axes = {"axis": (0, 1, 2), "keepdims": True}
    np.testing.assert_allclose(dx, ramp / d, rtol=1e-5)
    np.testing.assert_allclose(dthreshold, -(ramp / d).sum(**axes), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dwidth, -(ramp * z / d**2).sum(**axes), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(sparse_step(*args[:1], threshold=args[1], width=args[2]).codes, threshold < X)


SLOPES_OF_SPARSE_STEP = jax.jit(
    jax.grad(lambda x, width: sparse_step(x, threshold=0.0, width=width).codes.sum(), argnums=(0, 1))
)


@pytest.mark.parametrize("width", [0.25, 1.0, 4.0])
def test_areas_of_the_ramp_do_not_depend_on_its_width(width):
    x = jnp.linspace(-10, 10, 400_001)
    dx, dwidth = SLOPES_OF_SPARSE_STEP(x, jnp.float32(width))
    step = 20 / 400_000
    assert float(dx.sum()) * step == pytest.approx(1.3, rel=2e-3)
    assert float(dwidth) * step == pytest.approx(-(1 - 0.3**2) / 2, rel=2e-3)


def test_rho_of_the_sparse_step():
    x = jnp.array([[-0.4, -0.2, 0.5]])
    quantizer = sparse(rho=0.5)
    parameters = quantizer.init(jax.random.key(0), x)
    slope = jax.grad(lambda x: quantizer.apply(x, **parameters).codes.sum())(x)
    np.testing.assert_array_equal(slope, [[1, 1, 1]])
    np.testing.assert_array_equal(
        jax.grad(lambda x: sparse().apply(x, **parameters).codes.sum())(x),
        [[0, 1, 1]],
    )


def test_a_width_that_training_drove_below_0_has_no_ramp():
    x, quantizer = jnp.array([[-0.4, 0.5]]), sparse()
    parameters = quantizer.init(jax.random.key(0), x) | {"width": jnp.array([[1.0, -0.1]])}
    codes, slope = jax.value_and_grad(lambda x: quantizer.apply(x, **parameters).codes.sum())(x)
    assert codes == 1
    np.testing.assert_array_equal(slope, [[0, 0]])


def norm(x, tree, bias):
    return (x @ tree["kernel"] - tree["mean"]) * tree["scale"] + bias


def layerwise(z, kernel):
    return z @ (np.abs(kernel).mean() * np.where(kernel < 0, -1, 1))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_decoupling_keeps_the_function_exactly(seed, binary_weights):
    rng = np.random.default_rng(seed)
    dyadic = lambda *shape: (rng.integers(-64, 65, shape) / 64).astype(np.float32)
    tree = {"kernel": dyadic(4, 8), "mean": dyadic(8), "scale": dyadic(8)}
    bias, kernel, x = dyadic(8), dyadic(8, 4), dyadic(5, 4)
    product = layerwise if binary_weights else np.matmul
    z = norm(x, tree, bias)
    before = product(np.asarray(dequantize(coupled(jnp.asarray(z))), np.float64), kernel.astype(np.float64))
    twice, biases, halves = jax.tree.map(np.asarray, jax.jit(decouple)(tree, bias, kernel))
    both = np.asarray(dequantize(decoupled(jnp.asarray(norm(x, twice, biases)))), np.float64)
    assert both.shape == (5, 16)
    after = product(both, halves.astype(np.float64))
    np.testing.assert_array_equal(after, before)


def test_decoupling_a_convolution():
    z, kernel = RNG.normal(0.4, 0.5, (2, 6, 6, 3)).astype(np.float32), RNG.normal(size=(3, 3, 3, 4)).astype(np.float32)
    conv = lambda codes, w: jax.lax.conv_general_dilated(
        codes, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    _, biases, halves = decouple((), jnp.zeros(3), jnp.asarray(kernel))
    both = jnp.concatenate([jnp.asarray(z)] * 2, -1) + biases.reshape(1, 1, 1, -1)
    assert halves.shape == (3, 3, 6, 4)
    assert np.abs(z - 0.25).min() > 1e-6
    np.testing.assert_allclose(
        conv(dequantize(decoupled(both)), halves),
        conv(dequantize(coupled(jnp.asarray(z))), jnp.asarray(kernel)),
        atol=1e-5,
    )


def test_decoupled_neurons_are_the_two_thresholds():
    z = jnp.linspace(-1, 2, 301).reshape(-1, 1)
    _, biases, _ = decouple((), jnp.zeros(1), jnp.ones((1, 1)))
    codes = decoupled(z + biases.reshape(1, 2)).codes
    np.testing.assert_array_equal(codes[:, 0], (z[:, 0] >= 0.75))
    clear = np.abs(np.asarray(z[:, 0]) - 0.25) > 1e-6
    np.testing.assert_array_equal(codes[clear, 1], np.asarray(z[:, 0] > 0.25)[clear])


@pytest.mark.usefixtures("unchecked")
def test_decouple_refuses_shapes_that_do_not_match():
    with pytest.raises(ValueError, match=r"`next_kernel` \(with 3 features\) must have the 2 features of `norm_bias`"):
        decouple((), jnp.zeros(2), jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"`per_feature` \(with 3 features\) must have the 2 features of `norm_bias`"):
        decouple({"mean": jnp.zeros(3)}, jnp.zeros(2), jnp.ones((2, 4)))


def test_error_texts():
    with pytest.raises(ValueError, match=r"`rho` \(=-0\.1\) must be at least 0; 0\.3 is usual"):
        sparse(rho=-0.1)
    with pytest.raises(ValueError, match=r"`width` \(=0\.0\) must be positive"):
        sparse_step(jnp.ones((2, 3)), threshold=0.0, width=0.0)
    with pytest.raises(ValueError, match=r"clip_value"):
        rsign("ste_sign", clip_valeu=2.0)

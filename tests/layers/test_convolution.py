"""The canonical convolution against XLA's own, its gradients, and the gradients of its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from bnn_jax.layers import conv, convolution, scaled_conv
from bnn_jax.layers.convolution import resolve_padding

jax_conv = lambda x, k, strides, padding, dilation: lax.conv_general_dilated(
    x, k, strides, padding, rhs_dilation=dilation, dimension_numbers=("NHWC", "HWIO", "NHWC")
)
pair = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def geometries(draw):
    kernel, strides, dilation = draw(pair(1, 3)), draw(pair(1, 3)), draw(pair(1, 2))
    padding = (draw(pair(0, 3)), draw(pair(0, 3)))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation)]
    size = [max(draw(st.integers(1, 9)), r - sum(p)) for r, p in zip(reach, padding)]
    return size, kernel, strides, padding, dilation


@settings(max_examples=20, deadline=None)
@given(geometries(), st.integers(0, 2**31))
def test_value_and_gradients_equal_xla(geometry, seed):
    size, kernel, *static = geometry
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(2, *size, 3)), jnp.float32)
    k = jnp.asarray(rng.normal(size=(*kernel, 3, 4)), jnp.float32)
    shape = jax.eval_shape(lambda x, k: jax_conv(x, k, *static), x, k).shape
    g = jnp.asarray(rng.normal(size=shape), jnp.float32)

    @jax.jit
    def values_and_gradients(x, k, g):
        results = []
        for function in (conv, jax_conv):
            y, pullback = jax.vjp(lambda x, k, function=function: function(x, k, *static), x, k)
            results.append((y, *pullback(g)))
        return results

    for ours, theirs in zip(*values_and_gradients(x, k, g)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [6, 7])
@pytest.mark.parametrize(
    ("shape", "kernel", "strides", "padding", "dilation"),
    [
        ((7, 6), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
        ((7, 6), (3, 2), (1, 2), ((2, 1), (0, 1)), (2, 1)),
        ((8, 9), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 2)),
        ((5, 5), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1)),
        ((9, 7), (4, 1), (1, 1), ((0, 3), (1, 0)), (1, 1)),
        ((12,), (5,), (1,), ((2, 2),), (2,)),
        ((4, 5, 6), (2, 3, 3), (1, 2, 1), ((1, 0), (1, 1), (0, 2)), (2, 1, 1)),
    ],
)
def test_the_kernel_gradient_in_parts_of_the_batch(shape, kernel, strides, padding, dilation, batch, monkeypatch):
    """Against sums over pixels in float64: whatever part of the batch one product takes, and in bfloat16."""
    rng = np.random.default_rng(0)
    x, k = rng.normal(size=(batch, *shape, 3)), rng.normal(size=(*kernel, 3, 4)).astype(np.float32)
    pullback = lambda x: jax.vjp(lambda k: conv(x, k, strides, padding, dilation), k)
    outputs = jax.eval_shape(lambda x: pullback(x)[0], x.astype(np.float32)).shape
    g = rng.normal(size=outputs)
    padded = np.pad(x, [(0, 0), *padding, (0, 0)])
    expected = np.zeros(k.shape)
    for tap in np.ndindex(*kernel):
        for pixel in np.ndindex(*outputs[1:-1]):
            place = tuple(p * s + t * d for p, s, t, d in zip(pixel, strides, tap, dilation))
            expected[tap] += padded[:, *place].T @ g[:, *pixel]
    for size in (1, 3 * 4 * padded[0].nbytes, 1 << 30):
        monkeypatch.setattr(convolution, "PART_BYTES", size)
        for dtype, tolerance in ((np.float32, 1e-5), (jnp.bfloat16, 2e-2)):
            found = jax.jit(lambda x, g: pullback(x)[1](g)[0])(jnp.asarray(x, dtype), jnp.asarray(g, np.float32))
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_transposed_gradient_is_the_jacobian_product(strides):
    rng = np.random.default_rng(0)
    x, k, dx, dk = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 6, 6, 3), (3, 3, 3, 4)) * 2)
    static = (strides, ((1, 1), (1, 1)), (1, 1))
    y, pullback = jax.vjp(lambda x, k: conv(x, k, *static), x, k)
    (pushed,) = jax.vjp(pullback, jnp.zeros_like(y))[1]((dx, dk))
    _, expected = jax.jvp(lambda x, k: jax_conv(x, k, *static), (x, k), (dx, dk))
    np.testing.assert_allclose(pushed, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale_shape", [(), (1, 1, 1, 4)])
def test_scaled_conv_value_and_gradients(scale_shape):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.choice([-1.0, 1.0], size=(2, 5, 5, 3)), jnp.float32)
    codes = jnp.asarray(rng.choice([-1.0, 0.0, 1.0], size=(3, 3, 3, 4)), jnp.float32)
    scale = jnp.asarray(rng.uniform(0.5, 2, size=scale_shape), jnp.float32)
    static = ((2, 1), ((1, 1), (0, 1)), (1, 1))
    g = jnp.asarray(rng.normal(size=(2, 3, 4, 4)), jnp.float32)

    def run(function):
        y, pullback = jax.vjp(lambda x, c, s: function(x, c, s), x, codes, scale)
        return y, pullback(g)

    expected, gradients = jax.jit(lambda: run(lambda x, c, s: jax_conv(x, c, *static) * s))()
    found, our_gradients = jax.jit(lambda: run(lambda x, c, s: scaled_conv(x, c, s, *static)))()
    np.testing.assert_array_equal(found, expected)
    for ours, theirs in zip(our_gradients, gradients):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rank", "stride", "groups"), [(2, 1, 1), (2, 2, 1), (1, 1, 1), (3, 2, 1), (2, 1, 2), (1, 2, 4), (3, 1, 4)]
)
def test_the_gradient_contains_canonical_convolutions_only(rank, stride, groups):
    x, k = jnp.ones((2, *[6] * rank, 4)), jnp.ones((*[3] * rank, 4 // groups, 4))
    gradient = jax.grad(lambda x, k: conv(x, k, stride, 1, groups=groups).sum(), argnums=(0, 1))
    second = jax.grad(lambda x, k: sum(g.sum() for g in gradient(x, k * k)), argnums=(0, 1))
    for function in (gradient, second):
        convs = [
            e for e in _equations(jax.make_jaxpr(function)(x, k).jaxpr) if e.primitive.name == "conv_general_dilated"
        ]
        assert convs
        for equation in convs:
            numbers = equation.params["dimension_numbers"]
            last = len(numbers.lhs_spec) - 1
            channels_last, kernel_last = (0, last, *range(1, last)), (last, last - 1, *range(last - 1))
            assert (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec) == (channels_last, kernel_last, channels_last)
            assert set(equation.params["lhs_dilation"]) == {1} and equation.params["batch_group_count"] == 1


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for one in value if isinstance(value, tuple) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        ("SAME", ((0, 1), (0, 1))),
        ("valid", ((0, 0), (0, 0))),
        (2, ((2, 2), (2, 2))),
        (((1, 0), (0, 3)), ((1, 0), (0, 3))),
    ],
)
def test_resolve_padding(padding, expected):
    assert resolve_padding(padding, shape=(8, 8), kernel_size=(3, 3), strides=(2, 2), dilation=(1, 1)) == expected


def test_unknown_padding():
    with pytest.raises(ValueError, match=r"`padding` \(='full'\) must be a whole number from 0 on, .*, SAME or VALID"):
        resolve_padding("full", shape=(8, 8), kernel_size=(3, 3), strides=(1, 1), dilation=(1, 1))


@pytest.mark.full
@pytest.mark.parametrize(("rank", "groups"), [(1, 1), (2, 1), (2, 3), (3, 1), (3, 3)])
def test_no_pixels_left_and_no_images_give_empty_results_and_gradients_of_zero(rank, groups):
    kernel = jnp.ones((*[3] * rank, 3 // groups, 3))
    for shape in ((2, *[2] * rank, 3), (0, *[4] * rank, 3)):
        value, gradients = jax.value_and_grad(lambda x, k: conv(x, k, 2, groups=groups).sum(), argnums=(0, 1))(
            jnp.ones(shape), kernel
        )
        assert value == 0 and [g.shape for g in gradients] == [shape, kernel.shape]
        assert not any(g.any() for g in gradients)

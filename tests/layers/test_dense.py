"""Dense layers over any axes: trained, frozen and a float64 oracle agree in integers; gradients are the matrix's."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bnn_jax.analysis.accounting import account
from bnn_jax.layers import BinaryDense, BinaryDenseGeneral, BinaryGRU, BinaryLSTM, SelfAttention
from bnn_jax.packed import freeze, verify
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, make_quantizer

KEY = jax.random.key(0)
PAIRS = {
    "one bit": ("ste_sign", "binary", lambda x, w: (np.where(x < 0, -1, 1), np.where(w < 0, -1, 1))),
    "bitnet": (
        "bitnet",
        "bitnet_b158",
        lambda x, w: (
            np.clip(np.rint(x * (127 / np.abs(x).max(-1, keepdims=True))), -127, 127),
            np.clip(np.rint(w / (np.abs(w).mean() + 1e-5)), -1, 1),
        ),
    ),
}


@partial(jax.jit, static_argnums=0)
def trained_and_frozen(layer, variables, x):
    y, frozen = layer.apply(variables, x, mutable=["packed"])
    return y, layer.apply(frozen, x)


def check_products(pair, leading, inputs, features, seed):
    """The layer on its latent weights and on the words that a call of `freeze` collects, without scales."""
    rng = np.random.default_rng(seed)
    # Multiples of 1/64 are far from every tie but at 0, where the rule is sign(0) = +1.
    x = (rng.integers(-64, 65, (*leading, inputs)) / 64).astype(np.float32)
    x[..., 0] = 1
    w = rng.normal(size=(inputs, features)).astype(np.float32)
    layer, variables = BinaryDense(features, *LAYERS[pair]), {"params": {"latent_kernel": jnp.asarray(w)}}
    codes = PAIRS[pair][2](x, w)
    expected = np.asarray(codes[0], np.float64) @ np.asarray(codes[1], np.float64)
    for found in trained_and_frozen(layer, variables, jnp.asarray(x)):
        assert found.shape == (*leading, features)
        np.testing.assert_array_equal(found, expected)


def _codes_alone(quantize, x):
    return (found := quantize(x))._replace(scale=jnp.ones_like(found.scale))


def unscaled(quantizer):
    return quantizer._replace(apply=partial(_codes_alone, quantizer.apply))


LAYERS = {
    name: (unscaled(ACTIVATION_QUANTIZERS[inputs]()), unscaled(WEIGHT_QUANTIZERS[kernel]()))
    for name, (inputs, kernel, _) in PAIRS.items()
}


def over_shapes(examples):
    def decorate(test):
        strategies = {
            "pair": st.sampled_from(sorted(PAIRS)),
            "leading": st.lists(st.integers(1, 3), max_size=3).map(tuple),
            "inputs": st.sampled_from((1, 33, 64)),
            "features": st.sampled_from((1, 5)),
            "seed": st.integers(0, 99),
        }
        return settings(max_examples=examples)(given(**strategies)(test))

    return decorate


@over_shapes(20)
def test_products_over_leading_axes_are_the_oracles_integers(**drawn):
    check_products(**drawn)


@pytest.mark.full
@over_shapes(500)
def test_products_over_many_leading_axes_are_the_oracles_integers(**drawn):
    check_products(**drawn)


class Heads(nn.Module):
    """Into two heads and out of them, over tokens, as an attention has its projections."""

    inputs: str
    kernel: str

    @nn.compact
    def __call__(self, images, train=False):
        dense = partial(BinaryDenseGeneral, input_quantizer=self.inputs, kernel_quantizer=self.kernel)
        heads = dense((2, 32), name="in")(images.reshape(len(images), -1, 64), train=train)
        return dense(5, axis=(-2, -1), use_bias=True, name="out")(heads, train=train).mean(1)


@pytest.mark.full
@pytest.mark.parametrize(("inputs", "kernel"), [("bitnet", "bitnet_b158"), ("ste_sign", "xnor")])
def test_heads_freeze_and_take_the_bytes_that_are_counted(inputs, kernel):
    """Two bits a weight of three values, one of a sign; 8-bit inputs are multiplied as integers."""
    model, images = Heads(inputs, kernel), jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 16)), jnp.float32)
    variables = model.init(KEY, images)
    packed = freeze(model, variables, images.shape[1:])
    found = verify(model, variables, packed, [images])
    assert found.passed and found.largest_logit_difference == 0
    assert {name: layer.integers for name, layer in found.layers.items()} == {"in/dense": 512, "out/dense": 40}
    counted = account(model.apply, variables, images[:1])
    bits = 2 if kernel == "bitnet_b158" else 1
    assert counted.quantized_weights == {bits: 64 * 64 + 64 * 5}
    assert counted.payload_bytes() == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(packed))
    words = sum(base.words.size for kernel in packed["packed"].values() for base in kernel["dense"]["kernel"].bases)
    assert words * 32 == bits * (64 * 64 + 64 * 5)


@pytest.mark.full
def test_codes_of_bytes_are_multiplied_as_int8_where_there_are_matrix_units():
    """On CPU as float32; a layer whose sums float32 does not hold, and one in training, never."""
    layer, x = BinaryDense(5, "bitnet", "bitnet_b158"), jnp.ones((3, 64))
    frozen = layer.apply(layer.init(KEY, x), x, mutable=["packed"])[1]
    lowered = lambda v, platform: jax.jit(layer.apply).trace(v, x).lower(lowering_platforms=(platform,)).as_text()
    assert "xi8>" in lowered(frozen, "cuda") and "xi32>" in lowered(frozen, "cuda")
    assert "xi8>" not in lowered(frozen, "cpu") and "xi8>" not in lowered(layer.init(KEY, x), "cuda")
    wide = layer.clone(kernel_quantizer=make_quantizer(WEIGHT_QUANTIZERS, "wrpn", bits=8))
    assert wide._sums_of_bytes(1040) and not wide._sums_of_bytes(1041) and layer._sums_of_bytes(2**24 // 127)


@pytest.mark.parametrize(
    ("shape", "axis", "features", "dtype"),
    [
        ((2, 3, 4), (-2, -1), (2, 3), "float32"),
        pytest.param((3, 4), -1, 5, "bfloat16", marks=pytest.mark.full),
        pytest.param((2, 3, 4), (2, 0), 3, "float32", marks=pytest.mark.full),
        pytest.param((4,), 0, 2, "float32", marks=pytest.mark.full),
    ],
)
def test_dense_over_axes_is_flaxs_with_quantizers_off(shape, axis, features, dtype):
    """Outputs and gradients by the axes and features that `flax.linen.DenseGeneral` takes."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    ours, theirs = BinaryDenseGeneral(features, axis, use_bias=True), nn.DenseGeneral(features, axis, dtype=dtype)
    params = ours.init(KEY, x)["params"]["dense"]
    wanted = jax.eval_shape(theirs.init, KEY, x)["params"]
    same = jax.tree.map(lambda own, shaped: own.reshape(shaped.shape).astype(dtype), dict(params), dict(wanted))

    def with_gradient(layer, params):
        y, pullback = jax.vjp(lambda x: layer.apply({"params": params}, x), x)
        return [np.asarray(a, np.float32) for a in (y, *pullback(jnp.ones_like(y)))]

    tolerance = 1e-5 if dtype == "float32" else 0.03
    for found, expected in zip(with_gradient(ours, {"dense": params}), with_gradient(theirs, same)):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"features": (2, 0)},
            r"`features` \(=\(2, 0\)\) must be a positive whole number, or several in layer 'heads'",
        ),
        ({"features": 3, "axis": 2}, r"`axis` \(=2\) must be different axes of x, which has 2, in layer 'heads'"),
        ({"features": 3, "axis": (-1, 1)}, r"`axis` \(=\(-1, 1\)\) must be different axes of x, which has 2, in layer"),
    ],
)
def test_impossible_axes_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        BinaryDenseGeneral(**arguments, name="heads").init(KEY, jnp.ones((2, 4)))


def test_no_examples_and_no_tokens():
    x = jnp.ones((0, 5, 8))
    layers = (BinaryDenseGeneral((2, 4)), BinaryDenseGeneral(3, axis=(-2, -1)), SelfAttention(heads=2))
    shapes = [layer.init_with_output(KEY, x)[0].shape for layer in layers]
    assert shapes == [(0, 5, 2, 4), (0, 3), (0, 5, 8)]
    for layer in (BinaryLSTM(4), BinaryGRU(4)):
        variables = layer.init(KEY, jnp.ones((2, 1, 3)))
        assert layer.apply(variables, jnp.ones((2, 0, 3))).shape == (2, 0, 4)

"""Binary layers: exact integers, the published formulas, padding, errors."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate

from bnn_jax.estimators import ESTIMATORS, ste_sign
from bnn_jax.layers import BinaryConv, BinaryDense
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

SIGN, XNOR, TTQ = ACTIVATION_QUANTIZERS["ste_sign"](), WEIGHT_QUANTIZERS["xnor"](), WEIGHT_QUANTIZERS["ttq"]()
signs = lambda x: np.where(x < 0, -1.0, 1.0)


def images(shape=(2, 6, 6, 5), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def apply(layer, x, seed=0):
    variables = layer.init(jax.random.key(seed), jnp.asarray(x))
    return np.asarray(layer.apply(variables, jnp.asarray(x))), variables["params"]


def convolve(x, kernel, pad_value=0.0, pad=1):
    """Stride 1, float64, one output feature at a time, by scipy."""
    x = np.pad(x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=pad_value)
    return np.stack(
        [
            [correlate(image, kernel[..., f].astype(np.float64), mode="valid")[..., 0] for image in x]
            for f in range(kernel.shape[-1])
        ],
        axis=-1,
    )


@pytest.mark.parametrize("pad_value", [-1, 0, 1])
def test_binary_products_are_exact_integers(pad_value):
    x = images()
    y, params = apply(
        BinaryConv(7, input_quantizer=SIGN, kernel_quantizer=WEIGHT_QUANTIZERS["binary"](), pad_value=pad_value), x
    )
    np.testing.assert_array_equal(y, convolve(signs(x), signs(params["latent_kernel"]), pad_value))


def names_in(jaxpr):
    """The names of checkpoint_name in order, with those of called functions."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name":
            yield equation.params["name"]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from names_in(inner)


KERNEL_SCALE, INPUT_SCALE = "kernel_quantizer scale", "input_quantizer scale"


@pytest.mark.parametrize(
    ("inputs", "kernel", "names"),
    [
        (None, None, []),
        (None, ("xnor", {}), ["kernel_quantizer codes: 2 values", KERNEL_SCALE]),
        (None, ("binary_connect", {"stochastic": True}), []),
        (
            ("tbn", {}),
            ("ttq", {}),
            ["kernel_quantizer codes: 2 values", KERNEL_SCALE] * 2 + ["input_quantizer codes: 3 values", INPUT_SCALE],
        ),
        (
            ("dorefa", {"bits": 3}),
            ("dorefa", {"bits": 5}),
            ["kernel_quantizer codes: 32 values", KERNEL_SCALE, "input_quantizer codes: 8 values", INPUT_SCALE],
        ),
        (
            ("abc_net", {"bases": 2}),
            ("twn", {}),
            ["kernel_quantizer codes: 3 values", KERNEL_SCALE] + ["input_quantizer codes: 2 values", INPUT_SCALE] * 2,
        ),
    ],
)
@pytest.mark.parametrize("layer", [BinaryDense, BinaryConv])
def test_codes_and_scales_are_marked(layer, inputs, kernel, names):
    layer = layer(
        3,
        input_quantizer=inputs and ACTIVATION_QUANTIZERS[inputs[0]](**inputs[1]),
        kernel_quantizer=kernel and WEIGHT_QUANTIZERS[kernel[0]](**kernel[1]),
    )
    x = jnp.ones((2, 4) if isinstance(layer, BinaryDense) else (2, 4, 4, 2))
    jaxpr = jax.make_jaxpr(lambda key: layer.init_with_output(key, x)[0])(jax.random.key(0))
    assert list(names_in(jaxpr.jaxpr)) == names


def test_marks_lower_to_nothing(monkeypatch):
    layer = BinaryConv(3, input_quantizer=SIGN, kernel_quantizer=XNOR)
    x = jnp.ones((1, 4, 4, 2))
    variables = layer.init(jax.random.key(0), x)

    def lowered():
        text = jax.jit(lambda v, x: layer.apply(v, x)).lower(variables, x).as_text()
        return [operation for operation in re.findall(r"stablehlo\.(\w+)", text) if operation != "constant"]

    marked = lowered()
    monkeypatch.setattr("bnn_jax.layers.operands.mark", lambda x, place, values=None: x)
    assert marked == lowered()
    assert "convolution" in marked


@pytest.mark.parametrize(
    "options", [{"input_quantizer": "tbn"}, pytest.param({"kernel_quantizer": "lq_net"}, marks=pytest.mark.full)]
)
def test_initializing_for_training_leaves_the_state_of_quantizers_as_it_starts(options):
    layer, x = BinaryDense(3, **options), jnp.asarray(images((4, 6)))
    variables, start = (jax.jit(partial(layer.init, train=train))(jax.random.key(0), x) for train in (True, False))
    jax.tree.map(np.testing.assert_array_equal, variables, start)
    _, after = layer.apply(variables, x, train=True, mutable=["quantizer_state"])
    pairs = zip(jax.tree.leaves(after), jax.tree.leaves(variables["quantizer_state"]), strict=True)
    assert any((new != old).any() for new, old in pairs)


def test_xnor_formula_with_and_without_the_input_scale():
    x = images()
    y, params = apply(BinaryConv(7, input_quantizer=SIGN, kernel_quantizer=XNOR), x)
    kernel = np.asarray(params["latent_kernel"], np.float64)
    expected = convolve(signs(x), signs(kernel)) * np.abs(kernel).mean((0, 1, 2))
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    y, _ = apply(BinaryConv(7, input_quantizer=SIGN, kernel_quantizer=XNOR, input_scaling=True), x)
    k = convolve(np.abs(x).mean(-1, keepdims=True), np.full((3, 3, 1, 1), 1 / 9))
    np.testing.assert_allclose(y, expected * k, rtol=1e-4, atol=1e-6)


def test_xnor_is_exact_where_inputs_and_filters_have_one_magnitude():
    x, kernel = 0.7 * signs(images()), 0.3 * signs(images((3, 3, 5, 4), seed=1))
    layer = BinaryConv(4, input_quantizer=SIGN, kernel_quantizer=XNOR, input_scaling=True, padding="VALID")
    y = layer.apply({"params": {"latent_kernel": jnp.float32(kernel)}}, jnp.float32(x))
    np.testing.assert_allclose(y, convolve(x, kernel, pad=0), rtol=1e-5, atol=1e-5)


def test_the_input_scale_is_constant_in_the_backward_pass():
    x = jnp.asarray(images())
    layer = BinaryConv(4, input_quantizer=SIGN, kernel_quantizer=XNOR, input_scaling=True)
    variables = layer.init(jax.random.key(0), x)
    outside = jnp.where(jnp.abs(x) > 1, x, 2.0)  # the estimator passes nothing here, so only K could
    gradient = jax.grad(lambda x: layer.apply(variables, x).sum())(outside)
    np.testing.assert_array_equal(gradient, 0)


def test_ternary_with_codes_and_with_real_inputs():
    x = images()
    params = None
    for quantizer, inputs in ((None, x), (SIGN, signs(x))):
        layer = BinaryConv(7, input_quantizer=quantizer, kernel_quantizer=TTQ)
        params = layer.init(jax.random.key(0), jnp.asarray(x))["params"]
        params["kernel_quantizer"] = {"positive_scale": jnp.float32(0.5), "negative_scale": jnp.float32(2.0)}
        w = np.asarray(params["latent_kernel"])
        delta = np.float32(0.05) * np.abs(w).max()
        ternary = np.where(w > delta, 0.5, np.where(w < -delta, -2.0, 0.0))
        expected = convolve(inputs, ternary)
        np.testing.assert_allclose(layer.apply({"params": params}, jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_full_precision_layer_has_a_kernel_and_no_latent_kernel():
    x = images()
    y, params = apply(BinaryConv(7, use_bias=True, strides=(2, 2), padding=1), x)
    assert set(params) == {"kernel", "bias"}
    np.testing.assert_allclose(y, convolve(x, np.asarray(params["kernel"]))[:, ::2, ::2], rtol=1e-4, atol=1e-5)


def test_gradient_of_the_latent_kernel_by_the_published_formula():
    x, g = images(), images((2, 6, 6, 4), seed=3)
    layer = BinaryConv(4, input_quantizer=SIGN, kernel_quantizer=XNOR)
    variables = layer.init(jax.random.key(0), jnp.asarray(x))
    w = np.asarray(variables["params"]["latent_kernel"], np.float64) * 5  # some beyond the clip
    found = jax.grad(lambda p: (layer.apply({"params": p}, jnp.asarray(x)) * g).sum())(
        {"latent_kernel": jnp.float32(w)}
    )
    padded = np.pad(signs(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    real = np.zeros(w.shape)  # gradient of the kernel alpha sign(w)
    for i, j in np.ndindex(3, 3):
        real[i, j] = np.einsum("bhwc,bhwf->cf", padded[:, i : i + 6, j : j + 6], g.astype(np.float64))
    alpha, n = np.abs(w).mean((0, 1, 2)), w[..., 0].size
    expected = alpha * real * (np.abs(w) <= 1) + signs(w) / n * (real * signs(w)).sum((0, 1, 2))
    np.testing.assert_allclose(found["latent_kernel"], expected, rtol=1e-3, atol=1e-4)


def test_dense_layer():
    x = images((3, 9))
    y, params = apply(BinaryDense(4, input_quantizer=SIGN, kernel_quantizer=XNOR, use_bias=True), x)
    kernel = np.asarray(params["latent_kernel"], np.float64)
    np.testing.assert_allclose(y, signs(x) @ signs(kernel) * np.abs(kernel).mean(0), rtol=1e-5, atol=1e-6)
    y, params = apply(BinaryDense(4), x)
    np.testing.assert_allclose(y, x @ np.asarray(params["kernel"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [BinaryConv, BinaryDense])
@pytest.mark.parametrize("inputs", ["ste_sign", ESTIMATORS["ste_sign"], ste_sign, SIGN], ids=type)
def test_a_name_an_estimator_a_function_and_a_quantizer_are_taken(layer, inputs):
    x = images((2, 4, 4, 3)) if layer is BinaryConv else images((2, 4))
    y, params = apply(layer(5, input_quantizer=inputs, kernel_quantizer="xnor"), x)
    expected, wanted = apply(layer(5, input_quantizer=SIGN, kernel_quantizer=XNOR), x)
    np.testing.assert_array_equal(y, expected)
    assert params.keys() == wanted.keys() == {"latent_kernel"}


def test_a_gradient_quantizer_has_a_name_too():
    assert BinaryDense(1, gradient_quantizer="dorefa").gradient_quantizer is not None
    with pytest.raises(ValueError, match=r"`kernel_quantizer` \(='xnorr'\) .*did you mean 'xnor'"):
        BinaryDense(1, kernel_quantizer="xnorr")


def test_a_number_stands_for_two_equal_ones():
    layer = BinaryConv(2, kernel_size=3, strides=2, kernel_dilation=2)
    y, params = apply(layer, images())
    assert params["kernel"].shape == (3, 3, 5, 2)
    same = layer.clone(strides=(2, 2))
    assert (same.kernel_size, same.strides, same.kernel_dilation) == ((3, 3), (2, 2), (2, 2))
    np.testing.assert_array_equal(y, apply(same, images())[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": 0}, r"`features` \(=0\) must be a positive whole number in layer 'conv1'"),
        ({"features": 1, "strides": (0, 1)}, r"`strides` \(=\(0, 1\)\) must be a positive whole number .* 'conv1'"),
        ({"features": 1, "pad_value": 2}, r"`pad_value` \(=2\) must be 0, \+1 or -1 in layer 'conv1'"),
        (
            {"features": 1, "input_scaling": True},
            r"`input_scaling` \(=True\) needs an `input_quantizer`.* in layer 'conv1'",
        ),
    ],
)
def test_impossible_layers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BinaryConv(**arguments, name="conv1")
    if "strides" not in arguments and "pad_value" not in arguments and "input_scaling" not in arguments:
        with pytest.raises(ValueError, match=message):
            BinaryDense(**arguments, name="conv1")

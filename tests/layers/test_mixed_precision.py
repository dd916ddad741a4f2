"""Layers on bfloat16 activations: exact integers, one rounding at the end, float32 parameters, statistics and sums."""

import jax
import jax.extend
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bnn_jax.layers import (
    BatchNorm,
    BinaryConv,
    BinaryDense,
    ChannelInteractions,
    OutputScale,
    PReLU,
    RPReLU,
    avg_pool_2x2,
    conv,
    scaled_conv,
)
from bnn_jax.layers.precision import dot
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

BF16 = ml_dtypes.bfloat16
SIGN, BINARY, XNOR = ACTIVATION_QUANTIZERS["ste_sign"](), WEIGHT_QUANTIZERS["binary"](), WEIGHT_QUANTIZERS["xnor"]()
PADS = ((0, 0), (1, 1), (1, 1), (0, 0))


def signs(rng, *shape) -> np.ndarray:
    """Nine of ten are +1, so that sums are large."""
    return rng.choice([-1.0, 1.0], shape, p=[0.1, 0.9])


def rounded(x) -> np.ndarray:
    """Float64 numbers rounded once to bfloat16."""
    return np.asarray(x, np.float64).astype(BF16).astype(np.float64)


def numbers(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def drawn(layer, x, rng) -> dict:
    """Parameters of the shapes and dtypes that the layer wants for x, between -1 and 1."""
    params = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x), x)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(-1, 1, leaf.shape), leaf.dtype), params)


def products(jaxpr) -> list[tuple[str, tuple[str, ...]]]:
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            found.append((equation.primitive.name, tuple(v.aval.dtype.name for v in equation.invars)))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += products(inner)
    return found


def conv_twin(x, kernel, stride):
    """3x3 convolution, padding 1, in float64, tap by tap."""
    padded = np.pad(x, PADS)
    height, width = ((n - 1) // stride + 1 for n in x.shape[1:3])
    rows, columns = (lambda i, n: slice(i, i + stride * n, stride) for _ in range(2))
    return sum(padded[:, rows(i, height), columns(j, width)] @ kernel[i, j] for i in range(3) for j in range(3))


def gradients_twin(x, kernel, g, stride):
    """dL/dx and dL/dkernel of :func:`conv_twin` for g = dL/dy, in float64."""
    padded = np.pad(x, PADS)
    dx, dkernel = np.zeros_like(padded), np.zeros_like(kernel)
    for i in range(3):
        for j in range(3):
            tap = (slice(None), slice(i, i + stride * g.shape[1], stride), slice(j, j + stride * g.shape[2], stride))
            dx[tap] += g @ kernel[i, j].T
            dkernel[i, j] = np.einsum("bhwc,bhwf->cf", padded[tap], g)
    return dx[:, 1:-1, 1:-1], dkernel


@pytest.mark.default_flags
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_of_codes_is_exact(stride):
    """Sums of up to 4608 codes and their gradients: integers that bfloat16 does not hold."""
    rng = np.random.default_rng(stride)
    x, kernel = signs(rng, 5 if stride == 1 else 21, 9, 9, 512), signs(rng, 3, 3, 512, 71)
    x[0], kernel[..., 0] = 1, 1
    y = conv_twin(x, kernel, stride)
    g = signs(rng, *y.shape)
    dx, dkernel = gradients_twin(x, kernel, g, stride)
    assert y.max() == 4608 and (rounded(y) != y).any() and (rounded(dkernel) != dkernel).any()

    def run(x, kernel, g):
        found, pullback = jax.vjp(lambda x, kernel: conv(x, kernel, (stride, stride), PADS[1:3]), x, kernel)
        return found, *pullback(g)

    operands = jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.float32), jnp.asarray(g, jnp.float32)
    found, found_dx, found_dkernel = jax.jit(run)(*operands)
    assert (found.dtype, found_dx.dtype, found_dkernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert np.array_equal(found, y) and np.array_equal(found_dkernel, dkernel)
    assert np.array_equal(numbers(found_dx), rounded(dx))


def test_scales_are_not_rounded_and_their_gradient_is_a_float32_sum():
    rng = np.random.default_rng(0)
    x, codes, g = signs(rng, 4, 6, 6, 64), signs(rng, 3, 3, 64, 8), signs(rng, 4, 6, 6, 8)
    scale = rng.uniform(0.1, 0.2, (1, 1, 1, 8)).astype(np.float32)
    y, (_, k) = conv_twin(x, codes, 1), gradients_twin(x, codes, g, 1)
    operands = jnp.asarray(x, jnp.bfloat16), jnp.asarray(codes, jnp.float32), jnp.asarray(scale)
    found, pullback = jax.vjp(lambda *operands: scaled_conv(*operands, (1, 1), PADS[1:3]), *operands)
    _, dcodes, dscale = pullback(jnp.asarray(g, jnp.float32))
    assert np.array_equal(found, y.astype(np.float32) * scale)
    assert np.array_equal(dcodes, k.astype(np.float32) * scale)
    assert dscale.dtype == jnp.float32 and np.array_equal(dscale, (k * codes).sum((0, 1, 2), keepdims=True))


def test_dense_product_of_codes_is_exact():
    rng = np.random.default_rng(0)
    x, kernel, g = signs(rng, 501, 4608), signs(rng, 4608, 501), signs(rng, 501, 501)
    x[0], kernel[:, 0] = 1, 1
    exact = x @ kernel, g @ kernel.T, x.T @ g
    assert all((rounded(values) != values).any() for values in exact) and exact[0].max() == 4608

    def run(x, kernel, g):
        found, pullback = jax.vjp(dot, x, kernel)
        return found, *pullback(g)

    operands = jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.float32), jnp.asarray(g, jnp.float32)
    found, dx, dkernel = jax.jit(run)(*operands)
    assert (found.dtype, dx.dtype, dkernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert np.array_equal(found, exact[0]) and np.array_equal(dkernel, exact[2])
    assert np.array_equal(numbers(dx), rounded(exact[1]))


@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_a_layer_rounds_once_at_its_end(kind):
    """alpha (codes * codes) + bias with float32 alpha and bias, rounded to bfloat16."""
    rng = np.random.default_rng(0)
    options = {"input_quantizer": SIGN, "kernel_quantizer": XNOR, "use_bias": True}
    layer = BinaryConv(8, padding=1, **options) if kind == "conv" else BinaryDense(8, **options)
    shape = (2, 6, 6, 256) if kind == "conv" else (40, 256)
    x = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    params = drawn(layer, x, rng)
    y, recorded = jax.jit(lambda params, x: layer.apply({"params": params}, x, mutable=["products"]))(params, x)
    codes, kernel = np.where(numbers(x) < 0, -1.0, 1.0), numbers(params["latent_kernel"])
    product = conv_twin if kind == "conv" else lambda x, kernel, _: x @ kernel
    integers = product(codes, np.where(kernel < 0, -1.0, 1.0), 1)
    assert np.array_equal(recorded["products"]["integers"][0], integers)
    alpha = np.abs(kernel).mean(tuple(range(kernel.ndim - 1)))
    expected = integers * alpha + numbers(params["bias"])
    # Float32 arithmetic may round a value that is nearly halfway the other way.
    near = np.abs(rounded(expected * (1 + 1e-6)) - rounded(expected * (1 - 1e-6))) > 0
    assert y.dtype == jnp.bfloat16 and near.mean() < 0.01
    assert np.array_equal(numbers(y)[~near], rounded(expected)[~near])


def test_the_scale_of_a_kernel_on_real_inputs_is_not_rounded():
    """Inputs are small integers, so that their sums are exact."""
    rng = np.random.default_rng(0)
    layer = BinaryDense(4, kernel_quantizer=WEIGHT_QUANTIZERS["binary_connect"](magnitude=0.3))
    x = rng.integers(-8, 9, (16, 64)).astype(np.float64)
    params = drawn(layer, x.astype(BF16), rng)
    codes = np.where(numbers(params["latent_kernel"]) < 0, -1.0, 1.0)
    y = layer.apply({"params": params}, jnp.asarray(x, jnp.bfloat16))
    assert np.array_equal(numbers(y), rounded((x @ codes).astype(np.float32) * np.float32(0.3)))
    assert not np.array_equal(numbers(y), rounded(x @ (codes * rounded(0.3))))


def test_the_map_of_input_scaling_is_float32():
    rng = np.random.default_rng(0)
    layer = BinaryConv(4, padding=1, input_quantizer=SIGN, kernel_quantizer=BINARY, input_scaling=True)
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 96)), jnp.bfloat16)
    params = drawn(layer, x, rng)
    y = jax.jit(layer.apply)({"params": params}, x)
    codes, kernel = (np.where(numbers(v) < 0, -1.0, 1.0) for v in (x, params["latent_kernel"]))
    mean = np.abs(numbers(x)).mean(-1, keepdims=True)
    expected = conv_twin(codes, kernel, 1) * conv_twin(mean, np.full((3, 3, 1, 1), 1 / 9), 1)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(numbers(y), expected, rtol=2.0**-8 + 1e-5, atol=0)  # half a unit of 8 bits


def test_thresholds_are_not_rounded():
    """1 is below the threshold 1 + 2^-10, which bfloat16 rounds to 1."""
    layer = BinaryDense(1, input_quantizer=ACTIVATION_QUANTIZERS["rsign"](), kernel_quantizer=BINARY)
    x = jnp.ones((1, 3), jnp.bfloat16)
    shift = jnp.asarray([[1 + 2.0**-10, 1 - 2.0**-10, 1.0]], jnp.float32)
    params = {"latent_kernel": jnp.asarray([[1.0], [2.0], [3.0]]), "input_quantizer": {"shift": shift}}
    _, recorded = layer.apply({"params": params}, x, mutable=["products"])
    assert recorded["products"]["integers"][0].item() == -1 + 1 + 1


def test_codes_that_bfloat16_does_not_hold_are_multiplied_in_float32():
    """9 bits: the code 511, which bfloat16 rounds to 512; 8 bits are exact."""
    found = {}
    for bits in (8, 9):
        quantizer = ACTIVATION_QUANTIZERS["dorefa"](bits=bits)
        layer = BinaryDense(1, input_quantizer=quantizer, kernel_quantizer=BINARY)
        variables = {"params": {"latent_kernel": jnp.ones((3, 1))}}
        ((_, found[bits]),) = products(jax.make_jaxpr(layer.apply)(variables, jnp.ones((1, 3), jnp.bfloat16)).jaxpr)
    assert found == {8: ("bfloat16", "bfloat16"), 9: ("float32", "float32")}


@pytest.mark.parametrize(
    ("kernel_quantizer", "input_quantizer"),
    [("xnor", name) for name in ACTIVATION_QUANTIZERS]
    + [(name, inputs) for name in WEIGHT_QUANTIZERS for inputs in ("full_precision", "ste_sign")],
)
def test_every_quantizer_keeps_its_parameters_float32_and_its_codes_narrow(kernel_quantizer, input_quantizer):
    """Initialised and differentiated on bfloat16 inputs, by tracing."""
    layer = BinaryConv(
        8,
        padding=1,
        input_quantizer=ACTIVATION_QUANTIZERS[input_quantizer](),
        kernel_quantizer=WEIGHT_QUANTIZERS[kernel_quantizer](),
    )
    rngs = {"params": jax.random.key(0), "quantizer": jax.random.key(1)}
    x = jax.ShapeDtypeStruct((2, 5, 5, 4), jnp.bfloat16)
    variables = jax.eval_shape(lambda x: layer.init(rngs, x), x)
    mutable = [name for name in variables if name != "params"]

    def run(variables, x):
        def forward(params, x):
            return layer.apply(variables | {"params": params}, x, train=True, mutable=mutable, rngs=rngs)

        y, pullback, updated = jax.vjp(forward, variables["params"], x, has_aux=True)
        return y, pullback(y), updated

    closed, (y, (dparams, dx), updated) = jax.make_jaxpr(run, return_shape=True)(variables, x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((variables["params"], dparams))} == {"float32"}
    assert "bfloat16" not in {leaf.dtype.name for leaf in jax.tree.leaves((variables, updated))}
    assert y.dtype == dx.dtype == jnp.bfloat16
    convolutions = [operands for name, operands in products(closed.jaxpr) if name == "conv_general_dilated"]
    assert convolutions and set(convolutions) == {("bfloat16", "bfloat16")}


ACTIVATIONS = {
    "prelu": (PReLU(both_slopes=True), lambda x, p: np.where(x > 0, p["positive_slope"], p["slope"]) * x),
    "rprelu": (
        RPReLU(),
        lambda x, p: (
            np.where(x > p["input_shift"], 1, p["slope"]) * (x - p["input_shift"]) + p["output_shift"]
        ),
    ),
    "output_scale": (OutputScale(case=4), lambda x, p: x * p["scale"] * p["row_scale"] * p["column_scale"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_learned_activations_round_once_and_sum_their_gradients_in_float32(name):
    layer, twin = ACTIVATIONS[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 6, 8)), jnp.bfloat16)
    params = drawn(layer, x, rng)
    y = jax.jit(layer.apply)({"params": params}, x)
    expected = twin(numbers(x), jax.tree.map(numbers, params))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(numbers(y), expected, rtol=2.0**-8 + 1e-6, atol=1e-6)  # half a unit of 8 bits

    ones = -jnp.ones((3, 20, 20, 8), jnp.bfloat16)
    params = {key: jnp.full(v.shape, float("shift" not in key)) for key, v in drawn(layer, ones, rng).items()}
    gradient = jax.grad(lambda params: layer.apply({"params": params}, ones).astype(jnp.float32).sum())(params)
    # 1200 equal terms: a sum in bfloat16 would stop at 256.
    key = "scale" if name == "output_scale" else "slope"
    assert gradient[key].dtype == jnp.float32 and np.array_equal(gradient[key].ravel(), np.full(8, -1200.0))


def test_batch_norm_has_float32_statistics():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(3.0, 0.1, (64, 6, 6, 4)), jnp.bfloat16)
    norm = BatchNorm(momentum=0.0)
    variables = norm.init(jax.random.key(0), x, train=True)

    def loss(params):
        y, updated = norm.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return (y.astype(jnp.float32) * x.astype(jnp.float32)).sum(), (y, updated["batch_stats"])

    gradient, (y, stats) = jax.grad(loss, has_aux=True)(variables["params"])
    wide = numbers(x).reshape(-1, 4)
    assert y.dtype == jnp.bfloat16 and {leaf.dtype.name for leaf in jax.tree.leaves((stats, gradient))} == {"float32"}
    np.testing.assert_allclose(stats["mean"], wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats["var"], wide.var(0), rtol=1e-3)  # E[x^2] - mean^2 cancels 10 of 24 bits
    np.testing.assert_allclose(gradient["bias"], wide.sum(0), rtol=1e-6)
    normalized = ((wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)).reshape(x.shape)
    np.testing.assert_allclose(numbers(y), normalized, rtol=2.0**-8, atol=1e-3)


def test_means_and_interactions_keep_the_dtype():
    """A mean of 256, 1, 1, 1, whose partial sums bfloat16 does not hold; corrections at thresholds above 256."""
    x = jnp.asarray([256, 1, 1, 1], jnp.bfloat16).reshape(1, 2, 2, 1)
    assert avg_pool_2x2(x).dtype == jnp.bfloat16 and avg_pool_2x2(x).item() == rounded(64.75)
    layer = ChannelInteractions(edges=((0, 1, 1),), thresholds=(301,), step=100)
    y = layer.apply({}, jnp.asarray([[302.0, 1.0], [300.0, 1.0]], jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and numbers(y).tolist() == [[302, 101], [300, 1]]

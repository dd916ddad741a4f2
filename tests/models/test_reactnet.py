"""ReActNet: sizes by hand count, its unit against numpy and Bi-Real's; without BN, variances and invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.models.reactnet import (
    BnFreeUnit,
    ReActUnit,
    input_factors,
    reactnet18,
    reactnet18_bn_free,
    reactnet_resnet20,
)
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

REACT = {
    "input_quantizer": ACTIVATION_QUANTIZERS["rsign"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["magnitude_aware"](),
}
BN_FREE = REACT | {"kernel_quantizer": WEIGHT_QUANTIZERS["bn_free"]()}


def filled(init):
    """Random variables of the shapes that `init` makes: kernels of both signs, the rest positive."""
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape) if len(shape) == 4 and shape[2] > 1 else rng.uniform(0.3, 1.5, shape)
    return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf.shape), jnp.float32), jax.eval_shape(init))


def shapes_of(model, size):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False))


def count(tree, leaf):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(value.size for path, value in leaves if path[-1].key == leaf)


@pytest.mark.parametrize(
    ("network", "options", "classes", "size", "latent", "kernel", "sums"),
    [
        (reactnet18, REACT, 1000, 224, 10_985_472, 9408 + 172_032 + 512_000, (3392, 3840)),
        (reactnet18, {}, 1000, 224, 0, 9408 + 172_032 + 512_000 + 10_985_472, (0, 3840)),
        (reactnet18_bn_free, BN_FREE, 1000, 224, 10_985_472, 9408 + 172_032 + 512_000, (3392, 3840)),
        (reactnet_resnet20, REACT, 10, 32, 13_824 + 50_688 + 202_752, 432 + 512 + 2048 + 640, (624, 672)),
    ],
)
def test_sizes_by_hand_count(network, options, classes, size, latent, kernel, sums):
    """Binary, then real weights; channels that enter units (RSign's shifts), channels that leave them (RPReLU's)."""
    stem = "imagenet" if size == 224 else "cifar"
    params = shapes_of(network(num_classes=classes, stem=stem, **options), size)["params"]
    assert (count(params, "latent_kernel"), count(params, "kernel")) == (latent, kernel)
    assert (count(params, "shift"), count(params, "input_shift")) == sums
    assert count(params, "slope") == count(params, "output_shift") == sums[1]


def convolve(x, kernel, stride, padding):
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = ((n - k) // stride + 1 for n, k in zip(x.shape[1:3], kernel.shape))
    taps = np.ndindex(*kernel.shape[:2])
    return sum(
        x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride] @ kernel[i, j]
        for i, j in taps
    )


def binary(kernel):
    return np.where(kernel < 0, -1.0, 1.0) * np.abs(kernel).mean((0, 1, 2), keepdims=True)


def normalize(x, params, stats):
    return params["scale"] * (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) + params["bias"]


def bi_real_unit(x, params, stats, stride):
    """BN(conv(sign(x - shift))) + shortcut(x)"""
    codes = np.where(x - params["conv"]["input_quantizer"]["shift"] < 0, -1.0, 1.0)
    y = convolve(codes, binary(params["conv"]["latent_kernel"]), stride, 1)
    if stride > 1:
        x = sum(x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
        x = normalize(
            convolve(x, params["downsample"]["kernel"], 1, 0), params["downsample_norm"], stats["downsample_norm"]
        )
    return normalize(y, params["norm"], stats["norm"]) + x


def rprelu(y, params):
    y = y - params["input_shift"]
    return np.where(y > 0, y, params["slope"] * y) + params["output_shift"]


@pytest.mark.parametrize(("features", "stride"), [(3, 1), (6, 2)])
@pytest.mark.parametrize("plain", [False, True])
def test_the_unit_equals_numpy_and_is_bi_real_where_rprelu_is_the_identity(features, stride, plain):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 4, 3)), jnp.float32)
    unit = ReActUnit(features, stride, **REACT)
    variables = filled(lambda: unit.init(jax.random.key(0), x, train=False, progress=0.0))
    params = variables["params"]
    if plain:
        ones, zeros = jnp.ones(features), jnp.zeros(features)
        params["activation"] = {"slope": ones, "input_shift": zeros, "output_shift": zeros}
    found = jax.jit(lambda: unit.apply(variables, x, train=False, progress=0.0))()
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    expected = bi_real_unit(np.asarray(x, np.float64), exact["params"], exact["batch_stats"], stride)
    if not plain:
        expected = rprelu(expected, exact["params"]["activation"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


SMALL = {"num_classes": 3, "width": 4, "stage_sizes": (1, 1), "stem": "cifar"}


@pytest.mark.parametrize(
    ("network", "options"), [(reactnet18, REACT), (reactnet18_bn_free, BN_FREE)], ids=["reactnet", "bn_free"]
)
def test_shapes_of_a_small_network(network, options):
    model = network(**SMALL, **options)
    images = jnp.zeros((2, 8, 8, 3))
    (logits, intermediates), _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, train=False))
    assert logits.shape == (2, 3) and logits.dtype == jnp.float32
    shapes = {name: value.shape for name, value in intermediates.items()}
    assert shapes == {"stage1": (2, 8, 8, 4), "stage2": (2, 4, 4, 8), "features": (2, 8)}


def test_expected_variances():
    """alpha = 0.2: 1, 1.04, 1.08, 1.12, then 1.16 into the transition and 1.04 out of it."""
    variances = [1 / np.square(stage) for stage in input_factors((4, 2), alpha=0.2)]
    np.testing.assert_allclose(variances[0], [1, 1.04, 1.08, 1.12])
    np.testing.assert_allclose(variances[1], [1.16, 1.04])
    released = [1 / np.square(stage) for stage in input_factors((4, 3), alpha=0.2, count_first_unit=False)]
    np.testing.assert_allclose(released[0], [1, 1, 1.04, 1.08])
    np.testing.assert_allclose(released[1], [1.12, 1, 1.04])


def test_bn_free_has_no_state_and_no_norm():
    variables = shapes_of(reactnet18_bn_free(num_classes=10, stem="cifar", **BN_FREE), 32)
    assert set(variables) == {"params"}
    assert not any("norm" in jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(variables))


def with_identity_activations(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.ones_like(leaf) if path[-1].key == "slope" else leaf, params
    )


@pytest.mark.parametrize(("quantized", "share"), [(True, 0.75), (False, 1.0)])
def test_bn_free_variances_at_the_start(quantized, share):
    """A unit adds alpha^2 times (E|w|)^2 / E[w^2], 3/4 for uniform weights; 1 for weights that stay real."""
    alpha = 0.5
    options = BN_FREE if quantized else {"input_quantizer": BN_FREE["input_quantizer"]}
    model = reactnet18_bn_free(num_classes=3, width=24, stage_sizes=(3,), stem="cifar", alpha=alpha, **options)
    images = jnp.asarray(np.random.default_rng(1).normal(size=(4, 32, 32, 3)), jnp.float32)

    @jax.jit
    def stage_at_start(key):
        params = with_identity_activations(model.init(key, images, train=False)["params"])
        return model.apply({"params": params}, images, train=False)[1]["stage1"]

    stage = stage_at_start(jax.random.key(1))
    np.testing.assert_allclose(stage.var((0, 1, 2)).mean(), 1 + 3 * share * alpha**2, rtol=0.15)


def test_standardized_kernels_forget_their_mean_and_size():
    model = reactnet18_bn_free(num_classes=3, width=4, stage_sizes=(1, 1), stem="cifar")
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 3)), jnp.float32)
    variables = filled(lambda: model.init(jax.random.key(0), images, train=False))
    moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 3 * leaf + 1 if path[-1].key == "kernel" and path[-2].key != "head" else leaf, variables
    )
    apply = jax.jit(lambda variables: model.apply(variables, images, train=False)[0])
    np.testing.assert_allclose(apply(moved), apply(variables), rtol=1e-3, atol=1e-4)


def test_the_bn_free_unit_equals_numpy():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 3)), jnp.float32)
    unit = BnFreeUnit(3, 1, 0.2, 0.8, **BN_FREE, downsample_quantizer=None)
    params = filled(lambda: unit.init(jax.random.key(0), x, train=False, progress=0.0))["params"]
    params["conv"]["kernel_quantizer"]["gain"] = jnp.ones((1, 1, 1, 3))
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    w = exact["conv"]["latent_kernel"]
    w = (w - w.mean((0, 1, 2))) / (w.std((0, 1, 2)) + 1e-5) / np.sqrt(27)
    codes = np.where(0.8 * np.asarray(x) - exact["conv"]["input_quantizer"]["shift"] < 0, -1.0, 1.0)
    expected = rprelu(0.2 * convolve(codes, binary(w), 1, 1) + np.asarray(x), exact["activation"])
    found = jax.jit(lambda: unit.apply({"params": params}, x, train=False, progress=0.0))()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_release_binarizes_the_shortcuts_kernels():
    model = reactnet18_bn_free(
        num_classes=3, width=4, stage_sizes=(1, 1), downsample_quantizer=BN_FREE["kernel_quantizer"], **BN_FREE
    )
    params = shapes_of(model, 8)["params"]
    assert set(params["stage2_unit1"]["downsample"]) == {"latent_kernel", "kernel_quantizer"}


def test_errors():
    with pytest.raises(ValueError, match=r"`stem` \(='large'\) must be cifar \(small images\) or imagenet"):
        reactnet18_bn_free(num_classes=3, stem="large")
    with pytest.raises(ValueError, match=r"`alpha` \(=0\) of a BN-free ReActNet must be positive; 0.2 is usual"):
        reactnet18_bn_free(num_classes=3, alpha=0)
    with pytest.raises(ValueError, match=r"`stem` \(='large'\) must be cifar"):
        shapes_of(reactnet18(num_classes=3, stem="large"), 8)

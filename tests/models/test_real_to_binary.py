"""Real-to-Binary: sizes by hand count and larq's total, the half block against numpy, outputs, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.models.real_to_binary import (
    ActivatedStem,
    HalfBlock,
    real_to_binary_baseline_resnet18,
    real_to_binary_resnet18,
)
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

BINARY = {
    "input_quantizer": ACTIVATION_QUANTIZERS["ste_sign"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["binary"](),
}


def filled(init):
    """Random variables of the shapes that `init` makes: kernels of both signs, the rest positive."""
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape) if len(shape) in (2, 4) else rng.uniform(0.3, 1.5, shape)
    return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf.shape), jnp.float32), jax.eval_shape(init))


def shapes_of(model, size):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False))


def count(tree, *names):
    """Elements of the leaves whose path holds every name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(value.size for path, value in leaves if set(names) <= {key.key for key in path})


def test_sizes_by_hand_count():
    params = shapes_of(real_to_binary_resnet18(num_classes=1000, stem="imagenet", **BINARY), 224)["params"]
    assert count(params, "latent_kernel") == 10_985_472
    within = 4 * 1024 + 3 * 4096 + 3 * 16_384 + 3 * 65_536
    between = 8 * (64 + 128) + 16 * (128 + 256) + 32 * (256 + 512)
    assert count(params, "gate") == within + between
    assert count(params, "kernel") - count(params, "gate") == 9408 + 172_032 + 512_000
    assert count(params, "slope") == 4 * (64 + 128 + 256 + 512)


def test_total_of_larq_zoo():
    """11,995,624 values, the running statistics included, and a PReLU in the stem."""
    model = real_to_binary_resnet18(num_classes=1000, stem="imagenet", stem_prelu=True, **BINARY)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes_of(model, 224))) == 11_995_624


def test_the_baseline_has_scales_of_case_4():
    params = shapes_of(real_to_binary_baseline_resnet18(num_classes=1000, stem="imagenet", **BINARY), 224)["params"]
    assert count(params, "gate") == 0
    sides = 4 * 2 * (56 + 28 + 14 + 7)
    assert count(params, "column_scale") + count(params, "row_scale") == sides
    assert {name: leaf.shape for name, leaf in params["stage2_block1a"]["scale"].items()} == {
        "scale": (1, 1, 128),
        "row_scale": (28, 1, 1),
        "column_scale": (1, 28, 1),
    }
    assert count(params, "stem", "slope") == 64


def convolve(x, kernel, stride, padding):
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = ((n - k) // stride + 1 for n, k in zip(x.shape[1:3], kernel.shape))
    taps = np.ndindex(*kernel.shape[:2])
    return sum(
        x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride] @ kernel[i, j]
        for i, j in taps
    )


def normalize(x, params, stats):
    return params["scale"] * (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) + params["bias"]


def half_block(x, params, stats, stride, binary):
    z = normalize(x, params["norm"], stats["norm"])
    signs = lambda values: np.where(values < 0, -1.0, 1.0)
    kernel = signs(params["conv"]["latent_kernel"]) if binary else params["conv"]["kernel"]
    y = convolve(signs(z) if binary else np.tanh(z), kernel, stride, 1)
    if "gate" in params:
        hidden = np.maximum(z.mean((1, 2)) @ params["gate"]["squeeze"]["kernel"], 0)
        y *= (1 / (1 + np.exp(-hidden @ params["gate"]["expand"]["kernel"])))[:, None, None]
    else:
        y *= params["scale"]["scale"] * params["scale"]["row_scale"] * params["scale"]["column_scale"]
    y = np.where(y > 0, y, params["activation"]["slope"] * y)
    if stride > 1:
        x = sum(x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
        x = convolve(x, params["downsample"]["kernel"], 1, 0)
        x = normalize(x, params["downsample_norm"], stats["downsample_norm"])
    return y + x


@pytest.mark.parametrize(
    ("gate", "stride", "binary"), [(True, 1, True), (True, 2, True), (False, 2, True), (True, 1, False)]
)
def test_the_half_block_equals_numpy(gate, stride, binary):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 4, 4)), jnp.float32)
    quantizers = BINARY if binary else dict.fromkeys(BINARY)
    block = HalfBlock(4 * stride, stride, **quantizers, gate=gate, reduction=2)
    variables = filled(lambda: block.init(jax.random.key(0), x, train=False, progress=0.0))
    found = jax.jit(lambda: block.apply(variables, x, train=False, progress=0.0))()
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    expected = half_block(np.asarray(x, np.float64), exact["params"], exact["batch_stats"], stride, binary)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prelu", [False, True])
def test_the_stems_activation(prelu):
    images = jnp.asarray(np.random.default_rng(1).normal(size=(1, 8, 8, 3)), jnp.float32)
    stem = ActivatedStem(4, kind="cifar", prelu=prelu)
    variables = filled(lambda: stem.init(jax.random.key(0), images, train=False))
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    params = exact["params"]
    y = convolve(np.asarray(images, np.float64), params["conv"]["kernel"], 1, 1)
    y = normalize(y, params["norm"], exact["batch_stats"]["norm"])
    y = np.where(y > 0, y, params["activation"]["slope"] * y if prelu else 0)
    found = jax.jit(lambda: stem.apply(variables, images, train=False))()
    np.testing.assert_allclose(found, y, rtol=1e-4, atol=1e-4)


def test_sizes_of_the_imagenet_stem():
    stem = ActivatedStem(4, kind="imagenet", prelu=True)
    images = jnp.zeros((1, 224, 224, 3))
    assert jax.eval_shape(lambda: stem.init_with_output(jax.random.key(0), images, train=True))[0].shape == (
        1,
        56,
        56,
        4,
    )


def test_what_the_network_hands_out():
    model = real_to_binary_resnet18(num_classes=3, width=4, stage_sizes=(1,), stem="cifar", reduction=2, **BINARY)
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 3)), jnp.float32)
    variables = filled(lambda: model.init(jax.random.key(0), images, train=False))
    logits, intermediates = jax.jit(lambda: model.apply(variables, images, train=False))()
    assert logits.shape == (2, 3) and logits.dtype == jnp.float32 and jnp.isfinite(logits).all()
    np.testing.assert_array_equal(intermediates["stage1"], intermediates["stage1_block1"])
    np.testing.assert_allclose(intermediates["features"], intermediates["stage1"].mean((1, 2)), rtol=1e-5)


def test_eight_blocks_to_match():
    model = real_to_binary_resnet18(num_classes=3, width=8, stem="cifar", **BINARY)
    images = jnp.zeros((1, 32, 32, 3))
    (_, intermediates), _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, train=False))
    blocks = {name: value.shape for name, value in intermediates.items() if "block" in name}
    sizes = {1: (32, 8), 2: (16, 16), 3: (8, 32), 4: (4, 64)}
    expected = {f"stage{s}_block{b}": (1, n, n, c) for s, (n, c) in sizes.items() for b in (1, 2)}
    assert blocks == expected


def test_errors():
    message = (
        r"`reduction` \(=8\) leaves a gate with no channels of the 4 inputs of layer 'stage1_block1a/gate'; "
        r"it must be at most 4"
    )
    with pytest.raises(ValueError, match=message):
        shapes_of(real_to_binary_resnet18(num_classes=3, width=4), 8)
    with pytest.raises(ValueError, match=r"`stem` \(='large'\) must be cifar \(small images\) or imagenet \(224x224\)"):
        real_to_binary_resnet18(num_classes=3, stem="large")

"""ReActNet-A: the paper's multiplications from shapes and strides, its block against numpy, shapes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.models.mobilenet import ReActBlock, reactnet_a
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

REACT = {
    "input_quantizer": ACTIVATION_QUANTIZERS["rsign"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["magnitude_aware"](),
}


def filled(init):
    """Random variables of the shapes that `init` makes: kernels of both signs, the rest positive."""
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape) if len(shape) == 4 and shape[2] > 1 else rng.uniform(0.3, 1.5, shape)
    return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf.shape), jnp.float32), jax.eval_shape(init))


def test_multiplications_of_the_paper():
    """4,816,896,000 binary and 11,862,016 real ones at 224x224: 0.87e8 operations at 64 binary ones each."""
    model = reactnet_a(num_classes=1000, stem="imagenet", **REACT)
    images = jnp.zeros((1, 224, 224, 3))
    (_, intermediates), variables = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), images, train=False)
    )
    sides = {"stem": 112, "head": 1}
    for stage, side in enumerate((112, 56, 28, 14, 7), start=1):
        assert intermediates[f"stage{stage}"].shape == (1, side, side, 32 * 2**stage)
        sides |= {f"stage{stage}_block{block}": side for block in range(1, 7)}
    binary = real = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        multiplications = leaf.size * sides.get(path[0].key, 0) ** 2
        binary += multiplications if path[-1].key == "latent_kernel" else 0
        real += multiplications if path[-1].key == "kernel" else 0
    assert (binary, real) == (4_816_896_000, 11_862_016)
    assert round((real + binary / 64) / 1e8, 2) == 0.87


def test_blocks_of_the_paper():
    channels = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    expected = [{(3, 3, a, a), (1, 1, a, b)} for a, b in itertools.pairwise(channels)]
    model = reactnet_a(num_classes=1000, stem="cifar", **REACT)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))["params"]
    blocks = [
        {params[f"stage{stage}_block{block}"][conv]["latent_kernel"].shape for conv in ("conv3x3", "conv1x1")}
        for stage, count in enumerate((1, 2, 2, 6, 2), start=1)
        for block in range(1, count + 1)
    ]
    assert blocks == expected


def convolve(x, kernel, stride, padding):
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = ((n - k) // stride + 1 for n, k in zip(x.shape[1:3], kernel.shape))
    taps = np.ndindex(*kernel.shape[:2])
    return sum(
        x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride] @ kernel[i, j]
        for i, j in taps
    )


def branch(x, kernel, shift, norm, stats, stride):
    """BN(conv(RSign(x)))"""
    codes = np.where(x - shift < 0, -1.0, 1.0)
    kernel = np.where(kernel < 0, -1.0, 1.0) * np.abs(kernel).mean((0, 1, 2), keepdims=True)
    y = convolve(codes, kernel, stride, kernel.shape[0] // 2)
    return norm["scale"] * (y - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) + norm["bias"]


def rprelu(y, params):
    y = y - params["input_shift"]
    return np.where(y > 0, y, params["slope"] * y) + params["output_shift"]


@pytest.mark.parametrize(("features", "stride"), [(3, 1), (6, 1), (6, 2)])
def test_the_block_equals_numpy(features, stride):
    """Where the channels double: two convolutions C -> C, each with its batch norm and shortcut, side by side."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 6, 3)), jnp.float32)
    block = ReActBlock(features, stride, **REACT)
    variables = filled(lambda: block.init(jax.random.key(0), x, train=False, progress=0.0))
    found = jax.jit(lambda: block.apply(variables, x, train=False, progress=0.0))()

    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    p, stats, x = exact["params"], exact["batch_stats"], np.asarray(x, np.float64)
    shortcut = x if stride == 1 else sum(x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    shift = p["conv3x3"]["input_quantizer"]["shift"]
    y = branch(x, p["conv3x3"]["latent_kernel"], shift, p["norm3x3"], stats["norm3x3"], stride)
    x = rprelu(y + shortcut, p["activation3x3"])
    halves = []
    for start in range(0, features, 3):
        norm, half_stats = (
            {name: vector[start : start + 3] for name, vector in tree["norm1x1"].items()} for tree in (p, stats)
        )
        kernel, shift = p["conv1x1"]["latent_kernel"][..., start : start + 3], p["conv1x1"]["input_quantizer"]["shift"]
        halves.append(branch(x, kernel, shift, norm, half_stats, 1) + x)
    expected = rprelu(np.concatenate(halves, axis=-1), p["activation1x1"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_shapes_of_a_small_network():
    model = reactnet_a(num_classes=3, width=4, stage_sizes=(1, 1), stem="cifar", **REACT)
    images = jnp.zeros((2, 8, 8, 3))
    (logits, intermediates), _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, train=False))
    assert logits.shape == (2, 3) and logits.dtype == jnp.float32
    shapes = {name: value.shape for name, value in intermediates.items()}
    assert shapes == {"stage1": (2, 8, 8, 8), "stage2": (2, 4, 4, 16), "features": (2, 16)}


def test_another_stem_is_refused():
    with pytest.raises(ValueError, match=r"`stem` \(='large'\) must be cifar \(small images\) or imagenet \(224x224\)"):
        reactnet_a(num_classes=3, stem="large")

"""CI-Net: bits by hand count, its block with edges against numpy, what edges change, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.models.cinet import cinet_resnet18
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

BINARY = {
    "input_quantizer": ACTIVATION_QUANTIZERS["ste_sign"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["binary"](),
}
SMALL = {"width": 4, "stage_sizes": (1, 1), "stem": "cifar"}
EDGES = {
    "stage1_block1/conv1": ((0, 1, 1), (1, 2, -1)),
    "stage2_block1/conv2": ((3, 0, 1),),
    "stage2_block1/downsample": ((2, 4, -1),),
}


def filled(init):
    """Random variables of the shapes that `init` makes: kernels of both signs, the rest positive."""
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape) if len(shape) in (2, 4) else rng.uniform(0.3, 1.5, shape)
    return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf.shape), jnp.float32), jax.eval_shape(init))


def shapes_of(model, size):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False))


def count(tree, leaf):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(value.size for path, value in leaves if path[-1].key == leaf)


@pytest.mark.parametrize(
    ("binary_downsampling", "latent", "kernel", "megabits"),
    [
        (True, 10_985_472 + 172_032, 9408 + 512_000, 27.875),
        (False, 10_985_472, 9408 + 512_000 + 172_032, 33.208),
    ],
)
def test_weight_bits_by_hand_count(binary_downsampling, latent, kernel, megabits):
    """Binary ResNet-18 with binary or real 1x1 convolutions: one bit a latent weight, 32 a real one and a bias."""
    model = cinet_resnet18(num_classes=1000, stem="imagenet", binary_downsampling=binary_downsampling, **BINARY)
    params = shapes_of(model, 224)["params"]
    assert (count(params, "latent_kernel"), count(params, "kernel")) == (latent, kernel)
    np.testing.assert_allclose((latent + 32 * (kernel + 1000)) / 1e6, megabits, atol=5e-4)


def convolve(x, kernel, stride):
    padding = kernel.shape[0] // 2
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = ((n - k) // stride + 1 for n, k in zip(x.shape[1:3], kernel.shape))
    taps = np.ndindex(*kernel.shape[:2])
    return sum(
        x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (columns - 1) + 1 : stride] @ kernel[i, j]
        for i, j in taps
    )


def normalize(x, params, stats):
    return params["scale"] * (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) + params["bias"]


def cinet(images, params, stats, edges, threshold, step):
    """Two stages of one block each; the last block without its outer norm."""
    signs = lambda x: np.where(x < 0, -1.0, 1.0)
    clip = lambda x: np.clip(x, -1, 1)

    def conv(block, name, x, stride):
        y = convolve(signs(x), signs(params[block][name]["latent_kernel"]), stride)
        out = y.copy()
        for source, target, level in edges.get(f"{block}/{name}", ()):
            out[..., target] += step * (level * (y[..., source] >= threshold) - (y[..., source] <= -threshold))
        return out

    norm = lambda block, name, x: normalize(x, params[block][name], stats[block][name])
    x = clip(norm("stem", "norm", convolve(images, params["stem"]["conv"]["kernel"], 1)))
    b1, b2 = "stage1_block1", "stage2_block1"
    y = conv(b1, "conv2", clip(norm(b1, "norm1", conv(b1, "conv1", x, 1))), 1)
    x = clip(norm(b1, "norm2", y + x))
    y = conv(b2, "conv2", clip(norm(b2, "norm1", conv(b2, "conv1", x, 2))), 1)
    x = y + norm(b2, "downsample_norm", conv(b2, "downsample", x, 2))
    features = clip(normalize(x.mean((1, 2)), params["norm"], stats["norm"]))
    return features @ params["head"]["kernel"] + params["head"]["bias"]


def test_logits_equal_numpy_and_edges_change_them():
    model = cinet_resnet18(
        num_classes=3, width=4, stage_sizes=(1, 1), stem="cifar", edges=EDGES, thresholds=(4,), step=3, **BINARY
    )
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 3)), jnp.float32)
    variables = filled(lambda: model.init(jax.random.key(0), images, train=False))
    # Features well inside hardtanh's linear part.
    variables["params"]["norm"]["scale"] = jnp.full(8, 0.02)
    variables["params"]["norm"]["bias"] = jnp.zeros(8)
    found = jax.jit(lambda: model.apply(variables, images, train=False))()[0]
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    network = lambda edges: cinet(np.asarray(images, np.float64), exact["params"], exact["batch_stats"], edges, 4, 3)
    np.testing.assert_allclose(found, network(EDGES), rtol=1e-3, atol=1e-3)
    for layer in EDGES:
        others = {name: edges for name, edges in EDGES.items() if name != layer}
        assert np.abs(network(others) - network(EDGES)).max() > 0.01, layer


def test_interactions_have_no_parameters():
    plain, edges = (shapes_of(cinet_resnet18(num_classes=3, **SMALL, edges=edges), 8) for edges in ({}, EDGES))
    assert jax.tree.structure(plain) == jax.tree.structure(edges)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        (
            {"stage1_block1/conv3": ()},
            r"`edges` \(='stage1_block1/conv3'\) is not known; did you mean",
        ),
        ({"stage1_block1/downsample": ()}, r"`edges` \(='stage1_block1/downsample'\) is not known"),
        (
            {"stage1_block1/conv2": ((0, 4, 1),)},
            r"`edges` \(with \(0, 4, 1\)\) must join channels from 0 to 3 in layer 'stage1_block1/conv2_interactions'",
        ),
        ({"stage1_block1/conv2": ((0, 1, 2),)}, r"must have levels from -1 to 1 in layer 'conv2_interactions'"),
    ],
)
def test_edge_errors(edges, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(cinet_resnet18(num_classes=3, width=4, stage_sizes=(1, 1), stem="cifar", edges=edges), 8)


def test_lists_of_edges_make_the_same_hashable_network():
    lists = {layer: [list(edge) for edge in edges] for layer, edges in EDGES.items()}
    networks = [cinet_resnet18(num_classes=3, edges=edges, **BINARY) for edges in (EDGES, lists)]
    assert networks[0] == networks[1] and len(set(networks)) == 1


def test_real_downsampling_takes_no_edges():
    with pytest.raises(ValueError, match=r"`edges` \(='stage2_block1/downsample'\) is not known"):
        cinet_resnet18(num_classes=3, binary_downsampling=False, edges={"stage2_block1/downsample": ()})

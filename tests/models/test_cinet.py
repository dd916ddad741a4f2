"""CI-Net: bits by hand count, its block with edges against numpy, what edges change, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import SIGNS, apply, count, exact, normal, random_variables, shapes_of, within
from numpy_layers import correlate, normalize, signs, stem_of

from bnn_jax.models.cinet import cinet_resnet18

SMALL = {"num_classes": 3, "width": 4, "stage_sizes": (1, 1), "stem": "cifar"}
EDGES = {
    "stage1_block1/conv1": ((0, 1, 1), (1, 2, -1)),
    "stage2_block1/conv2": ((3, 0, 1),),
    "stage2_block1/downsample": ((2, 4, -1),),
}


@pytest.mark.parametrize(
    ("binary_downsampling", "latent", "kernel", "megabits"),
    [
        (True, 10_985_472 + 172_032, 9408 + 512_000, 27.875),
        (False, 10_985_472, 9408 + 512_000 + 172_032, 33.208),
    ],
)
def test_weight_bits_by_hand_count(binary_downsampling, latent, kernel, megabits):
    """Binary ResNet-18 with binary or real 1x1 convolutions: one bit a latent weight, 32 a real one and a bias."""
    model = cinet_resnet18(num_classes=1000, binary_downsampling=binary_downsampling, **SIGNS)
    params = shapes_of(model, 224)["params"]
    assert (count(params, "latent_kernel"), count(params, "kernel")) == (latent, kernel)
    np.testing.assert_allclose((latent + 32 * (kernel + 1000)) / 1e6, megabits, atol=5e-4)


def cinet(images, variables, edges, threshold, step):
    """Two stages of one block each; the last block without its outer norm."""
    clip = lambda x: np.clip(x, -1, 1)

    def conv(block, name, x, stride=1):
        kernel = signs(variables["params"][block][name]["latent_kernel"])
        y = correlate(signs(x), kernel, stride, padding=kernel.shape[0] // 2)
        out = y.copy()
        for source, target, level in edges.get(f"{block}/{name}", ()):
            out[..., target] += step * (level * (y[..., source] >= threshold) - (y[..., source] <= -threshold))
        return out

    b1, b2 = "stage1_block1", "stage2_block1"
    first, second = within(variables, b1), within(variables, b2)
    x = clip(stem_of(variables, images))
    y = conv(b1, "conv2", clip(normalize(conv(b1, "conv1", x), first, "norm1")))
    x = clip(normalize(y + x, first, "norm2"))
    y = conv(b2, "conv2", clip(normalize(conv(b2, "conv1", x, 2), second, "norm1")))
    x = y + normalize(conv(b2, "downsample", x, 2), second, "downsample_norm")
    features = clip(normalize(x.mean((1, 2)), variables, "norm"))
    return features @ variables["params"]["head"]["kernel"] + variables["params"]["head"]["bias"]


def test_logits_equal_numpy_and_edges_change_them():
    model = cinet_resnet18(**SMALL, edges=EDGES, thresholds=(4,), step=3, **SIGNS)
    images = normal(2, 8, 8, 3)
    variables = random_variables(model, images)
    # Features well inside hardtanh's linear part.
    variables["params"]["norm"] = {"scale": jnp.full(8, 0.1), "bias": jnp.zeros(8)}
    network = lambda edges: cinet(exact(images), exact(variables), edges, 4, 3)
    np.testing.assert_allclose(apply(model, variables, images)[0], network(EDGES), rtol=1e-3, atol=1e-3)
    for layer in EDGES:
        others = {name: edges for name, edges in EDGES.items() if name != layer}
        assert np.abs(network(others) - network(EDGES)).max() > 0.01, layer


def test_interactions_have_no_parameters():
    plain, edges = (shapes_of(cinet_resnet18(**SMALL, edges=edges), 8) for edges in ({}, EDGES))
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
            r"`edges` \(=\(0, 4, 1\)\) must join channels from 0 to 3 in layer 'stage1_block1/conv2_interactions'",
        ),
        (
            {"stage1_block1/conv2": ((0, 1, 2),)},
            r"must have levels from -1 to 1 in layer 'stage1_block1/conv2_interactions'",
        ),
    ],
)
def test_edge_errors(edges, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(cinet_resnet18(**SMALL, edges=edges), 8)


def test_lists_of_edges_make_the_same_hashable_network():
    lists = {layer: [list(edge) for edge in edges] for layer, edges in EDGES.items()}
    networks = [cinet_resnet18(num_classes=3, edges=edges, **SIGNS) for edges in (EDGES, lists)]
    assert networks[0] == networks[1] and len(set(networks)) == 1


def test_real_downsampling_takes_no_edges():
    with pytest.raises(ValueError, match=r"`edges` \(='stage2_block1/downsample'\) is not known"):
        cinet_resnet18(num_classes=3, binary_downsampling=False, edges={"stage2_block1/downsample": ()})

"""ReActNet-A: the paper's multiplications from shapes and strides, its block against numpy."""

import itertools

import numpy as np
import pytest
from networks import REACT, apply, conv_of, exact, normal, outputs_of, paths_of, random_variables, shapes_of
from numpy_layers import correlate, magnitude_aware, means_of_2x2, normalize, rprelu, signs

from bnn_jax.models.mobilenet import ReActBlock, reactnet_a


def test_multiplications_of_the_paper():
    """4,816,896,000 binary and 11,862,016 real ones at 224x224: 0.87e8 operations at 64 binary ones each."""
    model = reactnet_a(num_classes=1000, **REACT)
    sides = {"stem": 112, "head": 1}
    _, intermediates = outputs_of(model, 224)
    for stage, side in enumerate((112, 56, 28, 14, 7), start=1):
        assert intermediates[f"stage{stage}"].shape == (1, side, side, 32 * 2**stage)
        sides |= {f"stage{stage}_block{block}": side for block in range(1, 7)}
    multiplications = {"latent_kernel": 0, "kernel": 0}
    for path, leaf in paths_of(shapes_of(model, 224)["params"]).items():
        layer, *_, name = path.split("/")
        if name in multiplications:
            multiplications[name] += leaf.size * sides[layer] ** 2
    assert multiplications == {"latent_kernel": 4_816_896_000, "kernel": 11_862_016}
    assert round((11_862_016 + 4_816_896_000 / 64) / 1e8, 2) == 0.87


def test_blocks_of_the_paper():
    channels = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    expected = [{(3, 3, a, a), (1, 1, a, b)} for a, b in itertools.pairwise(channels)]
    params = shapes_of(reactnet_a(num_classes=1000, stem="cifar", **REACT), 32)["params"]
    blocks = [
        {params[f"stage{stage}_block{block}"][conv]["latent_kernel"].shape for conv in ("conv3x3", "conv1x1")}
        for stage, count in enumerate((1, 2, 2, 6, 2), start=1)
        for block in range(1, count + 1)
    ]
    assert blocks == expected


@pytest.mark.parametrize(("features", "stride"), [(3, 1), (6, 1), (6, 2)])
def test_the_block_equals_numpy(features, stride):
    """Where the channels double: two convolutions C -> C, each with its batch norm and shortcut, side by side."""
    x, block = normal(2, 4, 6, 3), ReActBlock(features, stride, conv_of(**REACT))
    variables = random_variables(block, x, progress=0.0)
    values, expected = exact(variables), exact(x)

    def branch(size, x, stride=1):
        """BN(conv(RSign(x)))"""
        layer = values["params"][f"conv{size}x{size}"]
        codes, kernel = signs(x - layer["input_quantizer"]["shift"]), magnitude_aware(layer["latent_kernel"])
        return normalize(correlate(codes, kernel, stride, padding=size // 2), values, f"norm{size}x{size}")

    shortcut = expected if stride == 1 else means_of_2x2(expected)
    expected = rprelu(branch(3, expected, stride) + shortcut, values["params"]["activation3x3"])
    doubled = np.concatenate([expected] * (features // 3), axis=-1)
    expected = rprelu(branch(1, expected) + doubled, values["params"]["activation1x1"])
    np.testing.assert_allclose(apply(block, variables, x, progress=0.0), expected, rtol=1e-4, atol=1e-4)

"""IGP-ResNets: published storage and convolutions a stage, the fractal join against numpy and in closed form."""

import numpy as np
import pytest
from networks import (
    SIGNS,
    apply,
    conv_of,
    count,
    exact,
    normal,
    of_layers,
    outputs_of,
    random_variables,
    replaced,
    shapes_of,
    within,
    without_gradient,
)
from numpy_layers import correlate, normalize, signs

from bnn_jax.models.fractal import FractalBlock, IGPResNet, igp_resnet21, igp_resnet37, igp_resnet41, igp_resnet69


@pytest.mark.parametrize(
    ("network", "convolutions", "with_bias", "without_bias"),
    [
        (igp_resnet21, (7, 7, 7, 7), "32.667", "32.635"),
        (igp_resnet37, (15, 15, 15, 15), "32.270", "32.238"),
        (igp_resnet41, (14, 14, 21, 14), "42.641", "42.609"),
        (igp_resnet69, (31, 31, 31, 31), "32.196", "32.164"),
    ],
)
@pytest.mark.full
def test_storage_and_convolutions(network, convolutions, with_bias, without_bias):
    """Zhu et al. print 32.2 Mbit for IGP-ResNet37(41) and 42.6 for IGP-ResNet41(48), without the dense layer's bias."""
    params = shapes_of(network(num_classes=1000, **SIGNS), 224)["params"]
    layers = of_layers(params, "latent_kernel")
    assert tuple(sum(path.startswith(f"stage{stage}_") for path in layers) for stage in (1, 2, 3, 4)) == convolutions
    bits = 32 * count(params, "kernel") + count(params, "latent_kernel")
    assert f"{(bits + 32 * 1000) / 1e6:.3f}" == with_bias
    assert f"{bits / 1e6:.3f}" == without_bias


def test_full_precision_layers():
    params = shapes_of(igp_resnet21(num_classes=10, stem="cifar", **SIGNS), 32)["params"]
    assert set(of_layers(params, "kernel")) == {"stem", "head", "stage2_widen", "stage3_widen", "stage4_widen"}


def test_three_stages_for_small_images():
    model = IGPResNet(num_classes=10, width=6, columns=(2, 1, 3), depths=(4, 3, 4), **SIGNS)
    logits, intermediates = outputs_of(model, 32)
    shapes = {name: value.shape for name, value in intermediates.items()}
    assert shapes == {"stage1": (1, 32, 32, 6), "stage2": (1, 16, 16, 12), "stage3": (1, 8, 8, 24), "features": (1, 24)}
    assert logits.shape == (1, 10)


INPUTS = normal(2, 5, 5, 3, seed=0)


@pytest.mark.parametrize(
    ("join", "columns", "gain"), [("mean", 1, 1), ("mean", 3, 1), ("sum", 1, 1), ("sum", 2, 2), ("sum", 3, 5)]
)
def test_the_identity_path_has_the_gain_of_the_join(join, columns, gain):
    """With batch norms of scale and bias zero only the shortcuts are left."""
    block = FractalBlock(columns, join, conv_of(**SIGNS))
    zeroed = replaced(random_variables(block, INPUTS), lambda path: path.endswith(("scale", "bias")), 0.0)
    np.testing.assert_allclose(block.apply(zeroed, INPUTS, train=False), gain * INPUTS, rtol=1e-6)


@pytest.mark.parametrize(("join", "weight"), [("mean", 0.5), ("sum", 1.0)])
def test_three_columns_equal_their_composition(join, weight):
    block = FractalBlock(3, join, conv_of(**SIGNS))
    variables = random_variables(block, INPUTS, seed=1)
    values = exact(variables)

    def unit(x, *path):
        """x + BN(conv3x3(sign x)) with the parameters found under `path`."""
        own = within(values, *path)
        return x + normalize(correlate(signs(x), signs(own["params"]["conv"]["latent_kernel"]), padding=1), own, "norm")

    def two_columns(y, name):
        return weight * (unit(unit(y, name, "first"), name, "second") + unit(y, name))

    x = exact(INPUTS)
    expected = weight * (two_columns(two_columns(x, "first"), "second") + unit(x))
    np.testing.assert_allclose(apply(block, variables, INPUTS), expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_reaches_every_parameter():
    """But the last shifts of the first stage, which the batch norm of the second takes out again."""
    model = IGPResNet(num_classes=5, width=4, columns=(2, 1), depths=(2, 1), **SIGNS)
    without = {"stage1_block1/norm/bias", "stage1_block1/second/norm/bias"}
    assert without_gradient(model, normal(4, 8, 8, 3, seed=3)) == without


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"join": "max"}, r"`join` \(='max'\) of IGPResNet must be mean or sum; mean keeps shortcuts at gain 1"),
        ({"columns": ()}, r"`columns` \(=\(\)\) of IGPResNet must be at least 1 for each of one or more stages"),
        ({"columns": (3, 0)}, r"`columns` \(=\(3, 0\)\) of IGPResNet must be at least 1"),
        ({"columns": (3,), "depths": (4, 4)}, r"`depths` \(=\(4, 4\)\) of IGPResNet must give one depth for each of"),
        (
            {"columns": (3, 2), "depths": (6, 0)},
            r"`depths` \(=\(6, 0\)\) of IGPResNet must be positive multiples of 2\^\(columns - 1\), here \(4, 2\); "
            r"take \(8, 2\)",
        ),
    ],
)
def test_networks_that_cannot_be_built(options, message):
    with pytest.raises(ValueError, match=message):
        IGPResNet(num_classes=10, **options)


def test_images_too_small():
    message = r"`images` \(of 4x4\) are too small for 4 stages of IGPResNet with the cifar stem; use larger ones or"
    with pytest.raises(ValueError, match=message):
        shapes_of(igp_resnet21(num_classes=10, stem="cifar"), 4)

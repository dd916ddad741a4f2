"""Bi-Real Net and its variants: sizes by hand count; blocks against numpy; what a batch norm of zero leaves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import (
    BI_REAL,
    apply,
    conv_of,
    count,
    normal,
    number_of,
    of_layers,
    random_variables,
    replaced,
    shapes_of,
    within,
    without_gradient,
)
from numpy_layers import correlate, magnitude_aware, normalize, projected, signs, stem_of

from bnn_jax.models.birealnet import (
    REAL_ACTIVATIONS,
    BiRealBlock,
    BiRealNet,
    bireal18,
    bireal34,
    bireal_resnet20,
    ebireal18,
    ebireal34,
    ftbnn_resnet18,
    leaky_clip,
)

TINY = {"num_classes": 3, "width": 4, "stem": "cifar"}
DOWNSAMPLING = 64 * 128 + 128 * 256 + 256 * 512
ENDS = 7 * 7 * 3 * 64 + 512 * 1000
"""The kernels of stem and classifier."""


@pytest.mark.parametrize(
    ("constructor", "layers", "binary", "megabits"),
    [
        (bireal18, 16, 10_985_472, 33.2),
        (ebireal18, 16, 10_985_472, 33.2),
        (ftbnn_resnet18, 16, 10_985_472, 33.2),
        (bireal34, 32, 21_086_208, 43.3),
        (ebireal34, 32, 21_086_208, 43.3),
    ],
)
def test_binary_layers_and_storage_of_the_published_tables(constructor, layers, binary, megabits):
    """Storage: 32 bits a real weight or bias of the classifier, 1 a binary weight; the rest is not counted."""
    params = shapes_of(constructor(num_classes=1000, **BI_REAL), 224)["params"]
    latent, real = count(params, "latent_kernel"), count(params, "kernel")
    assert (number_of(params, "latent_kernel"), latent) == (layers, binary)
    assert (number_of(params, "kernel"), real) == (5, ENDS + DOWNSAMPLING)
    assert round((32 * (real + 1000) + latent) / 1e6, 1) == megabits


def test_resnet20_has_nineteen_convolutions():
    """Stages of 6 layers, the first of each but the first stage doubling the width; kernels 3x3."""
    params = shapes_of(bireal_resnet20(num_classes=10, **BI_REAL), 32)["params"]
    assert number_of(params, "latent_kernel") == 18
    assert count(params, "latent_kernel") == 13_824 + 50_688 + 202_752
    real = sorted(np.prod(shape) for shape in of_layers(params, "kernel").values())
    assert real == sorted([3 * 3 * 3 * 16, 16 * 32, 32 * 64, 64 * 10])


@pytest.mark.parametrize(("constructor", "slopes"), [(ftbnn_resnet18, 3840), (bireal18, 0)])
def test_ftbnn_learns_two_slopes_a_channel(constructor, slopes):
    """4 (64 + 128 + 256 + 512) channels follow the convolutions."""
    params = shapes_of(constructor(num_classes=1000, **BI_REAL), 224)["params"]
    assert count(params, "slope") == count(params, "positive_slope") == slopes


def numpy_block(variables, x, stride, *, outer=False):
    """The units in numpy: magnitude-aware weights, binary inputs, the two slopes where there are any."""
    params = variables["params"]
    shortcut = projected(x, variables, stride)
    for unit in (1, 2):
        if f"conv{unit}" not in params:
            break
        kernel = magnitude_aware(params[f"conv{unit}"]["latent_kernel"])
        y = correlate(signs(x), kernel, stride if unit == 1 else 1, padding=1)
        x = normalize(y, variables, f"norm{unit}") + (shortcut if unit == 1 else x)
        if f"activation{unit}" in params:
            slopes = params[f"activation{unit}"]
            x = x * np.where(x > 0, slopes["positive_slope"], slopes["slope"])
    return x + shortcut if outer else x


@pytest.mark.parametrize(
    ("features", "stride", "units", "options"),
    [
        (3, 1, 1, {}),
        (6, 2, 2, {}),
        (3, 1, 2, {"trainable_slopes": True}),
        (6, 2, 1, {"trainable_slopes": True}),
        (6, 2, 2, {"outer_shortcut": True}),
    ],
)
def test_a_block_equals_numpy(features, stride, units, options):
    """z = u1(x), y = u2(z) [+ S(x)]."""
    options = {"outer_shortcut": False, "trainable_slopes": False} | options
    block = BiRealBlock(features, stride, conv_of(**BI_REAL), units, lambda x: x, **options)
    x = normal(2, 5, 6, 3)
    variables = random_variables(block, x, progress=1.0)
    expected = numpy_block(variables, np.asarray(x), stride, outer=options["outer_shortcut"])
    np.testing.assert_allclose(apply(block, variables, x, progress=1.0), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stages", [(3, 2), (2, 2)])
def test_stages_are_blocks_of_two_units(stages):
    """The last block of an odd stage has one; the outer shortcuts go around the pairs of even stages."""
    model = BiRealNet(**TINY, **BI_REAL, stage_sizes=stages, outer_shortcut=stages == (2, 2))
    images = normal(2, 8, 8, 3, seed=2)
    variables = random_variables(model, images)
    found = apply(model, variables, images)[1]
    x = stem_of(variables, images)
    for stage, units in enumerate(stages, start=1):
        for block in range(1, -(-units // 2) + 1):
            values = within(variables, f"stage{stage}_block{block}")
            x = numpy_block(values, x, stage if block == 1 else 1, outer=model.outer_shortcut)
        np.testing.assert_allclose(found[f"stage{stage}"], x, rtol=1e-3, atol=1e-3)
        x = np.asarray(found[f"stage{stage}"])


def test_zero_gain_makes_every_unit_its_shortcut():
    model = BiRealNet(**TINY, **BI_REAL, stage_sizes=(3, 2))
    images = normal(2, 8, 8, 3, seed=3)
    variables = random_variables(model, images)
    variables = replaced(variables, lambda path: path.split("/")[1] in ("norm1", "norm2"), 0.0)
    found = apply(model, variables, images)[1]
    x = stem_of(variables, images)
    np.testing.assert_allclose(found["stage1"], x, rtol=1e-4, atol=1e-4)
    assert x.min() < 0
    expected = projected(x, within(variables, "stage2_block1"), 2)
    np.testing.assert_allclose(found["stage2"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("activation", "values"),
    [
        ("relu", [0, 0, 0, 0.5, 1, 3]),
        ("leaky_clip", [-1.2, -1, -0.5, 0.5, 1, 1.2]),
        ("clip", [-1, -1, -0.5, 0.5, 1, 1]),
    ],
)
def test_real_inputs_go_through_the_chosen_activation(activation, values):
    """A kernel that is 1 at its centre hands on what the convolution is given; the shortcut's share is taken off."""
    inputs = jnp.array([-3, -1, -0.5, 0.5, 1, 3], jnp.float32).reshape(1, 1, 6, 1)
    model = BiRealNet(num_classes=2, activation=activation)
    block = model.block(features=1, stride=1, units=1, conv=conv_of(), name=None)
    assert block.activation is REAL_ACTIVATIONS[activation]
    variables = {
        "params": {
            "conv1": {"kernel": jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)},
            "norm1": {"scale": jnp.ones(1), "bias": jnp.zeros(1)},
        },
        "batch_stats": {"norm1": {"mean": jnp.zeros(1), "var": jnp.ones(1)}},
    }
    y = block.apply(variables, inputs, train=False, progress=1.0)
    np.testing.assert_allclose((y - inputs).ravel(), values, rtol=1e-4)


def test_with_a_quantizer_there_is_no_activation():
    model = BiRealNet(num_classes=2, activation="clip", **BI_REAL)
    block = model.block(features=1, stride=1, units=1, conv=conv_of(), name=None)
    assert block.activation(-3.0) == -3.0 and block.activation is not nn.hard_tanh


def test_the_slopes_of_leaky_clip():
    x = jnp.array([-3, -1, 0.5, 1, 3], jnp.float32)
    np.testing.assert_allclose(jax.grad(lambda x: leaky_clip(x).sum())(x), [0.1, 1, 1, 1, 0.1], rtol=1e-6)


def test_training_with_real_inputs_reaches_every_parameter():
    """With binary ones the table of networks is trained, where every parameter of every network moves."""
    options = {"stage_sizes": (1, 1), "trainable_slopes": True, "kernel_quantizer": BI_REAL["kernel_quantizer"]}
    assert without_gradient(BiRealNet(**TINY | options), normal(2, 8, 8, 3, seed=4)) == set()


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (
            r"`stage_sizes` \(=\(4, 3\)\) of BiRealNet must be even with `outer_shortcut`",
            {"stage_sizes": (4, 3), "outer_shortcut": True},
        ),
        (r"`BiRealNet.activation` \(='leaky'\) is not known; did you mean 'leaky_clip'\?", {"activation": "leaky"}),
    ],
)
def test_refusals(text, arguments):
    with pytest.raises(ValueError, match=text):
        BiRealNet(**{"num_classes": 10} | arguments)

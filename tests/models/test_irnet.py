"""IR-Net's residual networks: published sizes by hand count; blocks against numpy; what a norm of zero leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import (
    REAL,
    SIGNS,
    apply,
    conv_of,
    count,
    normal,
    number_of,
    of_layers,
    random_variables,
    replaced,
    shapes_of,
    without_gradient,
)
from numpy_layers import correlate, means_of_2x2, normalize, signs, stem_of

from bnn_jax.models.irnet import IRBlock, IRNet, irnet_resnet18, irnet_resnet20, irnet_resnet34
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

IR = {"input_quantizer": ACTIVATION_QUANTIZERS["ede_sign"](), "kernel_quantizer": WEIGHT_QUANTIZERS["libra_pb"]()}


def test_resnet20_has_eighteen_binary_layers_and_shortcuts_without_weights():
    params = shapes_of(irnet_resnet20(num_classes=10, **IR), 32)["params"]
    assert number_of(params, "latent_kernel") == 18
    assert count(params, "latent_kernel") == 13_824 + 50_688 + 202_752
    assert of_layers(params, "kernel") == {"stem": (3, 3, 3, 16), "head": (64, 10)}
    assert params["norm"]["scale"].shape == (64,)


@pytest.mark.parametrize(
    ("constructor", "layers", "binary", "bits"),
    [(irnet_resnet18, 16, 10_985_472, 33_175_552), (irnet_resnet34, 32, 21_086_208, 43_276_288)],
)
def test_large_networks_have_the_weights_of_the_published_table(constructor, layers, binary, bits):
    """Stem 9408, shortcuts 172,032 and classifier 512,000 weights of 32 bits; the table's 33.1 Mbit are cut off."""
    params = shapes_of(constructor(num_classes=1000, **IR), 224)["params"]
    latent, real = count(params, "latent_kernel"), count(params, "kernel")
    assert (number_of(params, "latent_kernel"), latent) == (layers, binary)
    assert real == 9_408 + 172_032 + 512_000
    assert 32 * real + latent == bits


@pytest.mark.parametrize(
    ("stride", "features", "units", "shortcut", "quantizers"),
    [
        (1, 3, 1, "pad", SIGNS),
        (2, 6, 2, "pad", SIGNS),
        (2, 6, 1, "conv", SIGNS),
        (2, 6, 2, "conv", REAL),
        (2, 6, 2, "pool", SIGNS),
    ],
)
def test_a_block_equals_numpy(stride, features, units, shortcut, quantizers):
    block = IRBlock(features, stride, conv_of(**quantizers), units, shortcut)
    x = normal(2, 5, 6, 3)
    variables = random_variables(block, x, progress=1.0)
    params, expected = variables["params"], np.asarray(x)
    for unit in range(1, units + 1):
        (kernel,) = params[f"conv{unit}"].values()
        inputs, kernel = (expected, kernel) if quantizers is REAL else (signs(expected), signs(kernel))
        y = normalize(correlate(inputs, kernel, stride, padding=1), variables, f"norm{unit}")
        if unit == 1:
            expected = means_of_2x2(expected) if shortcut == "pool" else expected[:, ::stride, ::stride]
            if shortcut == "conv":
                expected = normalize(expected @ params["downsample"]["kernel"][0, 0], variables, "downsample_norm")
            else:
                front = (features - 3) // 2 if shortcut == "pool" else 0
                expected = np.pad(expected, ((0, 0), (0, 0), (0, 0), (front, features - 3 - front)))
        expected, stride = np.clip(y + expected, -1, 1), 1
    np.testing.assert_allclose(apply(block, variables, x, progress=1.0), expected, rtol=1e-4, atol=1e-4)
    assert 0.05 < (np.abs(expected) == 1).mean() < 0.95


def test_zero_gain_makes_every_unit_its_shortcut():
    model = IRNet(num_classes=3, width=4, stage_sizes=(2, 2), **IR)
    images = normal(2, 8, 8, 3, seed=2)
    variables = random_variables(model, images)
    variables = replaced(variables, lambda path: path.split("/")[1] in ("norm1", "norm2"), 0.0)
    found = apply(model, variables, images)[1]
    x = stem_of(variables, images)
    x = np.clip(x, -1, 1)
    np.testing.assert_allclose(found["stage1"], x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["stage2"][..., :4], x[:, ::2, ::2], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["stage2"][..., 4:], 0)
    assert np.abs(x).max() == 1


def test_the_first_layers_inputs_have_both_signs():
    """The stem ends without ReLU: of the images and of their negatives the first unit makes different things."""
    model = IRNet(num_classes=3, width=4, stage_sizes=(1,), **SIGNS)
    images = normal(2, 8, 8, 3, seed=3)
    variables = random_variables(model, images)
    variables["batch_stats"]["stem_norm"] = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    variables["params"]["stem_norm"] = {"scale": jnp.full(4, 1e-3), "bias": jnp.zeros(4)}
    both = jax.jit(lambda: [model.apply(variables, sign * images, train=False)[1]["stage1"] for sign in (1, -1)])()
    # The stem's outputs are far below 1, so all that can differ by as much is the binary convolution.
    assert float(jnp.abs(both[0] - both[1]).max()) > 0.5


def test_training_in_full_precision_reaches_every_parameter():
    """With binary layers the table of networks is trained, where every parameter of every network moves."""
    model = IRNet(num_classes=3, width=4, stage_sizes=(1, 1), **REAL)
    assert without_gradient(model, normal(4, 8, 8, 3, seed=4)) == set()


def test_another_shortcut_is_refused():
    with pytest.raises(ValueError, match=r"`IRNet.shortcut` \(='project'\) is not known; .* one of: conv, pad, pool"):
        IRNet(num_classes=10, shortcut="project")

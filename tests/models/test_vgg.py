"""VGG-like networks: weights of the papers by hand count, order and clipping against numpy, a gradient everywhere."""

import math

import numpy as np
import pytest
from networks import SIGNS, apply, exact, normal, of_layers, random_variables, shapes_of
from numpy_layers import correlate, maxima, normalize, signs

from bnn_jax.models.vgg import bnn_plus_vgg, vgg_small
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

IR_NET = {
    "input_quantizer": ACTIVATION_QUANTIZERS["ste_sign"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["libra_pb"](estimator="ste_sign"),
}
BNN_PLUS = {
    "input_quantizer": ACTIVATION_QUANTIZERS["swish_sign"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["bnn_plus"](initial="percentile75"),
}


def sizes_of(params, leaf):
    return {layer: math.prod(shape) for layer, shape in of_layers(params, leaf).items()}


def test_vgg_small():
    params = shapes_of(vgg_small(num_classes=10, **IR_NET), 32)["params"]
    assert sizes_of(params, "latent_kernel") == {
        "conv2": 147_456,
        "conv3": 294_912,
        "conv4": 589_824,
        "conv5": 1_179_648,
        "conv6": 2_359_296,
    }
    assert sizes_of(params, "kernel") == {"conv1": 3_456, "head": 8192 * 10}
    assert set(params["head"]) == {"kernel", "bias"}


def test_the_vgg_of_bnn_plus_has_36_127_488_weights():
    """All weights, first and last layer included; without them 36,110,336 are binary, with one scale a filter."""
    params = shapes_of(bnn_plus_vgg(num_classes=10, **BNN_PLUS), 32)["params"]
    binary, real = sizes_of(params, "latent_kernel"), sizes_of(params, "kernel")
    assert real == {"conv1": 6_912, "head": 10_240}
    assert binary["dense1"] == 4 * 4 * 1024 * 1024
    assert sum(binary.values()) == 36_127_488 - 6_912 - 10_240 == 36_110_336
    assert [params[f"conv{number}"]["latent_kernel"].shape[-1] for number in range(2, 7)] == [256, 512, 512, 1024, 1024]
    assert params["conv2"]["kernel_quantizer"]["scale"].shape == (1, 1, 1, 256)
    assert params["dense2"]["kernel_quantizer"]["scale"].shape == (1, 1024)
    assert set(params["head"]) == {"kernel"}
    assert "head_norm" not in params


@pytest.mark.parametrize("hardtanh", [True, False])
@pytest.mark.parametrize("binary", [True, False])
def test_the_network_equals_numpy(hardtanh, binary):
    """conv -> pool -> BN -> hardtanh, where inputs stay real always; the first and the last layer real."""
    quantizers = SIGNS if binary else {}
    model = vgg_small(num_classes=3, width=2, stage_sizes=(2,), hardtanh=hardtanh, **quantizers)
    images = normal(2, 6, 6, 3)
    variables = random_variables(model, images)
    logits, intermediates = apply(model, variables, images)
    values, clip = exact(variables), lambda x: np.clip(x, -1, 1)
    params = values["params"]
    x = normalize(correlate(images, params["conv1"]["kernel"], padding=1), values, "norm1")
    (kernel,) = params["conv2"].values()
    x = correlate(signs(x) if binary else clip(x), signs(kernel) if binary else kernel, padding=1)
    x = normalize(maxima(x), values, "norm2")
    stage = clip(x) if hardtanh or not binary else x
    np.testing.assert_allclose(intermediates["stage1"], stage, rtol=1e-4, atol=1e-4)
    features = clip(x).reshape(2, -1)
    np.testing.assert_allclose(intermediates["features"], features, rtol=1e-4, atol=1e-4)
    expected = features @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_images_too_small():
    message = r"`images` \(of 4x32\) are too small for a VGG with 3 pools; they need 8x8 pixels"
    with pytest.raises(ValueError, match=message):
        shapes_of(vgg_small(num_classes=10), (4, 32, 3))

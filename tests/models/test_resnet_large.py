"""ResNet-18 and -34: published sizes by hand count; blocks against numpy; what a batch norm of zero leaves."""

import jax
import numpy as np
import pytest
from networks import (
    SIGNS,
    XNOR,
    apply,
    conv_of,
    count,
    normal,
    paths_of,
    random_variables,
    replaced,
    shapes_of,
    without_gradient,
)
from numpy_layers import correlate, means_of_2x2, normalize, relu, signs, stem_of

from bnn_jax.models.network import identity
from bnn_jax.models.resnet_large import (
    PostActivationBlock,
    PostActivationResNet,
    PreActivationBlock,
    resnet18,
    resnet34,
    tbn_resnet18,
    tbn_resnet34,
    xnor_resnet18,
    xnor_resnet34,
)
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

TBN = {
    "input_quantizer": ACTIVATION_QUANTIZERS["tbn"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["magnitude_aware"](estimator="identity_sign"),
}
TINY = {"num_classes": 3, "stage_sizes": (1, 1), "width": 4, "stem": "cifar"}


def imagenet(constructor, **arguments):
    return shapes_of(constructor(num_classes=1000, **arguments), 224)["params"]


@pytest.mark.parametrize(("constructor", "parameters"), [(resnet18, 11_689_512), (resnet34, 21_797_672)])
def test_full_precision_has_the_parameters_of_he_et_al(constructor, parameters):
    """Batch norms and biases included; times 32 the 374.064 and 697.526 Mbit of the tables."""
    assert count(imagenet(constructor)) == parameters


BINARY_3X3 = {18: 10_985_472, 34: 21_086_208}
DOWNSAMPLING = 64 * 128 + 128 * 256 + 256 * 512
ENDS = 7 * 7 * 3 * 64 + 512 * 1000
"""The kernels of stem and classifier."""


@pytest.mark.parametrize(
    ("constructor", "arguments", "binary", "real"),
    [
        (resnet18, SIGNS, BINARY_3X3[18], ENDS + DOWNSAMPLING),
        (resnet18, SIGNS | {"binary_downsampling": True}, BINARY_3X3[18] + DOWNSAMPLING, ENDS),
        (xnor_resnet18, XNOR, BINARY_3X3[18] + DOWNSAMPLING, ENDS),
        (xnor_resnet34, XNOR, BINARY_3X3[34] + DOWNSAMPLING, ENDS),
        (tbn_resnet18, TBN, BINARY_3X3[18], ENDS + DOWNSAMPLING),
        (tbn_resnet34, TBN, BINARY_3X3[34], ENDS + DOWNSAMPLING),
        (tbn_resnet34, TBN | {"binary_downsampling": True}, BINARY_3X3[34] + DOWNSAMPLING, ENDS),
    ],
)
def test_weights_of_the_quantized_networks(constructor, arguments, binary, real):
    params = imagenet(constructor, **arguments)
    assert (count(params, "latent_kernel"), count(params, "kernel")) == (binary, real)


def learned_scales(params):
    """Elements of the learned scales: a batch norm's gain is called scale as well."""
    return sum(leaf.size for path, leaf in paths_of(params).items() if "_scale/" in path)


@pytest.mark.parametrize(
    ("megabits", "constructor", "arguments", "scales"),
    [
        (27.9, xnor_resnet18, {}, 0),
        (28.0, xnor_resnet18, {"output_scale_case": 1}, 4736),
        (27.9, tbn_resnet18, {"binary_downsampling": True}, 0),
        (38.0, tbn_resnet34, {"binary_downsampling": True}, 0),
    ],
)
def test_storage_of_the_published_tables(megabits, constructor, arguments, scales):
    """32 bits a real weight, bias of the classifier or learned scale, 1 a binary weight; batch norm not counted."""
    params = imagenet(constructor, **SIGNS, **arguments)
    assert learned_scales(params) == scales
    bits = 32 * (count(params, "kernel") + 1000 + scales) + count(params, "latent_kernel")
    assert round(bits / 1e6, 1) == megabits


def test_learned_scales_of_case_four():
    """features + height + width for each of the 19 quantized convolutions of ResNet-18."""
    sizes = [(64, 56)] * 4 + [(128, 28)] * 5 + [(256, 14)] * 5 + [(512, 7)] * 5
    params = imagenet(xnor_resnet18, output_scale_case=4, **SIGNS)
    assert learned_scales(params) == sum(c + 2 * side for c, side in sizes)


IMAGES = normal(2, 5, 6, 3)


def test_a_post_activation_block_equals_numpy():
    block = PostActivationBlock(4, 2, conv_of(), jax.nn.relu, identity, binary_downsampling=False)
    values = random_variables(block, IMAGES, progress=1.0)
    kernel = {name: values["params"][name]["kernel"] for name in ("conv1", "conv2", "downsample")}
    y = relu(normalize(correlate(IMAGES, kernel["conv1"], 2, padding=1), values, "norm1"))
    y = normalize(correlate(y, kernel["conv2"], padding=1), values, "norm2")
    shortcut = normalize(correlate(IMAGES, kernel["downsample"], 2), values, "downsample_norm")
    found = apply(block, values, IMAGES, progress=1.0)
    np.testing.assert_allclose(found, relu(y + shortcut), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("binary_downsampling", [False, True])
def test_a_pre_activation_block_equals_numpy(binary_downsampling):
    case = 1 if binary_downsampling else None
    block = PreActivationBlock(4, 2, conv_of(**SIGNS), lambda x: x, binary_downsampling, output_scale_case=case)
    values = random_variables(block, IMAGES, progress=1.0)

    def layer(name, inputs, stride, padding):
        y = correlate(signs(inputs), signs(values["params"][name]["latent_kernel"]), stride, padding)
        return y * values["params"][f"{name}_scale"]["scale"] if binary_downsampling else y

    inputs = normalize(IMAGES, values, "norm1")
    y = layer("conv2", normalize(layer("conv1", inputs, 2, 1), values, "norm2"), 1, 1)
    if binary_downsampling:
        shortcut = layer("downsample", inputs, 2, 0)
    else:
        shortcut = relu(normalize(means_of_2x2(np.asarray(IMAGES)), values, "downsample_norm"))
        shortcut = shortcut @ values["params"]["downsample"]["kernel"][0, 0]
    np.testing.assert_allclose(apply(block, values, IMAGES, progress=1.0), y + shortcut, rtol=1e-4, atol=1e-4)


def test_zero_gain_leaves_the_shortcut():
    model, images = PostActivationResNet(**TINY | {"stage_sizes": (2,)}), normal(2, 8, 8, 3, seed=2)
    variables = replaced(random_variables(model, images), lambda path: "/norm2/" in path, 0.0)
    start = relu(stem_of(variables, images))
    np.testing.assert_allclose(apply(model, variables, images)[1]["stage1"], start, rtol=1e-4, atol=1e-5)
    assert np.abs(start).max() > 0


@pytest.mark.parametrize(("quantizers", "found"), [(SIGNS, {-1, 1}), ({}, {0, 1})], ids=["binary", "full precision"])
def test_no_relu_stands_before_a_sign(quantizers, found):
    model, images = PostActivationResNet(**TINY | {"stage_sizes": (1,)}, **quantizers), normal(2, 8, 8, 3, seed=4)
    variables = replaced(random_variables(model, images), lambda path: "/norm2/" in path, 0.0)
    stage1 = apply(model, variables, images)[1]["stage1"]
    assert set(np.sign(stage1).ravel().tolist()) == found


def test_training_in_full_precision_reaches_every_parameter():
    """With quantizers the table of networks is trained, where every parameter of every network moves."""
    assert without_gradient(PostActivationResNet(**TINY), normal(2, 16, 16, 3, seed=3)) == set()


def test_another_case_of_scales_is_refused():
    with pytest.raises(ValueError, match=r"`output_scale_case` \(=5\) of PreActivationResNet must be 1, 2, 3 or 4"):
        xnor_resnet18(num_classes=10, output_scale_case=5)

"""Dense networks: published parameter counts and storage, blocks against numpy."""

from functools import cache, partial

import numpy as np
import pytest
from networks import apply, count, exact, normal, of_layers, outputs_of, random_variables, shapes_of, without_gradient
from numpy_layers import correlate, maxima, normalize, relu, signs

from bnn_jax.layers import BinaryConv
from bnn_jax.models import densenet
from bnn_jax.models.densenet import BinaryDenseNet, DenseLayer, IGPDenseBlock, IGPDenseNet, Transition
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

BINARY = {
    "input_quantizer": ACTIVATION_QUANTIZERS["ste_sign"](clip_value=1.3),
    "kernel_quantizer": WEIGHT_QUANTIZERS["binary"](clip_value=1.3),
}
SMALL = {"stage_sizes": (1, 1), "reduction": (2.0,), "rounding": 1, "width": 4}


@cache
def imagenet(name):
    return shapes_of(getattr(densenet, name)(num_classes=1000, **BINARY), 224)


def weight_bits(params):
    """32 bits a full-precision weight and bias of the dense layer, 1 bit a binary weight, no batch norm."""
    return 32 * (count(params, "kernel") + 1000) + count(params, "latent_kernel")


@pytest.mark.parametrize(
    ("name", "variables", "mebibytes", "widths"),
    [
        ("binary_densenet28", 5_150_504, "3.97", (160, 192, 256, 576)),
        ("binary_densenet37", 8_734_120, "5.01", (128, 192, 256, 640)),
        ("binary_densenet45", 13_939_240, "7.16", (160, 288, 288, 800)),
    ],
)
@pytest.mark.full
def test_counts_of_bethge_et_al(name, variables, mebibytes, widths):
    """Larq's totals count all weights, the bias, and scale, bias, mean and variance of every batch norm."""
    shapes = imagenet(name)
    assert count(shapes) == variables
    assert f"{weight_bits(shapes['params']) / 8 / 2**20:.2f}" == mebibytes
    transitions = [shapes["params"][f"transition{index}"]["conv"]["kernel"].shape[-1] for index in (1, 2, 3)]
    assert (*transitions, shapes["params"]["head"]["kernel"].shape[0]) == widths


@pytest.mark.parametrize(
    ("name", "megabits", "final"),
    [
        ("binary_densenet51", "34.51", 586),
        pytest.param("binary_densenet69", "41.66", 625, marks=pytest.mark.full),
        ("igp_densenet51", "34.24", 529),
        pytest.param("igp_densenet69", "41.24", 518, marks=pytest.mark.full),
    ],
)
@pytest.mark.full
def test_storage_of_the_networks_of_zhu_et_al(name, megabits, final):
    """The paper prints 34.8, 42.0, 34.5 and 41.5: 0.3 more each, in which it may count batch norms."""
    params = imagenet(name)["params"]
    assert f"{weight_bits(params) / 1e6:.2f}" == megabits
    assert params["head"]["kernel"].shape == (final, 1000)


def test_convolutions_of_a_two_column_stage():
    """Six blocks on 64 channels, growth 53: two convolutions of all channels and one of the growth each."""
    params = imagenet("igp_densenet51")["params"]
    stage = {name: value for name, value in params.items() if name.startswith("stage1_")}
    channels = [64, 117, 170, 223, 276, 329]
    assert count(stage, "latent_kernel") == 9 * (2 * 53 * sum(channels) + 6 * 53 * 53)


@pytest.mark.parametrize("network", [BinaryDenseNet, IGPDenseNet])
def test_full_precision_layers_and_intermediates(network):
    model = network(num_classes=10, **SMALL | {"stage_sizes": (2, 1)}, stem_width=6, **BINARY)
    params = shapes_of(model, 16)["params"]
    assert set(of_layers(params, "kernel")) == {"stem", "transition1/conv", "head"}
    shapes = {name: value.shape for name, value in outputs_of(model, 16)[1].items()}
    assert shapes == {"stage1": (1, 16, 16, 14), "stage2": (1, 8, 8, 11), "features": (1, 11)}


INPUTS = normal(2, 5, 4, 3, seed=0)


@pytest.mark.parametrize("pad_value", [0, -1])
def test_a_dense_layer_equals_numpy(pad_value):
    """The pads are put in after the sign."""
    layer = DenseLayer(2, partial(BinaryConv, padding=1, pad_value=pad_value, **BINARY))
    variables = random_variables(layer, INPUTS)
    y, values = apply(layer, variables, INPUTS), exact(variables)
    np.testing.assert_array_equal(y[..., :3], INPUTS)
    kernel = signs(values["params"]["conv"]["latent_kernel"])
    expected = correlate(signs(normalize(exact(INPUTS), values, "norm")), kernel, padding=1, pad_value=pad_value)
    np.testing.assert_array_equal(y[..., 3:], expected)


@pytest.mark.parametrize(("join", "weight"), [("mean", 0.5), ("sum", 1.0)])
def test_a_two_column_block_equals_numpy(join, weight):
    block = IGPDenseBlock(2, partial(BinaryConv, padding=1, pad_value=-1, **BINARY), join=join)
    variables = random_variables(block, INPUTS, seed=1)
    y, values = apply(block, variables, INPUTS), exact(variables)
    np.testing.assert_array_equal(y[..., :3], INPUTS)

    def unit(x, name):
        kernel = signs(values["params"][f"{name}_conv"]["latent_kernel"])
        return normalize(correlate(signs(x), kernel, padding=1, pad_value=-1), values, f"{name}_norm")

    a, b = unit(exact(INPUTS), "long1"), unit(exact(INPUTS), "short")
    c = a + unit(a, "long2")
    np.testing.assert_allclose(y[..., 3:], weight * (b + c), rtol=1e-4, atol=1e-4)


def test_a_transition_equals_numpy():
    transition = Transition(features=2)
    variables = random_variables(transition, INPUTS, seed=2)
    values = exact(variables)
    pooled = maxima(normalize(exact(INPUTS), values, "norm"))
    expected = relu(pooled) @ values["params"]["conv"]["kernel"][0, 0]
    np.testing.assert_allclose(apply(transition, variables, INPUTS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "without"),
    [
        (BinaryDenseNet, set()),
        # The next batch norm takes a shift out again where no sign comes before it: exactly no gradient.
        (IGPDenseNet, {f"stage{s}_block1/{n}_norm/bias" for s in (1, 2) for n in ("short", "long2")}),
    ],
)
@pytest.mark.full
def test_the_gradient_reaches_every_parameter(network, without):
    model = network(num_classes=5, **SMALL, stem_width=4, **BINARY)
    assert without_gradient(model, normal(4, 8, 8, 3, seed=3), least=1e-4) == without


@pytest.mark.parametrize("network", [BinaryDenseNet, IGPDenseNet])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem_width": 0}, r"`stem_width` \(=0\) of {} must be positive; 64 is usual"),
        ({"rounding": 0}, r"`rounding` \(=0\) of {} must be positive; (1|32) is usual"),
        ({"reduction": (2.0,)}, r"`reduction` \(=\(2.0,\)\) of {} must give a factor for .*; 4 stages have 3"),
        ({"reduction": (2.0, 0.5, 2.0)}, r"`reduction` \(=\(2.0, 0.5, 2.0\)\) of {} must be at least 1; 1 keeps"),
    ],
)
def test_networks_that_cannot_be_built(network, options, message):
    with pytest.raises(ValueError, match=message.replace("{}", network.__name__)):
        network(num_classes=10, **options)


def test_the_join_is_checked():
    with pytest.raises(ValueError, match=r"`join` \(='max'\) of IGPDenseNet must be mean or sum; mean is the default"):
        IGPDenseNet(num_classes=10, join="max")


def test_images_and_widths_too_small():
    message = r"`images` are too small for 4 stages of BinaryDenseNet with the cifar stem: 1x1 pixels are left before"
    with pytest.raises(ValueError, match=message):
        shapes_of(BinaryDenseNet(num_classes=10, width=4), 4)
    message = r"`reduction` \(=2.7\) of BinaryDenseNet leaves none of 32 channels for stage 2 at `rounding` 32; use a"
    with pytest.raises(ValueError, match=message):
        shapes_of(BinaryDenseNet(num_classes=10, width=4, stem_width=8), 16)

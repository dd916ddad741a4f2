"""Networks after 2020 and those of Deep Frank-Wolfe: published sizes to the digit, blocks against numpy."""

import jax
import numpy as np
import pytest
from networks import BI_REAL, SIGNS, apply, conv_of, exact, normal, random_variables, shapes_of
from numpy_layers import correlate, magnitude_aware, means_of_2x2, normalize, projected, relu, signs

from bnn_jax.analysis.accounting import account_model
from bnn_jax.models import MODELS
from bnn_jax.models.birealnet import BiRealBottleneck
from bnn_jax.models.bnext import Processor
from bnn_jax.models.build import build_model
from bnn_jax.models.densenet_bc import BottleneckLayer
from bnn_jax.models.meliusnet import MeliusBlock
from bnn_jax.models.network import identity
from bnn_jax.models.pokebnn import PokeBlock
from bnn_jax.models.quicknet import blur_pool
from bnn_jax.models.wide_resnet import WideBlock
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS

IMAGES = normal(2, 6, 8, 4)


def elements(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def densenet_by_hand(k=40, layers=6, classes=10):
    """Each 1x1 convolution with its batch norm, each 3x3 with its own; half the channels behind a transition."""
    total, channels = 27 * 2 * k, 2 * k
    for stage in range(3):
        for _ in range(layers):
            total += 2 * channels + channels * 4 * k + 2 * 4 * k + 9 * 4 * k * k
            channels += k
        total += 2 * channels + (channels * (channels // 2) if stage < 2 else channels * classes)
        channels = channels // 2 if stage < 2 else channels
    return total


PARAMETERS = {
    "wide_resnet40_4": 8_949_210,
    "densenet40_40": densenet_by_hand(),
    # Larq Zoo's tables: all weights of the Keras models,
    "binary_alexnet": 61_859_192 - 20_944,
    "binary_resnet_e18": 11_699_368 - 9_728,
    # or two a normalized channel, also of the stem's batch norm, which has no scale and bias; and QuickNet's blurs.
    "quicknet_small": 12_655_688 - 2 * 8 - 9 * (32 + 64 + 256),
    "quicknet": 13_234_088 - 2 * 16 - 9 * (64 + 128 + 256),
    "quicknet_large": 23_342_248 - 2 * 16 - 9 * (64 + 128 + 256),
    "meliusnet22": 6_944_584,
    "bireal50": 25_557_032,  # He et al.'s ResNet-50
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "quicknet" else pytest.mark.full) for name in PARAMETERS]
)
def test_parameters_are_as_many_as_published(name):
    side, classes = (32, 10) if name in ("wide_resnet40_4", "densenet40_40") else (224, 1000)
    params = shapes_of(build_model(name, num_classes=classes), side)["params"]
    assert elements(params) == PARAMETERS[name]


def resnet50_by_hand():
    """Weights and multiplications of the bottlenecks' convolutions, and those of stem, shortcuts and classifier."""
    weights, macs, real, channels = 0, 0, 147 * 64 * 112**2 + 2048 * 1000, 64
    for blocks, inner, side in ((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7)):
        for block in range(blocks):
            before = side * (2 if block == 0 and inner > 64 else 1)
            sizes = (channels * inner, before), (9 * inner * inner, side), (4 * inner * inner, side)
            weights += sum(size for size, _ in sizes)
            macs += sum(size * side**2 for size, side in sizes)
            real += channels * 4 * inner * side**2 if block == 0 else 0
            channels = 4 * inner
    return weights, macs, real


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "weights", "binary", "real"),
    [
        ("binary_alexnet", 61_827_776, 768_512_000, 72_855_552),
        ("binary_resnet_e18", 10_985_472, 1_676_279_808, 137_793_536),
        ("meliusnet22", 6_119_424, 4_624_220_160, 136_388_608),
        ("bireal50", *resnet50_by_hand()),
        ("pokebnn", *resnet50_by_hand()[:2], None),
        # Those of ReActNet-A, whose 1x1 convolutions C -> 2C are two C -> C here.
        ("bnext_tiny", 28_253_184, 4_816_896_000, None),
    ],
)
def test_binary_weights_and_multiplications_are_as_many_as_published(name, weights, binary, real):
    """Larq Zoo's summaries, which count the products of real images with binary kernels as real ones."""
    counted = account_model(build_model(name, num_classes=1000), (224, 224, 3))
    macs = counted.macs()
    assert (counted.binary_weights, macs.binary) == (weights, binary)
    assert real is None or macs.full_precision == real


def gate(values, name, z, squash):
    """Squeeze-and-excitation."""
    params = values["params"][name]
    hidden = relu(z.mean((1, 2)) @ params["squeeze"]["kernel"] + params["squeeze"]["bias"])
    return squash(hidden @ params["expand"]["kernel"] + params["expand"]["bias"])[:, None, None]


def prelu(y, params):
    return np.where(y > 0, params.get("positive_slope", 1.0) * y, params["slope"] * y)


def hard_sigmoid(x):
    return np.clip(x + 3, 0, 6) / 6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def close(block, values, expected, **phase):
    found = apply(block, values, IMAGES, progress=0.0, **phase)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * max(1, np.abs(expected).max()))


def drawn(block):
    values = random_variables(block, IMAGES, progress=0.0)
    return values, exact(values), exact(IMAGES)


def binary(values, name, x, stride=1, kernel_of=signs):
    kernel = values["params"][name]["latent_kernel"]
    return correlate(signs(x), kernel_of(kernel), stride, padding=kernel.shape[0] // 2)


def test_a_blur_is_the_binomial_filter_at_every_second_pixel():
    kernel = np.outer([1, 2, 1], [1, 2, 1])[..., None, None] / 16 * np.eye(4)
    expected = correlate(np.pad(exact(IMAGES), ((0, 0), (0, 1), (0, 1), (0, 0))), kernel, 2)
    np.testing.assert_allclose(blur_pool(IMAGES), expected, atol=1e-6)
    odd = IMAGES[:, :5, :7]
    np.testing.assert_allclose(blur_pool(odd), correlate(exact(odd), kernel, 2, padding=1), atol=1e-6)


def test_a_melius_block_adds_channels_and_improves_them():
    block = MeliusBlock(3, conv_of(**SIGNS), identity)
    values, wide, x = drawn(block)
    x = np.concatenate([x, binary(wide, "dense_conv", normalize(x, wide, "dense_norm"))], -1)
    y = binary(wide, "improvement_conv", normalize(x, wide, "improvement_norm"))
    close(block, values, x + np.pad(y, ((0, 0),) * 3 + ((4, 0),)))


@pytest.mark.parametrize(("features", "stride"), [(4, 1), (12, 2)])
def test_a_bottleneck_of_bi_real_net(features, stride):
    block = BiRealBottleneck(features, stride, conv_of(**BI_REAL), identity)
    values, wide, x = drawn(block)
    y = normalize(binary(wide, "conv1", x, kernel_of=magnitude_aware), wide, "norm1")
    shortcut = means_of_2x2(y) if stride > 1 else y
    y = normalize(binary(wide, "conv2", y, stride, magnitude_aware), wide, "norm2") + shortcut
    y = normalize(binary(wide, "conv3", y, kernel_of=magnitude_aware), wide, "norm3")
    close(block, values, y + projected(x, wide, stride))


def means_of_3x3(x):
    """Stride 2, "SAME", zeros counted: an even image is padded below and to the right."""
    return correlate(np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))), np.ones((3, 3, 1, 1)) / 9 * np.eye(x.shape[-1]), 2)


def test_a_block_of_pokebnn():
    """8 channels in two inner ones: means of neighbours, zeros and copies in its shortcuts; a stride."""
    block = PokeBlock(8, 2, conv_of(**SIGNS), identity, zero_scale=False, gate_reduction=1)
    values, wide, x = drawn(block)
    params = wide["params"]

    def poke(number, x, shortcuts, stride=1):
        y = normalize(binary(wide, f"conv{number}", x, stride), wide, f"norm{number}") + shortcuts
        own = params[f"activation{number}"]
        y = prelu(y - own["input_shift"], own) + own["output_shift"]
        return normalize(y * gate(wide, f"gate{number}", x, hard_sigmoid), wide, f"gate_norm{number}")

    first = poke(1, x, x.reshape(*x.shape[:-1], 2, 2).mean(-1))
    second = poke(2, first, means_of_3x3(first), stride=2)
    zeros = np.pad(second, ((0, 0),) * 3 + ((0, 6),))
    close(block, values, poke(3, second, zeros + np.tile(means_of_3x3(x), 2)))


@pytest.mark.parametrize(("attention", "stride"), [(True, 2), (False, 1)])
def test_a_processor_of_bnext(attention, stride):
    quantizers = SIGNS | {"input_quantizer": ACTIVATION_QUANTIZERS["rsign"]()}
    block = Processor(3, stride, attention, 2, conv_of(**quantizers))
    values, wide, x = drawn(block)
    params = wide["params"]
    z = binary(wide, "conv", x - params["conv"]["input_quantizer"]["shift"], stride)
    z = prelu(normalize(z, wide, "norm"), params["activation"])
    residual = prelu(x, params["input_activation"]) if attention else x
    x, residual = (means_of_2x2(y) if stride > 1 else y for y in (x, residual))
    share = np.clip(params["share"], 0, 1)
    z = gate(wide, "gate", share * x + (1 - share) * z, sigmoid) * z * (residual if attention else 1)
    close(block, values, normalize(z, wide, "gate_norm") + residual)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_wide_block_sees_the_normalized_inputs_on_its_shortcut(stride):
    block = WideBlock(4 * stride, stride, conv_of(), jax.nn.relu, identity)
    values, wide, x = drawn(block)
    seen = relu(normalize(x, wide, "norm1"))
    y = relu(normalize(correlate(seen, wide["params"]["conv1"]["kernel"], stride, 1), wide, "norm2"))
    y = correlate(y, wide["params"]["conv2"]["kernel"], 1, 1)
    close(block, values, y + (x if stride == 1 else correlate(seen, wide["params"]["downsample"]["kernel"], 2)))


def test_a_layer_with_a_bottleneck_adds_its_growth():
    block = BottleneckLayer(3, True, conv_of(), jax.nn.relu)
    values, wide, x = drawn(block)
    y = correlate(relu(normalize(x, wide, "norm1")), wide["params"]["conv1"]["kernel"])
    y = correlate(relu(normalize(y, wide, "norm2")), wide["params"]["conv2"]["kernel"], padding=1)
    close(block, values, np.concatenate([x, y], -1))


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("quicknet", {"width": 6}, r"`width` \(=6\) of QuickNet must be a multiple of 4, for the stem has a quarter"),
        (
            "quicknet",
            {"multiples": (1, 2)},
            r"`multiples` \(=\(1, 2\)\) of QuickNet must have one for each of 4 stages",
        ),
        ("meliusnet22", {"width": 24}, r"`width` \(=24\) of MeliusNet must be a multiple of 16, for the stem's groups"),
        ("meliusnet22", {"reduced": (0.001,)}, r"`reduced` .* of MeliusNet must leave channels behind each of 3"),
        ("densenet40_40", {"reduction": 0.5}, r"`reduction` \(=0.5\) of DenseNet must be at least 1; 1 keeps all"),
        ("pokebnn", {"stem_width": 7}, r"`stem_width` \(=7\) of PokeBNN must be even and positive; 64 is usual"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name, options, text):
    with pytest.raises(ValueError, match=text):
        MODELS[name].constructor(num_classes=2, **options)

"""Accounts of traced networks against counts by hand and printed tables."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct, lax

from bnn_jax.analysis.accounting import Convention, Macs, account, account_model, as_dict
from bnn_jax.analysis.published_sizes import CONVENTIONS, TABLE, account_rows, counted_as, verdict
from bnn_jax.errors import UsageError
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense
from bnn_jax.models.alexnet import alexnet_xnor
from bnn_jax.models.convnet import bnn_convnet
from bnn_jax.models.mobilenet import reactnet_a
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, Quantized, Quantizer, make_quantizer, stateless
from bnn_jax.training.config import Config, ModelConfig
from bnn_jax.training.experiment import make_model
from bnn_jax.training.validation import validate


def inputs(name, **options):
    return make_quantizer(ACTIVATION_QUANTIZERS, name, **options)


def kernels(name, **options):
    return make_quantizer(WEIGHT_QUANTIZERS, name, **options)


BINARY = {"input_quantizer": inputs("ste_sign"), "kernel_quantizer": kernels("binary")}
XNOR = {"input_quantizer": inputs("ste_sign"), "kernel_quantizer": kernels("xnor")}


class Single(nn.Module):
    """One convolution 8 -> 6, kernel 3x3, on 5x5 images: 432 weights, 10,800 MACs."""

    input_quantizer: Quantizer | None = None
    kernel_quantizer: Quantizer | None = None
    use_bias: bool = False
    input_scaling: bool = False

    @nn.compact
    def __call__(self, x, *, train):
        layer = BinaryConv(
            6,
            input_quantizer=self.input_quantizer,
            kernel_quantizer=self.kernel_quantizer,
            use_bias=self.use_bias,
            input_scaling=self.input_scaling,
            name="conv",
        )
        return layer(x, train=train)


MACS = 5 * 5 * 9 * 8 * 6


@pytest.mark.parametrize(
    ("input_quantizer", "kernel_quantizer", "bits", "analytic", "learned", "macs"),
    [
        (None, None, 32, 0, 0, Macs(full_precision=MACS)),
        (None, kernels("binary"), 1, 0, 0, Macs(full_precision=MACS)),
        (inputs("ste_sign"), None, 32, 0, 0, Macs(full_precision=MACS)),
        (inputs("ste_sign"), kernels("binary"), 1, 0, 0, Macs(binary=MACS, bit_products=MACS)),
        (inputs("ste_sign"), kernels("xnor"), 1, 6, 0, Macs(binary=MACS, bit_products=MACS)),
        (inputs("sparse"), kernels("learned_scale"), 1, 0, 6, Macs(binary=MACS, bit_products=MACS)),
        (inputs("tbn"), kernels("xnor"), 1, 6, 0, Macs(ternary=MACS, bit_products=2 * MACS)),
        (inputs("ste_sign"), kernels("twn"), 2, 1, 0, Macs(ternary=MACS, bit_products=2 * MACS)),
        (inputs("tbn"), kernels("twn"), 2, 1, 0, Macs(multibit=MACS, bit_products=4 * MACS)),
        (None, kernels("ttq"), 2, 0, 2, Macs(full_precision=MACS)),
        (inputs("ste_sign"), kernels("ttq"), 2, 0, 2, Macs(binary=2 * MACS, bit_products=2 * MACS)),
        (inputs("dorefa", bits=3), kernels("dorefa", bits=4), 4, 0, 0, Macs(multibit=MACS, bit_products=12 * MACS)),
        (inputs("dorefa", bits=3), kernels("dorefa", bits=1), 1, 1, 0, Macs(multibit=MACS, bit_products=3 * MACS)),
        (inputs("dorefa", bits=1), kernels("wrpn", bits=1), 1, 6, 0, Macs(binary=MACS, bit_products=MACS)),
        (
            inputs("abc_net", bases=2),
            kernels("abc_net", bases=3),
            3,
            3,
            0,
            Macs(binary=6 * MACS, bit_products=6 * MACS),
        ),
        (inputs("residual", bases=2), kernels("xnor"), 1, 6, 0, Macs(binary=2 * MACS, bit_products=2 * MACS)),
        (None, kernels("abc_net", bases=3), 3, 3, 0, Macs(full_precision=MACS)),
        (inputs("lq_net", bits=2), kernels("lq_net", bits=2), 2, 0, 12, Macs(binary=4 * MACS, bit_products=4 * MACS)),
        (inputs("pact", bits=2), kernels("inq", bits=5), 5, 1, 0, Macs(multibit=MACS, bit_products=10 * MACS)),
        (inputs("ste_sign"), kernels("c_sign"), 1, 6, 0, Macs(binary=MACS, bit_products=MACS)),
        (inputs("ste_sign"), kernels("rbnn"), 1, 0, 6, Macs(binary=MACS, bit_products=MACS)),
        (inputs("adabin"), kernels("adabin"), 1, 12, 0, Macs(binary=MACS, bit_products=MACS)),
        (inputs("recu"), kernels("recu"), 1, 0, 6, Macs(binary=MACS, bit_products=MACS)),
        (inputs("ste_sign"), kernels("proxy"), 1, 6, 0, Macs(binary=MACS, bit_products=MACS)),
        (inputs("ste_sign"), kernels("bn_free"), 1, 6, 0, Macs(binary=MACS, bit_products=MACS)),
        (inputs("ste_sign"), kernels("binary_connect", stochastic=True), 32, 0, 0, Macs(full_precision=MACS)),
    ],
)
def test_one_layer_of_each_method(input_quantizer, kernel_quantizer, bits, analytic, learned, macs):
    model = Single(input_quantizer, kernel_quantizer)
    counted = account_model(model, (5, 5, 8))
    (layer,) = counted.layers
    assert (layer.weights, layer.weight_bits, layer.macs) == (432, bits, macs)
    assert (layer.analytic_scales, layer.learned_scales) == (analytic, learned)
    assert counted.flops() == macs.full_precision + macs.bit_products / 64


def test_a_network_that_cannot_be_packed_is_counted():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            signs = {"input_quantizer": "ste_sign", "kernel_quantizer": "binary"}
            x = BatchNorm()(BinaryConv(32, **signs, name="first")(x), train=train)
            x = BinaryConv(32, **signs, name="second")(x)
            return BinaryConv(4, kernel_quantizer=kernels("binary_connect", stochastic=True), name="third")(x)

    counted = account_model(Mixed(), (5, 5, 8))
    assert counted.folded == 0 and counted.full_precision_weights == 9 * 32 * 4
    assert counted.quantized_weights == {1: 9 * 8 * 32 + 9 * 32 * 32}


def test_what_belongs_to_activations_is_stored_and_what_only_makes_codes_is_not():
    assert account_model(Single(inputs("rsign"), kernels("binary")), (5, 5, 8)).other == {
        "conv/input_quantizer/shift": 8
    }
    assert account_model(Single(inputs("pact"), kernels("binary")), (5, 5, 8)).other == {
        "conv/input_quantizer/clipping_level": 1
    }
    assert account_model(Single(inputs("tbn"), kernels("binary")), (5, 5, 8)).other == {
        "quantizer_state/conv/input_quantizer/delta": 1
    }
    # The 72x72 proxy matrix and RBNN's rotations and angles are spent when the codes are made.
    for name in ("proxy", "rbnn", "c_sign"):
        assert account_model(Single(inputs("ste_sign"), kernels(name)), (5, 5, 8)).other == {}


def test_the_map_of_input_magnitudes_is_counted_apart_from_the_kernel():
    layer, scaling = account_model(Single(**XNOR, input_scaling=True), (5, 5, 8)).layers
    assert layer.macs == Macs(binary=MACS, bit_products=MACS)
    assert scaling.macs == Macs(full_precision=5 * 5 * 9)
    assert (scaling.weights, scaling.name) == (0, "(Single/conv/conv._input_scale)")


def test_biases_words_and_payload_by_hand():
    counted = account_model(Single(**XNOR, use_bias=True), (5, 5, 8))
    (layer,) = counted.layers
    # 72 bits a filter are 3 words; 6 scales and 6 biases are float32.
    assert (layer.words, layer.biases, layer.scales) == (18, 6, 6)
    assert counted.payload_bytes() == 4 * (18 + 6 + 6)
    assert counted.bits() == 432 + 32 * 12
    assert counted.mebibytes() == (432 + 32 * 12) / 8 / 2**20


class Classifier(nn.Module):
    """conv -> BN -> mean -> dense with bias."""

    @nn.compact
    def __call__(self, x, *, train):
        x = BinaryConv(6, **XNOR, use_bias=True, name="conv")(x, train=train)
        x = BatchNorm(use_scale=False, name="norm")(x, train=train)
        return BinaryDense(10, use_bias=True, name="head")(x.mean((1, 2))), {"features": x}


@pytest.mark.parametrize(
    ("convention", "numbers", "full_precision_macs"),
    [
        (Convention(), 60 + 10 + 6 + 12 + 6, 60),
        (Convention(classifier_bias=False), 60 + 6 + 12 + 6, 60),
        (Convention(biases=False), 60 + 10 + 12 + 6, 60),
        (Convention(batch_norm=False), 60 + 10 + 6 + 6, 60),
        (Convention(scales=False), 60 + 10 + 6 + 12, 60),
        (Convention(classifier_macs=False), 60 + 10 + 6 + 12 + 6, 0),
    ],
)
def test_what_a_convention_counts(convention, numbers, full_precision_macs):
    counted = account_model(Classifier(), (5, 5, 8))
    assert [layer.classifier for layer in counted.layers] == [False, True]
    assert counted.bits(convention) == 432 + 32 * numbers
    assert counted.flops(convention) == full_precision_macs + MACS / 64


class OwnNorm(nn.Module):
    """Kernel, bias and batch norm in one module."""

    @nn.compact
    def __call__(self, x, *, train):
        kernel = self.param("weights", nn.initializers.ones, (8, 4))
        gamma = self.param("gamma", nn.initializers.ones, (4,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (4,))
        variance = self.variable("batch_stats", "variance", jnp.ones, (4,))
        centered = x @ kernel - mean.value.reshape(1, 1, 1, 4)
        return centered * (gamma / jnp.sqrt(variance.value)).reshape(1, 1, 1, 4)


def test_batch_norm_is_two_numbers_a_channel_wherever_it_is():
    counted = account_model(OwnNorm(), (5, 5, 8))
    assert [(layer.name, layer.weights) for layer in counted.layers] == [("weights", 32)]
    assert (counted.batch_norm, counted.biases, counted.other) == (8, 0, {})
    assert account_model(Classifier(), (5, 5, 8)).batch_norm == 12


class Twice(nn.Module):
    """A user's own module, written without this package's knowledge of it: one layer called twice, inside a scan."""

    turns: int = 3

    @nn.compact
    def __call__(self, x, *, train):
        layer = BinaryConv(
            8, input_quantizer=inputs("abc_net", bases=2), kernel_quantizer=kernels("xnor"), name="shared"
        )
        x = layer(layer(x, train=train), train=train)

        def turn(module, x, _):
            return module(x, train=train), None

        inner = BinaryConv(8, **XNOR, name="inner")
        scanned = nn.scan(turn, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.turns)
        return scanned(inner, x, None)[0]


def test_a_users_module_is_counted_with_shared_and_scanned_layers():
    shared, inner = account_model(Twice(), (5, 5, 8)).layers
    once = 5 * 5 * 9 * 8 * 8
    assert (shared.weights, shared.weight_bits, shared.scales) == (9 * 64, 1, 8)
    assert shared.macs == Macs(binary=2 * 2 * once, bit_products=4 * once)
    assert (inner.shape, inner.weight_bits, inner.scales) == ((3, 3, 3, 8, 8), 1, 3 * 8)
    assert inner.macs == Macs(binary=3 * once, bit_products=3 * once)
    assert inner.words == 3 * 8 * 3


@pytest.mark.parametrize("turns", [1, 5])
def test_a_function_scans_over_one_kernel(turns):
    def function(kernel, x):
        return lax.scan(lambda x, _: (x @ kernel, None), x, length=turns)[0]

    counted = account(function, ShapeDtypeStruct((4, 4), jnp.float32), ShapeDtypeStruct((1, 4), jnp.float32))
    assert (counted.full_precision_weights, counted.flops()) == (16, 16 * turns)


def test_ones_own_network_with_a_binary_convolution():
    """Not one line in analysis/ knows this module, its quantizer, or its names."""
    thirds = stateless(
        lambda x: Quantized(jnp.round(3 * jnp.tanh(x)), jnp.float32(1 / 3)), code_set=tuple(range(-3, 4))
    )

    class Branches(nn.Module):
        binary: bool

        @nn.compact
        def __call__(self, x, *, train):
            own = BinaryConv(4, input_quantizer=thirds, kernel_quantizer=kernels("binary"), name="low_bit")
            left = own(x, train=train) if self.binary else nn.Conv(4, (3, 3), use_bias=False, name="real")(x)
            right = nn.Conv(8, (3, 3), feature_group_count=4, name="grouped")(x)
            gain = self.param("gain", nn.initializers.ones, (12,))
            return jnp.concatenate([left, right], -1) * gain.reshape(1, 1, 1, 12)

    real, mixed = (account_model(Branches(binary), (5, 5, 8)) for binary in (False, True))
    own = 5 * 5 * 9 * 8 * 4
    grouped = 5 * 5 * 9 * 2 * 8
    assert real.macs() == Macs(full_precision=own + grouped)
    assert mixed.macs() == Macs(full_precision=grouped, multibit=own, bit_products=3 * own)
    assert (real.binary_weights, mixed.binary_weights) == (0, 9 * 8 * 4)
    assert real.full_precision_weights - mixed.full_precision_weights == 9 * 8 * 4
    assert (mixed.biases, mixed.other) == (8, {"gain": 12})
    assert mixed.layers[0].name == "low_bit/latent_kernel"


def test_plain_functions_need_no_names():
    variables = {"first": jnp.ones((8, 16)), "shift": jnp.ones(16), "last": jnp.ones((16, 3)), "unused": jnp.ones(99)}

    def function(v, x):
        dead_end = x @ v["first"]
        del dead_end
        return (v["last"].T @ jax.nn.relu(x @ v["first"] + v["shift"][None]).T).T

    counted = account(function, variables, jnp.ones((1, 8)))
    assert [(layer.name, layer.weights) for layer in counted.layers] == [("first", 128), ("last", 48)]
    assert (counted.biases, counted.other, counted.flops()) == (16, {}, 128 + 48)


def test_a_latent_kernel_that_inference_needs_as_it_is_is_stored_as_it_is():
    def function(v, x):
        layer = BinaryDense(3, **BINARY)
        return layer.apply({"params": v}, x) + x @ v["latent_kernel"]

    counted = account(function, {"latent_kernel": jnp.ones((4, 3))}, jnp.ones((1, 4)))
    assert (counted.binary_weights, counted.full_precision_weights) == (0, 12)
    assert counted.macs() == Macs(full_precision=12, binary=12, bit_products=12)


@pytest.mark.parametrize("name", ["lenet", "bnn_convnet", "resnet20", "reactnet_resnet20", "bireal_resnet20"])
def test_every_parameter_is_counted_once(name):
    config = Config(name=name, epochs=1, batch_size=1, model=ModelConfig(name=name))
    model = make_model(validate(config).model, num_classes=10)
    images = jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))["params"]
    counted = account_model(name, (32, 32, 3))
    weights = sum(layer.weights for layer in counted.layers)
    numbers = counted.biases + counted.batch_norm + counted.learned_scales + sum(counted.other.values())
    assert weights + numbers == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_no_array_of_weights_is_made():
    """They would fill 14 GB."""
    counted = account_model(bnn_convnet(num_classes=10, width=2048, **BINARY), (32, 32, 3))
    assert counted.binary_weights > 3 * 10**9


# Counts by hand: the papers' layers, one by one.
CONVNET = [27 * 128, *(9 * a * b for a, b in ((128, 128), (128, 256), (256, 256), (256, 512), (512, 512)))]


@pytest.mark.parametrize(
    ("model", "shape", "binary", "real", "bits"),
    [
        (
            bnn_convnet(num_classes=10, **BINARY),
            (32, 32, 3),
            sum(CONVNET) + 8192 * 1024 + 1024**2 + 10240,
            0,
            14_022_016,
        ),
        (alexnet_xnor(num_classes=1000, **XNOR), (224, 224, 3), 58_236_928, 34_848 + 4_096_000, None),
    ],
    ids=["BNN ConvNet", "AlexNet-XNOR"],
)
def test_weights_of_published_networks(model, shape, binary, real, bits):
    counted = account_model(model, shape)
    assert (counted.binary_weights, counted.full_precision_weights) == (binary, real)
    weights_alone = Convention(False, False, False, False, False)
    assert counted.bits(weights_alone) == (bits or binary + 32 * real)
    assert binary + real in (14_022_016, 62_367_776)


def test_lenet_of_the_survey():
    assert account_model("lenet", (32, 32, 3)).binary_weights == 2850 == 75 * 6 + 150 * 16


@pytest.mark.full
def test_macs_of_reactnet_a():
    model = reactnet_a(
        num_classes=1000, stem="imagenet", input_quantizer=inputs("rsign"), kernel_quantizer=kernels("xnor")
    )
    macs = account_model(model, (224, 224, 3)).macs()
    assert (macs.binary, macs.full_precision) == (4_816_896_000, 11_862_016)


def by_hand(blocks, *, binary_downsampling, divisor=64):
    """(weights in bits without the classifier's bias, FLOPs) of a ResNet of 3x3 convolutions, at 224x224."""
    real, binary, flops = 9408, 0, 9408 * 112**2
    previous = 64
    for stage, count in enumerate(blocks):
        width, side = 64 * 2**stage, 56 // 2**stage
        convolutions = 9 * previous * width + (2 * count - 1) * 9 * width**2
        binary += convolutions
        flops += convolutions * side**2 / divisor
        down = previous * width if stage else 0
        real, binary = (real, binary + down) if binary_downsampling else (real + down, binary)
        flops += down * side**2 / (divisor if binary_downsampling else 1)
        previous = width
    return 32 * (real + 512_000) + binary, flops + 512_000


HAND = {
    "BNN ResNet18 #": (lambda bits, flops: (bits + 32_000, flops - 512_000), (2, 2, 2, 2), True, 64),
    "XNOR ResNet18 #": (lambda bits, flops: (bits + 32_000 + 32 * 4736, flops - 512_000), (2, 2, 2, 2), True, 64),
    "TBN-ResNet18 #": (lambda bits, flops: (bits + 32_000, flops), (2, 2, 2, 2), True, 32),
    "TBN-ResNet34 #": (lambda bits, flops: (bits + 32_000, flops), (3, 4, 6, 3), True, 32),
    "Bi-Real ResNet18": (lambda bits, flops: (bits + 32_000, flops), (2, 2, 2, 2), False, 64),
    "Bi-Real ResNet34": (lambda bits, flops: (bits + 32_000, flops), (3, 4, 6, 3), False, 64),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full if "34" in name else ()) for name in HAND])
def test_residual_networks_of_the_table_by_hand(name):
    counts, blocks, binary_downsampling, divisor = HAND[name]
    bits, flops = counts(*by_hand(blocks, binary_downsampling=binary_downsampling, divisor=divisor))
    ((row, counted),) = account_rows(row for row in TABLE if row.name == name)
    assert counted_as(row, counted) == pytest.approx((bits / 1e6, flops / 1e9), rel=1e-12)
    assert verdict(row, counted) == "ok"


@pytest.mark.parametrize(
    ("name", "megabits", "gigaflops", "found"),
    [
        ("IGP-ResNet37(41)", 32.238, 0.128, "ok"),
        pytest.param("IGP-ResNet41(48)", 42.609, 0.164, "ok", marks=pytest.mark.full),
        ("Full-precision ResNet18", 374.064, 1.814, "ok"),
        pytest.param("Full-precision ResNet34", 697.526, 3.664, "+0.2 Mbit", marks=pytest.mark.full),
    ],
)
@pytest.mark.full
def test_other_rows_of_the_table(name, megabits, gigaflops, found):
    ((row, counted),) = account_rows(row for row in TABLE if row.name == name)
    mine = counted_as(row, counted)
    assert (round(mine[0], 3), round(mine[1], 3)) == (megabits, gigaflops)
    assert verdict(row, counted) == found


def test_every_row_says_what_it_counts():
    assert all(row.convention in CONVENTIONS for row in TABLE)
    assert len({row.name for row in TABLE}) == len(TABLE)


def test_json_has_all_the_numbers():
    record = as_dict(account_model(Classifier(), (5, 5, 8)), Convention(batch_norm=False))
    assert record["quantized_weights"] == {"1": 432}
    assert record["layers"][0]["macs"]["binary"] == MACS
    assert math.isclose(record["megabits"], (432 + 32 * 82) / 1e6)


@pytest.mark.parametrize("given", [{"num_classes": 100}, {"width": 64}, {"nonsense": 3}])
def test_settings_of_a_module_are_refused(given):
    ((name, value),) = given.items()
    message = rf"`{name}` \(={value}\) is for a network by name; make the Classifier with it"
    with pytest.raises(UsageError, match=message):
        account_model(Classifier(), (5, 5, 8), **given)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UsageError, match=r"`model.name` \(='lenett'\) is not known; did you mean 'lenet'\?"):
        account_model("lenett", (32, 32, 3))
    with pytest.raises(UsageError, match=r"`setting` \(='widht'\) is not known; did you mean 'width'\?"):
        account_model("lenet", (32, 32, 3), widht=3)

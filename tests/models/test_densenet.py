"""Dense networks: published parameter counts and storage, blocks against numpy."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.models import densenet
from bnn_jax.models.densenet import BinaryDenseNet, DenseLayer, IGPDenseBlock, IGPDenseNet, Transition
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

BINARY = {
    "input_quantizer": ACTIVATION_QUANTIZERS["ste_sign"](clip_value=1.3),
    "kernel_quantizer": WEIGHT_QUANTIZERS["binary"](clip_value=1.3),
}


def shapes_of(model, side=224):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), train=False))


def size(tree, name=None):
    named = jax.tree_util.tree_leaves_with_path(tree)
    return sum(int(np.prod(leaf.shape)) for path, leaf in named if name in (None, path[-1].key))


@cache
def imagenet(name):
    return shapes_of(getattr(densenet, name)(num_classes=1000, stem="imagenet", **BINARY))


def weight_bits(params):
    """32 bits a full-precision weight and bias of the dense layer, 1 bit a binary weight, no batch norm."""
    return 32 * (size(params, "kernel") + 1000) + size(params, "latent_kernel")


@pytest.mark.parametrize(
    ("name", "variables", "mebibytes", "widths"),
    [
        ("binary_densenet28", 5_150_504, "3.97", (160, 192, 256, 576)),
        ("binary_densenet37", 8_734_120, "5.01", (128, 192, 256, 640)),
        ("binary_densenet45", 13_939_240, "7.16", (160, 288, 288, 800)),
    ],
)
def test_counts_of_bethge_et_al(name, variables, mebibytes, widths):
    """Larq's totals count all weights, the bias, and scale, bias, mean and variance of every batch norm."""
    shapes = imagenet(name)
    assert size(shapes) == variables
    assert f"{weight_bits(shapes['params']) / 8 / 2**20:.2f}" == mebibytes
    transitions = [shapes["params"][f"transition{index}"]["conv"]["kernel"].shape[-1] for index in (1, 2, 3)]
    assert (*transitions, shapes["params"]["head"]["kernel"].shape[0]) == widths


@pytest.mark.parametrize(
    ("name", "megabits", "final"),
    [
        ("binary_densenet51", "34.51", 586),
        ("binary_densenet69", "41.66", 625),
        ("igp_densenet51", "34.24", 529),
        ("igp_densenet69", "41.24", 518),
    ],
)
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
    assert size(stage, "latent_kernel") == 9 * (2 * 53 * sum(channels) + 6 * 53 * 53)


@pytest.mark.parametrize("network", [BinaryDenseNet, IGPDenseNet])
def test_full_precision_layers_and_intermediates(network):
    model = network(num_classes=10, width=4, stage_sizes=(2, 1), reduction=(2.0,), rounding=1, stem_width=6, **BINARY)
    params = shapes_of(model, 16)["params"]
    paths = [[entry.key for entry in path] for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    layers = {tuple(path[:-1]) for path in paths if path[-1] == "kernel"}
    assert layers == {("stem", "conv"), ("transition1", "conv"), ("head",)}
    _, intermediates = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), train=False)[0]
    )
    shapes = {name: value.shape for name, value in intermediates.items()}
    assert shapes == {"stage1": (1, 16, 16, 14), "stage2": (1, 8, 8, 11), "features": (1, 11)}
    assert size(shapes_of(network(num_classes=10, width=4), 16), "latent_kernel") == 0


def random_variables(model, *inputs, seed=0):
    """Parameters and statistics drawn at random, where zero biases would hide what depends on them."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, train=False))

    def draw(path, leaf):
        value = 0.3 * rng.normal(size=leaf.shape)
        return jnp.asarray(np.abs(value) + 0.5 if path[-1].key == "var" else value, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def norm(x, variables, name):
    params, statistics = variables["params"][name], variables["batch_stats"][name]
    return params["scale"] * (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5) + params["bias"]


def sign_conv(x, variables, name, pad_value):
    """conv3x3(sign x), by loops over taps; the pads are put in after the sign."""
    spatial = ((0, 0), (1, 1), (1, 1), (0, 0))
    padded = np.pad(np.where(x < 0, -1.0, 1.0), spatial, constant_values=pad_value)
    kernel = np.where(variables["params"][name]["latent_kernel"] < 0, -1.0, 1.0)
    height, width = x.shape[1:3]
    return sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in np.ndindex(3, 3))


INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4, 3)), jnp.float32)


@pytest.mark.parametrize("pad_value", [0, -1])
def test_a_dense_layer_equals_numpy(pad_value):
    layer = DenseLayer(growth=2, pad_value=pad_value, **BINARY)
    variables = random_variables(layer, INPUTS)
    y = layer.apply(variables, INPUTS, train=False)
    np.testing.assert_array_equal(y[..., :3], INPUTS)
    v = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    expected = sign_conv(norm(np.asarray(INPUTS, np.float64), v, "norm"), v, "conv", pad_value)
    np.testing.assert_array_equal(y[..., 3:], expected)


@pytest.mark.parametrize(("join", "weight"), [("mean", 0.5), ("sum", 1.0)])
def test_a_two_column_block_equals_numpy(join, weight):
    block = IGPDenseBlock(growth=2, join=join, pad_value=-1, **BINARY)
    variables = random_variables(block, INPUTS, seed=1)
    y = block.apply(variables, INPUTS, train=False)
    np.testing.assert_array_equal(y[..., :3], INPUTS)
    v = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    x = np.asarray(INPUTS, np.float64)
    a = norm(sign_conv(x, v, "long1_conv", -1), v, "long1_norm")
    b = norm(sign_conv(x, v, "short_conv", -1), v, "short_norm")
    c = a + norm(sign_conv(a, v, "long2_conv", -1), v, "long2_norm")
    np.testing.assert_allclose(y[..., 3:], weight * (b + c), rtol=1e-4, atol=1e-4)


def test_a_transition_equals_numpy():
    transition = Transition(features=2)
    variables = random_variables(transition, INPUTS, seed=2)
    v = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    x = norm(np.asarray(INPUTS, np.float64), v, "norm")
    pooled = np.max([x[:, i:4:2, j:4:2] for i in (0, 1) for j in (0, 1)], axis=0)
    expected = np.maximum(pooled, 0) @ v["params"]["conv"]["kernel"][0, 0]
    np.testing.assert_allclose(transition.apply(variables, INPUTS, train=False), expected, rtol=1e-4, atol=1e-5)


def parameters_without_gradient(model):
    images = jnp.asarray(np.random.default_rng(3).normal(size=(4, 8, 8, 3)), jnp.float32)
    variables = random_variables(model, images)

    def loss(params):
        (logits, _), _ = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[:, 0].sum(), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert logits.shape == (4, 5)
    assert jnp.isfinite(logits).all()
    found = jax.tree_util.tree_leaves_with_path(gradients)
    return {"/".join(entry.key for entry in path) for path, leaf in found if abs(leaf).max() < 1e-4}


@pytest.mark.parametrize(
    ("network", "without"),
    [
        (BinaryDenseNet, set()),
        # The next batch norm takes a shift out again where no sign comes before it: exactly no gradient.
        (IGPDenseNet, {f"stage{s}_block1/{n}_norm/bias" for s in (1, 2) for n in ("short", "long2")}),
    ],
)
def test_the_gradient_reaches_every_parameter(network, without):
    model = network(num_classes=5, width=4, stage_sizes=(1, 1), reduction=(2.0,), rounding=1, stem_width=4, **BINARY)
    assert parameters_without_gradient(model) == without


@pytest.mark.parametrize("network", [BinaryDenseNet, IGPDenseNet])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, r"`width` \(=0\) of {} must be at least 1; 64 in BinaryDenseNet28 is usual"),
        ({"stem_width": 0}, r"`stem_width` \(=0\) of {} must be at least 1; 64 is usual"),
        ({"rounding": 0}, r"`rounding` \(=0\) of {} must be at least 1; 32 is usual"),
        ({"stage_sizes": (6, 0, 6, 5)}, r"`stage_sizes` \(=\(6, 0, 6, 5\)\) of {} must name one or more stages of at"),
        ({"stage_sizes": ()}, r"`stage_sizes` \(=\(\)\) of {} must name one or more stages"),
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

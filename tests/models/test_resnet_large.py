"""ResNet-18 and -34: published sizes by hand count; blocks against numpy; what a batch norm of zero leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.layers import BinaryConv
from bnn_jax.models.resnet_large import (
    PostActivationBlock,
    PostActivationResNet,
    PreActivationBlock,
    PreActivationResNet,
    resnet18,
    resnet34,
    tbn_resnet18,
    tbn_resnet34,
    xnor_resnet18,
    xnor_resnet34,
)
from bnn_jax.models.stem import Stem
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

SIGN = {"input_quantizer": ACTIVATION_QUANTIZERS["ste_sign"](), "kernel_quantizer": WEIGHT_QUANTIZERS["binary"]()}
XNOR = SIGN | {"kernel_quantizer": WEIGHT_QUANTIZERS["xnor"]()}
TBN = {
    "input_quantizer": ACTIVATION_QUANTIZERS["tbn"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["magnitude_aware"](estimator="identity_sign"),
}
TINY = {"num_classes": 3, "stage_sizes": (1, 1), "width": 4, "stem": "cifar"}


def shapes_of(constructor, size=224, **arguments):
    model = constructor(num_classes=1000, **arguments)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False))["params"]


def count(params, *leaves):
    flat = jax.tree_util.tree_leaves_with_path(params)
    return sum(int(np.prod(value.shape)) for path, value in flat if not leaves or path[-1].key in leaves)


@pytest.mark.parametrize(("constructor", "parameters"), [(resnet18, 11_689_512), (resnet34, 21_797_672)])
def test_full_precision_has_the_parameters_of_he_et_al(constructor, parameters):
    """Batch norms and biases included; times 32 the 374.064 and 697.526 Mbit of the tables."""
    assert count(shapes_of(constructor)) == parameters


BINARY_3X3 = {18: 10_985_472, 34: 21_086_208}
DOWNSAMPLING = 64 * 128 + 128 * 256 + 256 * 512
ENDS = 7 * 7 * 3 * 64 + 512 * 1000
"""The kernels of stem and classifier."""


@pytest.mark.parametrize(
    ("constructor", "arguments", "binary", "real"),
    [
        (resnet18, SIGN, BINARY_3X3[18], ENDS + DOWNSAMPLING),
        (resnet18, SIGN | {"binary_downsampling": True}, BINARY_3X3[18] + DOWNSAMPLING, ENDS),
        (xnor_resnet18, XNOR, BINARY_3X3[18] + DOWNSAMPLING, ENDS),
        (xnor_resnet34, XNOR, BINARY_3X3[34] + DOWNSAMPLING, ENDS),
        (tbn_resnet18, TBN, BINARY_3X3[18], ENDS + DOWNSAMPLING),
        (tbn_resnet34, TBN, BINARY_3X3[34], ENDS + DOWNSAMPLING),
        (tbn_resnet34, TBN | {"binary_downsampling": True}, BINARY_3X3[34] + DOWNSAMPLING, ENDS),
    ],
)
def test_weights_of_the_quantized_networks(constructor, arguments, binary, real):
    params = shapes_of(constructor, **arguments)
    assert count(params, "latent_kernel") == binary
    assert count(params, "kernel") == real


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
    params = shapes_of(constructor, **SIGN, **arguments)
    learned_scales = sum(count(value, "scale") for path, value in scales_of(params))
    assert learned_scales == scales
    bits = 32 * (count(params, "kernel") + 1000 + learned_scales) + count(params, "latent_kernel")
    assert round(bits / 1e6, 1) == megabits


def scales_of(params):
    """The modules of learned scales, of every block: a batch norm's gain is called scale as well."""
    return [(name, leaf) for block in params.values() for name, leaf in block.items() if name.endswith("_scale")]


def test_learned_scales_of_case_four():
    """features + height + width for each of the 19 quantized convolutions of ResNet-18."""
    sizes = [(64, 56)] * 4 + [(128, 28)] * 5 + [(256, 14)] * 5 + [(512, 7)] * 5
    params = shapes_of(xnor_resnet18, output_scale_case=4, **SIGN)
    assert sum(count(value) for _, value in scales_of(params)) == sum(c + 2 * side for c, side in sizes)


@pytest.mark.parametrize("size", [16, 20, 33])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize(
    ("constructor", "arguments"),
    [(PostActivationResNet, {}), (PreActivationResNet, TBN), (PreActivationResNet, {"binary_downsampling": False})],
)
def test_stages_halve_images_of_any_size(size, stem, constructor, arguments):
    model = constructor(num_classes=5, width=4, stem=stem, stage_sizes=(1, 1, 1), **arguments)
    images = jnp.zeros((2, size, size + 1, 3))
    (logits, intermediates), _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, train=False))
    sides = [size, size + 1] if stem == "cifar" else [-(-size // 4), -(-(size + 1) // 4)]
    for stage in (1, 2, 3):
        assert intermediates[f"stage{stage}"].shape == (2, *sides, 4 * 2 ** (stage - 1))
        sides = [-(-side // 2) for side in sides]
    assert intermediates["features"].shape == (2, 16)
    assert (logits.shape, logits.dtype) == ((2, 5), jnp.float32)


def correlate(x, kernel, stride, padding):
    """Correlation of NHWC images with a HWIO kernel, zero padding on both sides, by loops over the kernel's taps."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = ((x.shape[i + 1] - kernel.shape[i]) // stride + 1 for i in (0, 1))
    return sum(
        x[:, i : i + stride * rows : stride, j : j + stride * columns : stride] @ kernel[i, j]
        for i, j in np.ndindex(*kernel.shape[:2])
    )


def random_variables(module, x, **arguments):
    """Variables of normal draws, but positive statistics; no time is lost on compiling the module's own start."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False, **arguments))
    generator = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), shapes)
    return {name: draws if name == "params" else jax.tree.map(np.exp, draws) for name, draws in values.items()}


def normalize(values, name, x):
    stats, affine = values["batch_stats"][name], values["params"][name]
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * affine["scale"] + affine["bias"]


def sign(x):
    return np.where(x < 0, -1.0, 1.0)


def relu(x):
    return np.maximum(x, 0)


def run_block(block, x):
    x = jnp.asarray(x, jnp.float32)
    variables = random_variables(block, x, progress=1.0)
    apply = jax.jit(lambda variables, x: block.apply(variables, x, train=False, progress=1.0))
    return variables, np.asarray(apply(variables, x))


IMAGES = np.random.default_rng(1).normal(size=(2, 5, 6, 3))


def test_a_post_activation_block_equals_numpy():
    def conv(features, **geometry):
        return BinaryConv(features, **{"padding": 1} | geometry)

    block = PostActivationBlock(features=4, stride=2, conv=conv, activation=jax.nn.relu, binary_downsampling=False)
    values, found = run_block(block, IMAGES)
    kernel = {name: values["params"][name]["kernel"] for name in ("conv1", "conv2", "downsample")}
    y = relu(normalize(values, "norm1", correlate(IMAGES, kernel["conv1"], 2, 1)))
    y = normalize(values, "norm2", correlate(y, kernel["conv2"], 1, 1))
    shortcut = normalize(values, "norm_downsample", correlate(IMAGES, kernel["downsample"], 2, 0))
    np.testing.assert_allclose(found, relu(y + shortcut), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("binary_downsampling", [False, True])
def test_a_pre_activation_block_equals_numpy(binary_downsampling):
    def conv(features, **geometry):
        return BinaryConv(features, **{"padding": 1} | SIGN | geometry)

    block = PreActivationBlock(
        features=4,
        stride=2,
        conv=conv,
        activation=lambda x: x,
        binary_downsampling=binary_downsampling,
        output_scale_case=1 if binary_downsampling else None,
    )
    values, found = run_block(block, IMAGES)

    def layer(name, inputs, stride, padding):
        y = correlate(sign(inputs), sign(values["params"][name]["latent_kernel"]), stride, padding)
        return y * values["params"][f"{name}_scale"]["scale"] if binary_downsampling else y

    inputs = normalize(values, "norm1", IMAGES)
    y = layer("conv2", normalize(values, "norm2", layer("conv1", inputs, 2, 1)), 1, 1)
    if binary_downsampling:
        shortcut = layer("downsample", inputs, 2, 0)
    else:
        edged = np.concatenate([IMAGES, IMAGES[:, -1:]], axis=1)  # the last row doubled: the mean of what is there
        halved = edged.reshape(2, 3, 2, 3, 2, 3).mean((2, 4))
        shortcut = relu(normalize(values, "norm_downsample", halved)) @ values["params"]["downsample"]["kernel"][0, 0]
    np.testing.assert_allclose(found, y + shortcut, rtol=1e-4, atol=1e-4)


def with_zero_gain(params, name):
    """The parameters with gamma = beta = 0 in the batch norms called `name`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if name in {key.key for key in path} else leaf, params
    )


def test_zero_gain_leaves_the_shortcut():
    model = PostActivationResNet(**TINY | {"stage_sizes": (2,)})
    images = jnp.asarray(np.random.default_rng(2).normal(size=(2, 8, 8, 3)), jnp.float32)
    variables = random_variables(model, images)
    variables = variables | {"params": with_zero_gain(variables["params"], "norm2")}
    stem = {name: values["stem"] for name, values in variables.items()}
    stage1, start = jax.jit(
        lambda: (model.apply(variables, images, train=False)[1]["stage1"], Stem(4).apply(stem, images, train=False))
    )()
    np.testing.assert_allclose(stage1, start, rtol=1e-6)
    assert float(jnp.abs(start).max()) > 0


@pytest.mark.parametrize(("quantizers", "signs"), [(SIGN, {-1, 1}), ({}, {0, 1})], ids=["binary", "full precision"])
def test_no_relu_stands_before_a_sign(quantizers, signs):
    model = PostActivationResNet(**TINY | {"stage_sizes": (1,)}, **quantizers)
    images = jnp.asarray(np.random.default_rng(4).normal(size=(2, 8, 8, 3)), jnp.float32)
    variables = random_variables(model, images)
    variables["params"]["stage1_block1"]["norm2"]["scale"] *= 0
    variables["params"]["stage1_block1"]["norm2"]["bias"] *= 0
    stage1 = jax.jit(lambda: model.apply(variables, images, train=False)[1]["stage1"])()
    assert set(np.sign(stage1).ravel().tolist()) == signs


@pytest.mark.parametrize(
    ("constructor", "arguments"),
    [
        (PostActivationResNet, {}),
        (PreActivationResNet, XNOR | {"output_scale_case": 4}),
        (PreActivationResNet, TBN | {"binary_downsampling": False}),
    ],
    ids=["full precision", "xnor++", "tbn"],
)
def test_training_reaches_every_parameter(constructor, arguments):
    model = constructor(**TINY, **arguments)
    images = jnp.asarray(np.random.default_rng(3).normal(size=(2, 16, 16, 3)), jnp.float32)
    variables = random_variables(model, images)

    def loss(params):
        (logits, _), state = model.apply(
            variables | {"params": params}, images, train=True, progress=0.5, mutable=["batch_stats", "quantizer_state"]
        )
        return (logits * jnp.arange(3.0)[None]).sum(), (logits, state)

    gradients, (logits, state) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert jnp.isfinite(logits).all()
    assert set(state) == set(variables) - {"params"}
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.isfinite(gradient).all(), path
        assert jnp.abs(gradient).max() > 0, path


@pytest.mark.parametrize(
    ("text", "constructor", "arguments"),
    [
        (r"`num_classes` \(=0\) of PostActivationResNet must be at least 1", resnet18, {"num_classes": 0}),
        (r"`width` \(=0\) of PreActivationResNet must be at least 1; 16 is usual", tbn_resnet18, {"width": 0}),
        (r"`stage_sizes` \(=\(2, 0\)\) of PostActivationResNet must hold", resnet34, {"stage_sizes": (2, 0)}),
        (
            r"`output_scale_case` \(=5\) of PreActivationResNet must be 1, 2, 3 or 4",
            xnor_resnet18,
            {"output_scale_case": 5},
        ),
    ],
)
def test_refusals(text, constructor, arguments):
    with pytest.raises(ValueError, match=text):
        constructor(**{"num_classes": 10} | arguments)

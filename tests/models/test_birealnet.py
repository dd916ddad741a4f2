"""Bi-Real Net and its variants: sizes by hand count; units against numpy; what a batch norm of zero leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.models.birealnet import (
    BiRealNet,
    BiRealUnit,
    bireal18,
    bireal34,
    bireal_resnet20,
    ebireal18,
    ebireal34,
    ftbnn_resnet18,
    leaky_clip,
)
from bnn_jax.models.stem import Stem
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

BINARY = {
    "input_quantizer": ACTIVATION_QUANTIZERS["approx_sign"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["magnitude_aware"](),
}
TINY = {"num_classes": 3, "width": 4, "stem": "cifar"} | BINARY
DOWNSAMPLING = 64 * 128 + 128 * 256 + 256 * 512
ENDS = 7 * 7 * 3 * 64 + 512 * 1000
"""The kernels of stem and classifier."""


def shapes_of(model, size=224):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False))["params"]


def leaves_of(params, leaf):
    flat = jax.tree_util.tree_leaves_with_path(params)
    return [int(np.prod(value.shape)) for path, value in flat if path[-1].key == leaf]


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
    params = shapes_of(constructor(num_classes=1000, **BINARY))
    latent, real = leaves_of(params, "latent_kernel"), leaves_of(params, "kernel")
    assert (len(latent), sum(latent)) == (layers, binary)
    assert (len(real), sum(real)) == (5, ENDS + DOWNSAMPLING)
    assert round((32 * (sum(real) + 1000) + sum(latent)) / 1e6, 1) == megabits


def test_resnet20_has_nineteen_convolutions():
    """Stages of 6 layers, the first of each but the first stage doubling the width; kernels 3x3."""
    params = shapes_of(bireal_resnet20(num_classes=10, **BINARY), 32)
    latent = leaves_of(params, "latent_kernel")
    assert (len(latent), sum(latent)) == (18, 13_824 + 50_688 + 202_752)
    assert sorted(leaves_of(params, "kernel")) == sorted([3 * 3 * 3 * 16, 16 * 32, 32 * 64, 64 * 10])


@pytest.mark.parametrize(("constructor", "slopes"), [(ftbnn_resnet18, 3840), (bireal18, 0)])
def test_ftbnn_learns_two_slopes_a_channel(constructor, slopes):
    """4 (64 + 128 + 256 + 512) channels follow the convolutions."""
    params = shapes_of(constructor(num_classes=1000, **BINARY))
    assert sum(leaves_of(params, "slope")) == slopes
    assert sum(leaves_of(params, "positive_slope")) == slopes


@pytest.mark.parametrize("size", [16, 20, 33])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_stages_halve_images_of_any_size(size, stem):
    model = BiRealNet(**TINY | {"stem": stem, "stage_sizes": (1, 1, 1)})
    images = jnp.zeros((2, size, size + 1, 3))
    (logits, intermediates), _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, train=False))
    sides = [size, size + 1] if stem == "cifar" else [-(-size // 4), -(-(size + 1) // 4)]
    for stage in (1, 2, 3):
        assert intermediates[f"stage{stage}"].shape == (2, *sides, 4 * 2 ** (stage - 1))
        sides = [-(-side // 2) for side in sides]
    assert intermediates["features"].shape == (2, 16)
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)


def random_variables(module, x, **arguments):
    """Variables of normal draws, but positive statistics; no time is lost on compiling the module's own start."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False, **arguments))
    generator = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), shapes)
    return {name: draws if name == "params" else jax.tree.map(np.exp, draws) for name, draws in values.items()}


def correlate(x, kernel, stride):
    """Correlation of NHWC images with a 3x3 HWIO kernel, zero padding 1, by loops over the kernel's taps."""
    rows, columns = ((side - 1) // stride + 1 for side in x.shape[1:3])
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        x[:, i : i + stride * rows : stride, j : j + stride * columns : stride] @ kernel[i, j]
        for i, j in np.ndindex(3, 3)
    )


def normalize(values, name, x):
    stats, affine = values["batch_stats"][name], values["params"][name]
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * affine["scale"] + affine["bias"]


def numpy_shortcut(values, x):
    """x, or the 2x2 means of x with the last row and column doubled where odd, times the 1x1 kernel, normalized."""
    if "downsample" not in values["params"]:
        return x
    b, h, w, c = x.shape
    x = np.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    x = x.reshape(b, -(-h // 2), 2, -(-w // 2), 2, c).mean((2, 4))
    return normalize(values, "norm_downsample", x @ values["params"]["downsample"]["kernel"][0, 0])


def numpy_unit(values, x, stride):
    """The unit in numpy: magnitude-aware binary weights, binary inputs, and the two slopes where there are any."""
    kernel = values["params"]["conv"]["latent_kernel"]
    kernel = np.abs(kernel).mean((0, 1, 2)) * np.where(kernel < 0, -1.0, 1.0)
    y = normalize(values, "norm", correlate(np.where(x < 0, -1.0, 1.0), kernel, stride)) + numpy_shortcut(values, x)
    if "prelu" in values["params"]:
        slopes = values["params"]["prelu"]
        y = y * np.where(y > 0, slopes["positive_slope"], slopes["slope"])
    return y


@pytest.mark.parametrize("trainable_slopes", [False, True])
@pytest.mark.parametrize(("stride", "features"), [(1, 3), (2, 6)])
def test_a_unit_equals_numpy(stride, features, trainable_slopes):
    unit = BiRealUnit(features=features, stride=stride, activation="relu", trainable_slopes=trainable_slopes, **BINARY)
    x = np.random.default_rng(1).normal(size=(2, 5, 6, 3)).astype(np.float32)
    variables = random_variables(unit, x, progress=1.0)
    y, shortcut = jax.jit(lambda: unit.apply(variables, x, train=False, progress=1.0))()
    np.testing.assert_allclose(y, numpy_unit(variables, x, stride), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(shortcut, numpy_shortcut(variables, x), rtol=1e-4, atol=1e-4)


def block_of(variables, name):
    return {collection: values[name] for collection, values in variables.items() if name in values}


def test_the_outer_shortcut_adds_the_inputs_of_each_pair():
    """z = u1(x), y = u2(z) + S(x), in both stages; without the option y = u2(z)."""
    images = np.random.default_rng(2).normal(size=(2, 8, 8, 3)).astype(np.float32)
    outer, plain = (BiRealNet(**TINY, stage_sizes=(2, 2), outer_shortcut=choice) for choice in (True, False))
    variables = random_variables(outer, images)
    stem = Stem(4, relu=False)
    start, with_outer, without = jax.jit(
        lambda: (
            stem.apply(block_of(variables, "stem"), images, train=False),
            outer.apply(variables, images, train=False)[1],
            plain.apply(variables, images, train=False)[1],
        )
    )()
    for found, times in ((with_outer, 1), (without, 0)):
        x = start
        for stage in (1, 2):
            first, second = (block_of(variables, f"stage{stage}_unit{unit}") for unit in (1, 2))
            y = numpy_unit(second, numpy_unit(first, x, stage), 1) + times * numpy_shortcut(first, x)
            np.testing.assert_allclose(found[f"stage{stage}"], y, rtol=1e-3, atol=1e-3)
            x = found[f"stage{stage}"]


def test_zero_gain_makes_every_unit_its_shortcut():
    model = BiRealNet(**TINY, stage_sizes=(3, 2))
    images = np.random.default_rng(3).normal(size=(2, 8, 8, 3)).astype(np.float32)
    variables = random_variables(model, images)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if path[0].key != "stem" and path[1].key == "norm" else leaf, variables["params"]
    )
    variables = variables | {"params": params}
    start, found = jax.jit(
        lambda: (
            Stem(4, relu=False).apply(block_of(variables, "stem"), images, train=False),
            model.apply(variables, images, train=False)[1],
        )
    )()
    np.testing.assert_allclose(found["stage1"], start, rtol=1e-6)
    assert float(jnp.min(start)) < 0
    expected = numpy_shortcut(block_of(variables, "stage2_unit1"), np.asarray(start))
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
    unit = BiRealUnit(
        features=1,
        stride=1,
        input_quantizer=None,
        kernel_quantizer=None,
        activation=activation,
        trainable_slopes=False,
    )
    variables = {
        "params": {
            "conv": {"kernel": jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)},
            "norm": {"scale": jnp.ones(1), "bias": jnp.zeros(1)},
        },
        "batch_stats": {"norm": {"mean": jnp.zeros(1), "var": jnp.ones(1)}},
    }
    y, shortcut = unit.apply(variables, inputs, train=False, progress=1.0)
    np.testing.assert_allclose((y - shortcut).ravel(), values, rtol=1e-4)


def test_the_slopes_of_leaky_clip():
    x = jnp.array([-3, -1, 0.5, 1, 3], jnp.float32)
    np.testing.assert_allclose(jax.grad(lambda x: leaky_clip(x).sum())(x), [0.1, 1, 1, 1, 0.1], rtol=1e-6)


def test_training_with_real_inputs_reaches_every_parameter():
    """With binary ones the table of networks is trained, where every parameter of every network moves."""
    model = BiRealNet(**TINY | {"stage_sizes": (1, 1), "trainable_slopes": True, "input_quantizer": None})
    images = np.random.default_rng(4).normal(size=(2, 8, 8, 3)).astype(np.float32)
    variables = random_variables(model, images)

    def loss(params):
        (logits, _), state = model.apply(
            variables | {"params": params}, images, train=True, progress=0.5, mutable=["batch_stats"]
        )
        return (logits * jnp.arange(3.0)[None]).sum(), (logits, state)

    gradients, (logits, state) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert jnp.isfinite(logits).all()
    assert set(state) == {"batch_stats"}
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.isfinite(gradient).all(), path
        assert jnp.abs(gradient).max() > 0, path


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (r"`num_classes` \(=0\) of BiRealNet must be at least 1", {"num_classes": 0}),
        (r"`stage_sizes` \(=\(\)\) of BiRealNet must hold at least one stage", {"stage_sizes": ()}),
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

"""BNAS: parameter counts of the authors' release, operations and cells against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.models.bnas import BNAS, CIFAR_CELLS, IMAGENET_CELLS, BinaryLayer, Cell, Genotype, bnas_a, bnas_e, pool
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

BINARY = {
    "input_quantizer": ACTIVATION_QUANTIZERS["ste_sign"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["binary"](),
}
SMALL = Genotype(
    normal=((("conv_3x3", 1), ("max_pool_3x3", 0)),),
    reduction=((("dilated_conv_3x3", 0), ("avg_pool_3x3", 1)),),
)


def shapes_of(model, side):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), train=False))


def size(tree, name=None):
    named = jax.tree_util.tree_leaves_with_path(tree)
    return sum(int(np.prod(leaf.shape)) for path, leaf in named if name in (None, path[-1].key))


@pytest.mark.parametrize(
    ("model", "side", "parameters"),
    [
        (bnas_a(num_classes=10, **BINARY), 32, 5_578_252),
        (BNAS(num_classes=1000, width=68, num_cells=15, stem="imagenet", **BINARY), 224, 39_781_442),
    ],
    ids=["BNAS-A", "BNAS-F"],
)
def test_parameters_that_the_release_prints(model, side, parameters):
    assert size(shapes_of(model, side)["params"]) == parameters


def test_operations_of_bnas_e():
    """The paper's 0.16 GFLOP: 1/64 of the binary products, and all of the stem and the dense layer; no skips."""
    params = shapes_of(bnas_e(num_classes=1000, stem="imagenet", **BINARY), 224)["params"]
    side, binary = 28, 0
    for index in range(12):
        cell = params[f"cell{index + 1}"]
        before, side = side, side // 2 if index in (4, 8) else side
        for name, layer in cell.items():
            if not name.startswith("skip"):
                binary += size(layer, "latent_kernel") * (before if name.startswith("input") else side) ** 2
    stem = sum(size(params[f"stem_conv{index}"]) * side**2 for index, side in ((1, 112), (2, 56), (3, 28)))
    assert f"{(stem + size(params['head'], 'kernel') + binary / 64) / 1e9:.2f}" == "0.16"


def test_full_precision_layers():
    params = shapes_of(BNAS(num_classes=10, width=4, num_cells=6, **BINARY), 16)["params"]
    paths = [[entry.key for entry in path] for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    layers = {tuple(path[:-1]) for path in paths if path[-1] == "kernel"}
    assert layers == {("stem_conv",), ("cell3", "skip_conv"), ("cell5", "skip_conv"), ("head",)}
    assert size(shapes_of(BNAS(num_classes=10, width=4, num_cells=3), 16), "latent_kernel") == 0


@pytest.mark.parametrize(("stem", "side", "sides"), [("cifar", 32, (32, 16, 8)), ("imagenet", 224, (28, 14, 7))])
def test_intermediates(stem, side, sides):
    model = BNAS(num_classes=10, width=4, num_cells=4, stem=stem, **BINARY)
    logits, intermediates = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), jnp.zeros((2, side, side, 3)), train=False)[0]
    )
    expected = {f"stage{s + 1}": (2, sides[s], sides[s], 16 * 2**s) for s in range(3)} | {"features": (2, 64)}
    assert {name: value.shape for name, value in intermediates.items()} == expected
    assert logits.shape == (2, 10)


def windows(x, stride, fill):
    """The 3x3 neighbours of every stride-th pixel, on a new first axis."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=fill)
    height, width = x.shape[1:3]
    return np.stack([padded[:, i : i + height : stride, j : j + width : stride] for i, j in np.ndindex(3, 3)])


@pytest.mark.parametrize("stride", [1, 2])
def test_pools_equal_numpy(stride):
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
    np.testing.assert_array_equal(pool(jnp.asarray(x), "max_pool_3x3", stride), windows(x, stride, -np.inf).max(0))
    inside = windows(x, stride, np.nan)
    np.testing.assert_allclose(
        pool(jnp.asarray(x), "avg_pool_3x3", stride), np.nanmean(inside, 0), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(pool(jnp.asarray(x), "zeroise", stride), np.zeros_like(x[:, ::stride, ::stride]))


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


@pytest.mark.parametrize(
    ("kernel_size", "dilation", "stride", "pad"), [(1, 1, 1, 0), (3, 1, 2, 1), (5, 2, 1, 4), (3, 2, 2, 2)]
)
def test_a_layer_equals_numpy(kernel_size, dilation, stride, pad):
    """BN -> sign -> conv -> ReLU; the pads are those of the release, 2 and 4 for dilated kernels of 3 and 5."""
    layer = BinaryLayer(2, size=kernel_size, dilation=dilation, stride=stride, **BINARY)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 6, 6, 3)), jnp.float32)
    variables = random_variables(layer, x)
    v = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    codes = np.where(norm(np.asarray(x, np.float64), v, "norm") < 0, -1.0, 1.0)
    padded = np.pad(codes, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    kernel = np.where(v["params"]["conv"]["latent_kernel"] < 0, -1.0, 1.0)
    taps = np.ndindex(kernel_size, kernel_size)
    y = sum(padded[:, i * dilation :, j * dilation :][:, :6:stride, :6:stride] @ kernel[i, j] for i, j in taps)
    np.testing.assert_array_equal(layer.apply(variables, x, train=False), np.maximum(y, 0))


def test_a_cell_of_zeros_is_its_skip():
    zeros = ((("zeroise", 0), ("zeroise", 1)), (("zeroise", 2), ("zeroise", 0)))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 4, 4, 6)), jnp.float32)
    for skip, expected in ((True, x), (False, jnp.zeros_like(x))):
        cell = Cell(3, zeros, reduction=False, skip=skip, catch_up=False, affine=True, **BINARY)
        y = cell.apply(random_variables(cell, x, x), x, x, train=False)
        np.testing.assert_array_equal(y, expected)


def test_the_reduction_cell_for_cifar_equals_numpy():
    """Its first two nodes are the maxima of the older input, its last two zero; the skip is BN and a 2x2 product."""
    cell = Cell(2, CIFAR_CELLS.reduction, reduction=True, skip=True, catch_up=False, affine=True, **BINARY)
    older, previous = (
        jnp.asarray(np.random.default_rng(seed).normal(size=(2, 4, 4, 8)), jnp.float32) for seed in (4, 5)
    )
    variables = random_variables(cell, older, previous)
    v = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    first = {name: values["input0"] for name, values in v.items()}
    codes = np.where(norm(np.asarray(older, np.float64), first, "norm") < 0, -1.0, 1.0)
    state = np.maximum(codes @ np.where(first["params"]["conv"]["latent_kernel"][0, 0] < 0, -1.0, 1.0), 0)
    nodes = windows(state, 2, -np.inf).max(0)
    x, skip = norm(np.asarray(previous, np.float64), v, "skip_norm"), v["params"]["skip_conv"]
    quarters = sum(x[:, i::2, j::2] @ skip["kernel"][i, j] for i, j in np.ndindex(2, 2))
    expected = np.concatenate([nodes, nodes, 0 * nodes, 0 * nodes], -1) + quarters + skip["bias"]
    np.testing.assert_allclose(cell.apply(variables, older, previous, train=False), expected, rtol=1e-4, atol=1e-4)


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
    return {"/".join(entry.key for entry in path) for path, leaf in found if abs(leaf).max() < 1e-5}


def test_the_gradient_reaches_every_parameter():
    """But the shifts of the first reduction's skip, which the second reduction's batch norms take out again."""
    model = BNAS(num_classes=5, width=4, num_cells=3, genotype=SMALL, **BINARY)
    assert parameters_without_gradient(model) == {"cell2/skip_norm/bias", "cell2/skip_conv/bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 1}, r"`width` \(=1\) of BNAS must be at least 2; 68 is usual"),
        ({"num_cells": 2}, r"`num_cells` \(=2\) of BNAS must be at least 3; 12 is usual"),
        ({"stem": "large"}, r"`stem` \(='large'\) of BNAS must be cifar \(small images\) or imagenet"),
        (
            {"genotype": Genotype(IMAGENET_CELLS.normal, ())},
            r"`genotype` \(with 4 normal and 0 reduction nodes\) of BNAS must have as many of one as of the other",
        ),
        (
            {"genotype": Genotype(((("skip", 0), ("zeroise", 1)),), ((("zeroise", 0), ("zeroise", 1)),))},
            r"`genotype` \(with 'skip'\) of BNAS must choose from zeroise, max_pool_3x3",
        ),
        (
            {"genotype": Genotype(((("conv_3x3", 2), ("zeroise", 1)),), ((("zeroise", 0), ("zeroise", 1)),))},
            r"`genotype` \(with input 2 of node 1\) of BNAS must take inputs from 0 to 1",
        ),
    ],
)
def test_networks_that_cannot_be_built(options, message):
    with pytest.raises(ValueError, match=message):
        BNAS(num_classes=10, **options)


@pytest.mark.parametrize(
    ("stem", "side", "message"),
    [
        ("cifar", 18, r"`images` \(of 18x18\) leave BNAS 9x9 pixels to halve; with the cifar stem sides .* of 4 fit"),
        ("imagenet", 16, r"`images` \(of 16x16\) leave BNAS 1x1 pixels to halve; .* multiples of 32 fit"),
    ],
)
def test_images_that_do_not_halve(stem, side, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(BNAS(num_classes=10, width=4, num_cells=3, stem=stem), side)

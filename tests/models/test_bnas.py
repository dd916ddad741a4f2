"""BNAS: parameter counts of the authors' release, operations and cells against numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from networks import (
    SIGNS,
    apply,
    count,
    exact,
    normal,
    of_layers,
    outputs_of,
    random_variables,
    shapes_of,
    within,
    without_gradient,
)
from numpy_layers import correlate, normalize, relu, signs

from bnn_jax.models.bnas import BNAS, CIFAR_CELLS, IMAGENET_CELLS, BinaryLayer, Cell, Genotype, bnas_a, bnas_e, pool

SMALL = Genotype(
    normal=((("conv_3x3", 1), ("max_pool_3x3", 0)),),
    reduction=((("dilated_conv_3x3", 0), ("avg_pool_3x3", 1)),),
)


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "side", "parameters"),
    [
        (bnas_a(num_classes=10, **SIGNS), 32, 5_578_252),
        (BNAS(num_classes=1000, width=68, num_cells=15, stem="imagenet", **SIGNS), 224, 39_781_442),
    ],
    ids=["BNAS-A", "BNAS-F"],
)
def test_parameters_that_the_release_prints(model, side, parameters):
    assert count(shapes_of(model, side)["params"]) == parameters


def test_operations_of_bnas_e():
    """The paper's 0.16 GFLOP: 1/64 of the binary products, and all of the stem and the dense layer; no skips."""
    params = shapes_of(bnas_e(num_classes=1000, **SIGNS), 224)["params"]
    side, binary = 28, 0
    for index in range(12):
        cell = params[f"cell{index + 1}"]
        before, side = side, side // 2 if index in (4, 8) else side
        for name, layer in cell.items():
            if not name.startswith("skip"):
                binary += count(layer, "latent_kernel") * (before if name.startswith("input") else side) ** 2
    stem = sum(count(params[f"stem_conv{index}"]) * side**2 for index, side in ((1, 112), (2, 56), (3, 28)))
    assert f"{(stem + count(params['head'], 'kernel') + binary / 64) / 1e9:.2f}" == "0.16"


def test_full_precision_layers():
    params = shapes_of(BNAS(num_classes=10, width=4, num_cells=6, **SIGNS), 16)["params"]
    assert set(of_layers(params, "kernel")) == {"stem_conv", "cell3/skip_conv", "cell5/skip_conv", "head"}


@pytest.mark.parametrize(("stem", "side", "sides"), [("cifar", 32, (32, 16, 8)), ("imagenet", 224, (28, 14, 7))])
def test_intermediates(stem, side, sides):
    model = BNAS(num_classes=10, width=4, num_cells=4, stem=stem, **SIGNS)
    logits, intermediates = outputs_of(model, side)
    expected = {f"stage{s + 1}": (1, sides[s], sides[s], 16 * 2**s) for s in range(3)} | {"features": (1, 64)}
    assert {name: value.shape for name, value in intermediates.items()} == expected
    assert logits.shape == (1, 10)


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


@pytest.mark.parametrize(
    ("kernel_size", "dilation", "stride", "pad"), [(1, 1, 1, 0), (3, 1, 2, 1), (5, 2, 1, 4), (3, 2, 2, 2)]
)
def test_a_layer_equals_numpy(kernel_size, dilation, stride, pad):
    """BN -> sign -> conv -> ReLU; the pads are those of the release, 2 and 4 for dilated kernels of 3 and 5."""
    layer, x = BinaryLayer(2, kernel_size, SIGNS, dilation=dilation, stride=stride), normal(2, 6, 6, 3, seed=2)
    variables = random_variables(layer, x)
    values = exact(variables)
    codes, kernel = signs(normalize(exact(x), values, "norm")), signs(values["params"]["conv"]["latent_kernel"])
    np.testing.assert_array_equal(apply(layer, variables, x), relu(correlate(codes, kernel, stride, pad, dilation)))


def test_a_cell_of_zeros_is_its_skip():
    zeros = ((("zeroise", 0), ("zeroise", 1)), (("zeroise", 2), ("zeroise", 0)))
    x = normal(2, 4, 4, 6, seed=3)
    for skip, expected in ((True, x), (False, jnp.zeros_like(x))):
        cell = Cell(3, zeros, reduction=False, skip=skip, catch_up=False, affine=True, quantizers=SIGNS)
        y = cell.apply(random_variables(cell, x, x), x, x, train=False)
        np.testing.assert_array_equal(y, expected)


def test_the_reduction_cell_for_cifar_equals_numpy():
    """Its first two nodes are the maxima of the older input, its last two zero; the skip is BN and a 2x2 product."""
    cell = Cell(2, CIFAR_CELLS.reduction, reduction=True, skip=True, catch_up=False, affine=True, quantizers=SIGNS)
    older, previous = normal(2, 4, 4, 8, seed=4), normal(2, 4, 4, 8, seed=5)
    variables = random_variables(cell, older, previous)
    values = exact(variables)
    first = within(values, "input0")
    codes = signs(normalize(exact(older), first, "norm"))
    nodes = windows(relu(correlate(codes, signs(first["params"]["conv"]["latent_kernel"]))), 2, -np.inf).max(0)
    skip = values["params"]["skip_conv"]
    halved = correlate(normalize(exact(previous), values, "skip_norm"), skip["kernel"], stride=2) + skip["bias"]
    expected = np.concatenate([nodes, nodes, 0 * nodes, 0 * nodes], -1) + halved
    np.testing.assert_allclose(apply(cell, variables, older, previous), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_the_gradient_reaches_every_parameter():
    """But the shifts of the first reduction's skip, which the second reduction's batch norms take out again."""
    model = BNAS(num_classes=5, width=4, num_cells=3, genotype=SMALL, **SIGNS)
    assert without_gradient(model, normal(4, 8, 8, 3, seed=3)) == {"cell2/skip_norm/bias", "cell2/skip_conv/bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 1}, r"`width` \(=1\) of BNAS must be at least 2; 68 is usual"),
        ({"num_cells": 2}, r"`num_cells` \(=2\) of BNAS must be at least 3; 12 is usual"),
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

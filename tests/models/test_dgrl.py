"""DGRL: sizes by hand count, the block's parts one by one, shapes, errors."""

import flax.linen as nn
import numpy as np
import pytest
from networks import (
    BI_REAL,
    REAL,
    apply,
    conv_of,
    count,
    exact,
    normal,
    outputs_of,
    random_variables,
    replaced,
    shapes_of,
    within,
)
from numpy_layers import correlate, magnitude_aware, normalize, relu, signs

from bnn_jax.models.dgrl import DgrlBlock, SqueezeInteraction, dgrl_resnet18


def test_sizes_by_hand_count():
    """A branch C -> F holds C^2/4 + 9 C^2/16 + C F/4 weights: 11 % of the binary ones, by the paper about 10 %."""
    params = shapes_of(dgrl_resnet18(num_classes=1000, **BI_REAL), 224)["params"]
    assert count(params, "latent_kernel") == 10_985_472
    branch = lambda c, f: c * c // 4 + 9 * c * c // 16 + c * f // 4
    transitions = sum(branch(c, 2 * c) for c in (64, 128, 256))
    expected = 4 * branch(64, 64) + transitions + 3 * sum(branch(c, c) for c in (128, 256, 512))
    assert count(params, "branch1", "kernel") + count(params, "branch2", "kernel") == expected == 1_227_008
    assert count(params, "kernel") == 9408 + 172_032 + 512_000 + expected
    assert 0.10 < expected / 10_985_472 < 0.12


@pytest.mark.parametrize(("features", "stride"), [(4, 1), (8, 2)])
def test_the_branch_equals_numpy(features, stride):
    x, branch = normal(2, 6, 4, 4), SqueezeInteraction(features, stride, reduction=2)
    variables = random_variables(branch, x)
    values, y = exact(variables), exact(x)
    for name, strides, padding in (("squeeze", 1, 0), ("interact", stride, 1), ("expand", 1, 0)):
        y = correlate(y, values["params"][name]["kernel"], strides, padding)
        y = normalize(y, values, f"{name}_norm")
        y = y if name == "expand" else relu(y)
    np.testing.assert_allclose(apply(branch, variables, x), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("quantizers", [BI_REAL, REAL], ids=["binary", "real"])
def test_a_unit_is_the_sum_of_its_parts(quantizers):
    x, real = normal(2, 4, 4, 4), quantizers is REAL
    block = DgrlBlock(4, 1, conv_of(**quantizers), 1, nn.relu if real else lambda y: y, reduction=2)
    variables = random_variables(block, x, progress=0.0)
    outputs = lambda variables: apply(block, variables, x, progress=0.0)
    no_branch = replaced(variables, lambda path: path.startswith("branch1/expand_norm"), 0.0)
    no_conv = replaced(variables, lambda path: path.startswith("norm1"), 0.0)
    neither = replaced(no_branch, lambda path: path.startswith("norm1"), 0.0)
    np.testing.assert_array_equal(outputs(neither)[0], x)
    branch = apply(SqueezeInteraction(4, 1, 2), within(variables, "branch1"), x)
    np.testing.assert_allclose(outputs(no_conv)[0], branch + x, rtol=1e-4, atol=1e-4)

    values, inputs = exact(variables), exact(x)
    (kernel,) = values["params"]["conv1"].values()
    y = correlate(relu(inputs) if real else signs(inputs), kernel if real else magnitude_aware(kernel), padding=1)
    np.testing.assert_allclose(outputs(no_branch)[0], normalize(y, values, "norm1") + inputs, rtol=1e-4, atol=1e-4)


def test_units_to_match():
    model = dgrl_resnet18(num_classes=3, width=4, stage_sizes=(3, 1), stem="cifar", reduction=2, **BI_REAL)
    _, intermediates = outputs_of(model, 8)
    units = {f"stage1_unit{unit}": (1, 8, 8, 4) for unit in (1, 2, 3)} | {"stage2_unit1": (1, 4, 4, 8)}
    shapes = {name: value.shape for name, value in intermediates.items()}
    assert shapes == units | {"stage1": (1, 8, 8, 4), "stage2": (1, 4, 4, 8), "features": (1, 8)}


def test_errors():
    message = (
        r"`reduction` \(=4\) leaves a branch with no channels of the 3 inputs of layer 'stage1_block1/branch1'; "
        r"it must be at most 3"
    )
    with pytest.raises(ValueError, match=message):
        shapes_of(dgrl_resnet18(num_classes=3, width=3), 8)
    with pytest.raises(ValueError, match=r"`reduction` \(=0\) must be positive in layer 'branch1'; 4 is usual"):
        shapes_of(dgrl_resnet18(num_classes=3, reduction=0), 8)

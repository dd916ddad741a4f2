"""Real-to-Binary: sizes by hand count and larq's total, the block against numpy, outputs, errors."""

import jax.numpy as jnp
import numpy as np
import pytest
from networks import (
    REAL,
    SIGNS,
    apply,
    conv_of,
    count,
    exact,
    normal,
    outputs_of,
    random_variables,
    replaced,
    shapes_of,
)
from numpy_layers import correlate, normalize, projected, relu, signs, stem_of

from bnn_jax.models.real_to_binary import (
    RealToBinaryBlock,
    real_to_binary_baseline_resnet18,
    real_to_binary_resnet18,
)


def test_sizes_by_hand_count():
    params = shapes_of(real_to_binary_resnet18(num_classes=1000, **SIGNS), 224)["params"]
    assert count(params, "latent_kernel") == 10_985_472
    within = 4 * 1024 + 3 * 4096 + 3 * 16_384 + 3 * 65_536
    between = 8 * (64 + 128) + 16 * (128 + 256) + 32 * (256 + 512)
    gates = count(params, "gate1") + count(params, "gate2")
    assert gates == within + between
    assert count(params, "kernel") - gates == 9408 + 172_032 + 512_000
    assert count(params, "slope") == 4 * (64 + 128 + 256 + 512)


def test_total_of_larq_zoo():
    """11,995,624 values, the running statistics included, and a PReLU in the stem."""
    model = real_to_binary_resnet18(num_classes=1000, stem_prelu=True, **SIGNS)
    assert count(shapes_of(model, 224)) == 11_995_624


def test_the_baseline_has_scales_of_case_4():
    params = shapes_of(real_to_binary_baseline_resnet18(num_classes=1000, **SIGNS), 224)["params"]
    assert count(params, "gate1") == count(params, "gate2") == 0
    sides = 4 * 2 * (56 + 28 + 14 + 7)
    assert count(params, "column_scale") + count(params, "row_scale") == sides
    assert {name: leaf.shape for name, leaf in params["stage2_block1"]["conv1_scale"].items()} == {
        "scale": (1, 1, 128),
        "row_scale": (28, 1, 1),
        "column_scale": (1, 28, 1),
    }
    assert count(params, "stem_activation", "slope") == 64


@pytest.mark.parametrize(
    ("gate", "stride", "quantizers"), [(True, 1, SIGNS), (True, 2, SIGNS), (False, 2, SIGNS), (True, 1, REAL)]
)
def test_the_block_equals_numpy(gate, stride, quantizers):
    """Twice PReLU( scale * conv(q(z)) ) + S(x), z = BN(x)."""
    x, real = normal(2, 6, 4, 4), quantizers is REAL
    activation = jnp.tanh if real else lambda z: z
    block = RealToBinaryBlock(4 * stride, stride, conv_of(**quantizers), activation, gate=gate, reduction=2)
    variables = random_variables(block, x, progress=0.0)
    values, expected = exact(variables), np.asarray(x, np.float64)
    params = values["params"]
    for half in (1, 2):
        z = normalize(expected, values, f"norm{half}")
        (kernel,) = params[f"conv{half}"].values()
        y = correlate(np.tanh(z) if real else signs(z), kernel if real else signs(kernel), stride, padding=1)
        if gate:
            squeeze, expand = (params[f"gate{half}"][name]["kernel"] for name in ("squeeze", "expand"))
            y *= (1 / (1 + np.exp(-relu(z.mean((1, 2)) @ squeeze) @ expand)))[:, None, None]
        else:
            scales = params[f"conv{half}_scale"]
            y *= scales["scale"] * scales["row_scale"] * scales["column_scale"]
        y = np.where(y > 0, y, params[f"activation{half}"]["slope"] * y)
        expected, stride = y + (projected(expected, values, stride) if half == 1 else expected), 1
    np.testing.assert_allclose(apply(block, variables, x, progress=0.0), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prelu", [False, True])
def test_the_stems_activation_and_what_the_network_hands_out(prelu):
    """Scales of zero leave of a block its shortcut, so what the stem hands on."""
    options = {"width": 4, "stage_sizes": (1,), "stem": "cifar", "stem_prelu": prelu}
    model, images = real_to_binary_baseline_resnet18(num_classes=3, **options, **SIGNS), normal(2, 8, 8, 3)
    variables = replaced(random_variables(model, images), lambda path: path.endswith("_scale/scale"), 0.0)
    logits, intermediates = apply(model, variables, images)
    y = stem_of(variables, images)
    slope = variables["params"]["stem_activation"]["slope"] if prelu else 0
    np.testing.assert_allclose(intermediates["stage1"], np.where(y > 0, y, slope * y), rtol=1e-4, atol=1e-4)
    assert logits.shape == (2, 3) and logits.dtype == jnp.float32 and jnp.isfinite(logits).all()
    np.testing.assert_array_equal(intermediates["stage1"], intermediates["stage1_block1"])
    np.testing.assert_allclose(intermediates["features"], intermediates["stage1"].mean((1, 2)), rtol=1e-5)


def test_eight_blocks_to_match():
    _, intermediates = outputs_of(real_to_binary_resnet18(num_classes=3, width=8, stem="cifar", **SIGNS), 32)
    blocks = {name: value.shape for name, value in intermediates.items() if "block" in name}
    sizes = {1: (32, 8), 2: (16, 16), 3: (8, 32), 4: (4, 64)}
    assert blocks == {f"stage{s}_block{b}": (1, n, n, c) for s, (n, c) in sizes.items() for b in (1, 2)}


def test_a_gate_needs_channels():
    message = (
        r"`reduction` \(=8\) must be at most 4, the number of the gate's inputs, in layer 'stage1_block1/gate1'; "
        r"8 is the paper's"
    )
    with pytest.raises(ValueError, match=message):
        shapes_of(real_to_binary_resnet18(num_classes=3, width=4), 8)

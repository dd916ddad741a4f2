"""ReActNet: sizes by hand count, its block against numpy and Bi-Real's."""

import jax.numpy as jnp
import numpy as np
import pytest
from networks import REACT, apply, conv_of, count, exact, normal, random_variables, shapes_of
from numpy_layers import correlate, magnitude_aware, normalize, projected, rprelu, signs

from bnn_jax.models.reactnet import ReActBlock, reactnet18, reactnet_resnet20


@pytest.mark.parametrize(
    ("network", "options", "classes", "side", "latent", "kernel", "sums"),
    [
        (reactnet18, REACT, 1000, 224, 10_985_472, 9408 + 172_032 + 512_000, (3392, 3840)),
        (reactnet18, {}, 1000, 224, 0, 9408 + 172_032 + 512_000 + 10_985_472, (0, 3840)),
        (reactnet_resnet20, REACT, 10, 32, 13_824 + 50_688 + 202_752, 432 + 512 + 2048 + 640, (624, 672)),
    ],
)
def test_sizes_by_hand_count(network, options, classes, side, latent, kernel, sums):
    """Binary, then real weights; channels that enter units (RSign's shifts), channels that leave them (RPReLU's)."""
    params = shapes_of(network(num_classes=classes, **options), side)["params"]
    assert (count(params, "latent_kernel"), count(params, "kernel")) == (latent, kernel)
    assert (count(params, "shift"), count(params, "input_shift")) == sums
    assert count(params, "slope") == count(params, "output_shift") == sums[1]


@pytest.mark.parametrize(("features", "stride", "units"), [(3, 1, 1), (6, 2, 2)])
@pytest.mark.parametrize("plain", [False, True])
def test_the_block_equals_numpy_and_is_bi_real_where_rprelu_is_the_identity(features, stride, units, plain):
    """Unit: RPReLU( BN(conv(sign(x - shift))) + shortcut(x) )."""
    x = normal(2, 6, 4, 3)
    block = ReActBlock(features, stride, conv_of(**REACT), units)
    variables = random_variables(block, x, progress=0.0)
    identity = {"slope": jnp.ones(features), "input_shift": jnp.zeros(features), "output_shift": jnp.zeros(features)}
    for unit in range(1, units + 1):
        if plain:
            variables["params"][f"activation{unit}"] = identity
    values, y = exact(variables), np.asarray(x, np.float64)
    for unit in range(1, units + 1):
        conv = values["params"][f"conv{unit}"]
        codes, kernel = signs(y - conv["input_quantizer"]["shift"]), magnitude_aware(conv["latent_kernel"])
        inner = normalize(correlate(codes, kernel, stride, padding=1), values, f"norm{unit}")
        y, stride = inner + (projected(y, values, stride) if unit == 1 else y), 1
        y = y if plain else rprelu(y, values["params"][f"activation{unit}"])
    np.testing.assert_allclose(apply(block, variables, x, progress=0.0), y, rtol=1e-4, atol=1e-4)

"""ReActNet without batch normalization: sizes, the expected variances, what standardized kernels forget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import REACT, apply, count, exact, normal, paths_of, random_variables, shapes_of, without_gradient
from numpy_layers import correlate, magnitude_aware, rprelu, signs

from bnn_jax.models.bn_free import BnFreeBlock, input_factors, reactnet18_bn_free
from bnn_jax.quantizers import WEIGHT_QUANTIZERS

BN_FREE = REACT | {"kernel_quantizer": WEIGHT_QUANTIZERS["bn_free"]()}
SMALL = {"num_classes": 3, "width": 4, "stage_sizes": (1, 1), "stem": "cifar"}


def test_sizes_by_hand_count():
    variables = shapes_of(reactnet18_bn_free(num_classes=1000, **BN_FREE), 224)
    assert set(variables) == {"params"} and not any("norm" in path for path in paths_of(variables))
    params = variables["params"]
    assert (count(params, "latent_kernel"), count(params, "kernel")) == (10_985_472, 9408 + 172_032 + 512_000)
    assert (count(params, "shift"), count(params, "input_shift")) == (3392, 3840)
    assert count(params, "slope") == count(params, "output_shift") == 3840


def test_expected_variances():
    """alpha = 0.2: 1, 1.04, 1.08, 1.12, then 1.16 into the transition and 1.04 out of it."""
    variances = [1 / np.square(stage) for stage in input_factors((4, 2), alpha=0.2)]
    np.testing.assert_allclose(variances[0], [1, 1.04, 1.08, 1.12])
    np.testing.assert_allclose(variances[1], [1.16, 1.04])
    released = [1 / np.square(stage) for stage in input_factors((4, 3), alpha=0.2, count_first_unit=False)]
    np.testing.assert_allclose(released[0], [1, 1, 1.04, 1.08])
    np.testing.assert_allclose(released[1], [1.12, 1, 1.04])


def test_blocks_get_the_factors_of_their_units():
    model = reactnet18_bn_free(num_classes=3, stage_sizes=(3, 2))
    place = {"features": 4, "stride": 1, "conv": None}
    blocks = [
        model.block(name=name, units=units, **place).betas
        for name, units in (("stage1_block1", 2), ("stage1_block2", 1), ("stage2_block1", 2))
    ]
    first, second = input_factors((3, 2), alpha=0.2)
    assert blocks == [first[:2], first[2:], second]


@pytest.mark.parametrize(("quantized", "share"), [(True, 0.75), (False, 1.0)])
def test_variances_at_the_start(quantized, share):
    """A unit adds alpha^2 times (E|w|)^2 / E[w^2], 3/4 for uniform weights; 1 for weights that stay real."""
    alpha = 0.5
    options = BN_FREE if quantized else {"input_quantizer": BN_FREE["input_quantizer"]}
    model = reactnet18_bn_free(num_classes=3, width=24, stage_sizes=(3,), stem="cifar", alpha=alpha, **options)
    images = normal(4, 32, 32, 3)

    @jax.jit
    def stage_at_start(key):
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.ones_like(leaf) if path[-1].key == "slope" else leaf,
            model.init(key, images, train=False)["params"],
        )
        return model.apply({"params": params}, images, train=False)[1]["stage1"]

    stage = stage_at_start(jax.random.key(1))
    np.testing.assert_allclose(stage.var((0, 1, 2)).mean(), 1 + 3 * share * alpha**2, rtol=0.15)


def test_standardized_kernels_forget_their_mean_and_size():
    model, images = reactnet18_bn_free(**SMALL), normal(2, 8, 8, 3)
    variables = random_variables(model, images)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 3 * leaf + 1 if path[-1].key == "kernel" and path[-2].key != "head" else leaf, variables
    )
    run = jax.jit(lambda variables: model.apply(variables, images, train=False)[0])
    np.testing.assert_allclose(run(moved), run(variables), rtol=1e-3, atol=1e-4)


def test_the_block_equals_numpy():
    x, alpha, betas = normal(2, 4, 4, 3), 0.2, (0.8, 0.7)
    block = BnFreeBlock(3, 1, alpha, betas, BN_FREE, downsample_quantizer=None)
    variables = random_variables(block, x, progress=0.0)
    for unit in (1, 2):
        variables["params"][f"conv{unit}"]["kernel_quantizer"]["gain"] = jnp.ones((1, 1, 1, 3))
    params, expected = exact(variables["params"]), np.asarray(x, np.float64)
    for unit, beta in enumerate(betas, start=1):
        w = params[f"conv{unit}"]["latent_kernel"]
        w = (w - w.mean((0, 1, 2))) / (w.std((0, 1, 2)) + 1e-5) / np.sqrt(27)
        codes = signs(beta * expected - params[f"conv{unit}"]["input_quantizer"]["shift"])
        expected = alpha * correlate(codes, magnitude_aware(w), padding=1) + expected
        expected = rprelu(expected, params[f"activation{unit}"])
    np.testing.assert_allclose(apply(block, variables, x, progress=0.0), expected, rtol=1e-4, atol=1e-5)


def test_the_release_binarizes_the_shortcuts_kernels():
    model = reactnet18_bn_free(**SMALL, downsample_quantizer=BN_FREE["kernel_quantizer"], **BN_FREE)
    params = shapes_of(model, 8)["params"]
    assert set(params["stage2_block1"]["downsample"]) == {"latent_kernel", "kernel_quantizer"}


def test_training_in_full_precision_reaches_every_parameter():
    """With quantizers the table of networks is trained, where every parameter of every network moves."""
    assert without_gradient(reactnet18_bn_free(**SMALL), normal(2, 8, 8, 3)) == set()


def test_alpha_is_positive():
    with pytest.raises(ValueError, match=r"`alpha` \(=0\) of ReActNetBnFree must be positive; 0.2 is usual"):
        reactnet18_bn_free(num_classes=3, alpha=0)

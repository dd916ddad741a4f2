"""ResNets: sizes by hand count, shapes, precision of the first and last layers."""

import jax.numpy as jnp
import numpy as np
import pytest
from networks import XNOR, apply, count, normal, of_layers, random_variables, shapes_of

from bnn_jax.models.residual import subsample_and_pad
from bnn_jax.models.resnet import ResNet, resnet6, resnet20


@pytest.mark.parametrize(("quantizers", "kernels"), [(XNOR, ("kernel", "latent_kernel")), ({}, ("kernel", "kernel"))])
def test_resnet20_has_the_weights_of_he_et_al(quantizers, kernels):
    """Stem 432, stages 13,824 + 50,688 + 202,752 (3x3 kernels), classifier 640."""
    params = shapes_of(resnet20(num_classes=10, **quantizers), 32)["params"]
    assert sum(count(params, kernel) for kernel in set(kernels)) == 432 + 640 + 13_824 + 50_688 + 202_752
    assert count(params, "latent_kernel") == (13_824 + 50_688 + 202_752 if quantizers else 0)


def test_first_and_last_layers_are_full_precision():
    params = shapes_of(resnet6(num_classes=10, **XNOR), (8, 8, 1))["params"]
    assert set(of_layers(params, "kernel")) == {"stem", "head"}
    assert set(params["head"]) == {"kernel", "bias"}
    assert set(params["stage1_block1"]["conv1"]) == {"latent_kernel"}


def test_logits_and_intermediates():
    model, images = ResNet(num_classes=10, width=4, stage_sizes=(1, 1), **XNOR), normal(2, 8, 8, 3)
    variables = random_variables(model, images)
    logits, intermediates = apply(model, variables, images)
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    assert jnp.isfinite(logits).all()
    assert intermediates["stage2"].shape == (2, 4, 4, 8)
    head = variables["params"]["head"]
    np.testing.assert_allclose(logits, np.asarray(intermediates["features"]) @ head["kernel"] + head["bias"], rtol=1e-5)


def test_the_shortcut_subsamples_and_pads():
    x = jnp.arange(2 * 4 * 4 * 3, dtype=jnp.float32).reshape(2, 4, 4, 3)
    y = subsample_and_pad(x, 5, 2)
    assert y.shape == (2, 2, 2, 5)
    np.testing.assert_array_equal(y[..., :3], np.asarray(x)[:, ::2, ::2])
    np.testing.assert_array_equal(y[..., 3:], 0)
    assert subsample_and_pad(x, 3, 1) is x

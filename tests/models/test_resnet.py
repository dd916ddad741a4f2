"""ResNets: sizes by hand count, shapes, precision of the first and last layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.models import MODELS
from bnn_jax.models.resnet import ResNet, subsample_and_pad
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

XNOR = {
    "input_quantizer": ACTIVATION_QUANTIZERS["ste_sign"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["xnor"](),
}


def variables_of(name, shape, **arguments):
    model = MODELS[name].constructor(num_classes=10, **arguments)
    return model, jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((2, *shape)), train=False))


def count(params, leaf):
    return sum(
        int(np.prod(value.shape)) for path, value in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == leaf
    )


def test_resnet20_has_the_weights_of_he_et_al():
    """Stem 432, stages 13,824 + 50,688 + 202,752 (3x3 kernels), classifier 640."""
    _, variables = variables_of("resnet20", (32, 32, 3), **XNOR)
    assert count(variables["params"], "latent_kernel") == 13_824 + 50_688 + 202_752
    assert count(variables["params"], "kernel") == 432 + 640
    _, variables = variables_of("resnet20", (32, 32, 3))
    assert count(variables["params"], "kernel") == 432 + 640 + 13_824 + 50_688 + 202_752
    assert count(variables["params"], "latent_kernel") == 0


def test_first_and_last_layers_are_full_precision():
    _, variables = variables_of("resnet6", (8, 8, 1), **XNOR)
    assert set(variables["params"]["stem"]) == {"kernel"}
    assert set(variables["params"]["head"]) == {"kernel", "bias"}
    assert set(variables["params"]["stage1_block1"]["conv1"]) == {"latent_kernel"}


@pytest.mark.parametrize("name", ["resnet6", "resnet20"])
def test_logits_and_intermediates(name):
    model, _ = variables_of(name, (8, 8, 3), width=4, **XNOR)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    variables = model.init(jax.random.key(0), x, train=False)
    logits, intermediates = model.apply(variables, x, train=False)
    assert logits.shape == (2, 10)
    assert logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all()
    assert intermediates["stage2"].shape == (2, 4, 4, 8)
    head = variables["params"]["head"]
    np.testing.assert_allclose(logits, intermediates["features"] @ head["kernel"] + head["bias"][None], rtol=1e-5)


def test_the_shortcut_subsamples_and_pads():
    x = jnp.arange(2 * 4 * 4 * 3, dtype=jnp.float32).reshape(2, 4, 4, 3)
    y = subsample_and_pad(x, 5, 2)
    assert y.shape == (2, 2, 2, 5)
    np.testing.assert_array_equal(y[..., :3], np.asarray(x)[:, ::2, ::2])
    np.testing.assert_array_equal(y[..., 3:], 0)
    assert subsample_and_pad(x, 3, 1) is x


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (r"`num_classes` \(=0\) of ResNet must be at least 1; CIFAR-10 has 10", {"num_classes": 0}),
        (r"`width` \(=-4\) of ResNet must be at least 1; 16 is usual for small images", {"width": -4}),
        (
            r"`stage_sizes` \(=\(3, 0\)\) of ResNet must hold at least one stage, none of them empty; \(3, 3, 3\) is",
            {"stage_sizes": (3, 0)},
        ),
        (r"`stage_sizes` \(=\(\)\) of ResNet must hold", {"stage_sizes": ()}),
    ],
)
def test_refusals(text, arguments):
    with pytest.raises(ValueError, match=text):
        ResNet(**{"num_classes": 10} | arguments)

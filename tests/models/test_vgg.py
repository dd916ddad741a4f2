"""VGG-like networks: weights of the papers by hand count, order and clipping against numpy, a gradient everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.models.vgg import bnn_plus_vgg, vgg_small
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

IR_NET = {
    "input_quantizer": ACTIVATION_QUANTIZERS["ste_sign"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["libra_pb"](estimator="ste_sign"),
}
BNN_PLUS = {
    "input_quantizer": ACTIVATION_QUANTIZERS["swish_sign"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["bnn_plus"](initial="percentile75"),
}


def shapes_of(model, shape=(32, 32, 3)):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False))["params"]


def sizes(params, leaf):
    return {name: int(np.prod(layer[leaf].shape)) for name, layer in params.items() if leaf in layer}


def test_vgg_small():
    params = shapes_of(vgg_small(num_classes=10, **IR_NET))
    assert sizes(params, "latent_kernel") == {
        "conv2": 147_456,
        "conv3": 294_912,
        "conv4": 589_824,
        "conv5": 1_179_648,
        "conv6": 2_359_296,
    }
    assert sizes(params, "kernel") == {"conv1": 3_456, "head": 8192 * 10}
    assert set(params["head"]) == {"kernel", "bias"}


def test_the_vgg_of_bnn_plus_has_36_127_488_weights():
    """All weights, first and last layer included; without them 36,110,336 are binary, with one scale a filter."""
    params = shapes_of(bnn_plus_vgg(num_classes=10, **BNN_PLUS))
    binary, real = sizes(params, "latent_kernel"), sizes(params, "kernel")
    assert real == {"conv1": 6_912, "head": 10_240}
    assert binary["dense1"] == 4 * 4 * 1024 * 1024
    assert sum(binary.values()) == 36_127_488 - 6_912 - 10_240 == 36_110_336
    assert [params[f"conv{number}"]["latent_kernel"].shape[-1] for number in range(2, 7)] == [256, 512, 512, 1024, 1024]
    assert params["conv2"]["kernel_quantizer"]["scale"].shape == (1, 1, 1, 256)
    assert params["dense2"]["kernel_quantizer"]["scale"].shape == (1, 1024)
    assert set(params["head"]) == {"kernel"}
    assert "head_norm" not in params


@pytest.mark.parametrize("network", [vgg_small, bnn_plus_vgg])
def test_in_full_precision_every_kernel_is_real(network):
    quantized = shapes_of(network(num_classes=10, **BNN_PLUS))
    real = shapes_of(network(num_classes=10))
    assert sizes(real, "kernel") == sizes(quantized, "kernel") | sizes(quantized, "latent_kernel")
    assert sizes(real, "latent_kernel") == {}


def convolve(x, kernel):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = x.shape[1:3]
    return sum(padded[:, i : i + h, j : j + w] @ kernel[i, j] for i, j in np.ndindex(3, 3))


def pool(x):
    return np.max([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=0)


def randomized(shapes):
    rng = np.random.default_rng(0)

    def value(path, leaf):
        drawn = rng.normal(size=leaf.shape)
        return jnp.asarray(np.abs(drawn) + 0.5 if path[-1].key == "var" else drawn, jnp.float32)

    return jax.tree_util.tree_map_with_path(value, shapes)


@pytest.mark.parametrize("hardtanh", [True, False])
@pytest.mark.parametrize("binary", [True, False])
def test_the_network_equals_numpy(hardtanh, binary):
    """conv -> pool -> BN -> hardtanh, where inputs stay real always; the first and the last layer real."""
    quantizers = {
        "input_quantizer": ACTIVATION_QUANTIZERS["ste_sign"](),
        "kernel_quantizer": WEIGHT_QUANTIZERS["binary"](),
    }
    model = vgg_small(num_classes=3, width=2, stage_sizes=(2,), hardtanh=hardtanh, **quantizers if binary else {})
    images = np.random.default_rng(1).normal(size=(2, 6, 6, 3)).astype(np.float32)
    variables = randomized(jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False)))
    logits, intermediates = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    params, stats = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), (variables["params"], variables["batch_stats"])
    )

    def norm(name, x):
        x = (x - stats[name]["mean"]) / np.sqrt(stats[name]["var"] + 1e-5)
        return x * params[name]["scale"] + params[name]["bias"]

    signs = lambda x: np.where(x < 0, -1.0, 1.0)
    clip = lambda x: np.clip(x, -1, 1)
    x = norm("norm1", convolve(images, params["conv1"]["kernel"]))
    if binary:
        x = convolve(signs(x), signs(params["conv2"]["latent_kernel"]))
    else:
        x = convolve(clip(x), params["conv2"]["kernel"])
    x = norm("norm2", pool(x))
    stage = clip(x) if hardtanh or not binary else x
    np.testing.assert_allclose(intermediates["stage1"], stage, rtol=1e-4, atol=1e-4)
    features = clip(x).reshape(2, -1)
    np.testing.assert_allclose(intermediates["features"], features, rtol=1e-4, atol=1e-4)
    expected = features @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"`width` \(=-1\) must be positive in a VGG", lambda: vgg_small(num_classes=10, width=-1)),
        (
            r"`images` \(of 4x32\) are too small for a VGG with 3 pools; they need 8x8 pixels",
            lambda: shapes_of(vgg_small(num_classes=10), (4, 32, 3)),
        ),
    ],
)
def test_refused(message, make):
    with pytest.raises(ValueError, match=message):
        make()

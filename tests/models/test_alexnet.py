"""AlexNets: weights and shapes of the papers by hand count, order of the layers, groups, gradients everywhere."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.models.alexnet import alexnet_dorefa, alexnet_xnor, bnn_plus_alexnet
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

XNOR = {"input_quantizer": ACTIVATION_QUANTIZERS["ste_sign"](), "kernel_quantizer": WEIGHT_QUANTIZERS["xnor"]()}
DOREFA = {
    "input_quantizer": ACTIVATION_QUANTIZERS["dorefa"](bits=2),
    "kernel_quantizer": WEIGHT_QUANTIZERS["dorefa"](bits=1),
}
BNN_PLUS = {
    "input_quantizer": ACTIVATION_QUANTIZERS["swish_sign"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["bnn_plus"](),
}


def traced(model, size):
    """Shapes of the variables and of the outputs."""
    images = jnp.zeros((1, size, size, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    return variables["params"], jax.eval_shape(lambda v: model.apply(v, images, train=False), variables)


def shapes(params, leaf):
    return {name: layer[leaf].shape for name, layer in params.items() if leaf in layer}


def total(found):
    return sum(int(np.prod(shape)) for shape in found.values())


def test_the_alexnet_of_xnor_net():
    params, (logits, stages) = traced(alexnet_xnor(num_classes=1000, **XNOR), 224)
    binary, real = shapes(params, "latent_kernel"), shapes(params, "kernel")
    assert real == {"conv1": (11, 11, 3, 96), "head": (4096, 1000)}
    assert binary == {
        "conv2": (5, 5, 96, 256),
        "conv3": (3, 3, 256, 384),
        "conv4": (3, 3, 384, 384),
        "conv5": (3, 3, 384, 256),
        "conv6": (6, 6, 256, 4096),
        "conv7": (1, 1, 4096, 4096),
    }
    assert total(real) == 34_848 + 4_096_000
    assert total(binary) == 58_236_928
    assert total(real) + total(binary) == 62_367_776
    # Larq counts 9,664 channels of batch norms.
    assert total(shapes({n: p for n, p in params.items() if n.startswith("norm")}, "scale")) == 9_664
    assert set(shapes(params, "bias")) >= {f"conv{number}" for number in range(1, 8)}
    assert {name: stage.shape[1:] for name, stage in stages.items()} == {
        "stage1": (27, 27, 96),
        "stage2": (13, 13, 256),
        "stage3": (6, 6, 256),
        "features": (4096,),
    }
    assert logits.shape == (1, 1000)


def test_the_alexnet_of_dorefa_net():
    """Two groups halve the inputs of a filter: 48 of 96, 192 of 384; the pools are "SAME", "SAME", "VALID"."""
    params, (_, stages) = traced(alexnet_dorefa(num_classes=1000, **DOREFA), 224)
    assert shapes(params, "kernel") == {"conv0": (12, 12, 3, 96), "head": (4096, 1000)}
    assert shapes(params, "latent_kernel") == {
        "conv1_group1": (5, 5, 48, 128),
        "conv1_group2": (5, 5, 48, 128),
        "conv2": (3, 3, 256, 384),
        "conv3_group1": (3, 3, 192, 192),
        "conv3_group2": (3, 3, 192, 192),
        "conv4_group1": (3, 3, 192, 128),
        "conv4_group2": (3, 3, 192, 128),
        "dense5": (9216, 4096),
        "dense6": (4096, 4096),
    }
    assert {name: stage.shape[1:] for name, stage in stages.items()} == {
        "stage1": (27, 27, 256),
        "stage2": (14, 14, 384),
        "stage3": (6, 6, 256),
        "features": (4096,),
    }


def test_the_alexnet_of_bnn_plus():
    """Krizhevsky's one-tower AlexNet has 61,100,840 parameters, 10,344 of them biases."""
    params, (_, stages) = traced(bnn_plus_alexnet(num_classes=1000, stem="imagenet", **BNN_PLUS), 224)
    binary, real = shapes(params, "latent_kernel"), shapes(params, "kernel")
    assert total(binary) + total(real) == 61_100_840 - 10_344
    assert real == {"conv1": (11, 11, 3, 64), "head": (4096, 1000)}
    assert {name: stage.shape[1:3] for name, stage in stages.items() if name != "features"} == {
        "stage1": (27, 27),
        "stage2": (13, 13),
        "stage3": (6, 6),
    }
    params, (_, stages) = traced(bnn_plus_alexnet(num_classes=10, **BNN_PLUS), 32)
    assert params["conv1"]["kernel"].shape == (3, 3, 3, 64)
    assert params["dense1"]["latent_kernel"].shape == (3 * 3 * 256, 4096)
    assert [stages[f"stage{number}"].shape[1] for number in (1, 2, 3)] == [15, 7, 3]


SMALL = {
    "xnor": (alexnet_xnor(num_classes=3, width=3, **XNOR), 63),
    "dorefa": (alexnet_dorefa(num_classes=3, width=6, **DOREFA), 44),
    "bnn_plus": (bnn_plus_alexnet(num_classes=3, width=2, **BNN_PLUS), 15),
}
"""Narrow networks, and the smallest images that they take."""


@lru_cache
def trained(name):
    """Images, random parameters, and for one step of training the gradients, logits and intermediates."""
    model, size = SMALL[name]
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(4, size, size, 3)), jnp.float32)
    targets = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)

    def value(path, leaf):
        drawn = rng.normal(size=leaf.shape)
        if "kernel" in path[-1].key:
            drawn /= np.sqrt(leaf.size / leaf.shape[-1])
        return jnp.asarray(np.abs(drawn) + 0.5 if path[-1].key == "var" else drawn, jnp.float32)

    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    variables = jax.tree_util.tree_map_with_path(value, variables)

    # The gradient of 11x11 or 12x12 taps takes most of the time to compile; what lies behind that kernel shows enough.
    first = {"xnor": "conv1", "dorefa": "conv0"}.get(name)
    others = {layer: leaves for layer, leaves in variables["params"].items() if layer != first}
    fixed = {layer: leaves for layer, leaves in variables["params"].items() if layer == first}

    @jax.jit
    def gradient(params):
        def loss(params):
            (logits, stages), _ = model.apply(
                variables | {"params": fixed | params},
                images,
                train=True,
                progress=0.5,
                mutable=["batch_stats"],
            )
            return ((logits - targets) ** 2).mean(), (logits, stages)

        return jax.grad(loss, has_aux=True)(params)

    gradients, (logits, stages) = gradient(others)
    as_float64 = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
    return as_float64(images), as_float64(variables["params"]), gradients, logits, as_float64(stages)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_behind_the_first_kernel_has_a_gradient(name):
    _, _, gradients, logits, stages = trained(name)
    assert jnp.isfinite(logits).all()
    assert stages["stage3"].shape[1:3] == (1, 1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.isfinite(leaf).all()
        if name == "xnor" and path[-1].key == "bias" and path[0].key.startswith("conv"):
            # The batch norm behind it absorbs a bias; XNOR-Net's program has it all the same.
            assert jnp.abs(leaf).max() < 1e-4, path
        else:
            assert jnp.abs(leaf).max() > 1e-7, path


def convolve(x, kernel, stride=1, padding=0):
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    h, w = ((n - k) // stride + 1 for n, k in zip(x.shape[1:3], kernel.shape))
    tap = lambda i, j: x[:, i : i + stride * (h - 1) + 1 : stride, j : j + stride * (w - 1) + 1 : stride] @ kernel[i, j]
    return sum(tap(i, j) for i, j in np.ndindex(*kernel.shape[:2]))


def pool(x):
    h, w = ((n - 3) // 2 + 1 for n in x.shape[1:3])
    return np.max([x[:, i : i + 2 * h - 1 : 2, j : j + 2 * w - 1 : 2] for i, j in np.ndindex(3, 3)], axis=0)


def normalize(x, layer, epsilon):
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / np.sqrt(variance + epsilon) * layer["scale"] + layer["bias"]


def signs(x):
    return np.where(x < 0, -1.0, 1.0)


def test_a_block_of_xnor_net_equals_numpy():
    """Pool -> [BN -> sign -> conv + bias -> pool], the scale a filter's mean |w|."""
    images, params, _, _, stages = trained("xnor")
    x = convolve(images, params["conv1"]["kernel"], 4, 2) + params["conv1"]["bias"]
    x = pool(np.maximum(normalize(x, params["norm1"], 1e-5), 0))
    np.testing.assert_allclose(stages["stage1"], x, rtol=1e-3, atol=1e-4)
    kernel = params["conv2"]["latent_kernel"]
    x = convolve(signs(normalize(x, params["norm2"], 1e-4)), signs(kernel), padding=2) * np.abs(kernel).mean((0, 1, 2))
    np.testing.assert_allclose(stages["stage2"], pool(x + params["conv2"]["bias"]), rtol=1e-3, atol=1e-4)


def test_groups_of_dorefa_net_equal_numpy():
    """[quantize -> conv in groups -> BN -> pool]: a filter sees its half of the channels."""
    images, params, _, _, stages = trained("dorefa")
    x = convolve(images, params["conv0"]["kernel"], 4) + params["conv0"]["bias"]
    x = np.round(3 * np.clip(x, 0, 1)) / 3
    kernels = [params[f"conv1_group{group}"]["latent_kernel"] for group in (1, 2)]
    halves = [convolve(half, signs(w), padding=2) * np.abs(w).mean() for half, w in zip(np.split(x, 2, -1), kernels)]
    x = normalize(np.concatenate(halves, -1), params["norm1"], 1e-4)
    # "SAME" for 9 pixels: one row or column of padding on each side.
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    np.testing.assert_allclose(stages["stage1"], pool(padded), rtol=1e-3, atol=1e-4)
    assert stages["features"].min() >= 0
    assert stages["features"].max() <= 1


def test_a_block_of_bnn_plus_equals_numpy():
    """conv -> pool -> BN -> [sign -> conv -> pool -> BN], the scale of a filter learned."""
    images, params, _, logits, stages = trained("bnn_plus")
    x = normalize(pool(convolve(images, params["conv1"]["kernel"], padding=1)), params["norm1"], 1e-5)
    np.testing.assert_allclose(stages["stage1"], x, rtol=1e-3, atol=1e-4)
    x = convolve(signs(x), signs(params["conv2"]["latent_kernel"]), padding=2)
    x = pool(x * params["conv2"]["kernel_quantizer"]["scale"].ravel())
    np.testing.assert_allclose(stages["stage2"], normalize(x, params["norm2"], 1e-5), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.asarray(logits).mean(0), 0, atol=1e-5)


@pytest.mark.parametrize(("train", "layers"), [(True, 6), (False, 0)])
def test_gradients_are_quantized_in_training_only(train, layers):
    """One quantizer a quantized layer, both groups of a convolution under one maximum; first and last layer without."""
    seen = []
    model = alexnet_dorefa(
        num_classes=3, width=6, gradient_quantizer=lambda y, key: seen.append(y.shape) or y, **DOREFA
    )
    images = jnp.zeros((1, 44, 44, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    rngs = {"quantizer": jax.random.key(1)}
    jax.eval_shape(lambda v: model.apply(v, images, train=train, mutable=["batch_stats"], rngs=rngs), variables)
    assert seen == [(1, 9, 9, 16), (1, 5, 5, 24), (1, 3, 3, 24), (1, 3, 3, 16), (1, 256), (1, 256)][:layers]


@pytest.mark.parametrize("network", [alexnet_xnor, alexnet_dorefa, bnn_plus_alexnet])
def test_in_full_precision_every_kernel_is_real(network):
    params, (logits, _) = traced(network(num_classes=10, width=6), 63)
    assert shapes(params, "latent_kernel") == {}
    assert logits.shape == (1, 10)


def test_xnor_nets_map_of_the_inputs():
    """K needs quantized inputs, which the layer says; with them the network takes it."""
    traced(alexnet_xnor(num_classes=3, width=3, input_scaling=True, **XNOR), 63)
    with pytest.raises(ValueError, match=r"`input_scaling` \(=True\) needs an `input_quantizer`.* in layer 'conv2'"):
        traced(alexnet_xnor(num_classes=3, width=3, input_scaling=True), 63)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"`width` \(=0\) must be positive in a XnorAlexNet", lambda: alexnet_xnor(num_classes=10, width=0)),
        (r"`width` \(=9\) must be even in a DorefaAlexNet", lambda: alexnet_dorefa(num_classes=10, width=9)),
        (r"`stem` \(='vgg'\) must be cifar .* or imagenet", lambda: bnn_plus_alexnet(num_classes=10, stem="vgg")),
        (
            r"`images` \(of 62x62\) are too small for the AlexNet of XNOR-Net; they need 63x63 pixels",
            lambda: traced(alexnet_xnor(num_classes=3, width=3), 62),
        ),
        (
            r"`images` \(of 43x43\) are too small for the AlexNet of DoReFa-Net; they need 44x44 pixels",
            lambda: traced(alexnet_dorefa(num_classes=3, width=6), 43),
        ),
        (
            r"`images` \(of 14x14\) are too small for the AlexNet of BNN\+ with the stem 'cifar'; they need 15x15",
            lambda: traced(bnn_plus_alexnet(num_classes=3, width=2), 14),
        ),
        (
            r"`images` \(of 62x62\) are too small for .* the stem 'imagenet'; they need 63x63 pixels",
            lambda: traced(bnn_plus_alexnet(num_classes=3, width=2, stem="imagenet"), 62),
        ),
    ],
)
def test_refused(message, make):
    with pytest.raises(ValueError, match=message):
        make()

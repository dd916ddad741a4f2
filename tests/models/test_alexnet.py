"""AlexNets: weights and shapes of the papers by hand count, order of the layers, groups, gradients everywhere."""

import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import XNOR, exact, normal, of_layers, outputs_of, random_variables, shapes_of
from numpy_layers import correlate, maxima, signs

from bnn_jax.models.alexnet import alexnet_dorefa, alexnet_xnor, bnn_plus_alexnet
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

DOREFA = {
    "input_quantizer": ACTIVATION_QUANTIZERS["dorefa"](bits=2),
    "kernel_quantizer": WEIGHT_QUANTIZERS["dorefa"](bits=1),
}
BNN_PLUS = {
    "input_quantizer": ACTIVATION_QUANTIZERS["swish_sign"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["bnn_plus"](),
}


def traced(model, side):
    """Shapes of the parameters and of the intermediates, without the batch."""
    shapes = {name: stage.shape[1:] for name, stage in outputs_of(model, side)[1].items()}
    return shapes_of(model, side)["params"], shapes


def total(found):
    return sum(map(math.prod, found.values()))


def test_the_alexnet_of_xnor_net():
    params, stages = traced(alexnet_xnor(num_classes=1000, **XNOR), 224)
    binary, real = of_layers(params, "latent_kernel"), of_layers(params, "kernel")
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
    assert total(of_layers({n: p for n, p in params.items() if n.startswith("norm")}, "scale")) == 9_664
    assert set(of_layers(params, "bias")) >= {f"conv{number}" for number in range(1, 8)}
    assert stages == {
        "stage1": (27, 27, 96),
        "stage2": (13, 13, 256),
        "stage3": (6, 6, 256),
        "features": (4096,),
    }


def test_the_alexnet_of_dorefa_net():
    """Two groups halve the inputs of a filter: 48 of 96, 192 of 384; the pools are "SAME", "SAME", "VALID"."""
    params, stages = traced(alexnet_dorefa(num_classes=1000, **DOREFA), 224)
    assert of_layers(params, "kernel") == {"conv0": (12, 12, 3, 96), "head": (4096, 1000)}
    assert of_layers(params, "latent_kernel") == {
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
    assert stages == {
        "stage1": (27, 27, 256),
        "stage2": (14, 14, 384),
        "stage3": (6, 6, 256),
        "features": (4096,),
    }


def test_the_alexnet_of_bnn_plus():
    """Krizhevsky's one-tower AlexNet has 61,100,840 parameters, 10,344 of them biases."""
    params, stages = traced(bnn_plus_alexnet(num_classes=1000, stem="imagenet", **BNN_PLUS), 224)
    binary, real = of_layers(params, "latent_kernel"), of_layers(params, "kernel")
    assert total(binary) + total(real) == 61_100_840 - 10_344
    assert real == {"conv1": (11, 11, 3, 64), "head": (4096, 1000)}
    assert {name: shape[:2] for name, shape in stages.items() if name != "features"} == {
        "stage1": (27, 27),
        "stage2": (13, 13),
        "stage3": (6, 6),
    }
    params, stages = traced(bnn_plus_alexnet(num_classes=10, **BNN_PLUS), 32)
    assert params["conv1"]["kernel"].shape == (3, 3, 3, 64)
    assert params["dense1"]["latent_kernel"].shape == (3 * 3 * 256, 4096)
    assert [stages[f"stage{number}"][0] for number in (1, 2, 3)] == [15, 7, 3]


pooled = partial(maxima, size=3, stride=2)

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
    images, targets = normal(4, size, size, 3, seed=0), normal(4, 3)
    variables = random_variables(model, images, mean=0.0)

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
    return exact(images), exact(variables["params"]), gradients, logits, exact(stages)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.full
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


def standardize(x, layer, epsilon):
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / np.sqrt(variance + epsilon) * layer["scale"] + layer["bias"]


def test_a_block_of_xnor_net_equals_numpy():
    """Pool -> [BN -> sign -> conv + bias -> pool], the scale a filter's mean |w|."""
    images, params, _, _, stages = trained("xnor")
    x = correlate(images, params["conv1"]["kernel"], 4, 2) + params["conv1"]["bias"]
    x = pooled(np.maximum(standardize(x, params["norm1"], 1e-5), 0))
    np.testing.assert_allclose(stages["stage1"], x, rtol=1e-3, atol=1e-4)
    kernel = params["conv2"]["latent_kernel"]
    x = correlate(signs(standardize(x, params["norm2"], 1e-4)), signs(kernel), padding=2) * np.abs(kernel).mean(
        (0, 1, 2)
    )
    np.testing.assert_allclose(stages["stage2"], pooled(x + params["conv2"]["bias"]), rtol=1e-3, atol=1e-4)


@pytest.mark.full
def test_groups_of_dorefa_net_equal_numpy():
    """[quantize -> conv in groups -> BN -> pool]: a filter sees its half of the channels."""
    images, params, _, _, stages = trained("dorefa")
    x = correlate(images, params["conv0"]["kernel"], 4) + params["conv0"]["bias"]
    x = np.round(3 * np.clip(x, 0, 1)) / 3
    kernels = [params[f"conv1_group{group}"]["latent_kernel"] for group in (1, 2)]
    halves = [correlate(half, signs(w), padding=2) * np.abs(w).mean() for half, w in zip(np.split(x, 2, -1), kernels)]
    x = standardize(np.concatenate(halves, -1), params["norm1"], 1e-4)
    # "SAME" for 9 pixels: one row or column of padding on each side.
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    np.testing.assert_allclose(stages["stage1"], pooled(padded), rtol=1e-3, atol=1e-4)
    assert stages["features"].min() >= 0
    assert stages["features"].max() <= 1


@pytest.mark.full
def test_a_block_of_bnn_plus_equals_numpy():
    """conv -> pool -> BN -> [sign -> conv -> pool -> BN], the scale of a filter learned."""
    images, params, _, logits, stages = trained("bnn_plus")
    x = standardize(pooled(correlate(images, params["conv1"]["kernel"], padding=1)), params["norm1"], 1e-5)
    np.testing.assert_allclose(stages["stage1"], x, rtol=1e-3, atol=1e-4)
    x = correlate(signs(x), signs(params["conv2"]["latent_kernel"]), padding=2)
    x = pooled(x * params["conv2"]["kernel_quantizer"]["scale"].ravel())
    np.testing.assert_allclose(stages["stage2"], standardize(x, params["norm2"], 1e-5), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.asarray(logits).mean(0), 0, atol=1e-5)


def test_gradients_are_quantized_in_training():
    """One quantizer a quantized layer, both groups of a convolution under one maximum; first and last layer without."""
    seen = []
    quantize = lambda y, key: seen.append(y.shape) or y
    model = alexnet_dorefa(num_classes=3, width=6, gradient_quantizer=quantize, **DOREFA)
    images, rngs = jnp.zeros((2, 44, 44, 3)), {"quantizer": jax.random.key(1)}
    run = lambda v: model.apply(v, images, train=True, mutable=["batch_stats"], rngs=rngs)
    jax.eval_shape(run, shapes_of(model, images))
    assert seen == [(2, 9, 9, 16), (2, 5, 5, 24), (2, 3, 3, 24), (2, 3, 3, 16), (2, 256), (2, 256)]


@pytest.mark.parametrize(
    ("quantizers", "others", "shapes"),
    [
        ({"conv3*": "real", "dense5": "real"}, [], [(2, 9, 9, 16), (2, 5, 5, 24), (2, 3, 3, 16), (2, 256)]),
        (
            {"conv2": {"gradient_quantizer": "other"}, "conv4_group2": "real"},
            [(2, 5, 5, 24)],
            [(2, 9, 9, 16), (2, 3, 3, 24), (2, 3, 3, 8), (2, 256), (2, 256)],
        ),
        (
            {"conv1*": {"gradient_quantizer": "other"}, "*": "real"},
            [(2, 9, 9, 8), (2, 9, 9, 8)],
            [],
        ),
    ],
    ids=["real", "one group real", "groups of their own"],
)
def test_patterns_choose_the_quantizers_of_gradients(quantizers, others, shapes):
    """Each gradient is quantized once, by the quantizer of its layer."""
    seen, seen_by_other = [], []
    quantize = lambda y, key: seen.append(y.shape) or y
    other = lambda y, key: seen_by_other.append(y.shape) or y
    replaced = lambda choice: dict.fromkeys(choice, other) if isinstance(choice, dict) else choice
    quantizers = {pattern: replaced(choice) for pattern, choice in quantizers.items()}
    model = alexnet_dorefa(num_classes=3, width=6, gradient_quantizer=quantize, quantizers=quantizers, **DOREFA)
    images, rngs = jnp.zeros((2, 44, 44, 3)), {"quantizer": jax.random.key(1)}
    run = lambda v: model.apply(v, images, train=True, mutable=["batch_stats"], rngs=rngs)
    jax.eval_shape(run, shapes_of(model, images))
    assert (seen_by_other, seen) == (others, shapes)


def test_xnor_nets_map_of_the_inputs():
    """K needs quantized inputs, which the layer says; with them the network takes it."""
    traced(alexnet_xnor(num_classes=3, width=3, input_scaling=True, **XNOR), 63)
    with pytest.raises(ValueError, match=r"`input_scaling` \(=True\) needs an `input_quantizer`.* in layer 'conv2'"):
        traced(alexnet_xnor(num_classes=3, width=3, input_scaling=True), 63)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"`width` \(=9\) of DorefaAlexNet must be even", lambda: alexnet_dorefa(num_classes=10, width=9)),
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

"""BinaryDuo: weights by hand count, and the switch from coupled to decoupled neurons, which changes no output."""

import math
from functools import lru_cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import normal, of_layers, shapes_of

from bnn_jax.models.binaryduo import binaryduo_resnet18, binaryduo_vgg7, decouple_variables
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

COUPLED = ACTIVATION_QUANTIZERS["coupled"]()
DECOUPLED = ACTIVATION_QUANTIZERS["decoupled"]()
LAYERWISE = WEIGHT_QUANTIZERS["dorefa"](bits=1)
FILTERWISE = WEIGHT_QUANTIZERS["xnor"]()


def stages_of(network, kernel_quantizer=LAYERWISE, **arguments):
    """The network of the first stage of training and that of the second."""
    arguments |= {"kernel_quantizer": kernel_quantizer}
    return (
        network(coupled=True, input_quantizer=COUPLED, **arguments),
        network(coupled=False, input_quantizer=DECOUPLED, **arguments),
    )


def kernels(params):
    return {layer: shape for layer, shape in layers(params).items() if layer.startswith("conv")}


def layers(params):
    return of_layers(params, "kernel") | of_layers(params, "latent_kernel")


def weights(params):
    return sum(map(math.prod, layers(params).values()))


def test_vgg7_has_the_layers_of_the_paper():
    """Decoupled, it has the weights of the plain network of 64-64-128-128-512-512, to 0.2 %."""
    coupled, decoupled = (shapes_of(model, 32)["params"] for model in stages_of(binaryduo_vgg7, num_classes=10))
    assert kernels(coupled) == {
        "conv2": (3, 3, 45, 45),
        "conv3": (3, 3, 45, 90),
        "conv4": (3, 3, 90, 90),
        "conv5": (4, 4, 90, 336),
        "conv6": (1, 1, 336, 512),
    }
    inner = 18_225 + 36_450 + 72_900 + 483_840 + 172_032
    assert weights(coupled) == 1_215 + inner + 5_120
    assert weights(decoupled) == 1_215 + 2 * inner + 5_120
    plain = 9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128) + 16 * 128 * 512 + 512 * 512 + 5_120
    assert abs(weights(decoupled) / plain - 1) < 0.002


def test_resnet18_has_the_layers_of_the_paper():
    arguments = {"num_classes": 1000, "stem": "imagenet"}
    coupled, decoupled = (shapes_of(model, 224)["params"] for model in stages_of(binaryduo_resnet18, **arguments))
    filters = [64] * 4 + [90] * 4 + [180] * 4 + [360] * 3 + [512]
    inputs = [64] * 5 + [90] * 4 + [180] * 4 + [360] * 3
    layers = [f"conv{number}" for number in range(2, 18)]
    assert kernels(coupled) == {name: (3, 3, i, o) for name, i, o in zip(layers, inputs, filters)}
    assert kernels(decoupled) == {name: (3, 3, 2 * i, o) for name, i, o in zip(layers, inputs, filters)}
    real = 7 * 7 * 3 * 64 + 64 * 90 + 90 * 180 + 180 * 360 + 512 * 1000
    assert weights(coupled) == real + 147_456 + 270_540 + 1_020_600 + 4_574_880
    assert decoupled["norm16"]["scale"].shape == (720,)
    assert decoupled["norm17"]["scale"].shape == (512,)


SMALL = {
    "vgg7": (binaryduo_vgg7, {"num_classes": 5, "width": 6}, 32),
    "resnet18": (binaryduo_resnet18, {"num_classes": 5, "width": 6, "stage_sizes": (1, 1), "stem": "cifar"}, 8),
}


def random_variables(shapes, seed=0):
    """Batch statistics, scales and biases too; latent kernels are multiples of 1/64, whose mean |w| is exact."""
    rng = np.random.default_rng(seed)

    def value(path, leaf):
        name = path[-1].key
        drawn = rng.normal(size=leaf.shape)
        if name == "latent_kernel":
            drawn = rng.integers(-64, 65, leaf.shape) / 64
        elif name == "kernel":
            drawn /= np.sqrt(leaf.size / leaf.shape[-1])
        elif name in ("var", "scale"):
            drawn = rng.uniform(0.5, 2, leaf.shape)
        elif path[-2].key.startswith("norm"):
            drawn = 0.3 * drawn + (0.4 if name == "bias" else 0)
        return jnp.asarray(drawn, jnp.float32)

    return jax.tree_util.tree_map_with_path(value, shapes)


@lru_cache
def networks(name, kernel_quantizer):
    """(model, variables) of both stages of training, the second's decoupled from the first's, and images."""
    network, arguments, size = SMALL[name]
    models = stages_of(network, kernel_quantizer, **arguments)
    images = normal(4, size, size, 3)
    coupled = random_variables(shapes_of(models[0], size))
    return (models[0], coupled), (models[1], decouple_variables(coupled)), images


@lru_cache
def outputs(name, kernel_quantizer, train):
    """((logits, intermediates), updated statistics) of coupled and decoupled; in training, a gradient."""
    (model, coupled), (decoupled_model, decoupled), images = networks(name, kernel_quantizer)
    run = lambda model, variables: model.apply(variables, images, train=train, mutable=["batch_stats"])

    def loss(params):
        result = run(decoupled_model, decoupled | {"params": params})
        return (result[0][0] ** 2).mean() + result[0][0][0, 0], result

    if train:
        gradient, after = jax.jit(jax.grad(loss, has_aux=True))(decoupled["params"])
    else:
        gradient, after = None, jax.jit(lambda v: run(decoupled_model, v))(decoupled)
    return jax.jit(lambda v: run(model, v))(coupled), after, gradient


CASES = {
    "vgg7-eval": ("vgg7", LAYERWISE, False),
    "vgg7-train": ("vgg7", LAYERWISE, True),
    "resnet18-eval": ("resnet18", FILTERWISE, False),
    "resnet18-train": ("resnet18", LAYERWISE, True),
}


@pytest.mark.parametrize(("name", "quantizer", "train"), CASES.values(), ids=CASES)
@pytest.mark.full
def test_the_switch_preserves_the_function(name, quantizer, train):
    """The neurons are the same integers; logits differ by what XLA rounds differently in two programs."""
    (coupled, _), (decoupled, _), _ = outputs(name, quantizer, train)
    hidden = [stage for stage in coupled[1] if coupled[1][stage].shape != decoupled[1][stage].shape]
    assert hidden == {"vgg7": ["stage1", "stage2", "stage3"], "resnet18": ["stage1"]}[name]
    for stage in hidden:
        before, after = np.asarray(coupled[1][stage]), np.asarray(decoupled[1][stage])
        first, second = np.split(after, 2, -1)
        codes = np.digitize(before, [0.25, 0.75])
        np.testing.assert_array_equal((first >= 0.5).astype(int) + (second >= 0.5), codes)
        assert min(np.bincount(codes.ravel(), minlength=3)) > 0.01 * codes.size
        np.testing.assert_allclose(first, before - 0.25, atol=1e-5)
        np.testing.assert_allclose(second, before + 0.25, atol=1e-5)
    logits = np.asarray(coupled[0])
    ulp = np.finfo(np.float32).eps * np.abs(logits).max()
    np.testing.assert_allclose(decoupled[0], logits, rtol=0, atol=8 * ulp)
    assert np.ptp(logits, axis=0).min() > 0.01


@pytest.mark.full
@pytest.mark.parametrize("name", SMALL)
def test_the_statistics_stay_decoupled_in_training(name):
    (_, variables), _, _ = networks(name, LAYERWISE)
    (_, coupled), (_, decoupled), _ = outputs(name, LAYERWISE, True)
    expected = decouple_variables(variables | coupled)["batch_stats"]
    chex.assert_trees_all_close(decoupled["batch_stats"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.full
def test_every_parameter_of_the_decoupled_network_has_a_gradient(name):
    *_, found = outputs(name, LAYERWISE, True)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert jnp.isfinite(leaf).all()
        assert jnp.abs(leaf).max() > 1e-7, path
    # The two neurons of a pair learn apart from here on.
    first, second = jnp.split(found["norm1"]["bias"], 2)
    assert jnp.abs(first - second).max() > 1e-6


def coupled_variables(**changes):
    shapes = shapes_of(stages_of(binaryduo_vgg7, num_classes=5, width=6)[0], 32)
    return shapes | changes


def test_other_collections_pass_through():
    assert decouple_variables(random_variables(coupled_variables()) | {"notes": {"a": 1}})["notes"] == {"a": 1}


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (
            r"`input_quantizer` \(of 3 levels\) must be binary in a decoupled BinaryDuoVGG7; choose decoupled, or set",
            lambda: binaryduo_vgg7(num_classes=10, coupled=False, input_quantizer=COUPLED),
        ),
        (
            r"`input_quantizer` \(of 3 levels\) must be binary in a decoupled BinaryDuoResNet",
            lambda: binaryduo_resnet18(num_classes=5, coupled=False, input_quantizer=ACTIVATION_QUANTIZERS["tbn"]()),
        ),
        (
            r"`input_quantizer` \(of 4 levels\) must be binary",
            lambda: binaryduo_vgg7(num_classes=5, coupled=False, input_quantizer=ACTIVATION_QUANTIZERS["pact"](bits=2)),
        ),
        (
            r"`images` \(of 31x32\) are too small for the VGG-7 of BinaryDuo; they need 32x32 pixels",
            lambda: shapes_of(binaryduo_vgg7(num_classes=2), (31, 32, 3)),
        ),
        (
            r"`images` \(of 12x12\) must leave whole 2x2 windows .* use sides that are multiples of 8",
            lambda: shapes_of(binaryduo_resnet18(num_classes=2, stem="cifar"), 12),
        ),
        (
            r"`images` \(of 48x48\) must leave whole 2x2 windows .* 'imagenet'; use sides that are multiples of 32",
            lambda: shapes_of(binaryduo_resnet18(num_classes=2, stem="imagenet"), 48),
        ),
        (
            r"`variables` \(with 12 neurons behind 6 filters of the stem\) must be those of a coupled network",
            lambda: decouple_variables(decouple_variables(random_variables(coupled_variables()))),
        ),
        (
            r"`variables` \(with the layers none\) must be `params` and `batch_stats` of a BinaryDuo network",
            lambda: decouple_variables({}),
        ),
        (
            r"`variables` \(with parameters or state of quantizers in conv2, conv3, conv4, conv5, conv6\) cannot be",
            lambda: decouple_variables(
                shapes_of(stages_of(binaryduo_vgg7, WEIGHT_QUANTIZERS["learned_scale"](), num_classes=2)[0], 32)
            ),
        ),
    ],
)
def test_refused(message, make):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("quantizer", ["decoupled", "ste_sign", "rsign", "sparse"])
def test_decoupled_networks_take_binary_quantizers(quantizer):
    model = binaryduo_resnet18(num_classes=2, coupled=False, input_quantizer=ACTIVATION_QUANTIZERS[quantizer]())
    assert model.coupled is False

"""BinaryNet's networks: weights by hand count, blocks and dropout against numpy, a gradient everywhere."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import SIGNS, apply, exact, normal, of_layers, paths_of, random_variables, shapes_of
from numpy_layers import correlate, maxima, normalize, relu, signs

from bnn_jax.layers import BinaryDense
from bnn_jax.models.build import build_model
from bnn_jax.models.convnet import binaryconnect_convnet, bnn_convnet, latent_uniform, mnist_mlp
from bnn_jax.quantizers import WEIGHT_QUANTIZERS

BINARY = SIGNS["kernel_quantizer"]
CONNECT = {"kernel_quantizer": WEIGHT_QUANTIZERS["binary_connect"]()}
CONVOLUTIONS = {
    "conv1": (3, 3, 3, 128),
    "conv2": (3, 3, 128, 128),
    "conv3": (3, 3, 128, 256),
    "conv4": (3, 3, 256, 256),
    "conv5": (3, 3, 256, 512),
    "conv6": (3, 3, 512, 512),
}
DENSE = {"dense1": (8192, 1024), "dense2": (1024, 1024), "head": (1024, 10)}


@pytest.mark.parametrize(("network", "quantizers"), [(bnn_convnet, SIGNS), (binaryconnect_convnet, CONNECT)])
def test_binarynet_has_14_022_016_binary_weights_and_no_real_ones(network, quantizers):
    params = shapes_of(network(num_classes=10, **quantizers), 32)["params"]
    found = of_layers(params, "latent_kernel")
    assert found == CONVOLUTIONS | DENSE
    assert sum(map(np.prod, found.values())) == 14_022_016
    norms = {*(f"norm{number}" for number in range(1, 7)), "dense_norm1", "dense_norm2", "head_norm"}
    assert params.keys() - found.keys() == norms


def test_the_mlp_for_mnist():
    params = shapes_of(mnist_mlp(num_classes=10, **SIGNS), (28, 28, 1))["params"]
    hidden = {"dense1": (784, 4096), "dense2": (4096, 4096), "dense3": (4096, 4096)}
    assert of_layers(params, "latent_kernel") == hidden | {"head": (4096, 10)}


@pytest.mark.parametrize(
    ("quantizer", "limit", "bound"),
    [(BINARY, 1.0, 1.0), (BINARY, 0.25, 0.25), (BINARY, None, np.sqrt(6 / 600)), (None, 1.0, np.sqrt(6 / 600))],
)
def test_where_weights_start(quantizer, limit, bound):
    """Uniform in the latent range; Glorot's sqrt(6 / (fan in + fan out)) for real weights and without a range."""
    weight = latent_uniform(quantizer, limit)(jax.random.key(0), (400, 200))
    assert 0.99 * bound < jnp.abs(weight).max() <= bound
    assert abs(float(weight.mean())) < 0.02 * bound


@pytest.mark.parametrize(
    ("name", "settings", "pattern"),
    [
        ("bnn_convnet", {"options": {"stage_sizes": (1, 1), "dense_layers": 1}}, {"head": "real", "conv2": "real"}),
        ("mnist_mlp", {"options": {"hidden_layers": 2}}, {"head": "real", "dense2": "real"}),
        (
            "binaryconnect_convnet",
            {"kernel_quantizer": "full_precision", "options": {"stage_sizes": (1, 1)}},
            {"dense1": "binary", "conv1": {"kernel_quantizer": "xnor"}},
        ),
    ],
    ids=["convnet", "mlp", "real convnet"],
)
def test_each_layer_starts_by_its_own_kernel_quantizer(name, settings, pattern):
    """Where patterns choose it too: latent weights in [-1, 1], real ones within Glorot's much smaller range."""
    model = build_model(name, num_classes=10, width=32, quantizers=pattern, **settings)
    params = jax.jit(partial(model.init, train=False))(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    largest = {path: float(jnp.abs(leaf).max()) for path, leaf in paths_of(params).items() if path.endswith("kernel")}
    latent = {path.partition("/")[0] for path in largest if path.endswith("latent_kernel")}
    assert latent & pattern.keys() == {layer for layer, choice in pattern.items() if choice != "real"}
    assert len(latent) not in (0, len(largest))
    for path, value in largest.items():
        assert 0.95 < value <= 1 if path.endswith("latent_kernel") else value < 0.5, path


@pytest.mark.parametrize("quantizers", [SIGNS, CONNECT], ids=["bnn", "binaryconnect"])
def test_the_network_equals_numpy(quantizers):
    """conv -> pool -> BN -> sign or ReLU, the image real, the last layer binary and normalized."""
    model = bnn_convnet(num_classes=3, width=2, stage_sizes=(2,), dense_layers=1, **quantizers)
    images = normal(3, 6, 6, 3)
    variables = random_variables(model, images)
    variables["params"]["norm2"]["scale"] *= np.array([-1, 1])  # of both signs: on which side of the pool the norm is
    logits, intermediates = apply(model, variables, images)
    values, real = exact(variables), quantizers is CONNECT
    norm = lambda name, x: normalize(x, values, name, epsilon=1e-4)
    neuron = relu if real else signs
    weight = lambda name: signs(values["params"][name]["latent_kernel"])

    x = norm("norm1", correlate(images, weight("conv1"), padding=1))
    x = norm("norm2", maxima(correlate(neuron(x), weight("conv2"), padding=1)))
    np.testing.assert_allclose(intermediates["stage1"], relu(x) if real else x, rtol=1e-4, atol=1e-4)
    x = norm("dense_norm1", neuron(x).reshape(3, -1) @ weight("dense1"))
    np.testing.assert_allclose(intermediates["features"], relu(x) if real else x, rtol=1e-4, atol=1e-4)
    x = norm("head_norm", neuron(x) @ weight("head"))
    np.testing.assert_allclose(logits, x, rtol=1e-4, atol=1e-4)


def test_dropout_drops_neurons_behind_their_sign():
    """A class a neuron: in training its logit stems from 0 or +-1/(1 - p), a dropped neuron never reads as +1."""
    units, rate = 64, 0.25
    model = mnist_mlp(
        num_classes=units,
        width=units,
        hidden_layers=1,
        input_dropout=0.0,
        hidden_dropout=rate,
        input_quantizer=SIGNS["input_quantizer"],
    )
    images = normal(256, 8, 8, 1, seed=3)
    variables = random_variables(model, images)
    variables["params"]["head"]["kernel"] = jnp.eye(units)
    variables["params"]["norm1"]["bias"] = jnp.full(units, 0.5)
    variables["batch_stats"]["head_norm"] = {"mean": jnp.zeros(units), "var": jnp.ones(units)}
    variables["params"]["head_norm"] = {"scale": jnp.ones(units), "bias": jnp.zeros(units)}

    train = lambda key: model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"quantizer": key})
    (_, intermediates), updated = jax.jit(train)(jax.random.key(1))
    codes = signs(np.asarray(intermediates["features"]))
    # One step of momentum 0.9 away from mean 0 and variance 1: a tenth of the batch's statistics came in.
    mean = 10 * np.asarray(updated["batch_stats"]["head_norm"]["mean"])
    square = 10 * (np.asarray(updated["batch_stats"]["head_norm"]["var"]) - 0.9) + mean**2
    assert abs(square.mean() - 1 / (1 - rate)) < 0.03
    assert abs((mean - codes.mean(0)).mean()) < 0.02

    # Evaluation drops nothing and asks for no randomness.
    logits, intermediates = jax.jit(lambda: model.apply(variables, images, train=False))()
    expected = signs(np.asarray(intermediates["features"])) / np.sqrt(1 + 1e-4)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


@pytest.mark.parametrize("inputs", [None, "full_precision"])
@pytest.mark.parametrize(
    "quantizers",
    [
        {"dense2": "binary", "dense3": "binary", "head": "binary"},
        {"*": ("tbn", "xnor")},
        {"dense2": "8-bit", "dense3": "real", "head": {"kernel_quantizer": "twn"}},
        {},
    ],
    ids=str,
)
def test_dropout_stays_where_patterns_choose_the_quantizers(inputs, quantizers):
    """In each layer behind the first: its training output depends on the key, that of an evaluation on none."""
    settings = {"quantizers": quantizers, "input_quantizer": inputs, "options": {"input_dropout": 0.0}}
    model = build_model("mnist_mlp", num_classes=16, width=16, **settings)
    images = normal(8, 4, 4, 1)
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), images)

    def run(train, seed):
        """The outputs of the dense layers by their names."""
        rngs = {"quantizer": jax.random.key(seed)} if train else {}
        _, state = model.apply(
            variables,
            images,
            train=train,
            rngs=rngs,
            mutable=["batch_stats", "quantizer_state", "intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, BinaryDense),
        )
        return {layer: outputs["__call__"][0] for layer, outputs in state["intermediates"].items()}

    run = jax.jit(run, static_argnums=(0, 1))
    first, second, evaluated = run(True, 0), run(True, 1), run(False, 0)
    np.testing.assert_array_equal(first["dense1"], second["dense1"])
    for layer in ("dense2", "dense3", "head"):
        assert jnp.abs(first[layer] - second[layer]).max() > 0.1, layer
    assert jnp.abs(first["dense2"] - evaluated["dense2"]).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, evaluated, run(False, 1))


def test_a_pattern_drops_as_the_networks_own_quantizer_does():
    images = normal(8, 4, 4, 1)
    plain, named = (
        build_model("mnist_mlp", num_classes=4, width=16, quantizers=quantizers)
        for quantizers in ({}, {"dense2": {"input_quantizer": "ste_sign"}, "head": {"input_quantizer": "ste_sign"}})
    )
    variables = random_variables(plain, images)
    options = {"train": True, "mutable": ["batch_stats"], "rngs": {"quantizer": jax.random.key(2)}}
    np.testing.assert_array_equal(
        *(jax.jit(lambda m=m: m.apply(variables, images, **options)[0][0])() for m in (plain, named))
    )


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"`latent_range` \(=-1\) of BinaryMLP must be positive", lambda: mnist_mlp(num_classes=2, latent_range=-1)),
        (r"`hidden_layers` \(=0\) of BinaryMLP must be positive", lambda: mnist_mlp(num_classes=2, hidden_layers=0)),
        (
            r"`hidden_dropout` \(=1\) of BinaryMLP must be in \[0, 1\); 0 drops nothing",
            lambda: mnist_mlp(num_classes=2, hidden_dropout=1),
        ),
        (
            r"`images` \(of 7x9\) are too small for a ConvNet with 3 pools; they need 8x8 pixels",
            lambda: shapes_of(bnn_convnet(num_classes=2, width=4), (7, 9, 3)),
        ),
        (
            r"`images` \(of 0x9\) are too small for a BinaryMLP; they need 1x1 pixels",
            lambda: shapes_of(mnist_mlp(num_classes=2, width=4), (0, 9, 1)),
        ),
    ],
)
def test_refused(message, make):
    with pytest.raises(ValueError, match=message):
        make()

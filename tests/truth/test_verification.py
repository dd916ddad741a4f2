"""Verification compares something, or fails; what a lifted transform of Flax hides is refused by name."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import SIGNS

from bnn_jax.errors import UsageError
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense
from bnn_jax.packed import PackedModel, freeze, verify
from bnn_jax.packed.verification import LayerReport, Verification

SHAPE, IMAGES = (4, 4, 3), 3


class Block(nn.Module):
    """Two binary layers with a threshold between them."""

    @nn.compact
    def __call__(self, x):
        x = BinaryConv(8, name="conv1", **SIGNS)(x)
        x = BatchNorm(name="norm")(x, train=False)
        return BinaryConv(8, name="conv2", **SIGNS)(x)


class Step(nn.Module):
    """A block as a step of a scan."""

    @nn.compact
    def __call__(self, x, _):
        return Block(name="block")(x), None


OF_TWO = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
LISTED = OF_TWO | {"variable_axes": {"params": 0, "batch_stats": 0, "packed": 0, "products": 0}}
SHARED = {"variable_axes": {"params": None, "batch_stats": None}, "split_rngs": {"params": False}}
STEPS = {"length": 2, "split_rngs": {"params": False}}
LIFTED = {
    "vmap": nn.vmap(Block, in_axes=None, axis_size=2, **OF_TWO),
    "vmap that maps packed variables too": nn.vmap(Block, in_axes=None, axis_size=2, **LISTED),
    "vmap of shared weights": nn.vmap(Block, in_axes=None, axis_size=2, **SHARED),
    "scan": nn.scan(Step, length=2, **OF_TWO),
    "scan of shared weights": nn.scan(Step, variable_broadcast=("params", "batch_stats"), **STEPS),
}


class Network(nn.Module):
    """A binary layer, then a block inside of a transform, twice where `twice`."""

    block: Any = Block
    twice: bool = False

    @nn.compact
    def __call__(self, x, *, train):
        x = BinaryConv(8, name="stem", kernel_quantizer=SIGNS["kernel_quantizer"])(x)
        block = self.block(name="block")
        if self.block in (LIFTED["scan"], LIFTED["scan of shared weights"]):
            x, _ = block(x, None)
        else:
            x = block(block(x)) if self.twice else block(x)
        x = x if x.ndim == 4 else x[0]
        return BinaryDense(5, name="head", **SIGNS)(x.reshape(-1, 128))


def variables_of(model, seed=0):
    """Latent weights that are normal; means of normalizations that put products on thresholds."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), jnp.zeros((IMAGES, *SHAPE)))
    names = jax.tree_util.tree_map_with_path(lambda path, leaf: (path[-1].key, leaf.shape), shapes)
    draw = {"latent_kernel": rng.normal, "mean": partial(rng.normal, 0, 4.0), "bias": rng.normal}
    value = lambda name, shape: draw[name](size=shape) if name in draw else np.ones(shape)
    is_name = lambda node: isinstance(node, tuple) and isinstance(node[0], str)
    return jax.tree.map(lambda n: jnp.asarray(value(*n), jnp.float32), names, is_leaf=is_name)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(1).normal(size=(IMAGES, *SHAPE)), jnp.float32)


@pytest.fixture(scope="module")
def variables():
    return variables_of(Network())


@pytest.fixture(scope="module")
def packed(variables):
    return freeze(Network(), variables, SHAPE)


@pytest.fixture(scope="module")
def wanted(variables, packed, images):
    """What is compared of the network without a transform: every code, product and word."""
    found = verify(Network(), variables, packed, [images])
    pixels = IMAGES * 16
    conv = LayerReport(9 * 64, 0, pixels * 8, 0, pixels * 32, 0, "bits")
    assert found.layers == {
        "stem": LayerReport(9 * 24, 0, 0, 0, 0, 0, "float32"),
        "block/conv1": conv,
        "block/conv2": conv,
        "head": LayerReport(128 * 5, 0, IMAGES * 5, 0, IMAGES * 128, 0, "bits"),
    }
    assert found.passed and found.examples == IMAGES
    return found


@pytest.mark.full
def test_jit_and_remat_change_nothing(variables, packed, images, wanted):
    """Twice: with a trace of the transform that is cached, too."""
    model = Network(nn.remat(nn.jit(Block)))
    for _ in range(2):
        found = freeze(model, variables, SHAPE)
        assert jax.tree.structure(found) == jax.tree.structure(packed)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, packed))
    assert verify(model, variables, found, [images]) == wanted


@pytest.mark.full
def test_remat_is_no_place_for_a_difference_to_hide(variables, packed, images):
    """One bit of a kernel, in a layer that is called twice inside of it."""
    model = Network(nn.remat(Block), twice=True)
    variables = variables_of(model)
    packed = freeze(model, variables, SHAPE)
    words = packed["packed"]["block"]["conv2"]["kernel"].bases[0].words
    changed = jax.tree.map(lambda leaf: leaf.at[0, 0, 0].set(leaf[0, 0, 0] ^ 1) if leaf is words else leaf, packed)
    found = verify(model, variables, changed, [images, images])
    assert not found.passed and found.layers["block/conv2"].differing_integers > 0
    # Codes are counted once, products in each of two calls on each of two batches.
    assert found.layers["block/conv2"][:3] == (9 * 64, 1, 4 * IMAGES * 16 * 8)
    assert found.layers["block/conv1"].differing_integers == found.layers["head"].differing_integers == 0


@pytest.mark.parametrize("name", LIFTED)
def test_layers_that_a_transform_hides_are_refused_by_name(name, packed, images):
    """By freeze, and by verify whatever it is given."""
    model, layer = Network(LIFTED[name]), "block/block/conv1" if name.startswith("scan") else "block/conv1"
    variables = variables_of(model)
    text = rf"`model` calls layer '{layer}' inside nn.vmap, nn.scan or another transform that hides .* as in a loop"
    with pytest.raises(ValueError, match=text):
        freeze(model, variables, SHAPE)
    if "packed" not in name:
        with pytest.raises(ValueError, match=text):
            verify(model, variables, packed, [images])


def test_a_network_that_is_one_layer(images):
    model = BinaryConv(8, **SIGNS)
    variables = model.init(jax.random.key(0), images)
    found = verify(model, variables, freeze(model, variables, SHAPE), [images])
    assert found.passed and found.layers[""] == LayerReport(9 * 24, 0, IMAGES * 16 * 8, 0, IMAGES * 16 * 32, 0, "bits")


# -- nothing compared


def test_no_images_are_no_verification(variables, packed):
    found = verify(Network(), variables, packed, [jnp.zeros((0, *SHAPE))])
    assert not found.passed and found.examples == 0


def test_no_images_have_no_accuracy(packed):
    network = PackedModel(Network(), packed, {"image_shape": SHAPE, "mean": (0.0,) * 3, "std": (1.0,) * 3})
    images = np.zeros((IMAGES, *SHAPE), np.uint8)
    for batches in ([], [(images, np.full(IMAGES, -1))]):
        with pytest.raises(UsageError, match="`batches` hold no image with a label, so that there is no accuracy"):
            network.accuracy(batches)


def test_no_packed_layer_is_no_verification(variables, images):
    """A network is always equal to itself."""
    with pytest.raises(ValueError, match="`packed` has no packed layer, so that nothing would be compared; give what"):
        verify(Network(), variables, variables, [images])


@pytest.mark.usefixtures("unchecked")
def test_images_are_not_taken_for_batches(variables, packed, images):
    """An array is a sequence of single images, whose rows would be a batch for a network that flattens them."""
    with pytest.raises(ValueError, match=r"`batches` \(='one array'\) must be an iterable of arrays; give \[images\]"):
        verify(Network(), variables, packed, images)


class RealHead(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return BinaryDense(5, use_bias=True, name="head")(BinaryConv(8, name="conv", **SIGNS)(x).mean((1, 2)))


def test_a_wrong_real_number_that_moves_no_prediction_is_found(images):
    model = RealHead()
    variables = variables_of(model)
    packed = freeze(model, variables, SHAPE)
    assert verify(model, variables, packed, [images]).passed
    doubled = {**packed, "params": jax.tree.map(lambda leaf: 2 * leaf, packed["params"])}
    found = verify(model, variables, doubled, [images])
    assert found.differing_predictions == 0 and sum(sum(layer[1::2]) for layer in found.layers.values()) == 0
    assert found.largest_logit_difference == pytest.approx(found.largest_logit) and not found.passed
    assert not Verification(found.layers, 5, 0, float("nan"), 1.0).passed
    slightly = {**packed, "params": jax.tree.map(lambda leaf: 1.01 * leaf, packed["params"])}
    assert not verify(model, variables, slightly, [images]).passed
    assert [Verification(found.layers, 5, 0, difference, 1.0).passed for difference in (5e-4, 2e-3)] == [True, False]


@pytest.mark.parametrize("layers", [{}, {"conv": LayerReport(0, 0, 0, 0, 0, 0, "bits")}])
def test_no_compared_weight_is_no_verification(layers):
    assert not Verification(layers, 5, 0, 0.0, 1.0).passed
    assert Verification({"conv": LayerReport(9, 0, 0, 0, 0, 0, "bits")}, 5, 0, 0.0, 1.0).passed


def test_packed_variables_that_lack_a_layer(variables, packed, images):
    """A layer that kept its latent weights would be compared with itself."""
    partly = {**packed, "params": {"head": variables["params"]["head"]}}
    partly["packed"] = {name: layer for name, layer in packed["packed"].items() if name != "head"}
    with pytest.raises(ValueError, match="they differ in layer 'head'; freeze them again"):
        verify(Network(), variables, partly, [images])

"""Latent variables from packed ones: frozen they are the same again, and they compute and train like the first."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from networks import random_variables
from packed_file import DESCRIBED, SHAPE, packed_of

from bnn_jax.models.build import build_model
from bnn_jax.packed import PackedModel, freeze, latent_variables

IMAGES = np.random.default_rng(0).integers(0, 256, (200, *SHAPE), np.uint8)


@pytest.fixture(scope="module")
def trained(network):
    """Variables of a network with two thresholds and a batch norm of gains, some of them 0, and the packed network."""
    model = network[0]
    variables = random_variables(model, SHAPE)
    return variables, packed_of(freeze(model, variables, SHAPE))


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_frozen_they_are_the_packed_variables_again(trained):
    _, packed = trained
    variables = latent_variables(packed)
    assert variables.keys() == {"params", "batch_stats"}
    given, again = leaves(packed.variables), leaves(freeze(packed.model, variables, SHAPE))
    assert given.keys() == again.keys() and any(leaf.dtype == np.uint32 for leaf in given.values())
    assert any("threshold" in name for name in given) and any("gain" in name for name in given)
    for name, leaf in given.items():
        if leaf.dtype == np.float32:
            np.testing.assert_allclose(again[name], leaf, rtol=1e-5, atol=1e-5 * np.abs(leaf).max())
        else:
            np.testing.assert_array_equal(again[name], leaf)


def test_logits_are_the_same(trained):
    _, packed = trained
    logits = np.asarray(packed.logits(IMAGES))
    for variables in (latent_variables(packed), latent_variables(packed, IMAGES)):
        found = np.asarray(replace(packed, variables=variables).logits(IMAGES))
        np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def test_gains_of_0_and_beyond_the_largest(network):
    model = network[0]
    variables = random_variables(model, SHAPE)
    variables["params"]["norm1"]["scale"][:2] = 0.0, -1e4
    packed = packed_of(freeze(model, variables, SHAPE))
    logits = np.asarray(packed.logits(IMAGES))
    found = np.asarray(replace(packed, variables=latent_variables(packed)).logits(IMAGES))
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


@pytest.mark.full
def test_a_network_as_it_starts_has_them_with_images(network):
    """Its offsets are 0, the differences of numbers that are not."""
    model = network[0]
    variables = jax.tree.map(np.asarray, model.init(jax.random.key(0), np.zeros((1, *SHAPE), np.float32), train=False))
    packed = packed_of(freeze(model, variables, SHAPE))
    logits = np.asarray(packed.logits(IMAGES))
    found = np.asarray(replace(packed, variables=latent_variables(packed, IMAGES)).logits(IMAGES))
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


@pytest.mark.parametrize("quantizer", ["twn", "ttq", "state_aware", "learned_scale"])
def test_ternary_kernels_and_learned_scales(quantizer):
    model = build_model("mnist_mlp", num_classes=4, width=8, options={"hidden_layers": 2}, kernel_quantizer=quantizer)
    variables = random_variables(model, SHAPE)
    packed = PackedModel(model, freeze(model, variables, SHAPE), DESCRIBED)
    found = latent_variables(packed)
    logits = np.asarray(packed.logits(IMAGES))
    trained = np.asarray(replace(packed, variables=found).logits(IMAGES))
    np.testing.assert_allclose(trained, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    given, again = leaves(variables["params"]), leaves(found["params"])
    assert given.keys() == again.keys()
    # A scale for each sign is never swallowed by a threshold.
    for name in (name for name in given if name.endswith("tive_scale']")):
        np.testing.assert_allclose(again[name], given[name], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kernel_quantizer": "bitnet_b158"}, "comes out as another one"),
        ({"kernel_quantizer": "abc_net"}, "comes out as another one"),
        ({"kernel_quantizer": "xnor", "kernel_quantizer_options": {"center": True}}, "comes out as another one"),
    ],
)
def test_what_has_no_latent_variables_is_refused(settings, reason):
    model = build_model("mnist_mlp", num_classes=4, width=8, options={"hidden_layers": 2}, **settings)
    packed = PackedModel(model, freeze(model, random_variables(model, SHAPE), SHAPE), DESCRIBED)
    sentence = (
        f"`packed` has no latent variables that freezing would pack to the same: .*{reason}; take those of its run"
    )
    with pytest.raises(ValueError, match=sentence):
        latent_variables(packed)


def test_images_of_another_kind_are_refused(trained, unchecked):
    with pytest.raises(ValueError, match=r"`images` .=float32 of shape .2, 6, 6, 2.. must be uint8"):
        latent_variables(trained[1], np.zeros((2, *SHAPE), np.float32))


def test_variables_alone_are_refused(network, unchecked):
    with pytest.raises(TypeError, match=r"`packed` .=dict. must be a PackedModel"):
        latent_variables(network[1])

"""Every network of the catalogue, frozen: the same integers and bits, and the size that accounting says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from packed_checks import compare, initialized
from small_models import INSTANCES, LARGE, TEXTS, UNREAD, compiled, small

from bnn_jax.analysis.accounting import account_model
from bnn_jax.packed import freeze, packed_structure
from bnn_jax.training.experiment import make_model

NOTHING_TO_PACK = {"resnet18", "binaryduo_vgg7", "wide_resnet40_4", "densenet40_40"}
"""Published with real weights."""
NETWORKS = sorted(INSTANCES.values())


def network(name):
    return make_model(small(name), num_classes=5), small_models.image_shape(name)


def trained(name, model, image_shape):
    """Variables as after training: no shift or slope at its start, statistics and gammas of all kinds."""
    variables = initialized(model, image_shape, drawn=name not in LARGE)
    rng = np.random.default_rng(0)

    def value(path, leaf):
        if path[0].key == "batch_stats":
            return (
                rng.choice([1e-6, 0.5, 2.0], leaf.shape) if path[-1].key == "var" else rng.integers(-3, 4, leaf.shape)
            )
        if leaf.ndim < 2 and path[-1].key == "scale":
            return rng.choice([-1.0, -1e-30, 0.0, 0.2, 1.0], leaf.shape)
        return leaf + rng.normal(size=leaf.shape) * (0.3 if leaf.ndim < 2 else 0.01)

    for collection in ("params", "batch_stats"):
        if collection in variables:
            tree = {collection: variables[collection]}
            variables |= jax.tree_util.tree_map_with_path(lambda p, leaf: jnp.asarray(value(p, leaf), leaf.dtype), tree)
    return variables


def size_is_what_accounting_says(name, model, image_shape, structure):
    """Accounting counts the trained network's computation and knows nothing of the packed arrays."""
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(structure))
    # A kernel that is multiplied by zero alone is stored, but nothing depends on it.
    return (account_model(model, image_shape).payload_bytes() == stored) != (name in UNREAD)


PACKABLE = [name for name in NETWORKS if name not in NOTHING_TO_PACK]


@pytest.mark.parametrize("name", compiled(PACKABLE, bireal18=pytest.mark.default_flags))
def test_a_frozen_network_is_the_trained_one_and_as_small_as_accounting_says(name):
    model, image_shape = network(name)
    variables = trained(name, model, image_shape)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 5, (1, *image_shape)) if name in TEXTS else rng.normal(size=(1, *image_shape))
    images = jnp.asarray(tokens, jnp.float32)
    frozen = freeze(model, variables, image_shape)
    found = compare(model, variables, frozen, images)
    weights_only = model.input_quantizer is None
    # Sums of real numbers may be rounded in another order.
    assert found.differing == 0 and found.logits <= 1e-5 * found.largest if weights_only else found.same, found
    assert (found.values == 0) == weights_only and found.weights > 0
    assert size_is_what_accounting_says(name, model, image_shape, frozen)


@pytest.mark.full
@pytest.mark.parametrize("name", LARGE)
def test_a_large_network_is_as_small_as_accounting_says(name):
    """By tracing alone."""
    model, image_shape = network(name)
    assert size_is_what_accounting_says(name, model, image_shape, packed_structure(model, image_shape))


@pytest.mark.parametrize("name", sorted(NOTHING_TO_PACK))
def test_a_network_without_quantized_weights_is_refused(name):
    with pytest.raises(ValueError, match="has no layer with quantized weights"):
        packed_structure(*network(name))

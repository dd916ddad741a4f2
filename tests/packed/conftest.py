"""A packed network and its file, made once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_file import DESCRIBED, SETTINGS, SHAPE, TESTED

from bnn_jax.models.build import build_model
from bnn_jax.packed import freeze, load, save


@pytest.fixture(scope="session")
def network():
    """The model and its packed variables, batch norms of both signs."""
    model = build_model(num_classes=4, **SETTINGS)
    rng = np.random.default_rng(0)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False))

    def random(path, leaf):
        values = rng.normal(size=leaf.shape).astype(leaf.dtype)
        return jnp.asarray(np.abs(values) + 0.5 if "var" in str(path[-1]) else values)

    return model, freeze(model, jax.tree_util.tree_map_with_path(random, dict(variables)), SHAPE)


@pytest.fixture(scope="session")
def path(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "model.bnn.safetensors"
    save(path, SETTINGS, network[1], **DESCRIBED, accounting={"bits": 7}, tested=TESTED)
    return path


@pytest.fixture(scope="session")
def loaded(path):
    return load(path)

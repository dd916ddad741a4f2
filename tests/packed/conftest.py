"""A packed network and its file, made once."""

import pytest
from networks import random_variables
from packed_file import SETTINGS, SHAPE, TESTED, packed_of

from bnn_jax.models.build import build_model
from bnn_jax.packed import freeze, load, save


@pytest.fixture(scope="session")
def network():
    """The model and its packed variables, batch norms of both signs."""
    model = build_model(num_classes=4, **SETTINGS)
    return model, freeze(model, random_variables(model, SHAPE), SHAPE)


@pytest.fixture(scope="session")
def path(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "model.bnn.safetensors"
    save(path, packed_of(network[1]), accounting={"bits": 7}, tested=TESTED)
    return path


@pytest.fixture(scope="session")
def loaded(path):
    return load(path)

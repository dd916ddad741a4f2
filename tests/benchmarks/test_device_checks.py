"""The checks of an accelerator see a wrong product, and pass on this machine."""

import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.benchmarks import device_checks


@pytest.mark.full
def test_products_and_convolutions_of_codes_are_exact_in_every_form():
    rng = np.random.default_rng(0)
    assert device_checks.differing_products(rng) == {"bits": 0, "int8": 0, "float32": 0, "bfloat16": 0}
    assert device_checks.differing_convolutions(rng) == {"float32": 0, "bfloat16": 0}
    assert device_checks.gradient_error(rng) < 1e-6


@pytest.mark.full
def test_wrong_products_are_counted(monkeypatch):
    monkeypatch.setattr(device_checks, "xor_counts", lambda a, b: jnp.zeros((a.shape[0], b.shape[1]), jnp.int32))
    monkeypatch.setattr(device_checks, "conv", lambda x, *_: jnp.full((*x.shape[:3], 1), 0.25, jnp.float32))
    monkeypatch.setattr(device_checks, "CONVOLUTIONS", ((2, 8, 4, 1),))
    found = device_checks.differing_products(np.random.default_rng(0))
    assert found["bits"] > 100_000
    assert found["int8"] == found["float32"] == 0
    assert min(device_checks.differing_convolutions(np.random.default_rng(0)).values()) > 100

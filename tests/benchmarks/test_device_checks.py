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


GOOD = {
    "differing_products": {"bits": 0},
    "differing_convolutions": {"float32": 0},
    "gradient_error": 1e-7,
    "packed_network": {"passed": True},
    "determinism": {"default_flags": False, "deterministic_ops": True},
}


@pytest.mark.parametrize(
    ("changed", "equal"),
    [
        ({}, True),
        ({"differing_products": {"bits": 1}}, False),
        ({"differing_convolutions": {"float32": 1}}, False),
        ({"gradient_error": 1e-3}, False),
        ({"packed_network": {"passed": False}}, False),
        ({"determinism": {"default_flags": True, "deterministic_ops": False}}, False),
        ({"determinism": {"default_flags": True, "deterministic_ops": "a process failed: no memory"}}, False),
    ],
)
def test_all_that_has_to_be_equal_is(monkeypatch, changed, equal):
    for name, value in (GOOD | changed).items():
        monkeypatch.setattr(device_checks, name, lambda *_, value=value: value)
    told = []
    found = device_checks.check_device(on_found=lambda name, _: told.append(name))
    assert found["equal"] is equal
    assert told == [*found] and told[0] == "device" and told[-1] == "equal"


@pytest.mark.full
def test_a_flag_that_xla_does_not_have_is_told_and_the_other_is_compared():
    flags = {"good": "", "bad": "--xla_no_such_flag=true"}
    found = device_checks.determinism(1, 2, flags)
    assert found["good"] is True
    assert found["bad"].startswith("a process failed: ")

"""What is asked of the compiler: only what it knows, and what the user has not decided."""

import jax
import pytest

from bnn_jax import compilation
from bnn_jax.compilation import EIGEN_CONVOLUTIONS, WIDE_VECTORS, packed_options, training_options


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    compilation._known.cache_clear()
    yield
    compilation._known.cache_clear()


def test_a_cpu_computes_convolutions_on_all_threads():
    options = training_options()
    assert options in (EIGEN_CONVOLUTIONS, {})  # a version of XLA may not know them
    assert options or jax.__version_info__ > (0, 10, 2) or jax.default_backend() != "cpu"


def test_packed_bits_have_wide_vectors_besides():
    options = packed_options()
    assert options in (EIGEN_CONVOLUTIONS | WIDE_VECTORS, WIDE_VECTORS, {})
    assert options or jax.default_backend() != "cpu"


def test_the_flags_of_the_user_go_before(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    assert training_options() == {}
    assert packed_options() == WIDE_VECTORS


def test_what_this_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(compilation, "EIGEN_CONVOLUTIONS", {"xla_cpu_of_another_version": "1"})
    assert training_options() == {}
    assert packed_options() == WIDE_VECTORS


def test_other_devices_are_asked_for_nothing(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert packed_options() == training_options() == {}

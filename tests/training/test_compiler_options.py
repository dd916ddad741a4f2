"""What training asks of the compiler: only what it knows, and what the user has not decided."""

import jax
import pytest

from bnn_jax.training import programs


@pytest.fixture(autouse=True)
def asked_anew():
    programs.compiler_options.cache_clear()
    yield
    programs.compiler_options.cache_clear()


def test_a_cpu_computes_convolutions_on_all_threads(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    options = programs.compiler_options()
    assert options in (programs.CPU_OPTIONS, {})  # a version of XLA may not know them
    assert options or jax.__version_info__ > (0, 10, 2) or jax.default_backend() != "cpu"


def test_the_flags_of_the_user_go_before(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    assert programs.compiler_options() == {}


def test_what_this_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(programs, "CPU_OPTIONS", {"xla_cpu_of_another_version": "1"})
    assert programs.compiler_options() == {}


def test_other_devices_are_asked_for_nothing(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert programs.compiler_options() == {}

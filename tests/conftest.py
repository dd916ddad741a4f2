"""What holds for every test: strict ranks, a shared compilation cache, no downloads."""

import os
from pathlib import Path

import jax
import pytest

CACHE = Path(__file__).parents[1] / ".cache" / "jax"

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="session")
def subprocess_env() -> dict[str, str]:
    """The environment for scripts that a test starts: the same compilation cache, no device but the CPU."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_PLATFORMS": "cpu",
    }

"""What holds for every test: strict ranks, a shared compilation cache, no downloads."""

import ctypes
import gc
import os
import resource
from pathlib import Path

import hypothesis
import jax
import jaxlib.version
import jaxtyping
import pytest
from strictness import check_arrays

ROOT = Path(__file__).parents[1]
MOST_RESIDENT = 10**9
CACHE = ROOT / ".cache" / "jax"
MANY_CASES, EVERY = 3, 8
"""Of a test with so many cases make test takes one in six; make test-full takes the others."""

# Compiling is most of the tests' time: no optimizations by LLVM, no splitting of programs that are small,
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
# and the older way to write fused loops, half as dear. XLA ends a process that names a flag which it does not have.
if jaxlib.version.__version__.startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
# What is marked default_flags is checked without them too: see tests/test_default_flags.py.
if "BNN_JAX_TESTS_AT_DEFAULT_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"

# A sixth of the time was the garbage collector's, which looks through all that JAX traces.
gc.set_threshold(50_000, 20, 20)

check_arrays("bnn_jax")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# The same examples in every run; `pytest --hypothesis-profile=default` looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def unchecked():
    """Nothing is checked against annotations, as users have it: for tests of what the functions themselves refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def standard_dtypes():
    """Dtypes promote, as users have it: for transforms of optax, which mix numbers with their whole step counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """What test files leave in JAX's caches stays until it is much; the garbage collector need not walk through it."""
    yield
    if resident_bytes() > MOST_RESIDENT:
        jax.clear_caches()
        gc.unfreeze()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    gc.freeze()


def resident_bytes() -> int:
    """The memory of this process, where the system tells it."""
    statistics = Path("/proc/self/statm")
    return int(statistics.read_text().split()[1]) * resource.getpagesize() if statistics.exists() else 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave cases to make test-full, and put long tests first, so that no worker is left alone with one at the end."""
    cases: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if hasattr(item, "callspec") and item.get_closest_marker("full") is None:
            cases.setdefault((item.path, item.originalname), []).append(item)
    for same in cases.values():
        for number, item in enumerate(same):
            if len(same) >= MANY_CASES and number % EVERY:
                item.add_marker("full")
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def subprocess_env() -> dict[str, str]:
    """The environment for scripts that a test starts: the same compilation cache, no device but the CPU."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_PLATFORMS": "cpu",
    }


@pytest.fixture
def interrupted_env(subprocess_env, tmp_path) -> dict[str, str]:
    """For scripts that are killed or run out of disk: what they leave half-written in the cache is theirs alone."""
    return subprocess_env | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}

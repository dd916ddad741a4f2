"""What is asked of XLA's compiler, and where it keeps what it compiled."""

import os
from contextlib import suppress
from functools import lru_cache
from typing import Any

import jax

from bnn_jax.errors import UsageError
from bnn_jax.paths import cache_folder

QUICK_COMPILATION = {"xla_backend_optimization_level": 0}
"""For what runs once: XLA compiles the many small random numbers of an initialisation eight times faster, same bits."""

EIGEN_CONVOLUTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
}
"""On a CPU: convolutions by Eigen, on all threads; jaxlib 0.10.2 has them on one."""

WIDE_VECTORS = {"xla_cpu_prefer_vector_width": 512}
"""With which most counts of bits take 0.5 to 0.8 of the time on AVX-512; XLA's default is 256 bits."""


def training_options() -> dict[str, Any]:
    """Compiler options for training and evaluation on the default device; none but on a CPU."""
    return _known(tuple(EIGEN_CONVOLUTIONS.items()))


def packed_options() -> dict[str, Any]:
    """Compiler options for networks on packed bits on the default device; none but on a CPU.

    >>> run = jax.jit(lambda x: x + 1, compiler_options=packed_options())
    """
    return training_options() | _known(tuple(WIDE_VECTORS.items()))


@lru_cache
def _known(options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The options on a CPU whose XLA knows them, unless XLA_FLAGS says otherwise; nothing elsewhere."""
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.default_backend() != "cpu" or any(name in flags for name, _ in options):
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=dict(options)).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return dict(options)


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another.

    Where there is no home, or nothing can be written in it, none are kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = cache_folder() / "compiled"
    except UsageError:
        if os.environ.get("XDG_CACHE_HOME"):
            raise
        return
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

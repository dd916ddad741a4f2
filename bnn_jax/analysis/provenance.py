"""Where a result comes from: date, code, versions and device."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from bnn_jax.cores import usable_cores

DISTRIBUTIONS = ("bnn_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
CPU_FEATURES = ("avx2", "avx512f", "avx512_vpopcntdq")
"""As Linux calls them: what the speed of products on floats and on bits depends on."""
GIT_SECONDS = 20


def provenance() -> dict[str, Any]:
    """What a result was made with, as plain JSON without host name or paths.

    ``{"date": UTC in ISO 8601, "python", "platform", "versions": {distribution: version},
    "xla_flags": [flag], "device": {"platform", "kind", "count"}, "cpu": {"cores", "model", "features"},
    "git": {"commit", "dirty"}}``

    A distribution that is not installed and what of the CPU cannot be read are left out; git says "unknown" outside a
    checkout.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": installed_versions(DISTRIBUTIONS),
        "xla_flags": xla_flags(),
        "device": device(),
        "cpu": cpu(),
        "git": git_state(Path(__file__).parents[1]),
    }


def installed_versions(distributions: tuple[str, ...]) -> dict[str, str]:
    """Distribution -> version, of those that are installed, in the order given."""
    versions = {}
    for name in distributions:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def xla_flags() -> list[str]:
    """The words of `$XLA_FLAGS`, which can change the last bits of a result, less those with a path in them."""
    return [flag for flag in os.environ.get("XLA_FLAGS", "").split() if os.sep not in flag]


def device() -> dict[str, Any]:
    """The accelerator that JAX uses by default: ``{"platform": "cpu", "kind": "cpu", "count": 1}``."""
    devices = jax.devices()
    kinds = sorted({one.device_kind for one in devices})
    return {"platform": devices[0].platform, "kind": ", ".join(kinds), "count": len(devices)}


def cpu() -> dict[str, Any]:
    """The CPU cores this process may use and, where they can be read, the model and its wide instructions.

    ``{"cores": 2, "model": "...", "features": ["avx2"]}``, of :data:`CPU_FEATURES`.
    """
    found = _linux_cpu_info()
    model = found.get("model name") or platform.processor()
    features = [name for name in CPU_FEATURES if name in found.get("flags", "").split()]
    known = {"model": model} if model else {}
    return {"cores": len(usable_cores())} | known | ({"features": features} if features else {})


def _linux_cpu_info() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in reversed(lines))  # of the first core
    return {name.strip(): value.strip() for name, _, value in pairs}


def git_state(folder: Path) -> dict[str, str | bool]:
    """The commit of the checkout that tracks `folder`'s ``__init__.py``, and whether the checkout differs from it.

    ``{"commit": 40 hex digits, "dirty": bool}``.  Untracked files count as a difference, files under the top-level
    ``results/`` do not.  Both values are "unknown" where `folder` is not in a checkout or git cannot be asked.
    """
    try:
        # A package installed into an ignored environment lies inside somebody else's checkout: that is not its commit.
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(folder, "rev-parse", "HEAD").strip()
        # A comparison writes its results into the checkout; they must not make the next one look modified.
        changes = _git(folder, "status", "--porcelain", "--", ":(top)", ":(top,exclude)results")
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": "unknown"}
    return {"commit": commit, "dirty": bool(changes.strip())}


def _git(folder: Path, *arguments: str) -> str:
    # Inside a git hook these variables name another checkout; optional locks would disturb a commit under way.
    ours = {
        name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    }
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    return subprocess.run(command, env=ours, capture_output=True, text=True, check=True, timeout=GIT_SECONDS).stdout

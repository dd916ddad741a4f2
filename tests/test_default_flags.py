"""What is exact is so at XLA's default flags too, which users have: other tests compile with fewer optimizations."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MARKED = sorted(str(path) for path in TESTS.rglob("test_*.py") if "pytest.mark.default_flags" in path.read_text())
"""Files with tests that are marked so, this one among them."""


@pytest.mark.full
def test_the_exact_statements_hold_at_the_default_flags(subprocess_env):
    kept = {name: value for name, value in subprocess_env.items() if name != "XLA_FLAGS" and "PYTEST" not in name}
    options = ["-n", "0", "-p", "no:cacheprovider", "-m", "default_flags"]
    command = [sys.executable, "-m", "pytest", *options, *MARKED]
    env = kept | {"BNN_JAX_TESTS_AT_DEFAULT_FLAGS": "1"}
    done = subprocess.run(command, env=env, cwd=TESTS.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 20, done.stdout


@pytest.mark.default_flags
def test_the_flags_are_those_of_a_user():
    assert ("optimization_level" in os.environ.get("XLA_FLAGS", "")) == (
        "BNN_JAX_TESTS_AT_DEFAULT_FLAGS" not in os.environ
    )

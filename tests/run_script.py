"""Runs a script within the process of the tests, without its start and with the programs that are compiled already."""

import io
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import jax
import pytest

from bnn_jax.cli.main import main

ROOT = Path(__file__).parents[1]


def run_script(name: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess:
    """Run scripts/<name>.py with the arguments; returns its exit code, which must be `code`, and its output."""
    command = [f"scripts/{name}.py", *map(str, arguments)]
    return _run(command, lambda: runpy.run_path(command[0], run_name="__main__"), code)


def run_command(*arguments: object, code: int = 0) -> subprocess.CompletedProcess:
    """Run `bnn-jax` with the arguments, as :func:`run_script`."""
    return _run(["bnn-jax", *map(str, arguments)], lambda: sys.exit(main()), code)


def _run(command: list[str], run: Callable[[], Any], code: int) -> subprocess.CompletedProcess:
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            run()
    done = subprocess.CompletedProcess(command, ended.value.code, out.getvalue(), error.getvalue())
    assert done.returncode == code, done.stdout + done.stderr
    return done

"""Run the notebooks, two at a time, while other pages are made: MyST-NB finds in its cache what they print.

A notebook that fails here is not in the cache; MyST-NB runs it again then, and says what is wrong.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from jupyter_cache import get_cache
from jupyter_cache.executors import load_executor
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
FOLDER = "notebooks/"


def execute(cache_path: str) -> None:
    """Run the notebooks that the cache does not have, each in a folder that is deleted afterwards."""
    cache = get_cache(cache_path)
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        cache.add_nb_to_project(str(notebook))
    load_executor("temp-parallel", cache).run_and_cache(timeout=600)


def begin(app: Sphinx) -> None:
    """Start a process that runs them: a process of its own, because JAX does not survive a fork."""
    command = [sys.executable, __file__, app.config.nb_execution_cache_path]
    one_thread_each = {**os.environ, "NPROC": "1"}  # of XLA: they would wait for one another
    app.running_notebooks = subprocess.Popen(
        command, env=one_thread_each, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def read_last(app: Sphinx, env: BuildEnvironment, docnames: list[str]) -> None:
    """Read the pages of the notebooks after all others."""
    docnames.sort(key=lambda name: name.startswith(FOLDER))


def await_notebooks(app: Sphinx, docname: str, source: list[str]) -> None:
    """Wait for all notebooks before the first of them is read."""
    if docname.startswith(FOLDER):
        app.running_notebooks.wait()


def stop(app: Sphinx, exception: Exception | None) -> None:
    """End the process if the build ended before it."""
    app.running_notebooks.terminate()
    app.running_notebooks.wait()


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", begin, priority=100)
    app.connect("env-before-read-docs", read_last)
    app.connect("source-read", await_notebooks)
    app.connect("build-finished", stop)
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    execute(sys.argv[1])

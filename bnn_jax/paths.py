"""Where files of the product lie."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder of what is decoded, compiled or measured once: `$XDG_CACHE_HOME/bnn_jax`, else `~/.cache/bnn_jax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bnn_jax"

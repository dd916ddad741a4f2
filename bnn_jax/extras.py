"""Packages that one purpose needs: imported when it comes to that, and where they are missing named with a pip line."""

import importlib
from types import ModuleType

from bnn_jax.errors import UsageError

EXTRAS: dict[str, str] = {
    "matplotlib": "plot",
    "flatbuffers": "export",
    "h5py": "keras",
    "grain": "stream",
    "tensorflow_datasets": "tfds",
    "array_record": "tfds",
    "importlib_resources": "tfds",
    "tensorboardX": "tensorboard",
    "wandb": "wandb",
}
"""Package -> the extra of bnn_jax, in setup.cfg, that installs it."""


def import_extra(module: str, purpose: str, otherwise: str = "") -> ModuleType:
    """Import a module of one of the packages in :data:`EXTRAS`.

    Args:
      module: its name.
      purpose: what needs it, as "drawing".
      otherwise: how to do without it.

    Raises:
      UsageError: where the package is not installed; names it and what installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        # Its own requirements may be missing too; the extra installs them with it.
        raise UsageError(
            f"{purpose} needs the Python package {error.name or package}, which is not installed; install it with: "
            f"pip install 'bnn_jax[{EXTRAS[package]}]'{otherwise and f'; or {otherwise}'}"
        ) from error

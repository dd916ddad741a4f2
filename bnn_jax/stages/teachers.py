"""Networks of earlier runs: those that teach, and those that another stage starts from."""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
from flax.core.meta import unbox
from flax.traverse_util import flatten_dict

from bnn_jax.checks import require
from bnn_jax.data import Dataset, ImageStream
from bnn_jax.errors import UsageError
from bnn_jax.paths import local_path
from bnn_jax.stages.warm_start import Variables
from bnn_jax.training.config import Config
from bnn_jax.training.programs import Teacher, programs_of, state_shapes
from bnn_jax.training.run_folder import read_config, restore_run
from bnn_jax.training.state import WHICH


def load_network(
    folder: str | Path,
    dataset: Dataset | ImageStream,
    *,
    which: Literal["best", "last"] = "best",
    config: Config | None = None,
) -> Teacher:
    """The network of a run: its settings and variables.

    Args:
      folder: of the run.
      dataset: with the image shape and classes that it was trained for.
      which: the variables of the best validation epoch, or those of the newest checkpoint.
      config: of the run, as this process has it; None reads it, which cannot have what no name finds again.

    Raises:
      UsageError: for another `which`; if there is no run, no checkpoint, or it was trained for images or classes of
        another kind.
    """
    require("which", which, which in WHICH, "must be best or last", error=UsageError)
    folder = local_path("folder", folder)
    config = read_config(folder) if config is None else config
    restored = restore_run(config, folder, state_shapes(programs_of(config, dataset)))
    if restored is None:
        raise UsageError(f"`folder` (={folder}) holds no checkpoint yet; train it first")
    found = restored.state.best if which == "best" else restored.state.train
    params, model_state = found.evaluated
    return Teacher(config.model, {"params": params, **model_state})


def fingerprint(variables: Variables) -> str:
    """SHA-256 of the variables: names, dtypes, shapes and bits.

    >>> a, b = ({"params": {"w": np.array([x])}} for x in (0.0, -0.0))
    >>> fingerprint(a) == fingerprint(a), fingerprint(a) == fingerprint(b)
    (True, False)
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten_dict(unbox(variables), sep="/").items()):
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()

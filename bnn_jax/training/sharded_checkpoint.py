"""Checkpoints of a state whose arrays lie in parts on several processes: Orbax lets each write the parts it holds.

The folder must be one that all processes see; :func:`sees_folder_of_first` tells.  Three things stay with process 0:

* all leaves that it has whole, so that data-parallel runs need no shared folder;
* the manifest, whose hashes are of whole leaves, so that they do not depend on the devices: it reads each leaf in parts
  back for that, after every process has compared its own parts with what was written;
* restoring: one process has to decide which checkpoint verifies, and sends the others what it has verified.

Orbax 0.12.8 does not tell the other processes when one cannot write: that one ends with its error, and the others,
which wait for it, are ended by JAX.  The last good checkpoint is kept.
"""

from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import jax
import numpy as np

from bnn_jax.training.checkpoint import (
    commit,
    delete_older,
    make_ready,
    marked_as_unfinished,
    telling_of_save,
    tree_to_store,
)
from bnn_jax.training.devices import is_first_process, largest, on_first_process
from bnn_jax.training.manifest import Damaged, make_manifest, named_shapes
from bnn_jax.training.orbax_store import read_arrays, save_tree


def is_in_parts(leaf: Any) -> bool:
    """Whether no process has the whole array."""
    return isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def sees_folder_of_first(folder: Path) -> bool:
    """Whether all processes see `folder` as process 0 does, where it exists; all call this together."""
    mark = folder / f"seen-by-all-{on_first_process(lambda: uuid4().hex)}.tmp"

    def make_mark() -> None:
        with suppress(OSError):  # then no process sees it, and what cannot be written is told by the save
            mark.touch()

    on_first_process(make_mark)
    seen = largest(float(not mark.exists())) == 0
    on_first_process(partial(mark.unlink, missing_ok=True))
    return seen


def save_in_parts(folder: Path, step: int, state: Any, *, metadata: dict[str, Any], keep: int = 2) -> None:
    """Save a new `step` as :func:`bnn_jax.training.checkpoint.save_checkpoint` does; all processes call this together.

    Raises:
      RunError: disk full, no permission; what was there before is kept.
    """
    path = folder / str(step)
    leaves = dict(zip(named_shapes(state, "state"), jax.tree_util.tree_leaves(state)))
    parts = {name: leaf for name, leaf in leaves.items() if is_in_parts(leaf)}
    arrays = {name: leaf if name in parts else np.asarray(leaf, order="C") for name, leaf in leaves.items()}

    def begin() -> None:
        with telling_of_save(folder, step):
            make_ready(folder)

    def finish() -> None:
        with telling_of_save(folder, step):
            stored = read_arrays(path, {name: np.dtype(array.dtype) for name, array in parts.items()})
            commit(folder, step, make_manifest(step, arrays | stored, metadata))
            delete_older(folder, step, keep)

    on_first_process(begin)
    with telling_of_save(folder, step), marked_as_unfinished(folder, step) if is_first_process() else nullcontext():
        save_tree(path, tree_to_store(state, arrays), together=True)
        wrong = next((name for name, array in parts.items() if not _is_stored(path, name, array)), None)
        if largest(float(wrong is not None)):
            raise Damaged(f"`{wrong or 'an array of another process'}` is not what was saved")
        on_first_process(finish)


def _is_stored(path: Path, name: str, array: jax.Array) -> bool:
    """Whether the parts of `array` that this process holds are what the checkpoint at `path` holds of it."""
    stored = read_arrays(path, {name: np.dtype(array.dtype)})[name]
    return all(stored[part.index].tobytes() == np.asarray(part.data).tobytes() for part in array.addressable_shards)

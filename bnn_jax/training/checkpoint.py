"""Checkpoints that are either exactly what was saved, or known to be damaged.

A folder of checkpoints holds, for each step::

    20/                       the state, a tree of named arrays that Orbax has saved, and that plain Orbax loads
      state/                    OCDBT store: `manifest.ocdbt` and `d/` point into `ocdbt.process_0/d/*`, the bytes
      state/_METADATA           names and types of the tree
      _CHECKPOINT_METADATA, commit_success.txt, orbax.checkpoint
    20.json                   the manifest: name, dtype, shape and SHA-256 of each leaf, the caller's metadata, and a
                              SHA-256 over the manifest itself
    20.json.tmp               `20/` is being written or deleted, and counts for nothing
    20.orbax-checkpoint-tmp/  what Orbax has not finished
    quarantine-1/             what a run could not go on from, and moved out of its way

The manifest takes its name last, after the data were read back and compared with it, so a checkpoint exists when its
manifest does; whatever a kill leaves behind is cleared by the next save.  Orbax itself restores a flipped bit without
a word and takes an empty folder for the latest checkpoint, hence the hashes.  A leaf without elements, which Orbax
cannot store, is in the manifest alone, and None in the tree that plain Orbax loads; a dtype that it does not know
(uint4) is there as bytes.

One process at a time writes to a folder; what several hold in parts is saved by `sharded_checkpoint`.
"""

import contextlib
import itertools
import operator
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bnn_jax.errors import RunError, UsageError
from bnn_jax.files import replace_synced, sync_tree, write_atomically, write_synced
from bnn_jax.paths import local_path
from bnn_jax.training.manifest import (
    Damaged,
    Unreadable,
    check_same_leaves,
    make_manifest,
    manifest_text,
    named_arrays,
    named_shapes,
    read_leaves,
    read_manifest,
)
from bnn_jax.training.orbax_store import StoreError, require_storable, save_tree

_STEP_NAME = re.compile(r"(0|[1-9][0-9]*)(\.json)?")
_UNFINISHED_NAME = re.compile(r"(0|[1-9][0-9]*)(\.json\.tmp|\.orbax-checkpoint-tmp.*)")
_ORBAX_MARKS = {"_CHECKPOINT_METADATA", "commit_success.txt", "orbax.checkpoint", "state"}


class CheckpointWarning(UserWarning):
    """A checkpoint was passed over; the text names its path and the reason."""


class Restored(NamedTuple):
    """What :func:`restore_checkpoint` found: the state, the step it was saved at, and the caller's metadata."""

    state: Any
    step: int
    metadata: dict[str, Any]


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    state: Any,
    *,
    metadata: dict[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Save `state` as checkpoint `step` of `folder`, then delete those older than the newest `keep` that verify.

    Args:
      folder: made if missing.
      step: training steps done, 0 or larger.
      state: pytree of jax or numpy arrays; typed PRNG keys go in as ``jax.random.key_data(key)``.
      metadata: a small dict of what JSON knows (config, metrics), kept in the manifest.
      keep: sound checkpoints to keep, counted from this one down.  Checkpoints of later steps are left alone.

    Returns:
      The data folder ``<folder>/<step>``.  Saving the same state again changes the metadata at most.

    Raises:
      TypeError, ValueError: `state`, `metadata`, `step` or `keep` is not as described.
      UsageError: `folder` is not a folder, or has square brackets or a backslash in its path; or `step` is there
        already with another state.
      RunError: disk full, no permission; what was there before is kept.
    """
    folder, step = local_path("folder", folder).absolute(), operator.index(step)
    if step < 0:
        raise ValueError(f"`step` (={step}) must be 0 or larger; give the number of training steps done")
    require_storable("folder", folder)
    if keep < 1:
        raise ValueError(f"`keep` (={keep}) must be 1 or larger; give the number of checkpoints to keep")
    arrays = named_arrays(state)
    manifest = make_manifest(step, arrays, metadata)
    with telling_of_save(folder, step):
        make_ready(folder)
        if not _holds_already(folder, step, manifest):
            with marked_as_unfinished(folder, step):
                save_tree(folder / str(step), tree_to_store(state, arrays))
                commit(folder, step, manifest)
        delete_older(folder, step, keep)
    return folder / str(step)


def restore_checkpoint(
    folder: str | os.PathLike[str],
    like: Any,
    *,
    step: int | None = None,
    why_rejected: Callable[[dict[str, Any]], str | None] = lambda metadata: None,
    finite: bool = False,
    quarantine: bool = False,
) -> Restored | None:
    """Restore the newest checkpoint of `folder` that verifies, bit for bit as it was saved.

    Checkpoints that are damaged, half-written, of another format, or with `finite` hold a number that is not are passed
    over, newest first, each with one :class:`CheckpointWarning`.  With `step` only that one is tried.

    Args:
      like: a state (or ``jax.eval_shape`` of one), for structure, shapes and dtypes; or a function of the metadata.
      why_rejected: metadata -> why a checkpoint is passed over although it verifies, or None.
      quarantine: move what was passed over into ``<folder>/quarantine-<n>``, with one more warning, and go on as if it
        had never been there.  What only cannot be read here and now (permission, format version) stays where it is.

    Returns:
      The state in the structure of `like`, its leaves jax arrays on the default device, never weakly typed; or None
      when `folder` is missing or holds no checkpoint.

    Raises:
      UsageError: `like` differs from what was saved, or there is no such `step`.
      RunError: there are checkpoints, but none verifies (with `quarantine`: and some of them cannot be read).

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> _ = save_checkpoint(folder, 20, {"kernel": np.array([1.0, -0.0], np.float32)}, metadata={"accuracy": 0.5})
    >>> restore_checkpoint(folder, {"kernel": np.zeros(2, np.float32)})
    Restored(state={'kernel': Array([ 1., -0.], dtype=float32)}, step=20, metadata={'accuracy': 0.5})
    """
    present = _steps_present(folder := local_path("folder", folder).absolute())
    if not callable(like):
        named_shapes(like, "like")  # to refuse what is no state even where there is nothing to restore
    passed: dict[int, Damaged] = {}
    for candidate in reversed(present) if step is None else [_present_step(folder, present, step)]:
        try:
            manifest = _manifest_of(folder, candidate)
            if (reason := why_rejected(manifest["metadata"])) is not None:
                raise Damaged(reason)
            saved_like = like(manifest["metadata"]) if callable(like) else like
            check_same_leaves(wanted := named_shapes(saved_like, "like"), manifest, folder / str(candidate))
            leaves = read_leaves(folder, candidate, manifest, finite=finite)
        except Damaged as damage:
            if step is not None:
                raise _restore_error(folder, candidate, damage) from None
            warnings.warn(f"skipped checkpoint `{folder / str(candidate)}`: {damage}", CheckpointWarning, stacklevel=2)
            if not _is_unfinished(folder, candidate):
                passed[candidate] = damage
            continue
        if quarantine:
            _quarantine(folder, passed)
        arrays = jax.device_put([leaves[name] for name in wanted])
        state = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(saved_like), arrays)
        return Restored(state, candidate, manifest["metadata"])
    if quarantine and not any(isinstance(damage, Unreadable) for damage in passed.values()):
        _quarantine(folder, passed)
    elif passed:
        each = "; ".join(f"step {candidate}: {damage}" for candidate, damage in passed.items())
        raise RunError(
            f"none of the {len(passed)} checkpoints in `{folder}` can be restored ({each}); "
            "put one back from a backup, or give another folder to start afresh"
        )
    return None


def _quarantine(folder: Path, passed: dict[int, Damaged]) -> None:
    steps = [step for step, damage in passed.items() if not isinstance(damage, Unreadable)]
    if not steps:
        return
    target = next(path for n in itertools.count(1) if not (path := folder / f"quarantine-{n}").exists())
    try:
        target.mkdir()
        for name in itertools.chain.from_iterable((str(step), f"{step}.json") for step in steps):
            if (folder / name).exists():
                replace_synced(folder / name, target / name)
    except OSError as error:
        raise RunError(f"cannot move checkpoints to `{target}` ({error.strerror}); make the folder writable") from error
    listed = ", ".join(map(str, steps))
    warnings.warn(f"moved what there was of step {listed} to `{target}`", CheckpointWarning, stacklevel=3)


def checkpoint_steps(folder: str | os.PathLike[str]) -> list[int]:
    """The steps in `folder` that have data and a manifest that verifies, in rising order; the data are not read."""
    folder, steps = local_path("folder", folder).absolute(), []
    for step in _steps_present(folder):
        with contextlib.suppress(Damaged):
            _manifest_of(folder, step)
            steps.append(step)
    return steps


def read_metadata(folder: str | os.PathLike[str], step: int) -> dict[str, Any]:
    """The `metadata` that checkpoint `step` was saved with; the data are not read.

    Raises:
      UsageError: there is no such step.
      RunError: its manifest does not verify.
    """
    folder = local_path("folder", folder).absolute()
    step = _present_step(folder, _steps_present(folder), step)
    try:
        return _manifest_of(folder, step)["metadata"]
    except Damaged as damage:
        raise _restore_error(folder, step, damage) from None


def verify_checkpoint(folder: str | os.PathLike[str], step: int) -> None:
    """Read checkpoint `step` and compare every leaf with its hash; needs neither the model nor its config.

    Raises:
      UsageError: there is no such step.
      RunError: it does not verify; the text gives the reason.
    """
    folder = local_path("folder", folder).absolute()
    step = _present_step(folder, _steps_present(folder), step)
    try:
        read_leaves(folder, step, _manifest_of(folder, step))
    except Damaged as damage:
        raise _restore_error(folder, step, damage) from None


def _steps_present(folder: Path) -> list[int]:
    """Every step that `folder` has data or a manifest for, sound or not, in rising order."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise UsageError(f"`folder` (={folder}) is a file or lies below one; give the path of a folder") from error
    except OSError as error:
        raise RunError(f"cannot list `{folder}`: {error.strerror}; make it readable") from error
    return sorted({int(match[1]) for match in map(_STEP_NAME.fullmatch, names) if match})


def _present_step(folder: Path, present: list[int], step: int) -> int:
    if operator.index(step) not in present:
        found = f"the steps there are {', '.join(map(str, present))}" if present else "it holds no checkpoint"
        raise UsageError(f"`step` (={step}) is not in `{folder}`; {found}")
    return operator.index(step)


def _manifest_of(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of a checkpoint whose save was finished; raises Damaged."""
    if _is_unfinished(folder, step):
        raise Damaged("its save was not finished")
    return read_manifest(folder, step)


def _is_unfinished(folder: Path, step: int) -> bool:
    return (folder / f"{step}.json.tmp").exists() and not (folder / f"{step}.json").exists()


def _restore_error(folder: Path, step: int, damage: Damaged) -> RunError:
    others = [str(other) for other in checkpoint_steps(folder) if other != step]
    way_out = f"try step {' or '.join(reversed(others))}" if others else "put it back from a backup"
    return RunError(f"checkpoint `{folder / str(step)}` does not verify: {damage}; {way_out}")


def _holds_already(folder: Path, step: int, manifest: dict[str, Any]) -> bool:
    """Whether `step` is there with these leaves (its metadata are then brought up to date); clears what is damaged."""
    path = folder / str(step)
    if step not in _steps_present(folder):
        return False
    try:
        found = _manifest_of(folder, step)
        read_leaves(folder, step, found)
    except Unreadable as damage:
        raise UsageError(f"`{path}` cannot be replaced: {damage}; give another folder") from None
    except Damaged:
        if path.is_dir() and os.listdir(path) and not _ORBAX_MARKS & set(os.listdir(path)):
            raise UsageError(f"`{path}` is in the way and no checkpoint; give another folder") from None
        _delete(folder, step)
        return False
    if found["leaves"] != manifest["leaves"]:
        raise UsageError(f"`{path}` holds another state of that step; give another folder, or delete it first")
    if found["sha256"] != manifest["sha256"]:
        write_atomically(folder / f"{step}.json", manifest_text(manifest))
    return True


def tree_to_store(state: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The state as Orbax can store it: in numpy, and None for each leaf without elements."""
    leaves = [array if array.size else None for array in arrays.values()]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(state), leaves)


def make_ready(folder: Path) -> None:
    """Make `folder` if it is missing, and clear it of what was not finished."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"`folder` (={folder}) is a file or lies below one; give the path of a folder") from error
    _clear_unfinished(folder)


@contextlib.contextmanager
def marked_as_unfinished(folder: Path, step: int) -> Iterator[None]:
    """Mark `step` as being written until :func:`commit`; clear what there is of it if that fails."""
    try:
        write_synced(folder / f"{step}.json.tmp", "")
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            _clear_unfinished(folder)
        raise


def commit(folder: Path, step: int, manifest: dict[str, Any]) -> None:
    """Make what was written a checkpoint, if it reads back as `manifest` says."""
    pending = folder / f"{step}.json.tmp"
    write_synced(pending, manifest_text(manifest))
    sync_tree(folder / str(step))
    read_leaves(folder, step, manifest)
    replace_synced(pending, folder / f"{step}.json")


def _clear_unfinished(folder: Path) -> None:
    """Remove what an interrupted save or deletion left, its mark ``<step>.json.tmp`` last."""
    for match in filter(None, map(_UNFINISHED_NAME.fullmatch, os.listdir(folder))):
        path, step = folder / match[0], match[1]
        if path.is_dir():
            shutil.rmtree(path)
            continue
        if not (folder / f"{step}.json").exists() and (folder / step).exists():
            shutil.rmtree(folder / step)
        path.unlink()


def _delete(folder: Path, step: int) -> None:
    """Delete a checkpoint such that a kill at any moment leaves it whole or marked as unfinished."""
    manifest, mark = folder / f"{step}.json", folder / f"{step}.json.tmp"
    if manifest.exists():
        replace_synced(manifest, mark)
    else:
        write_synced(mark, "")
    _clear_unfinished(folder)


def delete_older(folder: Path, step: int, keep: int) -> None:
    """Delete what lies below the newest `keep` sound checkpoints, `step` the first of them.

    Checkpoints with an unreadable manifest are nobody's to delete, and a damaged one does not count as kept.
    """
    older = [other for other in _steps_present(folder) if other < step]
    if len(older) < keep:
        return
    kept = 1
    for other in reversed(older):
        try:
            manifest = _manifest_of(folder, other)
            if kept < keep:
                read_leaves(folder, other, manifest)
        except Damaged:
            continue
        if kept == keep:
            _delete(folder, other)
        else:
            kept += 1


@contextlib.contextmanager
def telling_of_save(folder: Path, step: int) -> Iterator[None]:
    """Raise RunError, which names the last good checkpoint, for what fails in saving `step`."""
    try:
        yield
    except (OSError, StoreError, Damaged) as error:
        cause = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        if isinstance(error, Damaged):
            cause = f"what was written does not read back, {cause}"
        last = _last_good(folder)
        kept = "there is no good checkpoint yet" if last is None else f"the last good checkpoint (step {last}) is kept"
        raise RunError(
            f"saving checkpoint `{folder / str(step)}` failed: {cause}; {kept}; "
            "make room or make the folder writable, then run again to go on from there"
        ) from error


def _last_good(folder: Path) -> int | None:
    with contextlib.suppress(RunError, UsageError):
        for step in reversed(_steps_present(folder)):
            with contextlib.suppress(Damaged):
                read_leaves(folder, step, _manifest_of(folder, step))
                return step
    return None

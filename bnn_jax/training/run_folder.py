"""The folder of a run: its config, its lock, and small files that are what was written or known to be damaged."""

import hashlib
import itertools
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from bnn_jax.checks import require
from bnn_jax.errors import RunError, UsageError
from bnn_jax.finite import require_finite
from bnn_jax.training.checkpoint import (
    Restored,
    checkpoint_steps,
    read_metadata,
    restore_checkpoint,
    save_checkpoint,
)
from bnn_jax.training.config import Config, from_dict, to_dict
from bnn_jax.training.devices import is_first_process, on_first_process, to_host
from bnn_jax.training.diagnostics import Flips, no_flips
from bnn_jax.training.metrics import pack_log, read_metrics, summarize, write_file
from bnn_jax.training.orbax_store import require_storable
from bnn_jax.training.resuming import differing_key, setting, what_spans_the_run
from bnn_jax.training.sharded_checkpoint import is_in_parts, save_in_parts, sees_folder_of_first
from bnn_jax.training.state import RunState

ENDS = ("result.json", "diverged.json")
"""The files of which a run leaves one when it has ended."""


class DamagedFileWarning(UserWarning):
    """A file of a run was passed over; the text names its path and the reason."""


def write_checksummed(path: Path, values: dict[str, Any]) -> None:
    """Write `values` as JSON, and with them the SHA-256 by which :func:`read_checksummed` knows them.

    A file that holds them already is left as it is.

    Raises:
      RunError: if the disk is full or the folder cannot be written; the old file is kept.
    """
    text = json.dumps(values | {"sha256": _checksum(values)}, indent=1) + "\n"
    with suppress(OSError):
        if path.read_bytes() == text.encode():
            return
    write_file(path, text)


def read_checksummed(path: Path) -> dict[str, Any] | None:
    """What :func:`write_checksummed` wrote; None, with a warning, if the file is damaged; None if there is none."""
    if not path.exists():
        return None
    with suppress(ValueError, AttributeError, TypeError, OSError):
        values = json.loads(path.read_text())
        if values.pop("sha256", None) == _checksum(values):
            return values
    warnings.warn(f"skipped `{path}`: it is damaged or was changed by hand", DamagedFileWarning, stacklevel=2)
    return None


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_config(workdir: Path) -> Config:
    """The config of the run in `workdir`: of `config.json`, or of the newest checkpoint if that file is damaged.

    Raises:
      UsageError: if there is none, or it has keys that this version does not know.
      RunError: if the file is damaged and there is no checkpoint.
    """
    recorded = _recorded_configs(workdir)
    if recorded:
        return recorded[0]
    path = workdir / "config.json"
    if path.exists():
        raise RunError(f"{path} is damaged and there is no checkpoint; remove {workdir} to start anew")
    raise UsageError(f"`workdir` (={workdir}) holds no run: there is no {path}; name the folder of a run")


def _recorded_configs(workdir: Path) -> list[Config]:
    return [from_dict(values) for values in recorded(workdir, "config")]


def recorded(workdir: Path, name: str) -> list[dict[str, Any]]:
    """What the checksummed file `<name>.json` of a run holds, or nothing.

    If it is damaged or gone, what the checkpoints hold under that name, newest first; some may be of another run.
    """
    values = [read_checksummed(workdir / f"{name}.json")]
    folder = workdir / "checkpoints"
    if values == [None] and folder.is_dir():
        values = [read_metadata(folder, step).get(name) for step in reversed(checkpoint_steps(folder))]
    return [value for value in values if value is not None]


def why_rejected(config: Config, metadata: dict[str, Any]) -> str | None:
    """Why a checkpoint with these metadata is none of the run of `config`; None if it is one."""
    if "config" not in metadata:
        return "it is of no run: its metadata hold no config"
    other = from_dict(metadata["config"])
    key = differing_key(other, config)
    if key == "init_sha256":
        return f"it is of another run, which began with other weights than those of `init_from` (={config.init_from})"
    return key and f"it is of another run, whose `{key}` is {setting(other, key)!r}, not {setting(config, key)!r}"


def has_begun(workdir: Path) -> bool:
    """Whether a run has left a checkpoint, be it damaged, or an end in its folder; before, the folder is nobody's."""
    folder = workdir / "checkpoints"
    left = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    unfinished = {name.partition(".")[0] for name in left if name.endswith(".tmp")}
    saved = any(name.partition(".")[0] not in unfinished for name in left)
    return saved or any((workdir / name).exists() for name in ENDS)


def check_workdir(config: Config, workdir: Path, *, extend: bool = False) -> None:
    """Refuse a folder in which a run of another config has begun, or one has ended whose config is lost.

    Args:
      extend: go on for more epochs also where something spans the whole run, see
        :func:`bnn_jax.training.resuming.what_spans_the_run`.

    Raises:
      UsageError: for one; names the first setting that differs, what spans the run, or that the config is lost.
    """
    recorded = _recorded_configs(workdir) if has_begun(workdir) else []
    differing = [differing_key(other, config) for other in recorded]
    if not recorded:
        if any((workdir / name).exists() for name in ENDS):
            raise UsageError(
                f"{workdir} holds the result of a run whose config is lost or damaged; move that folder away, or train "
                "with `--overwrite`"
            )
        return
    if None not in differing:
        key, old = differing[0], recorded[0]
        differs = f"`{key}` is {setting(config, key)!r} now, but {workdir} holds a run with {setting(old, key)!r}"
        if key == "init_sha256":
            start = "random weights" if old.init_from is None else f"other ones, of {old.init_from}"
            differs = (
                f"`init_from` (={config.init_from}) has not the weights that the run in {workdir} began with, {start}"
            )
        raise UsageError(f"{differs}; choose another `--workdir`, move that folder away, or train with `--overwrite`")
    old = recorded[differing.index(None)]
    shorter = replace(config, epochs=old.epochs)
    if config.epochs > old.epochs and not extend and (reason := what_spans_the_run(shorter, config.epochs)):
        raise UsageError(
            f"`epochs` is {config.epochs} now, but {workdir} holds a run with {old.epochs}, and {reason}; "
            "train with `--extend` to go on with that change, choose another `--workdir`, or move that folder away"
        )


def claim_workdir(config: Config, workdir: Path, *, stage: dict[str, Any] | None = None, extend: bool = False) -> None:
    """Write the resolved config, and what the run is a stage of, into `workdir`.

    The end of a run that goes on for more epochs is removed, and that it diverged, for now it is trained again.

    Raises:
      UsageError: as :func:`check_workdir`.
      RunError: if they cannot be written.
    """
    check_workdir(config, workdir, extend=extend)
    with suppress(OSError, ValueError, AttributeError):  # what is damaged is nobody's end
        if json.loads((workdir / "result.json").read_text()).get("epochs", config.epochs) < config.epochs:
            (workdir / "result.json").unlink()
    (workdir / "diverged.json").unlink(missing_ok=True)
    write_checksummed(workdir / "config.json", to_dict(config))
    if stage is not None:
        write_checksummed(workdir / "stage.json", stage)


def last_saved(workdir: Path) -> str:
    """From where the same command would go on now, in words."""
    folder = workdir / "checkpoints"
    steps = checkpoint_steps(folder) if folder.is_dir() else []
    where = f"from step {steps[-1]}, saved before" if steps else "from the start, for nothing of this run is saved"
    return f"the same command goes on {where}"


def move_aside(workdir: Path) -> Path:
    """Rename the folder of a run to the first free `<workdir>.replaced-<n>`, and return that.

    Raises:
      UsageError: for the current folder, which has no name.
      RunError: if it cannot be renamed.
    """
    rule = "is the current folder, which would take what is written to it along; start from another one"
    require("workdir", str(workdir), workdir.name not in ("", ".."), rule, error=UsageError)
    names = (workdir.with_name(f"{workdir.name}.replaced-{n}") for n in itertools.count(1))
    aside = next(path for path in names if not path.exists())
    try:
        workdir.rename(aside)
    except OSError as error:
        raise RunError(f"cannot rename {workdir} to {aside} ({error.strerror}); choose another `--workdir`") from None
    return aside


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Make `workdir` if missing, and keep other processes from training in it.

    The operating system lets go when this process ends, however.

    Raises:
      UsageError: if another one trains there; names its process and machine.  If its path has square brackets or a
        backslash.
      RunError: if `workdir` cannot be made or written.
    """
    require_storable("workdir", workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {workdir} ({error.strerror}); choose another `--workdir`") from None
    try:
        lock = os.open(workdir / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunError(f"cannot write to {workdir} ({error.strerror}); make it writable") from None
    try:
        try:
            _take(lock)
        except OSError:
            holder = os.read(lock, 1000).decode(errors="replace")
            raise UsageError(
                f"`workdir` (={workdir}) is being trained in by {holder or 'another process'}; "
                "wait for its end, or choose another `--workdir`"
            ) from None
        # Who holds the lock is for people to read: a full disk must not stop a run that only resumes.
        with suppress(OSError):
            os.truncate(lock, 0)
            os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(lock)


def _take(lock: int) -> None:
    """Lock an open file; an OSError if another process has."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        # Windows locks bytes, which others then cannot read: one far behind those that name the process.
        os.lseek(lock, 2**30, os.SEEK_SET)
        try:
            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(lock, 0, os.SEEK_SET)
    else:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def save_run(config: Config, workdir: Path, run: RunState, *, stage: dict[str, Any] | None = None) -> None:
    """Save the state of a run with all that its folder is remade from: config, log, stage.

    All processes call this together.  Process 0 gathers and saves arrays that lie in parts on several, unless all see
    its folder: then each saves the parts it holds.

    Raises:
      RunError: if the disk is full, or a number of the state is not finite; the last good checkpoint is kept.
    """

    def metadata() -> dict[str, Any]:
        log = pack_log(workdir / "metrics.jsonl")
        values = {"config": to_dict(config), "best_validation_accuracy": float(run.best.accuracy), "log": log}
        return values if stage is None else values | {"stage": stage}

    step = int(run.train.step)
    if any(map(is_in_parts, jax.tree.leaves(run))):
        folder = on_first_process(lambda: workdir.absolute()) / "checkpoints"
        is_new = not on_first_process((folder / str(step)).exists)
        if is_new and sees_folder_of_first(folder.parent):
            save_in_parts(folder, step, run, metadata=metadata() if is_first_process() else {})
            return
        run = to_host(run)
    require_finite("state", run, "it is not saved, the last good checkpoint is kept", error=RunError)
    on_first_process(lambda: save_checkpoint(workdir / "checkpoints", step, run, metadata=metadata()))


def restore_run(config: Config, workdir: Path, like: RunState, *, quarantine: bool = False) -> Restored | None:
    """The newest good checkpoint of a run, see :func:`bnn_jax.training.checkpoint.restore_checkpoint`; None before it.

    Where it counts flips for the diagnostics and `like` does not, they are left out; the other way round they start
    from zero.

    Args:
      config: of the run, as it goes on.
      like: a state of the run, or its shapes.
      quarantine: put what was passed over aside.

    Raises:
      UsageError: if the state of `config` is another.
      RunError: if there are checkpoints, but none can be restored.
    """

    def saved_like(metadata):
        counts = from_dict(metadata["config"]).diagnostics.every_steps > 0
        return _with_flips(like, jax.eval_shape(no_flips, like.train.params) if counts else None)

    why = partial(why_rejected, config)
    found = restore_checkpoint(
        workdir / "checkpoints", saved_like, why_rejected=why, finite=True, quarantine=quarantine
    )
    if found is None or (found.state.train.flips is None) == (like.train.flips is None):
        return found
    return found._replace(state=_with_flips(found.state, like.train.flips and no_flips(found.state.train.params)))


def _with_flips(run: RunState, flips: Flips | None) -> RunState:
    return run.replace(train=run.train.replace(flips=flips))


def finished_result(config: Config, workdir: Path) -> dict[str, Any] | None:
    """The `result.json` of a run that is finished with as many epochs as the config has; None of another."""
    result = read_checksummed(workdir / "result.json")
    return result if result is not None and result.get("epochs") == config.epochs else None


def write_result(config: Config, workdir: Path, run: RunState, tested: dict[str, float]) -> dict[str, Any]:
    """Write, and return, the `result.json` of a run from its log and its test accuracies, as `test_accuracy_best`.

    Raises:
      RunError: if it cannot be written.
    """
    result = summarize(list(read_metrics(workdir / "metrics.jsonl"))) | {
        "seed": config.seed,
        "epochs": config.epochs,
        "best_epoch": int(run.best.epoch),
        "validation_accuracy_best": float(run.best.accuracy),
        **tested,
    }
    write_checksummed(workdir / "result.json", result)
    return result

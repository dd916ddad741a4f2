"""The folder of a run: its config, its lock, and small files that are what was written or known to be damaged."""

import fcntl
import hashlib
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bnn_jax.errors import RunError, UsageError
from bnn_jax.training.checkpoint import checkpoint_steps, read_metadata
from bnn_jax.training.config import Config, flatten, from_dict, to_dict
from bnn_jax.training.metrics import write_file


class DamagedFileWarning(UserWarning):
    """A file of a run was passed over; the text names its path and the reason."""


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Write `values` as JSON, and with them the SHA-256 by which :func:`read_sealed` knows them.

    Raises:
      RunError: if the disk is full or the folder cannot be written; the old file is kept.
    """
    write_file(path, json.dumps(values | {"sha256": _seal(values)}, indent=1) + "\n")


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What :func:`write_sealed` wrote; None, with a warning, if the file is damaged; None if there is none."""
    if not path.exists():
        return None
    with suppress(ValueError, AttributeError, TypeError, OSError):
        values = json.loads(path.read_text())
        if values.pop("sha256", None) == _seal(values):
            return values
    warnings.warn(f"skipped `{path}`: it is damaged or was changed by hand", DamagedFileWarning, stacklevel=2)
    return None


def _seal(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_config(workdir: Path) -> Config:
    """The config of the run in `workdir`: of `config.json`, or of the newest checkpoint if that file is damaged.

    Raises:
      UsageError: if there is none, or it has keys that this version does not know.
      RunError: if the file is damaged and there is no checkpoint.
    """
    config = _recorded_config(workdir)
    if config is not None:
        return config
    path = workdir / "config.json"
    if path.exists():
        raise RunError(f"{path} is damaged and there is no checkpoint; remove {workdir} to start anew")
    raise UsageError(f"`workdir` (={workdir}) holds no run: there is no {path}; name the folder of a run")


def _recorded_config(workdir: Path) -> Config | None:
    values = recorded(workdir, "config")
    return None if values is None else from_dict(values)


def recorded(workdir: Path, name: str) -> dict[str, Any] | None:
    """What the sealed file `<name>.json` of a run holds; if it is damaged or gone, what the newest checkpoint does."""
    values = read_sealed(workdir / f"{name}.json")
    if values is None and (workdir / "checkpoints").is_dir():
        steps = checkpoint_steps(workdir / "checkpoints")
        values = read_metadata(workdir / "checkpoints", steps[-1]).get(name) if steps else None
    return values


def claim_workdir(config: Config, workdir: Path) -> None:
    """Write the resolved config into `workdir`, made if missing.

    Raises:
      UsageError: if it already holds a run of another config; names the first key that differs.
      RunError: if it cannot be written.
    """
    recorded = _recorded_config(workdir)
    if recorded is not None:
        old, new = flatten(to_dict(recorded)), flatten(to_dict(config))
        differing = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
        if differing:
            key = differing[0]
            raise UsageError(
                f"`{key}` is {new.get(key)!r} now, but {workdir} holds a run with {old.get(key)!r}; "
                "choose another `--workdir`, or remove that one"
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {workdir} ({error.strerror}); choose another `--workdir`") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedFileWarning)  # it has been told
        written = read_sealed(workdir / "config.json")
    if written is None:
        write_sealed(workdir / "config.json", to_dict(config))


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keep other processes from training in `workdir`; the operating system lets go when this one ends, however.

    Raises:
      UsageError: if another one does; names its process and machine.
    """
    with open(workdir / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UsageError(
                f"`workdir` (={workdir}) is being trained in by {file.read() or 'another process'}; "
                "wait for its end, or choose another `--workdir`"
            ) from None
        file.seek(0)
        file.truncate()
        # Who holds the lock is for people to read: a full disk must not stop a run that only resumes.
        with suppress(OSError):
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield

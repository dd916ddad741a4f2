"""Where files lie: paths that a user gives, and the product's own folder."""

import errno
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from bnn_jax.errors import UsageError

# A drive of Windows has one letter.  Of two slashes `pathlib` keeps one.
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(argument: str, path: str | os.PathLike[str]) -> Path:
    """The path that a user gave, its ~ expanded.

    Raises:
      UsageError: for a URL, which `pathlib` would take for a folder; for a ~ without a user.

    >>> local_path("workdir", "gs://bucket/run")
    Traceback (most recent call last):
    bnn_jax.errors.UsageError: `workdir` (='gs://bucket/run') is a URL, and only this machine's file system is read and
    written; mount the bucket and give the path of its folder, or copy from and to it
    """
    text = os.fspath(path)
    if URL.match(text):
        text = re.sub(":/+", "://", text, count=1)
        raise UsageError(
            f"`{argument}` (={text!r}) is a URL, and only this machine's file system is read and written; mount the "
            "bucket and give the path of its folder, or copy from and to it"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"`{argument}` (={text!r}) is no path ({error}); write the folder out") from None


def folder_name(label: str) -> str:
    """The label as the name of one folder, which Orbax reads back.

    >>> folder_name("stage_sizes=[1, 2],kernel=models/mine.py")
    'stage_sizes=(1, 2),kernel=models_mine.py'
    """
    return label.translate(str.maketrans("/\\[]", "__()"))


def require_ending(argument: str, path: str | os.PathLike[str], *endings: str) -> None:
    """Refuse a file to write whose name ends as that of another format does; a name without an ending is none.

    Args:
      argument: its name, as the user typed it.
      path: of the file.
      *endings: of what can be written, the usual one first; of one with two dots the last part is enough.

    Raises:
      UsageError: naming the endings, and the file with the usual one.

    >>> require_ending("output", "net.onnx", ".bnn.safetensors", ".tflite")
    Traceback (most recent call last):
    bnn_jax.errors.UsageError: `output` (=net.onnx) must end in .bnn.safetensors or .tflite, the formats that are
    written; name it net.bnn.safetensors
    """
    path = Path(path)
    if path.suffix and path.suffix.lower() not in {Path(ending).suffix or ending for ending in endings}:
        written = "the format that is written" if len(endings) == 1 else "the formats that are written"
        raise UsageError(
            f"`{argument}` (={path}) must end in {' or '.join(endings)}, {written}; name it {path.stem}{endings[0]}"
        )


def folder_named_by(variable: str) -> Path | None:
    """The folder that an environment variable names; None if it is unset or empty.

    Raises:
      UsageError: as :func:`local_path`.
    """
    named = os.environ.get(variable)
    return local_path(f"${variable}", named) if named else None


def cache_folder() -> Path:
    """The folder of what is decoded, compiled or measured once: `$XDG_CACHE_HOME/bnn_jax`, else `~/.cache/bnn_jax`.

    Raises:
      UsageError: as :func:`folder_or_home`.
    """
    return folder_or_home("XDG_CACHE_HOME", ".cache") / "bnn_jax"


def folder_or_home(variable: str, name: str) -> Path:
    """The folder that an environment variable names, else the folder `name` in the user's home.

    Raises:
      UsageError: as :func:`local_path`; if neither is there, as in a container without a home.
    """
    try:
        return folder_named_by(variable) or Path.home() / name
    except RuntimeError:
        raise UsageError(f"`${variable}` (unset) must name a folder, for there is no home folder") from None


def require_writable(argument: str, path: Path) -> None:
    """Refuse a file that is to be written when the work is done and cannot be; nothing is made.

    Raises:
      UsageError: naming the argument, the file and why.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        there = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UsageError(f"`{argument}` (={path}) cannot be written ({error.strerror}); choose another file") from None


def with_local_paths(arguments: Any) -> Any:
    """The arguments of a script, a dataclass, every path in it by :func:`local_path`.

    Raises:
      UsageError: as :func:`local_path`; names the option.
    """
    paths = {name: local_path(name, value) for name, value in vars(arguments).items() if isinstance(value, Path)}
    return replace(arguments, **paths)

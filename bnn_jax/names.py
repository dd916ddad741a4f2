"""Names of what a user brings, `package.module:Name` or `file.py:Name`, and what they stand for."""

import difflib
import importlib
import importlib.util
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Mapping
from functools import cache, reduce
from pathlib import Path
from types import ModuleType
from typing import Any

from bnn_jax.errors import UsageError
from bnn_jax.paths import local_path

IN_MEMORY = "in memory: "
"""How a record begins that stands for a thing which no import finds again."""


_INSTALLED = tuple(sysconfig.get_paths().values())


def is_import(name: Any) -> bool:
    """Whether a name is one to import, and none of a table.

    >>> is_import("my_package.networks:MyNet"), is_import("resnet20"), is_import(None)
    (True, False, False)
    """
    return isinstance(name, str) and ":" in name


def import_named(argument: str, name: str) -> Any:
    """What a name stands for: an attribute of a module, or of a Python file.

    A module is looked for on Python's path, then in the current folder.  What stands behind the last colon may have
    several parts, as ``Networks.Small``; one that ends in ``()`` is called, so that a thing that a config makes has the
    name ``config.py:get_config().model.name``.

    Args:
      argument: what the user calls it, for errors.
      name: ``package.module:Name`` or ``file.py:Name``.

    Raises:
      UsageError: for a name that cannot be imported; says why.

    >>> import_named("loss", "math:pi")
    3.141592653589793
    >>> import_named("loss", "math:hinge")
    Traceback (most recent call last):
    bnn_jax.errors.UsageError: `loss` (='math:hinge') cannot be imported: math has no 'hinge'
    """
    where, _, attribute = name.rpartition(":")
    if name.startswith(IN_MEMORY):
        raise UsageError(
            f"`{argument}` (={name.removeprefix(IN_MEMORY)}) was given as an object that no import finds again; define "
            "it in a file or a package and give its name, package.module:Name or file.py:Name"
        )
    if not where or not attribute:
        raise UsageError(f"`{argument}` (={name!r}) must be package.module:Name or file.py:Name")
    try:
        module = module_of_file(where) if where.endswith(".py") else _imported(where)
    except Exception as error:
        raise UsageError(f"`{argument}` (={name!r}) cannot be imported: {why_not_run(error)}") from error
    found = module
    for part in attribute.split("."):
        step, calls = part.removesuffix("()"), part.endswith("()")
        try:
            found = _part(found, step)
        except (AttributeError, LookupError):
            near = difflib.get_close_matches(step, dir(found), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"`{argument}` (={name!r}) cannot be imported: {where} has no {step!r}{hint}") from None
        found = _called(found) if calls else found
    return found


@cache
def _called(function: Any) -> Any:
    """What a function without arguments returns, the same thing each time."""
    return function()


def _part(found: Any, step: str) -> Any:
    if isinstance(found, Mapping):
        return found[step]
    return found[int(step)] if step.isdigit() else getattr(found, step)


def absolute(name: Any) -> Any:
    """A name whose file is given from the root, so that it stands for the same from any folder; others as they are."""
    where, _, attribute = name.rpartition(":") if is_import(name) else ("", "", "")
    return f"{_path_of(where)}:{attribute}" if where.endswith(".py") else name


def name_of(thing: Any) -> str | None:
    """The name by which :func:`import_named` finds this very thing, in this process and in others; None if none does.

    >>> name_of(Path), name_of(lambda x: x)
    ('pathlib:Path', None)
    """
    module = sys.modules.get(getattr(thing, "__module__", None) or "")
    if module is None or module.__name__ == "__main__":  # which is another file in another process
        return None
    name = getattr(thing, "__qualname__", "")
    parts = module.__name__.split(".")
    packages = [sys.modules.get(".".join(parts[:count])) for count in range(1, len(parts))]
    for public in filter(None, packages):  # as optax:lion, which lies in optax._src.alias
        if name and getattr(public, name, None) is thing:
            return f"{public.__name__}:{name}"
    for own in (name, *(key for key, value in vars(module).items() if value is thing)):
        if own and reduce(lambda found, part: getattr(found, part, None), own.split("."), module) is thing:
            return f"{_origin(module)}:{own}"
    return None


def record_of(thing: Any) -> str:
    """What a record says of a thing: its name, or that it has none and what it is."""
    return name_of(thing) or IN_MEMORY + re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(thing).split()))


def last_part(thing: Any) -> str:
    """A short label of a name or a thing, for titles and folders.

    >>> last_part("/home/me/mine.py:get_config().optim.name"), last_part("adam"), last_part(max)
    ('name', 'adam', 'max')
    """
    if isinstance(thing, str):
        return re.split(r"[:.]", thing)[-1].removesuffix("()") if is_import(thing) else thing
    return getattr(thing, "__name__", type(thing).__name__)


def module_of_file(path: str | Path) -> ModuleType:
    """The module that a Python file makes; run once, and again when its text has changed.

    Its folder is on Python's path from then on, as that of a program is.

    Raises:
      OSError: if it cannot be read.
      Exception: what it raises.
    """
    path = _path_of(path)
    return _executed(str(path), path.read_text(encoding="utf-8"))


@cache
def _executed(path: str, text: str) -> ModuleType:
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.append(folder)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        same = os.path.basename(file) == os.path.basename(path) and os.path.realpath(file) == path
        if same and name not in ("__main__", path):
            return module
    module = ModuleType(path)
    module.__file__ = path
    sys.modules[path] = module  # where dataclasses look for what annotations name
    exec(compile(text, path, "exec", dont_inherit=True), vars(module))
    return module


def why_not_run(error: BaseException) -> str:
    """Why a module could not be run, with the line that says it."""
    if isinstance(error, ModuleNotFoundError):
        return f"there is no module {error.name!r}; install it, start in its folder, or name that in PYTHONPATH"
    if isinstance(error, FileNotFoundError):
        return f"there is no file {error.filename}"
    every = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in every if not frame.filename.startswith((*_INSTALLED, __file__))] or every
    line = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{line}"


def _path_of(path: str | Path) -> Path:
    return local_path("path", path).resolve()


def _imported(where: str) -> ModuleType:
    here = os.getcwd()
    if importlib.util.find_spec(where.partition(".")[0]) is None and here not in sys.path:
        sys.path.append(here)
    return importlib.import_module(where)


def _origin(module: ModuleType) -> str:
    """The name of a module; of one that is a single file and not installed, the file, which is found from anywhere."""
    file = getattr(module, "__file__", None) or ""
    alone = "." not in module.__name__ and file.endswith(".py") and not file.endswith("__init__.py")
    return str(_path_of(file)) if alone and not file.startswith(_INSTALLED) else module.__name__

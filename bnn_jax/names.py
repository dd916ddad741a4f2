"""Names of what a user brings, `package.module:Name` or `file.py:Name`, and what they stand for."""

import dataclasses
import difflib
import dis
import hashlib
import importlib
import importlib.util
import itertools
import math
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, partial, reduce
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any

import jax
import numpy as np

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
    named = is_import(name) and not name.startswith(IN_MEMORY)
    where, _, attribute = name.rpartition(":") if named else ("", "", "")
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
    """What a record says of a thing: its name, or that it has none, what it is, and its :func:`contents_of`."""
    return name_of(thing) or f"{IN_MEMORY}{_without_addresses(repr(thing))}, contents {contents_of(thing)}"


def contents_of(thing: Any) -> str:
    """Eight hexadecimal digits of what a thing that has no name consists of.

    They change with the code of a function, its defaults, and what it takes from outside: the values of enclosing
    functions and of globals; with the fields of a record, the numbers of an array, the methods of a class and the
    attributes of its objects.  What has a name stands for that.  Another version of Python has other code.

    >>> slopes = [lambda x, slope=slope: slope * x for slope in (1, 2, 1)]
    >>> [contents_of(slope) == contents_of(slopes[0]) for slope in slopes]
    [True, False, True]
    """
    known: dict[int, tuple[bytes, Any]] = {}  # with the things, for others would have their numbers

    def digest_of(part: Any) -> bytes:
        if isinstance(part, bool | int | float | complex | str | bytes | NoneType):
            # Numbers by their value: a schedule of optax makes 100.0 of its 100 steps.
            same = part == int(part) if isinstance(part, float) and math.isfinite(part) else False
            return hashlib.sha256(repr(int(part) if same else part).encode()).digest()
        if id(part) not in known:
            known[id(part)] = b"around itself", part
            digest = hashlib.sha256(type(part).__qualname__.encode())
            for inner in _parts_of(part):
                digest.update(digest_of(inner))
            known[id(part)] = digest.digest(), part
        return known[id(part)][0]

    return digest_of(thing).hex()[:8]


def _parts_of(thing: Any) -> Iterable[Any]:
    """What decides a thing: plain values, and other things."""
    if isinstance(thing, ModuleType):
        return (thing.__name__,)
    if (name := name_of(thing)) is not None:
        return (name,)
    if isinstance(thing, CodeType):
        return (thing.co_code, thing.co_names, thing.co_consts)
    if isinstance(thing, FunctionType):
        taken = [cell.cell_contents for cell in thing.__closure__ or () if cell != CellType()]
        if _is_of_flax(thing):  # around a module's methods, filled in as they are called
            return [one for one in taken if isinstance(one, FunctionType | type) and not _is_of_flax(one)]
        return (thing.__code__, thing.__defaults__, thing.__kwdefaults__, *taken, *_globals_of(thing))
    if isinstance(thing, MethodType):
        return (thing.__func__, thing.__self__)
    if isinstance(thing, partial):
        return (thing.func, thing.args, thing.keywords)
    if isinstance(thing, classmethod | staticmethod):
        return (thing.__func__,)
    if isinstance(thing, property):
        return (thing.fget, thing.fset)
    if isinstance(thing, Mapping):
        return itertools.chain.from_iterable(sorted(thing.items(), key=lambda item: _without_addresses(repr(item[0]))))
    if isinstance(thing, tuple | list):
        return thing
    if isinstance(thing, set | frozenset):
        return sorted(thing, key=lambda one: _without_addresses(repr(one)))
    if isinstance(thing, type):
        own = {key: value for key, value in vars(thing).items() if not key.startswith("__") or callable(value)}
        return (thing.__qualname__, thing.__bases__, own)
    if isinstance(thing, np.ndarray | np.generic | jax.Array):
        return _numbers_of(thing)
    if dataclasses.is_dataclass(thing):
        fields = [field.name for field in dataclasses.fields(thing)]
        return (type(thing), *((name, getattr(thing, name, None)) for name in fields))
    if isinstance(thing, jax.custom_vjp | jax.custom_jvp):
        return [getattr(thing, name, None) for name in ("__wrapped__", "fwd", "bwd", "jvp")]
    state = getattr(thing, "__dict__", {})
    if "__wrapped__" in state:  # what is compiled, or remembers results
        return (state["__wrapped__"],)
    if name_of(type(thing)) is None:
        return (type(thing), state)
    return (_without_addresses(repr(thing)),)


def _numbers_of(array: Any) -> Iterable[Any]:
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if isinstance(array, jax.Array) and array.is_deleted():
        return (str(array.dtype), array.shape)
    array = np.asarray(array)
    return (str(array.dtype), array.shape, array.tolist() if array.dtype.kind == "O" else array.tobytes())


def _is_of_flax(thing: Any) -> bool:
    module = thing.__globals__.get("__name__") if isinstance(thing, FunctionType) else thing.__module__
    return (module or "").startswith("flax.")


def _globals_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The global names that a function reads, those within it too, and what they stand for now."""
    codes, names = [function.__code__], {}
    for code in codes:
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
        names |= dict.fromkeys(i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return ((name, function.__globals__[name]) for name in names if name in function.__globals__)


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(text.split()))


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

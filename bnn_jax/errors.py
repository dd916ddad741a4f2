"""The two errors that a user can cause, the end that a machine can ask for, and how a script ends on them.

A pure function refuses a bad argument with ``ValueError`` or ``TypeError``.  What reads a command line, a config, a
folder or a file raises one of these two, always with one sentence that names the value, the rule and the way out.
"""

import difflib
import errno
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any


class UsageError(ValueError):
    """What was asked for cannot be done: a wrong name, path or value.  A script ends with exit code 2."""


class RunError(RuntimeError):
    """What was asked for was begun and failed: diverged, disk full, corrupt data.  A script ends with exit code 1."""


class Preempted(KeyboardInterrupt):
    """The machine asked the process to end (SIGTERM), and what was done is saved.  A script ends with exit code 0."""


def exit_code_of(main: Callable[[], None], flags: Mapping[str, str] = {}) -> int:
    """Run a script's `main`; print a user's error as one sentence on stderr instead of a traceback.

    A warning of this package is one sentence too, without the line of code that it comes from.

    Args:
      main: of the script.
      flags: name of an argument, as a sentence has it -> the option that a user of the script types.

    Returns:
      0 when `main` returned or was preempted, 2 after a :class:`UsageError`, 1 after a :class:`RunError`, 130 after
      Ctrl-C, 141 where who reads the output has ended before it did.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, warnings.showwarning, flags)
            main()
        flush_output()
    except OSError as error:
        return code_of_output(error)
    except UsageError as error:
        print(f"error: {renamed(str(error), flags)}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {renamed(str(error), flags)}", file=sys.stderr)
        return 1
    except Preempted as preemption:
        print(f"preempted: {preemption}", file=sys.stderr)
        return 0
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {interrupt}" if str(interrupt) else "interrupted", file=sys.stderr)
        return 130
    return 0


def code_of_output(error: OSError) -> int:
    """The exit code where something could not be written, as the standard output: 141 if its reader ended, 1 if full.

    Raises:
      OSError: any other, which is no user's.
    """
    if not isinstance(error, BrokenPipeError) and error.errno != errno.ENOSPC:
        raise error
    leave_output()
    if isinstance(error, BrokenPipeError):
        return 141
    where = f"write {error.filename}" if error.filename else "write what is printed"
    print(f"error: cannot {where} ({error.strerror}); make room and run the command again", file=sys.stderr)
    return 1


def flush_output() -> None:
    """Write what is still kept of the standard output, if there is one."""
    if sys.stdout is not None:
        sys.stdout.flush()


def leave_output() -> None:
    """Write nothing more to a standard output whose reader has ended, as `| head`; Python would at the very end."""
    with suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(
    others: Callable[..., None], flags: Mapping[str, str], message: Warning, category: type[Warning], *where: Any
) -> None:
    if category.__module__.startswith("bnn_jax."):
        print(f"warning: {renamed(str(message), flags)}", file=sys.stderr)
    else:
        others(message, category, *where)


def renamed(sentence: str, names: Mapping[str, str]) -> str:
    """Replace names in backquotes.

    >>> renamed("`data.split_seed` (=-1) must not be negative", {"data.split_seed": "--data.split-seed"})
    '`--data.split-seed` (=-1) must not be negative'
    """
    return re.sub(r"`([\w.]+)`", lambda found: f"`{names.get(found[1], found[1])}`", sentence)


def unknown_name(argument: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a `name` that is not among the `known` ones, with the nearest of them.

    >>> print(unknown_name("optim.name", "adamm", ["adam", "sgd"]))
    `optim.name` (='adamm') is not known; did you mean 'adam'? Choose one of: adam, sgd
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? Choose" if near else "choose"
    return UsageError(f"`{argument}` (={name!r}) is not known; {hint} one of: {', '.join(known)}")

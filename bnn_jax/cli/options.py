"""Options that several commands have, as dataclasses for tyro."""

import dataclasses
import shlex
import sys
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bnn_jax.analysis.tables import Tables
from bnn_jax.errors import RunError, UsageError
from bnn_jax.files import write_atomically
from bnn_jax.paths import with_local_paths
from bnn_jax.training.command_line import read_command_line
from bnn_jax.training.config import Config, Settings
from bnn_jax.training.overrides import default_of

POSITIONAL = typing.get_args(tyro.conf.Positional[str])[1]


def write_output(argument: str, path: Path, text: str) -> None:
    """Write a file that an argument names, in one step; its folder is made.

    Raises:
      RunError: if it cannot be written, as on a full disk.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise RunError(f"cannot write {path} ({error.strerror}); make room, or choose another `{argument}`") from None


def command_line() -> str:
    """The command that runs, for reports: as `bnn-jax train ...`, or `python scripts/train.py ...` of a clone."""
    program, *rest = sys.argv
    return shlex.join(["python", *sys.argv]) if program.endswith(".py") else f"{program} {shlex.join(rest)}"


def flags_of(arguments_type: type, prefix: str = "") -> dict[str, str]:
    """The options of a command: name, as an error has it, of an argument or of a setting of the config -> its flag.

    >>> flags_of(TrainingOptions)["data.validation_examples"], flags_of(TrainedOptions)["data.data_dir"]
    ('--data.validation-examples', '--data-dir')
    """
    flags = {}
    for name, hint in typing.get_type_hints(arguments_type, include_extras=True).items():
        kind, *marks = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        if dataclasses.is_dataclass(kind):
            flags |= flags_of(kind, prefix if kind is Config else f"{prefix}{name}.")
        elif POSITIONAL not in marks and f"{prefix}{name}" != "name":
            flags[f"{prefix}{name}"] = f"--{prefix}{name}".replace("_", "-")
    # What a setting, or one of several, is called by who refuses it.
    for name, option in (("data.data_dir", "data_dir"), ("optimizer", "optimizers"), ("processes", "jobs")):
        if option in flags and name not in flags:
            flags[name] = flags[option]
    return flags


def parse_options(arguments_type: type, description: str) -> Any:
    """Parse the command line of a script without a config; a malformed option ends the program with exit code 2.

    Raises:
      UsageError: for a URL in the place of a path.
    """
    return with_local_paths(read_command_line(arguments_type, description))


def refuse_unread(arguments: Any, names: Iterable[str], purpose: str) -> None:
    """Refuse options that nothing would read and that differ from their defaults.

    Args:
      arguments: of a script.
      names: of the options.
      purpose: what reads them, as "is for images that are read from disk".

    Raises:
      UsageError: for the first of them.
    """
    defaults = {field.name: default_of(field) for field in dataclasses.fields(arguments)}
    for name in names:
        if (value := getattr(arguments, name)) != defaults[name]:
            raise UsageError(f"`--{name.replace('_', '-')}` (={value}) {purpose}; leave it out")


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How tables are printed."""

    format: Literal["text", "md", "csv", "json"] = "text"
    """Of the tables, which are alone on the standard output if it is for another program; the rest goes to stderr."""

    @contextmanager
    def tables(self) -> Iterator[Tables]:
        """What prints the tables; in another format what else is printed goes to stderr."""
        tables = Tables(self.format, sys.stdout)
        with nullcontext() if self.format == "text" else redirect_stdout(sys.stderr):
            yield tables


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """A config file with overrides, and where to write."""

    settings: Settings
    config: Path = Path("digits_xnor")
    """Python file with get_config(), or the name of one that comes with the package."""
    workdir: Path | None = None
    """Folder to write into; by default one in runs/, named after what runs."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(ConfigOptions):
    """On what one run at a time is trained, and how images are read."""

    devices: int | None = None
    """To divide each batch among; all by default."""
    workers: int = 0
    """Processes that read images from disk, where the config has data.stream; 0 takes threads."""
    strict: bool = False
    """Refuse corrupt images of a stream, which are else left out with a warning."""

    def reading(self) -> dict[str, Any]:
        """How images are read, as :func:`bnn_jax.training.loop.train` takes it."""
        if not self.settings.data.stream:
            refuse_unread(self, ("workers", "strict"), "is for images read from disk, with `--data.stream`")
        return {"workers": self.workers, "strict": self.strict}


@dataclass(frozen=True, kw_only=True)
class SweepOptions(ConfigOptions, TableOptions):
    """How many runs are trained."""

    execution: Literal["auto", "sequential", "processes", "vmapped"] = "auto"
    """One run after another, one process a core, or mapped together on the device; auto measures, once, where it may
    pay."""
    jobs: int | None = None
    """Processes at a time; None takes one for each core."""

    def engine(self) -> dict[str, Any]:
        """How runs are executed, as :func:`bnn_jax.sweeps.engine.run_all` takes it."""
        if self.execution != "processes":
            refuse_unread(self, ("jobs",), "is for `--execution processes`")
        return {"execution": self.execution, "processes": self.jobs}


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions(SweepOptions):
    """Rows that are trained with the same seeds and tuning budget."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the runs of each row."""
    tune: bool = False
    """Choose the settings that optim.tune of each row names, on the validation split, with one budget for all rows."""


@dataclass(frozen=True, kw_only=True)
class TrainedOptions:
    """A trained network and the images to run it on."""

    workdir: tyro.conf.Positional[Path]
    """Folder of a run, finished or not."""
    split: Literal["train", "validation", "test"] = "test"
    """Of the data set."""
    which: Literal["best", "last"] = "best"
    """The variables of the best validation epoch, or of the newest checkpoint."""
    data_dir: str | None = None
    """Where the data set lies now, if not where the run found it."""

"""The written pages of the documentation: their code, and their command lines tried up to where the work begins."""

import importlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from configparser import ConfigParser
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bnn_jax.cli.main import COMMANDS, main
from bnn_jax.cli.options import flags_of
from bnn_jax.stages.stage import Stage
from bnn_jax.sweeps.grid import grid_cells
from bnn_jax.training.config import Config
from bnn_jax.training.validation import validate

ROOT = Path(__file__).parents[1]
GENERATED = ("_build", "api", "gallery", "notebooks", "results", "zoo")
"""Folders of docs/ that the build writes."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted(
    path for path in (ROOT / "docs").rglob("*.md") if path.relative_to(ROOT / "docs").parts[0] not in GENERATED
)

BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n)?^(?P<fence>`{3,})(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=fence)`*$",
    re.M | re.S,
)
FILE = re.compile(r"# (?P<name>\w+\.py)\n")
"""First line of a block that is a file of the reader's."""
PROGRAM = r"(?:bnn-jax|python (?:scripts|tests|docs)/[\w/]+\.py|make|pip install)(?=\s)"
COMMAND = re.compile(rf"(?:^|(?<=[\s\"])){PROGRAM}", re.M)
PLACEHOLDER = re.compile(r"(COMMAND|TABLE)\b")


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
      language: as the fence has it.
      text: the lines.
      line: of the page, from 1, in which the text begins.
      reason: why it is not run, if the page says so; readers do not see that.
    """

    language: str
    text: str
    line: int
    reason: str | None

    @property
    def file(self) -> str | None:
        """The name of the file that it shows, if it shows one."""
        found = FILE.match(self.text)
        return found["name"] if found else None


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text = page.read_text()
    return [
        Block(found["language"].strip(), found["text"], text.count("\n", 0, found.start("text")) + 1, found["reason"])
        for found in BLOCK.finditer(text)
    ]


def python_of(page: Path) -> list[Block]:
    """The blocks that a reader may copy into Python; the build runs those of notebooks."""
    return [block for block in blocks_of(page) if block.language == "python"]


def commands_of(page: Path) -> list[str]:
    """The command lines of a page, in blocks and in the running text, each once."""
    text = page.read_text()
    shell = [block.text for block in blocks_of(page) if block.language in ("", "bash", "sh", "console")]
    spans = [" ".join(found.split()) for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", BLOCK.sub("", text))]
    found = []
    for part in shell + spans:
        part = re.sub(r"\\\n\s*", "", part)
        for name, value in re.findall(r'^(\w+)="(.*)"$', part, re.M):
            part = part.replace(f"${name}", value)
        found += [first_command(part[start.start() :]) for start in COMMAND.finditer(part)]
    return [command for command in dict.fromkeys(found) if not PLACEHOLDER.search(command)]


def first_command(text: str) -> str:
    """The first command of a text: without what follows it on its line, a comment, or the quote that it stands in.

    >>> first_command("pip install '.[all]' && make test"), first_command('make docs"')
    ("pip install '.[all]'", 'make docs')
    """
    line, quote, opened = text.partition("\n")[0], "", 0
    for place, sign in enumerate(line):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote, opened = sign, place
        elif sign in "&|;" or line[place : place + 2] == " #":
            return line[:place].strip()
    return (line[:opened] if quote else line).strip()


def options_of(page: Path) -> list[str]:
    """The options that the running text names, as `--epochs`, each once."""
    spans = re.findall(r"(?<!`)`(--[^`]+)`(?!`)", BLOCK.sub("", page.read_text()))
    words = dict.fromkeys(word for span in spans for word in span.split() if word.startswith("--"))
    return [re.sub(r"(options|tune)\.\w+$", r"\1", word) for word in words]


def known_options() -> set[str]:
    """The options of all commands and scripts."""
    known = {"--help", "--version"}
    for command in COMMANDS.values():
        known |= set(flags_of(importlib.import_module(f"bnn_jax.cli.{command.module}").Arguments).values())
    suite = runpy.run_path(str(ROOT / "scripts" / "gpu_suite.py"))
    return known | set(flags_of(suite["Arguments"]).values())


class Begun(Exception):
    """The command line was read and is valid: the work would begin."""


def _begin(*arguments: Any, **options: Any) -> None:
    raise Begun


def _begin_if_valid(*arguments: Any, **options: Any) -> None:
    """What a run, rows, stages or a grid are checked for before anything runs."""
    given = arguments[0]
    if isinstance(given, Config):
        axes = arguments[1] if isinstance(arguments[1], dict) else {}
        cells = [cell for cell, _ in grid_cells(given, axes).values()]
    else:
        cells = given.values() if isinstance(given, dict) else given
    for cell in cells:
        validate(cell.config if isinstance(cell, Stage) else cell)
    raise Begun


WORK: dict[str, Callable[..., Any]] = {
    "cli.train.train": _begin_if_valid,
    "cli.train.make_devices": lambda *arguments, **options: None,
    "cli.train.initialize_processes": lambda *arguments: None,
    "cli.sweep.sweep": _begin_if_valid,
    "cli.stages.run_stages": _begin_if_valid,
    "cli.comparisons.compare": _begin_if_valid,
    "cli.evaluate.evaluate_run": _begin,
    "cli.evaluate.load": _begin,
    "cli.plot.plot_run": _begin,
    "cli.plot.plot_runs": _begin,
    "cli.summarize.account_model": _begin,
    "cli.summarize.print_sizes": _begin,
    "cli.verify.freeze_run": _begin,
    "cli.export.freeze_run": _begin,
    "cli.sample.freeze_run": _begin,
    "cli.sample.load": _begin,
    "data.prepare.replacing": _begin,
    "data.prepare.fetch": _begin,
    "cli.synthesize.write_synthetic_imagenet": _begin,
    "cli.tables.rows_of": _begin,
    "cli.benchmark.progress_display": _begin,
    "training.input_pipeline.load_data": _begin,  # of scripts, which import it only now
    "benchmarks.suite.run_suite": _begin,
}
"""What begins the work of a command, in `bnn_jax` -> what stands in its place."""


def refused(command: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> str | None:
    """Why a command line cannot be run, or None if it can.

    Args:
      command: as a reader types it, in `folder`.
      monkeypatch: under which the work that it would do is left out.
      folder: the current one, with the folders of the clone and the reader's files.
    """
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
        return f"the Makefile has no {unknown}" if unknown else None
    if words[:2] == ["pip", "install"]:
        settings = ConfigParser()
        settings.read(ROOT / "setup.cfg")
        extras = settings["options.extras_require"]
        named = [extra for found in re.findall(r"(?:\.|bnn_jax)\[([\w,]+)\]", command) for extra in found.split(",")]
        unknown = [extra for extra in named if extra not in extras]
        return f"setup.cfg has no extra {unknown}" if unknown else None
    if words[0] == "bnn-jax" and " ".join(words[1:]) in COMMANDS:
        return None  # The text names a command, no more.
    if words[0] == "python":
        path = ROOT / words[1]
        if not path.exists():
            return f"there is no {words[1]}"
        if path.parent.name == "docs":  # They have no options.
            return None
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setattr("bnn_jax.compilation.use_compilation_cache", lambda: None)
    monkeypatch.setattr("tempfile.TemporaryDirectory", _begin)  # in which the campaigns of tests/fuzz work
    for name, stand_in in WORK.items():
        module, _, attribute = f"bnn_jax.{name}".rpartition(".")
        monkeypatch.setattr(importlib.import_module(module), attribute, stand_in)
        monkeypatch.setattr(importlib.import_module(module), "use_compilation_cache", lambda: None, raising=False)
    script = words[0] == "python"
    monkeypatch.setattr(sys, "argv", words[1:] if script else words)
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            code = runpy.run_path(words[1], run_name="__main__") if script else main()
        except Begun:
            return None
        except SystemExit as ended:
            code = ended.code
    return None if code in (0, None) else printed.getvalue()


def reader_files(page: Path, folder: Path) -> None:
    """Lay out what a reader of a page has: a clone, and the files that the page shows."""
    folder.mkdir()
    for name in ("configs", "scripts", "tests", "docs", "results", "bnn_jax"):
        (folder / name).symlink_to(ROOT / name)
    for block in python_of(page):
        if block.file:
            (folder / block.file).write_text(block.text)

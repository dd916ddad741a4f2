"""The command `bnn-jax`, which `python -m bnn_jax` and the files in scripts/ call too."""

import importlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import bnn_jax
from bnn_jax.errors import code_of_output, exit_code_of, flush_output, unknown_name


class Command(NamedTuple):
    """One of the programs.

    Attributes:
      module: of bnn_jax.cli, imported when the command is run; has a `main()` that reads `sys.argv`.
      summary: what it does, for `--help`.
    """

    module: str
    summary: str


COMMANDS: dict[str, Command] = {
    "train": Command("train", "train one network; again: resume"),
    "sweep": Command("sweep", "train a grid of settings over several seeds"),
    "compare optimizers": Command("compare_optimizers", "compare optimizers over seeds, with one tuning budget"),
    "compare estimators": Command("compare_estimators", "compare gradient estimators over seeds"),
    "compare architectures": Command("compare_architectures", "compare networks over seeds, and what they cost"),
    "stages": Command("stages", "train in stages: the recipe of a paper"),
    "evaluate": Command("evaluate", "accuracy and loss of a run, or of an exported file"),
    "plot": Command("plot", "draw the curves and diagnostics of a run"),
    "summarize": Command("summarize", "bits, operations and gradient paths of a network"),
    "verify": Command("verify", "prove that a run's packed network is the trained one"),
    "export": Command("export", "write a run's packed network into one file"),
    "sample": Command("sample", "continue a text by a language model, packed"),
    "prepare": Command("prepare", "download a data set and store it for training"),
    "synthesize": Command("synthesize", "write made-up images in ImageNet's format"),
    "list": Command("tables", "what a config can name, a line and the paper of each"),
    "benchmark": Command("benchmark", "measure speed beside named peers"),
}

USAGE = """usage: bnn-jax COMMAND [OPTION ...]    (bnn-jax COMMAND --help: its options)

Train, compare and export binary neural networks.

commands:
{commands}

options:
  -h, --help             show this text
  --version              show the version
"""


def main() -> int:
    """Run the command that `sys.argv` names; returns its exit code."""
    try:
        code = _answer()
        flush_output()
    except OSError as error:
        return code_of_output(error)
    return code


def _answer() -> int:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE.format(commands="\n".join(f"  {name:22} {command.summary}" for name, command in COMMANDS.items())))
        return 0 if words else 2
    if words[0] == "--version":
        print(bnn_jax.__version__)
        return 0
    # What is compared is two words; without the second one it is the optimizers.
    name, *rest = words
    if name == "compare":
        named = bool(rest) and not rest[0].startswith("-")
        name, *rest = (f"compare {rest[0]}", *rest[1:]) if named else ("compare optimizers", *rest)
    if name not in COMMANDS:
        print(f"error: {unknown_name('command', name, COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv = [f"bnn-jax {name}", *rest]  # As the command's own help and reports name it.
    return run_command(name)


def run_command(name: str) -> int:
    """Import a command's module and run it with `sys.argv`; returns the exit code."""
    with _ended_at_once() if name == "train" else nullcontext():
        module = importlib.import_module(f"bnn_jax.cli.{COMMANDS[name].module}")
        from bnn_jax.cli.options import flags_of  # imports what the command needs, not what `bnn-jax --help` does

        return exit_code_of(module.main, flags_of(module.Arguments))


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """SIGTERM ends the process with 0, for importing takes seconds in which there is nothing to save.

    Within, train() takes the signal over; on the way out, by whatever exception, it is what it was before.
    """
    try:
        previous = signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    except ValueError:  # not the main thread, which alone receives signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)

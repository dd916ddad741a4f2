"""--help of every command: readable in a terminal of 80 columns, without type expressions."""

import dataclasses
import importlib
import re
import sys
import typing
from dataclasses import dataclass

import pytest
from run_script import run_script

from bnn_jax.cli import main as command
from bnn_jax.cli.options import SweepOptions, flags_of
from bnn_jax.stages.recipes import RECIPES
from bnn_jax.training.command_line import helps_of, read_command_line

TYPES = re.compile(r"\{None|\|(?! )|Union|Optional|Annotated|Callable|typing|<class|\[\[|lambda")


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_of_every_command(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["bnn-jax", *name.split(), "--help"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert printed.startswith(f"usage: bnn-jax {name} ")
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    options = re.findall(r"^[│ ] +(-.*)$", printed, re.M)
    assert len(options) > 1 and not [line for line in options if TYPES.search(line)]
    assert ("bnn-jax list" in printed) == ("--optim.name" in printed or name in ("list", "summarize", "evaluate"))


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_option_is_explained(name):
    def unexplained(owner):
        types = typing.get_type_hints(owner)
        for field in dataclasses.fields(owner):
            if dataclasses.is_dataclass(types[field.name]):
                yield from unexplained(types[field.name])
            elif not helps_of(owner).get(field.name) and not hasattr(types[field.name], "_fields"):
                yield field.name

    module = importlib.import_module(f"bnn_jax.cli.{command.COMMANDS[name].module}")
    assert list(unexplained(module.Arguments)) == []


def test_what_the_engine_refuses_has_the_name_of_the_option():
    assert flags_of(SweepOptions)["processes"] == "--jobs"


def test_help_names_every_recipe():
    named = re.search(r"Recipes: (.+?);", importlib.import_module("bnn_jax.cli.stages").__doc__, re.S)[1]
    assert re.split(r",\s+", named) == list(RECIPES)


@dataclass(frozen=True)
class Arguments:
    size: int | None = None
    """How large it is,
    over two lines."""
    box: tuple[float, float] | None = (0.0, 1.0)
    names: tuple[str, ...] = ("a",)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", Arguments()),
        ("--size 3 --box 1 2", Arguments(3, (1.0, 2.0))),
        ("--size None --box None", Arguments(None, None)),
        ("--names", Arguments(names=())),
        ("--names b c --size 1", Arguments(1, names=("b", "c"))),
    ],
)
def test_what_may_be_none_and_several(line, found):
    assert read_command_line(Arguments, "It.", argv=line.split()) == found


@pytest.mark.parametrize("line", ["--size x", "--box 1", "--box 1 2 3", "--box a b"])
def test_what_is_neither(line, capsys):
    with pytest.raises(SystemExit) as ended:
        read_command_line(Arguments, "It.", argv=line.split())
    assert ended.value.code == 2


def test_help_is_a_paragraph(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        read_command_line(Arguments, "It.", argv=["--help"])
    printed = capsys.readouterr().out
    assert "How large it is, over two lines. (default: None)" in printed
    assert "--names [STR ...]" in printed and "--box FLOAT FLOAT" in printed


@pytest.mark.parametrize("script", ["gpu_suite", "check_tflite"])
def test_help_of_the_scripts_that_are_no_command(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = run_script(script, "--help").stdout
    assert f"{script}.py" in printed and max(map(len, printed.splitlines())) <= 80

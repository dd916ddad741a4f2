"""--help of every command: readable in a terminal of 80 columns, without type expressions."""

import re
import sys
from dataclasses import dataclass

import pytest
from run_script import run_script

from bnn_jax.cli import main as command
from bnn_jax.training.command_line import read_command_line

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
    assert ("bnn-jax list" in printed) == ("--optim.name" in printed or name == "list")


@dataclass(frozen=True)
class Arguments:
    size: int | None = None
    box: tuple[float, float] | None = (0.0, 1.0)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("", Arguments()),
        ("--size 3 --box 1 2", Arguments(3, (1.0, 2.0))),
        ("--size None --box None", Arguments(None, None)),
    ],
)
def test_what_may_be_none(line, found):
    assert read_command_line(Arguments, "It.", argv=line.split()) == found


@pytest.mark.parametrize("line", ["--size x", "--box 1", "--box 1 2 3", "--box a b"])
def test_what_is_neither(line, capsys):
    with pytest.raises(SystemExit) as ended:
        read_command_line(Arguments, "It.", argv=line.split())
    assert ended.value.code == 2


@pytest.mark.parametrize("script", ["gpu_suite", "check_tflite"])
def test_help_of_the_scripts_that_are_no_command(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = run_script(script, "--help").stdout
    assert f"{script}.py" in printed and max(map(len, printed.splitlines())) <= 80

"""Every table of every command shows its numbers, in a narrow terminal and to another program."""

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnn_jax.analysis.account_table import print_account
from bnn_jax.analysis.accounting import EVERYTHING, account_model, network_named
from bnn_jax.analysis.published_sizes import TABLE, print_sizes
from bnn_jax.analysis.report import print_report
from bnn_jax.analysis.tables import Tables, print_lines, print_text, text_table
from bnn_jax.benchmarks.estimators import print_estimators
from bnn_jax.benchmarks.input import print_input
from bnn_jax.benchmarks.packed_tables import print_packed
from bnn_jax.benchmarks.sweep import print_sweep
from bnn_jax.benchmarks.training import print_training
from bnn_jax.cli.verify import print_verification
from bnn_jax.packed.verification import LayerReport, Verification
from bnn_jax.sweeps.results import read_results

RESULTS = Path(__file__).parents[2] / "results"
BENCHMARKS = {
    "estimators": print_estimators,
    "packed": print_packed,
    "input": print_input,
    "sweep": print_sweep,
    "training": print_training,
}


@dataclass(frozen=True)
class Recorded(Tables):
    """Keeps what it prints."""

    numbers: list = field(default_factory=list)

    def print(self, header, rows, *, texts=(0,), **look):
        rows = [list(row) for row in rows]
        self.numbers.extend(row[n] for row in rows for n in range(len(header)) if n not in texts)
        super().print(header, rows, texts=texts, **look)


def account(tables):
    account = account_model(network_named("lenet", num_classes=10), (32, 32, 3))
    print_account("a network with a name", account, EVERYTHING, tables)


def verification(tables):
    layers = {f"stage{n}_block1/conv1": LayerReport(*[10**9 + n] * 6, path="words") for n in range(3)}
    print_verification(Verification(layers, 1000, 0, 0.0, 8.0), tables)


TABLES = {
    **{path.parent.name: lambda tables, path=path: print_report(read_results(path), tables)
       for path in RESULTS.glob("*/results.json")},
    **{f"benchmark {name}": lambda tables, name=name, show=show: show(benchmark(name), tables)
       for name, show in BENCHMARKS.items()},
    "summarize": account,
    "summarize --table": lambda tables: print_sizes([row for row in TABLE if "DGRL" in row.name], tables),
    "verify": verification,
}  # fmt: skip


def benchmark(name):
    found = json.loads((RESULTS / f"benchmark_{name}.json").read_text())
    return {key: value for key, value in found.items() if key not in ("command", "provenance")}


@pytest.mark.parametrize("columns", [80, 50])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if "--table" in name else name for name in TABLES]
)
def test_a_narrow_terminal_shows_every_number(name, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    tables = Recorded()
    TABLES[name](tables)
    out = capsys.readouterr().out
    assert "…" not in out
    printed = out.split("\n")
    assert max(map(len, printed)) <= columns or name.startswith("benchmark")  # which say more below their tables
    left = {" ".join(line.split()) for line in printed}
    assert tables.numbers
    for number in tables.numbers:
        assert any(" ".join(number.split()) in line for line in left), number


@pytest.mark.parametrize("name", ["summarize", "digits_xnor", "verify"])
def test_another_program_reads_the_tables(name, capsys):
    for style in ("csv", "json", "md"):
        out = io.StringIO()
        TABLES[name](Tables(style, out))
        assert len(out.getvalue()) > 100 and out.getvalue() not in capsys.readouterr().out
        if style == "json":
            found = [json.loads(line) for line in out.getvalue().splitlines()]
        elif style == "csv":
            first = list(csv.DictReader(out.getvalue().split("\n\n")[0].splitlines()))
    rows = found[0]["rows"]
    assert [list(row) for row in rows] == [list(row) for row in first]
    assert [["" if value is None else str(value) for value in row.values()] for row in rows] == [
        list(row.values()) for row in first
    ]
    if name == "digits_xnor":
        assert isinstance(rows[0]["test, best (%)"], float) and isinstance(rows[0]["test, best (%) ±"], float)


def test_a_line_break_in_a_name_is_none_to_another_program():
    for style in ("csv", "json", "md"):
        out = io.StringIO()
        Tables(style, out).print(["optim.\nlearning_rate", "MMAC\nreal"], [["0.1", "1"]])
        assert "optim.learning_rate" in out.getvalue() and "MMAC real" in out.getvalue()


def test_a_table_without_rows_has_its_header():
    for style, text in (("csv", "name,number\n\n"), ("json", '{"title": "", "rows": []}\n'), ("text", "number")):
        out = io.StringIO()
        Tables(style, out).print(["name", "number"], [])
        assert text in out.getvalue()


@pytest.mark.parametrize("columns", [None, "0", "-3", ""])
def test_without_a_terminal_a_table_is_as_wide_as_it_needs(columns, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    Tables().print(["name", "number"], [["word " * 50, "1"]])
    assert max(map(len, capsys.readouterr().out.splitlines())) > 250


@given(
    st.lists(st.lists(st.integers(0, 10**12).map("{:,}".format), min_size=6, max_size=6), min_size=1, max_size=3),
    st.text(st.characters(categories=("L", "N"), max_codepoint=0x2FF), min_size=1, max_size=60),
    st.integers(30, 120),
)
def test_numbers_are_whole_and_in_their_rows(rows, name, width):
    header = ["name", "a\nb", "c", "d", "e", "f", "text"]
    table = text_table(header, [[name, *row[:5], row[5]] for row in rows], texts=(0, 6), width=width, title="t")
    assert max(map(len, table.splitlines())) <= max(width, 12 + 1 + 2 + 17)
    for row in rows:
        assert all(number in table.replace("\n", " ").split() for number in row[:5])


def test_labels_and_prose_fit_too(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    print_lines([("label", "many words " * 10), ("longer label", "")])
    print_text("many words " * 10)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 40 and lines[1].startswith(" " * 14 + "words")

"""Tables for people and for programs: in the terminal, as Markdown, CSV or JSON."""

import csv
import json
import os
import sys
import textwrap
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TextIO

from bnn_jax.analysis.documents import markdown_table

NARROWEST_TEXT = 12
"""Columns to which a column of words may shrink."""

PROSE = 100
"""Columns of text."""


@dataclass(frozen=True)
class Tables:
    """Where tables go, and how they look.

    In the terminal the words of a table that is too wide are broken, never its numbers; if that does not do, the table
    goes on below with its first columns again.  Where the output is no terminal and `COLUMNS` is not set a table is as
    wide as it needs.

    Attributes:
      style: "text"; "md" for Markdown; "csv", an empty line after each table; "json", a line with title and rows for
        each.  In the last two numbers are plain, and mean and spread two columns.
      file: where to; None is the standard output.
    """

    style: str = "text"
    file: TextIO | None = None

    def print(
        self,
        header: Sequence[str],
        rows: Iterable[Sequence[str]],
        *,
        title: str = "",
        texts: Collection[int] = (0,),
        unbroken: Collection[int] = (),
        bold: int | None = None,
    ) -> None:
        """Print a table.

        Args:
          header: of each column, a line break in it where there may be one, for a space or behind the dot of a setting.
          rows: the cells.
          title: above the table.
          texts: the columns that are words, aligned to the left; the others are numbers.
          unbroken: of the words, the columns that stay on one line too, as names to type.
          bold: the row to emphasize.
        """
        file, rows = self.file or sys.stdout, [list(row) for row in rows]
        if self.style == "text":
            look = {"unbroken": unbroken, "bold": bold if file.isatty() else None, "width": _width(file)}
            file.write(text_table(header, rows, title=title, texts=texts, **look))
            return
        header = [" ".join(name.replace(".\n", ".").split()) for name in header]
        if self.style == "md":
            above = [f"**{title}**"] if title else []
            file.write("\n\n".join([*above, markdown_table(header, rows, texts=texts), ""]))
            return
        header, rows = plain_columns(header, rows, texts)
        if self.style == "json":
            found = {"title": title, "rows": [dict(zip(header, row)) for row in rows]}
            file.write(json.dumps(found, ensure_ascii=False) + "\n")
        else:
            csv.writer(file, lineterminator="\n").writerows([header, *rows, []])


TEXT = Tables()


def _width(file: TextIO) -> int | None:
    """How many columns a file shows; None for any number."""
    with suppress(KeyError, ValueError):
        if (columns := int(os.environ["COLUMNS"])) > 0:
            return columns
    with suppress(OSError, ValueError, AttributeError):
        return os.get_terminal_size(file.fileno()).columns or None
    return None


def print_text(*lines: str) -> None:
    """Print lines, broken between words not wider than 100 columns."""
    width = min(PROSE, _width(sys.stdout) or PROSE)
    for line in lines:
        print(textwrap.fill(line, width, break_on_hyphens=False))


def print_lines(lines: Iterable[tuple[str, str]]) -> None:
    """Print (label, text) below each other, texts in a column of their own, not wider than 100 columns."""
    lines = list(lines)
    width, first = min(PROSE, _width(sys.stdout) or PROSE), 2 + max(len(label) for label, _ in lines)
    for label, text in lines:
        parts = textwrap.wrap(text, max(NARROWEST_TEXT, width - first)) or [""]
        print("\n".join(f"{name:{first}}{part}" for name, part in zip_longest([label], parts, fillvalue="")))


def text_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    texts: Collection[int] = (0,),
    unbroken: Collection[int] = (),
    bold: int | None = None,
    width: int | None = None,
) -> str:
    """A table as text, see :class:`Tables`.

    >>> print(text_table(["network", "MACs"], [["lenet", "1,234"]], width=80), end="")
    <BLANKLINE>
     network   MACs
     ──────────────
     lenet    1,234
    <BLANKLINE>
    """
    columns = [[name, *cells] for name, *cells in zip(header, *rows, strict=True)]
    wide = [max(len(line) for cell in column for line in cell.splitlines() or [""]) for column in columns]
    names = next((n for n in range(len(columns)) if n not in texts), len(columns)) or 1
    if width is not None:
        _shrink(wide, set(texts) - set(unbroken), width)
    parts, at = [], names
    while not parts or at < len(columns):
        end = at
        while end < len(columns) and (end == at or width is None or _total(wide[:names] + wide[at : end + 1]) <= width):
            end += 1
        parts.append([*range(names), *range(at, end)])
        at = end
    titles = [title, *[f"{title} (continued)".strip()] * (len(parts) - 1)]
    said = ["\n".join(textwrap.wrap(text, width or len(text) or 1)) for text in titles]
    drawn = (_draw([(columns[n], wide[n], n in texts) for n in part], bold) for part in parts)
    return "".join("\n".join(["", *filter(None, [above]), table]) for above, table in zip(said, drawn))


def _total(wide: Sequence[int]) -> int:
    return sum(wide) + 2 * len(wide) - 1


def _shrink(wide: list[int], texts: Collection[int], width: int) -> None:
    """Make the widest columns of words narrower until the table fits, or they are all as narrow as they may be."""
    while _total(wide) > width:
        widest = max((n for n in texts if n < len(wide)), key=wide.__getitem__, default=None)
        if widest is None or wide[widest] <= NARROWEST_TEXT:
            return
        wide[widest] -= 1


def _draw(columns: list[tuple[list[str], int, bool]], bold: int | None) -> str:
    lines = []
    for number in range(len(columns[0][0])):
        cells = [_broken(cells[number], wide) if words else cells[number].split("\n") for cells, wide, words in columns]
        high = max(map(len, cells))
        # The lines of a header stand on the rule.
        filled = [[""] * (high - len(cell)) + cell if number == 0 else cell for cell in cells]
        for parts in zip_longest(*filled, fillvalue=""):
            aligned = (f"{part:{'<' if words else '>'}{wide}}" for part, (_, wide, words) in zip(parts, columns))
            line = f" {'  '.join(aligned)}".rstrip()
            lines.append(f"\x1b[1m{line}\x1b[0m" if bold is not None and number == bold + 1 else line)
        if number == 0:
            lines.append(f" {'─' * (_total([wide for _, wide, _ in columns]) - 1)}")
    return "\n".join(lines) + "\n"


def _broken(text: str, wide: int) -> list[str]:
    return [part for line in text.split("\n") for part in textwrap.wrap(line, wide, break_on_hyphens=False) or [""]]


def plain_columns(
    header: Sequence[str], rows: Sequence[Sequence[str]], texts: Collection[int]
) -> tuple[list[str], list[list[Any]]]:
    """A table for programs: numbers as numbers, mean and spread apart, None where there is nothing.

    >>> plain_columns(["name", "accuracy"], [["a", "98.4 ± 0.2"], ["b", "-"]], (0,))
    (['name', 'accuracy', 'accuracy ±'], [['a', 98.4, 0.2], ['b', None, None]])
    """
    names, columns = [], []
    for number, name in enumerate(header):
        column = [row[number] for row in rows]
        if number in texts:
            names.append(name)
            columns.append(column)
            continue
        parts = [cell.partition(" ± ") for cell in column]
        names.append(name)
        columns.append([_number(mean) for mean, _, _ in parts])
        if any(spread for _, _, spread in parts):
            names.append(f"{name} ±")
            columns.append([_number(spread) for _, _, spread in parts])
    return names, [list(row) for row in zip(*columns)]


def _number(text: str) -> int | float | str | None:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text.replace(",", ""))
    return None if text in ("", "-") else text

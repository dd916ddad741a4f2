"""Docstrings of the package as reStructuredText: their formulas keep their lines, their signs are no markup."""

import re
from itertools import groupby
from typing import Any

from sphinx.application import Sphinx

FORMULA = re.compile(r"^(Forward|Backward)\b")
SECTION = re.compile(r"^[A-Z]\w+:$")
ARGUMENT = re.compile(r"^ +[*\w, ]+:( |$)")
LIST_ITEM = re.compile(r"^([-*] |\d+\. |:\w|\.\. |>>> )")
MARKUP = re.compile(r"(?<!\\)(\*(?=\S)|\||(?<=\w)_(?!\w))")
CODE = re.compile(r"(``.*?``|(?::\w+:)?`[^`]*`|^\s*:[^:`]+:(?= |$))")


def is_set_in_lines(paragraph: list[str]) -> bool:
    """Whether the lines of a paragraph are formulas or columns, and no running text, list or section."""
    first, *others = paragraph
    if SECTION.match(first) or LIST_ITEM.match(first.lstrip()) or ARGUMENT.match(first):
        return False
    indent = len(first) - len(first.lstrip())
    return bool(FORMULA.match(first)) or any(line.startswith(" " * (indent + 1)) for line in others)


def keep_lines(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Put formulas and columns into literal blocks, before the sections are read."""
    kept: list[str] = []
    for blank, group in groupby(lines, key=lambda line: not line.strip()):
        paragraph = list(group)
        if not blank and is_set_in_lines(paragraph):
            indent = " " * (len(paragraph[0]) - len(paragraph[0].lstrip()))
            paragraph = [f"{indent}.. code-block:: text", "", *(f"   {line}" for line in paragraph)]
        kept += paragraph
    lines[:] = kept


def escape_signs(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape asterisks, bars and trailing underscores of the running text, after the sections are read."""
    literal: int | None = None
    example = False
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and indent <= literal:
            literal = None
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        if literal is None and not example and not line.lstrip().startswith(".. "):
            parts = CODE.split(line)
            parts[::2] = [MARKUP.sub(r"\\\1", part) for part in parts[::2]]
            parts[1::2] = [part if "`" in part else part.replace("**", r"\*\*") for part in parts[1::2]]
            lines[number] = "".join(parts)
        if line.lstrip().startswith(".. code-block::") or line.rstrip().endswith("::"):
            literal = indent


def skip_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, which the docstring of the class tells, and annotated types."""
    return True if type(obj).__name__ in ("_tuplegetter", "_AnnotatedAlias") else None


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", keep_lines, priority=400)
    app.connect("autodoc-process-docstring", escape_signs, priority=600)
    app.connect("autodoc-skip-member", skip_fields)
    return {"parallel_read_safe": True}

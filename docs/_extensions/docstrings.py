"""Docstrings of the package as reStructuredText: their formulas keep their lines, their signs are no markup."""

import re
from itertools import groupby
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject

FORMULA = re.compile(r"^(Forward|Backward)\b")
SECTION = re.compile(r"^[A-Z]\w+:$")
ARGUMENT = re.compile(r"^ +[*\w, ]+:( |$)")
LIST_ITEM = re.compile(r"^([-*] |\d+\. |:\w|\.\. |>>> )")
MARKUP = re.compile(r"(?<!\\)(\*(?=\S)|\||(?<=\w)_(?!\w))")
ROLE = re.compile(r":\w+:`([^`]*)`|``(.*?)``")
LONG_TYPE = re.compile(r"^\s*:vartype \w+: .{60,}")
SEVERAL = re.compile(r"^(\s*:(?:ivar|param) \w+(?:, \w+)+):")
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
            plain = [ROLE.sub(r"\1\2", line) for line in paragraph]
            paragraph = [f"{indent}.. code-block:: text", "", *(f"   {line}" for line in plain)]
        kept += paragraph
    lines[:] = kept


def escape_signs(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape asterisks, bars and trailing underscores of the running text, after the sections are read."""
    # Of a union of many what the text says is enough.
    lines[:] = [line for line in lines if not LONG_TYPE.match(line)]
    literal: int | None = None
    example = False
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and indent <= literal:
            literal = None
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        # Of a field with a space in it the first word is taken for the type.
        line = lines[number] = SEVERAL.sub(lambda found: f"{found[1].replace(', ', ',')}:", line)
        if literal is None and not example and not line.lstrip().startswith(".. "):
            parts = CODE.split(line)
            parts[::2] = [MARKUP.sub(r"\\\1", part) for part in parts[::2]]
            parts[1::2] = [part if "`" in part else part.replace("**", r"\*\*") for part in parts[1::2]]
            lines[number] = "".join(parts)
        if line.lstrip().startswith(".. code-block::") or line.rstrip().endswith("::"):
            literal = indent


def space_names(app: Sphinx, doctree: nodes.document) -> None:
    """Put spaces between the names of a field again."""
    for name in doctree.findall(addnodes.literal_strong):
        name.children = [nodes.Text(name.astext().replace(",", ", "))]


def skip_members(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what the docstring of the class tells: named tuples' fields, annotated types, functions as defaults."""
    if type(obj).__name__ in ("_tuplegetter", "_AnnotatedAlias"):
        return True
    of_others = callable(obj) and not (getattr(obj, "__module__", None) or "bnn_jax").startswith("bnn_jax")
    return True if what == "class" and of_others else None


DEFAULTS = (
    (re.compile(r"<function (\w+)\.<locals>\.[^>]*>"), r"\1(...)"),
    (re.compile(r"<(?:function|class) '?(?:[\w.]*\.)?(\w+)[^>]*>"), r"\1"),
    (re.compile(r", parent=<flax[^>]*>, name=None"), ""),
)


def shorten(app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None):
    """Write defaults by their names, and leave out what every Flax module takes."""
    for pattern, short in DEFAULTS:
        signature = pattern.sub(short, signature) if signature else signature
    return signature, returns


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", keep_lines, priority=400)
    app.connect("autodoc-process-docstring", escape_signs, priority=600)
    app.connect("doctree-read", space_names)
    app.connect("autodoc-skip-member", skip_members)
    app.connect("autodoc-process-signature", shorten)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    return {"parallel_read_safe": True}

"""A report in Markdown as one HTML page that needs no other file and no network."""

import base64
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}</main>
<script>
{script}</script>
</body>
</html>
"""


def web_page(markdown: str, folder: Path) -> str:
    """A text in Markdown as an HTML page: its first heading is the title, its PNG pictures are part of the page.

    A click on a heading of a table sorts its rows; the page is light or dark as the browser is.  HTML in the text is
    shown as it is written.

    Args:
      markdown: the text, with tables.
      folder: of the pictures that it names.

    Raises:
      OSError: a picture cannot be read.
    """
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    reader.add_render_rule("table_open", _table_open)
    reader.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = reader.parse(markdown)
    for token in tokens:
        for part in token.children or ():
            if part.type == "image":
                part.attrSet("src", _embedded(folder / str(part.attrGet("src"))))
    heading = next((after for token, after in pairwise(tokens) if token.type == "heading_open"), None)
    return PAGE.format(
        title=escape(_plain(heading) if heading else "Report"),
        style=(FOLDER / "report.css").read_text("utf-8"),
        body=reader.renderer.render(tokens, reader.options, {}),
        script=(FOLDER / "sort_tables.js").read_text("utf-8"),
    )


def _table_open(renderer: Any, tokens: Any, index: int, *_: Any) -> str:
    # What scrolls must be reached by the keyboard too.
    return '<div class="table" tabindex="0"><table class="sortable">\n'


def _embedded(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _plain(heading: Any) -> str:
    return "".join(part.content for part in heading.children)

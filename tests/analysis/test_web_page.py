"""report.html: report.md as one page, with the same numbers and pictures, and nothing that is loaded."""

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from made_up_results import a_comparison, a_grid, a_row, a_run
from PIL import Image

from bnn_jax.analysis.report import write_report
from bnn_jax.analysis.web_page import web_page

LOADED = ("link", "iframe", "object", "embed", "video", "audio", "source", "base")


def a_report(kind):
    if kind == "sweep":
        grid = {"optim.learning_rate": [0.1, 1.0], "model.width": [16, 32]}
        return a_grid(grid, [(0.5, 0.7), (0.9, None), (0.8, 0.81), (0.6, 0.7)])
    gamma = {"step": [1, 2, 3], "value": [1.0, 1.0, 0.5]}
    rows = [
        a_row("dfw", [a_run(seed, 0.9 + seed / 100, gamma=gamma) for seed in range(3)]),
        a_row("a | b <script>", [a_run(seed, 0.8 + seed / 100) for seed in range(3)]),
    ]
    results = a_comparison(*rows, compared=kind, command="bnn-jax compare --name 'a & b'")
    if kind == "estimator":
        return replace(results, estimators=["ste_sign", "approx_sign"])
    return results


def cells(markdown):
    """The tables of a Markdown text as lists of rows of words."""
    tables, rows = [], []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            tables.append([rows[0], *rows[2:]])
            rows = []
    return [[[plain(cell) for cell in row] for row in table] for table in tables]


def plain(cell):
    return cell.replace("**", "").replace("\\|", "|").replace("&lt;", "<").replace("`", "")


@pytest.mark.parametrize("kind", ["optimizer", "architecture", "estimator", "sweep"])
def test_page_holds_the_report_and_loads_nothing(kind, tmp_path):
    names = write_report(a_report(kind), tmp_path)
    text, markdown = ((tmp_path / name).read_text("utf-8") for name in ("report.html", "report.md"))
    assert text.startswith("<!doctype html>") and text.count("<html") == text.count("</html>") == 1
    page = BeautifulSoup(text, "html.parser")
    assert page.title.get_text() == page.h1.get_text() == markdown.splitlines()[0].removeprefix("# ")
    assert not page.find_all(LOADED) and not page.find_all("script", src=True)
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttpRequest", text)
    assert [link["href"] for link in page.find_all("a")] == re.findall(r"(?<!!)\[\S+\]\((\S+)\)", markdown)

    shown = [[[cell.get_text() for cell in row.find_all(["th", "td"])] for row in table.find_all("tr")]
             for table in page.find_all("table")]  # fmt: skip
    assert shown == cells(markdown) and len(shown) >= 1
    assert page.pre.get_text().strip() == markdown.partition("```sh\n")[2].partition("\n```")[0]

    pictures = re.findall(r"!\[(.+)\]\((\S+\.png)\)", markdown)
    assert [name for name in names if name.endswith(".png")] == [name for _, name in pictures] != []
    for (what, name), picture in zip(pictures, page.find_all("img"), strict=True):
        data = base64.b64decode(picture["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert data == (tmp_path / name).read_bytes() and picture["alt"] == what
        Image.open(io.BytesIO(data)).verify()


def test_html_in_a_report_is_text(tmp_path):
    page = BeautifulSoup(web_page("# a <b> & c\n\n<script>alert(1)</script>\n", tmp_path), "html.parser")
    assert page.title.get_text() == page.h1.get_text() == "a <b> & c"
    assert len(page.find_all("script")) == 1
    assert "<script>alert(1)</script>" in page.main.get_text()


@pytest.mark.skipif(not shutil.which("node"), reason="Node runs the page's script")
def test_tables_are_sorted_by_value_with_what_is_missing_last():
    """The functions of the page's script, over rows of one cell."""
    cells = ["9.5 ± 1.2", "-", "1,200", "10", "", "−3"]
    script = f"""
        const document = {{ addEventListener() {{}} }};
        {(Path(web_page.__code__.co_filename).parent / "sort_tables.js").read_text()}
        const rows = {json.dumps(cells)}.map((text) => ({{ cells: [{{ textContent: text }}] }}));
        const texts = (upwards) => sorted(rows, 0, upwards).map((row) => row.cells[0].textContent);
        console.log(JSON.stringify([texts(true), texts(false)]));
    """
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True)
    numbers = ["−3", "9.5 ± 1.2", "10", "1,200"]
    assert json.loads(done.stdout) == [[*numbers, "-", ""], [*numbers[::-1], "-", ""]]

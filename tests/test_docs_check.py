"""The check of the built documentation finds each mistake that it looks for, and none in a site that is right."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "docs" / "check_site.py"
check = runpy.run_path(str(PROGRAM))["check"]

PAGE = """<!doctype html><html lang="en"><head><title>Start</title><link rel="stylesheet" href="_static/site.css">
<link rel="canonical" href="https://example.org/"><script src="_static/site.js"></script></head><body>
<h1 id="start">Start</h1><a href="#start">here</a> <a href="guides/data.html#files">data</a>
<a href="guides/">guides</a>
<a href="https://example.org/paper">paper</a> <a href="mailto:a@example.org">us</a>
<img src="_images/curve.png" alt="Accuracy over epochs">
<img src="data:image/png;base64,AA" alt="A dot"></body></html>"""
DATA = """<html><head><title>Data</title></head><body><h1>Data</h1><a name="files"></a>
<a href="../index.html#start">start</a></body></html>"""
INDEX = (
    'Search.setIndex({"terms":{"binaryconv":0},"titleterms":{},"objects":{"bnn_jax.layers":[[0,0,1,"","BinaryConv"]]}})'
)


@pytest.fixture
def site(tmp_path):
    files = {
        "index.html": PAGE,
        "guides/data.html": DATA,
        "guides/index.html": DATA,
        "_static/site.css": "a { background: url('dot.png') }",
        "_static/dot.png": "",
        "_static/site.js": "",
        "_images/curve.png": "",
        "searchindex.js": INDEX,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def replaced(site, name, old, new):
    text = (site / name).read_text()
    assert text.count(old) == 1
    (site / name).write_text(text.replace(old, new))


def test_a_right_site_has_no_mistakes(site):
    assert check(site) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        ("index.html", "data.html#files", "date.html", "index.html: guides/date.html leads to no file"),
        ("index.html", "#files", "#file", "index.html: guides/data.html#file leads to no anchor of that page"),
        ("index.html", 'href="#start"', 'href="#stop"', "index.html: #stop leads to no anchor of that page"),
        ("guides/data.html", "../index", "index", "guides/data.html: index.html#start leads to no anchor of that page"),
        ("index.html", "site.js", "other.js", "index.html: _static/other.js leads to no file"),
        ("index.html", "curve.png", "a.png", "index.html: _images/a.png leads to no file"),
        ("index.html", "<title>Start</title>", "", "index.html: the page has no <title>"),
        ("index.html", 'id="start">Start<', 'id="start"> <', "index.html: the page has no <h1>"),
        (
            *("index.html", ' alt="Accuracy over epochs"', ""),
            "index.html: the picture _images/curve.png has no alternative text",
        ),
        (
            *("index.html", "Accuracy over epochs", "../_images/curve.png"),
            "index.html: the picture _images/curve.png has no alternative text",
        ),
        (
            *("index.html", '"_static/site.js"', '"https://cdn.example.org/MathJax.js"'),
            "index.html: https://cdn.example.org/MathJax.js would be loaded from the network",
        ),
        (
            *("index.html", '"_static/site.css"', '"//fonts.example.org/a.css"'),
            "index.html: //fonts.example.org/a.css would be loaded from the network",
        ),
        (
            *("index.html", "</body>", "<style>@import 'https://a.org/b.css';</style></body>"),
            "index.html: https://a.org/b.css would be loaded from the network",
        ),
        (
            *("_static/site.css", "dot.png", "https://a.org/font.woff2"),
            "_static/site.css: https://a.org/font.woff2 would be loaded from the network",
        ),
        ("_static/site.css", "dot.png", "no.png", "_static/site.css: no.png leads to no file"),
        ("searchindex.js", '"binaryconv":0', "", "searchindex.js: no page has the word BinaryConv"),
        ("searchindex.js", '"BinaryConv"', '"Conv"', "searchindex.js: no object of the API is called BinaryConv"),
    ],
)
def test_each_mistake_is_found(site, name, old, new, sentence):
    replaced(site, name, old, new)
    assert check(site) == [sentence]


def test_a_site_without_search_or_pages_is_wrong(site, tmp_path):
    (site / "searchindex.js").unlink()
    assert check(site) == ["searchindex.js: is missing, so nothing can be searched"]
    assert check(tmp_path / "none") == [f"{tmp_path / 'none'}: holds no page; run `make docs` first"]


def test_program_prints_the_mistakes_and_fails(site):
    done = subprocess.run([sys.executable, str(PROGRAM), str(site)], capture_output=True, text=True)
    right = "3 pages: links, titles, pictures, what is loaded and search are right\n"
    assert (done.returncode, done.stdout) == (0, right)
    (site / "_images" / "curve.png").unlink()
    done = subprocess.run([sys.executable, str(PROGRAM), str(site)], capture_output=True, text=True)
    wrong = "index.html: _images/curve.png leads to no file\n3 pages: 1 wrong\n"
    assert (done.returncode, done.stdout) == (1, wrong)


def browser():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.full
@pytest.mark.skipif(not (browser() and shutil.which("npm")), reason="npm and Chromium read the pages")
def test_pages_are_read_in_a_browser(site):
    """The network asked, low contrast in the dark, a page that is too wide, a search without result."""
    node = ROOT / "docs" / "_build" / "node"
    node.mkdir(parents=True, exist_ok=True)
    shutil.copy2(ROOT / "docs" / "package.json", node)
    subprocess.run(["npm", "install", "--silent", "--no-package-lock", "--prefix", str(node)], check=True)
    dark = "@media (prefers-color-scheme: dark) { body { color: #333; background: #222 } }"
    (site / "_static" / "site.css").write_text(f"{dark} h1 {{ width: 500px }}")
    replaced(site, "index.html", "</body>", '<script src="https://cdn.example.org/a.js"></script></body>')
    (site / "search.html").write_text("<html lang='en'><title>Search</title><h1>Search</h1></html>")
    program = ["node", str(ROOT / "docs" / "check_pages.mjs"), str(site), browser(), "index.html"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 1
    assert "index.html: asks the network for https://cdn.example.org/a.js" in done.stdout
    assert "index.html, dark: serious: Elements must meet minimum color contrast" in done.stdout
    assert "index.html, light: serious: Elements must meet minimum color contrast" not in done.stdout
    assert "pixels wider than a window of 390" in done.stdout
    assert "search.html: finds nothing for BinaryConv" in done.stdout

"""Check the built documentation; `make docs-check` calls it.

python docs/check_site.py docs/_build/html

Prints one sentence for each link or anchor that is not there, page without a title, picture without alternative text,
thing that would be loaded from the network, and for a search that does not find a name of the package.  Exit status 1
if there is any.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

SEARCHED = "BinaryConv"
"""A name that the search finds on some page."""

LOADED_BY = {
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "script": ("src",),
    "iframe": ("src",),
    "video": ("src", "poster"),
    "audio": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "link": ("href",),
}
"""tag -> the attributes that a browser loads."""
NOT_LOADED = {"author", "canonical", "license", "next", "prev", "search", "index", "top"}
"""Relations of a <link> that no browser loads."""
IN_STYLE = re.compile(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""")
REMOTE = ("http", "https", "ftp", "ws", "wss")


def addresses_in(text: str) -> Iterator[str]:
    """What a text of CSS loads."""
    for found in IN_STYLE.finditer(text):
        yield found[1] or found[2]


def loaded(page: BeautifulSoup) -> Iterator[str]:
    """The addresses that a browser loads to show a page."""
    for tag in page.find_all(list(LOADED_BY)):
        if tag.name == "link" and set(tag.get("rel", [])) <= NOT_LOADED:
            continue
        for name in LOADED_BY[tag.name]:
            value = tag.get(name, "")
            yield from (part.split()[0] for part in value.split(",")) if value and name == "srcset" else [value]
    for style in page.find_all("style"):
        yield from addresses_in(style.get_text())
    for tag in page.find_all(style=True):
        yield from addresses_in(tag["style"])


def is_remote(address: str) -> bool:
    return address.startswith("//") or urlsplit(address).scheme in REMOTE


def target_of(site: Path, path: Path, address: str) -> tuple[Path, str]:
    """The file and the anchor that an address on a page means."""
    parts = urlsplit(address)
    name = unquote(parts.path)
    file = path if not name else site / name.lstrip("/") if name.startswith("/") else path.parent / name
    file = file.resolve()
    return (file / "index.html" if file.is_dir() else file), unquote(parts.fragment)


def in_pages(site: Path) -> Iterator[str]:
    """What is wrong on the pages, a sentence each: "file: what"."""
    site = site.resolve()
    pages = {path: BeautifulSoup(path.read_text("utf-8"), "html.parser") for path in sorted(site.rglob("*.html"))}
    anchors = {
        path: {tag.get("id") or tag.get("name") for tag in page.find_all(lambda tag: tag.get("id") or tag.get("name"))}
        for path, page in pages.items()
    }
    for path, page in pages.items():
        name = path.relative_to(site)
        for what in ("title", "h1"):
            found = page.find(what)
            if found is None or not found.get_text(strip=True):
                yield f"{name}: the page has no <{what}>"
        for picture in page.find_all("img"):
            text, source = picture.get("alt", "").strip(), picture.get("src", "")
            # Where no text is given, Sphinx writes the file's name.
            if not text or text.endswith(Path(source).name):
                yield f"{name}: the picture {source[:80]} has no alternative text"
        needed = [address for address in loaded(page) if address]
        for address in needed:
            if is_remote(address):
                yield f"{name}: {address} would be loaded from the network"
        links = [tag["href"] for tag in page.find_all("a", href=True)]
        for address in dict.fromkeys(links + needed):
            if is_remote(address) or urlsplit(address).scheme in ("data", "mailto", "javascript"):
                continue
            file, anchor = target_of(site, path, address)
            if not file.is_file():
                yield f"{name}: {address} leads to no file"
            elif anchor and file in anchors and anchor not in anchors[file]:
                yield f"{name}: {address} leads to no anchor of that page"


def in_styles(site: Path) -> Iterator[str]:
    """What style sheets load from the network, or from files that are not there."""
    for path in sorted(site.rglob("*.css")):
        for address in addresses_in(path.read_text("utf-8")):
            if is_remote(address):
                yield f"{path.relative_to(site)}: {address} would be loaded from the network"
            elif urlsplit(address).scheme != "data" and not (path.parent / unquote(urlsplit(address).path)).is_file():
                yield f"{path.relative_to(site)}: {address} leads to no file"


def in_search(site: Path, name: str) -> Iterator[str]:
    """Whether the search finds a name, in the text and among the objects of the API."""
    path = site / "searchindex.js"
    if not path.is_file():
        yield f"{path.name}: is missing, so nothing can be searched"
        return
    index = json.loads(path.read_text("utf-8").strip().removeprefix("Search.setIndex(").removesuffix(")"))
    if not any(name.lower() in index[of] for of in ("terms", "titleterms")):
        yield f"{path.name}: no page has the word {name}"
    if not any(entry[4] == name for entries in index["objects"].values() for entry in named(entries)):
        yield f"{path.name}: no object of the API is called {name}"


def named(entries: list | dict) -> Iterator[list]:
    """The entries [..., name] of the objects below a prefix, of either form that Sphinx writes."""
    for name, entry in entries.items() if isinstance(entries, dict) else ((entry[4], entry) for entry in entries):
        yield [*entry[:4], name]


def check(site: Path, *, searched: str = SEARCHED) -> list[str]:
    """Everything that is wrong with a site."""
    if not any(site.glob("*.html")):
        return [f"{site}: holds no page; run `make docs` first"]
    return list(dict.fromkeys([*in_pages(site), *in_styles(site), *in_search(site, searched)]))


def main() -> int:
    site = Path(sys.argv[1])
    wrong = check(site)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    said = f"{len(wrong)} wrong" if wrong else "links, titles, pictures, what is loaded and search are right"
    print(f"{len(list(site.rglob('*.html')))} pages: {said}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

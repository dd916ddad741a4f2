"""Pages of the committed results and copies of the notebooks, which lie outside of the documentation's folder."""

import json
import shutil
from pathlib import Path
from typing import Any

from pages import write
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
COPIED = (".png", ".svg")
INTRODUCTION = """# Results

Each is a folder of `results/` in the repository: the report below, all numbers in `results.json`, versions, device,
commit and the command that makes it again. Reports are as they were written; figures of older commits say so.
"""


def title_of(name: str) -> str:
    """The name of a folder or a file as words, which break between them.

    >>> title_of("digits_xnor")
    'Digits xnor'
    """
    words = name.replace("_", " ")
    return f"{words[0].upper()}{words[1:]}"


def benchmark_page(path: Path) -> str:
    """The page of a benchmark's file: what it measured, and where."""
    record = json.loads(path.read_text())
    name = title_of(path.stem)
    picture = f"![{name}]({path.stem}.png)\n\n" if path.with_suffix(".png").exists() else ""
    scalars = {key: value for key, value in record.items() if isinstance(value, str | int | float)}
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in scalars.items()}
    rows = "\n".join(f"| {key} | {value} |" for key, value in shown.items())
    table = f"| | |\n|---|---|\n{rows}\n\n" if rows else ""
    return f"# {name}\n\n{picture}{table}All times are in `results/{path.name}`.\n"


def generate(app: Sphinx) -> None:
    """Write the pages of results and copy the notebooks."""
    docs, names = Path(app.srcdir), []
    folder = docs / "results"
    for report in sorted((ROOT / "results").glob("*/report.md")):
        name = report.parent.name
        names.append(f"{name}/report")
        _, _, text = report.read_text().partition("\n")
        text = text.replace("[results.json](results.json)", f"`results/{name}/results.json`")
        write(folder / name / "report.md", f"# {title_of(name)}\n{text}")
        for picture in report.parent.iterdir():
            if picture.suffix in COPIED:
                shutil.copy2(picture, folder / name / picture.name)
    for record in sorted((ROOT / "results").glob("benchmark_*.json")):
        names.append(record.stem)
        write(folder / f"{record.stem}.md", benchmark_page(record))
        if (picture := record.with_suffix(".png")).exists():
            shutil.copy2(picture, folder / picture.name)
    listed = "\n".join(names)
    write(folder / "index.md", f"{INTRODUCTION}\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n")
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        write(docs / "notebooks" / notebook.name, notebook.read_text())


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True}

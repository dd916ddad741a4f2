"""Pages that the build writes."""

from pathlib import Path


def write(path: Path, text: str) -> None:
    """Write a page, if its text is another one: the rest of the build reads again what is newer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)

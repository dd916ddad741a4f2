"""Texts as sets of bytes: each example so many bytes of a file, and as their labels the byte behind each."""

import ast
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from bnn_jax.checks import require
from bnn_jax.errors import RunError, UsageError

TOKENS = 64
"""Bytes of an example, where no number is given."""
BYTES = 256


def tokens_of(text: str | bytes) -> UInt8[np.ndarray, "1 tokens"]:
    """The bytes of a text, UTF-8, as a batch of one.

    >>> tokens_of("ab")
    array([[97, 98]], dtype=uint8)
    """
    return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)[None].copy()


def text_of(tokens: Iterable[Any]) -> str:
    """The text of bytes; what is no UTF-8 shows as a replacement character.

    >>> text_of(np.array([97, 98]))
    'ab'
    """
    return bytes(np.asarray(tokens).astype(np.uint8)).decode(errors="replace")


def package_text() -> bytes:
    """The docstrings of this package, file by file in the order of their paths."""
    package = Path(__file__).parents[1]
    parts = []
    for path in sorted(package.rglob("*.py"), key=lambda path: path.relative_to(package).as_posix()):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                parts.append(text)
    return "\n\n".join(parts).encode()


def read_text(name: str, path: Path) -> tuple[bytes, str]:
    """The bytes that a name stands for, and what a report says of them.

    Raises:
      UsageError: if it is the path of no file.
      RunError: if the file cannot be read.
    """
    if name == "text":
        found = package_text()
        return found, f"docstrings of bnn_jax {version('bnn_jax')}, {len(found):,} bytes"
    if not path.is_file():
        raise UsageError(f"`name` (={name!r}) is not a file; give 'text', or the path of a .txt file")
    try:
        found = path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {path} ({error.strerror}); make it readable") from None
    return found, f"{path.name}, {len(found):,} bytes"


def windows_of(
    text: bytes, tokens: int, validation_examples: int | None
) -> dict[str, tuple[UInt8[np.ndarray, "examples tokens 1 1"], Int[np.ndarray, "examples tokens"]]]:
    """The splits of a text: windows of `tokens` bytes, none of which overlap, and of each byte the next one.

    The last tenth of the windows is for the test, the tenth before it, or `validation_examples`, for validation.

    >>> splits = windows_of(b"abcdefghi", 2, None)
    >>> [(images[0, :, 0, 0].tolist(), labels[0].tolist()) for images, labels in splits.values()]
    [([97, 98], [98, 99]), ([101, 102], [102, 103]), ([103, 104], [104, 105])]

    Raises:
      UsageError: if there are too few bytes for a window of each split.
    """
    numbers = np.frombuffer(text, np.uint8)
    count = max(0, len(numbers) - 1) // tokens
    rule = f"must leave a window for each split of the {len(numbers)} bytes of the text"
    require("tokens", tokens, count >= 3, rule, "give a longer text, or fewer", error=UsageError)
    tenth = max(1, count // 10)
    taken = tenth if validation_examples is None else validation_examples
    rule = f"must be at most {count - tenth - 1}, so that windows are left to train on"
    require("validation_examples", taken, taken < count - tenth, rule, error=UsageError)
    images = numbers[: count * tokens].reshape(count, tokens, 1, 1)
    labels = numbers[1 : count * tokens + 1].reshape(count, tokens).astype(np.int32)
    bounds = {"train": (0, count - tenth - taken), "validation": (count - tenth - taken, count - tenth)}
    bounds["test"] = (count - tenth, count)
    return {name: (images[low:high].copy(), labels[low:high].copy()) for name, (low, high) in bounds.items()}

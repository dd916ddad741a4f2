"""What reports are made of: text, numbers, tables in Markdown."""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bnn_jax.errors import RunError, UsageError
from bnn_jax.sweeps.results import is_number


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Make the folder of a report, and say in one sentence why it could not be written.

    Raises:
      UsageError: `folder` is, or lies below, a file.
      RunError: a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"`folder` (={folder}) must be a folder, but there is a file; name another one.") from error
    except OSError as error:
        reason = error.strerror or error
        raise RunError(
            f"The report in {folder} was not written ({reason}); free space or name another folder."
        ) from error


def to_json(results: dict[str, Any]) -> str:
    """Results as JSON text, lists of numbers on one line each; NaN and infinities become null.

    >>> print(to_json({"loss": [1.5, float("nan")], "seed": 0}))
    {
     "loss": [1.5, null],
     "seed": 0
    }
    """
    text = json.dumps(_finite_or_none(results), indent=1, ensure_ascii=False, allow_nan=False)
    # A line break inside brackets is always json's own: in a string it would be escaped.
    return re.sub(r"\[(\n[\s\d.,eE+\-nul]*)\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_none(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_none(inner) for inner in value]
    return None if isinstance(value, float) and not is_number(value) else value


def provenance_section(provenance: dict[str, Any]) -> str:
    """What :func:`bnn_jax.analysis.provenance.provenance` found, as a section in Markdown."""
    device, cpu, git = (provenance.get(name) or {} for name in ("device", "cpu", "git"))
    versions = ", ".join(f"{name} {found}" for name, found in (provenance.get("versions") or {}).items())
    changes = {True: ", with uncommitted changes", False: ""}.get(git.get("dirty"), ", state of the checkout unknown")
    devices = f"{device.get('count', 'unknown')} x {device.get('kind', 'unknown')}"
    cores = f"{cpu.get('cores', 'unknown')} cores" + (f" of {cpu['model']}" if cpu.get("model") else "")
    lines = [
        f"- date: {provenance.get('date', 'unknown')}",
        f"- code: commit {git.get('commit', 'unknown')}{changes}",
        f"- device: {devices} ({device.get('platform', 'unknown')})",
        f"- host: {cores}, {provenance.get('platform', 'unknown')}",
        f"- versions: Python {provenance.get('python', 'unknown')}, {versions or 'others unknown'}",
    ]
    if flags := provenance.get("xla_flags"):
        lines.append(f"- XLA flags: {' '.join(flags)}")
    return "\n".join(["## Provenance", "", *map(inline, lines)])


def plus_minus(mean: float | None, std: float | None, style: str, std_style: str) -> str:
    """Mean and spread, each in its format; the mean alone where there is no spread.

    >>> plus_minus(98.421, 0.163, ".2f", ".2g"), plus_minus(98.421, None, ".1f", ".2g")
    ('98.42 ± 0.16', '98.4')
    """
    return number(mean, style) + (f" ± {std:{std_style}}" if std is not None else "")


def percent(share: float | None, style: str = ".2f") -> str:
    """A share as a number of per cent, "-" where there is none."""
    return number(100 * share if is_number(share) else None, style)


def number(value: float | None, style: str) -> str:
    """A number in a format, "-" where there is none or it is not finite."""
    return format(value, style) if is_number(value) else "-"


def value_text(value: Any) -> str:
    """A value of an axis, as short as it goes.

    >>> value_text(0.1), value_text(1e-05), value_text(True), value_text(10.0)
    ('0.1', '1e-05', 'True', '10')
    """
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_text(settings: dict[str, Any]) -> str:
    """Settings in a cell of a table.

    >>> settings_text({"learning_rate": 0.1, "momentum": 0.0, "schedule": "cosine"})
    'learning_rate=0.1, momentum=0, schedule=cosine'
    """
    return ", ".join(f"{name}={value_text(value)}" for name, value in settings.items())


def inline(text: str) -> str:
    """Text that stays on its line and in its table cell, and is no HTML."""
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "\\|")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, texts: Collection[int]) -> str:
    """A table in Markdown, its columns that are not among `texts` aligned to the right."""
    rule = ["---" if column in texts else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(map(inline, cells))} |" for cells in (header, rule, *rows))

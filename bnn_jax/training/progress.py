"""What a run shows while it works."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

OnProgress: TypeAlias = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, text); a text that ends with a line break stays, another one goes."""

SECONDS_BETWEEN_LINES = 30.0


def silent(done: int, total: int, text: str) -> None:
    """Show nothing."""


@contextmanager
def progress_display(title: str) -> Iterator[OnProgress]:
    """Show texts on stderr: on a terminal above and beside a bar; elsewhere, as in a log file, as plain lines.

    Of the texts that do not stay a log has one every thirty seconds, and none between two lines that stay.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_printer(title)
        return
    texts = (TextColumn("{task.description}", markup=False), TextColumn("{task.fields[text]}", markup=False))
    columns = (texts[0], BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), texts[1])
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=None, text="starting")

        def show(done: int, total: int, text: str) -> None:
            shown = text
            if text.endswith("\n"):
                bars.console.print(f"{title}: {text.rstrip()}", markup=False, highlight=False, soft_wrap=True)
                shown = text.partition("  ")[0].rstrip()
            bars.update(task, completed=done, total=total, text=shown)

        yield show


def _line_printer(title: str) -> OnProgress:
    last = -SECONDS_BETWEEN_LINES

    def show(done: int, total: int, text: str) -> None:
        nonlocal last
        if text.endswith("\n") or done == total or time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{title}: {done}/{total} {text.rstrip()}", file=sys.stderr, flush=True)

    return show

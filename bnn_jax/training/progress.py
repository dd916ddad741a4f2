"""What a run shows while it works."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

OnProgress: TypeAlias = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, text)."""

SECONDS_BETWEEN_LINES = 10.0


def silent(done: int, total: int, text: str) -> None:
    """Show nothing."""


@contextmanager
def progress_display(title: str) -> Iterator[OnProgress]:
    """A progress bar with the time left on a terminal; elsewhere, as in a log file, a line every ten seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_printer(title, console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[text]}"), console=console) as bars:
        task = bars.add_task(title, total=None, text="compiling")
        yield lambda done, total, text: bars.update(task, completed=done, total=total, text=text)


def _line_printer(title: str, console) -> OnProgress:
    last = -SECONDS_BETWEEN_LINES

    def show(done: int, total: int, text: str) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            console.print(f"{title}: {done}/{total} {text}", soft_wrap=True, highlight=False)

    return show

"""Ctrl-C and SIGTERM: what a run is told, and the limit on how long it may take to end."""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from bnn_jax.errors import Preempted
from bnn_jax.training.devices import largest

Asked: TypeAlias = Callable[[], type[KeyboardInterrupt] | None]
"""The exception with which the run shall end, None before."""

SECONDS_TO_END = 8.0
"""After SIGTERM.  Preempted machines go away soon after, Slurm kills after 30 seconds."""


@contextmanager
def interrupts(last_saved: Callable[[], str]) -> Iterator[Asked]:
    """Turn the first Ctrl-C, or SIGTERM, into what the loop asks for: the exception to end with, None before.

    A second Ctrl-C acts as usual.  A process that has not ended :data:`SECONDS_TO_END` after SIGTERM, because it is
    compiling or computes something long, ends there with exit code 0: what is saved is whole at any moment.

    Args:
      last_saved: says, for the message of such an end, where the run can go on.
    """
    asked: type[KeyboardInterrupt] | None = None

    def ask(number, frame):
        nonlocal asked
        asked = Preempted if number == signal.SIGTERM else KeyboardInterrupt
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which alone receives signals
        yield lambda: None
        return
    with _limit_on_ending(last_saved):
        try:
            yield lambda: asked
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextmanager
def _limit_on_ending(last_saved: Callable[[], str]) -> Iterator[None]:
    """Python's own handler waits until XLA returns; the byte that the C handler writes here does not."""
    signals, wakeup = os.pipe()
    done, closed = os.pipe()
    os.set_blocking(wakeup, False)

    def watch():
        while True:
            ready, _, _ = select.select([signals, done], [], [])
            if done in ready:
                return
            if signal.SIGTERM in os.read(signals, 64):
                break
        if not select.select([done], [], [], SECONDS_TO_END)[0]:
            print(f"preempted: {last_saved()}", file=sys.stderr, flush=True)
            os._exit(0)

    previous = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="limit on ending", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(closed)
        thread.join()
        for descriptor in (signals, wakeup, done):
            os.close(descriptor)


def agreed(asked: Asked) -> Asked:
    """Ask what one of the processes at least is asked for."""
    endings = (None, KeyboardInterrupt, Preempted)
    return lambda: endings[int(largest(endings.index(asked())))]

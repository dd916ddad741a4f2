"""prefetch: an iterator that runs ahead of its consumer in a thread, so that transfers overlap with computation."""

import threading
import time
from collections.abc import Callable, Iterable
from queue import SimpleQueue
from typing import Any

from bnn_jax.checks import require


class Prefetch:
    """An iterator that runs ahead in a thread, made by :func:`prefetch`.

    Attributes:
      waited: seconds that its consumer has waited for items.
    """

    def __init__(self, source: Iterable[Any], put: Callable[[Any], Any], depth: int):
        self.waited = 0.0
        self._source = source
        self._slots = threading.Semaphore(depth)
        self._ready: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=_run_ahead, args=(source, put, self._slots, self._ready, self._closed), name="prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> Any:
        if self._closed.is_set():
            raise StopIteration
        began = time.perf_counter()
        kind, value = self._ready.get()
        self.waited += time.perf_counter() - began
        if kind == "item":
            self._slots.release()
            return value
        self.close()
        raise StopIteration if kind == "end" else value

    def close(self) -> None:
        """End the thread, and close the source if that can be closed."""
        self._closed.set()
        self._slots.release()
        getattr(self._source, "close", lambda: None)()
        self._thread.join()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prefetch(source: Iterable[Any], put: Callable[[Any], Any], *, depth: int = 2) -> Prefetch:
    """``map(put, source)``, computed in a thread that is up to `depth` items ahead of whoever takes them.

    With `put` such as `jax.device_put` the transfer of the next batches overlaps with the computation on this one.

    Args:
      source: its `close`, if it has one, is called when the result is closed; it must not wait for the item under way.
      put: function of an item.
      depth: items made ahead.

    Returns:
      An iterator; an exception of `source` or `put` is raised where its item would have been.  Its `waited` counts the
      seconds that the consumer had to wait.

    Raises:
      ValueError: if `depth` is less than 1.

    >>> with prefetch([1, 2, 3], lambda x: x * x) as squares:
    ...     print(list(squares))
    [1, 4, 9]
    """
    require("depth", depth, depth >= 1, "must be at least 1", "2 is usual")
    return Prefetch(source, put, depth)


def _run_ahead(source, put, slots, ready, closed) -> None:
    try:
        items = iter(source)
        while True:
            slots.acquire()
            if closed.is_set():
                return
            try:
                item = next(items)
            except StopIteration:
                ready.put(("end", None))
                return
            ready.put(("item", put(item)))
    except BaseException as error:
        ready.put(("error", error))

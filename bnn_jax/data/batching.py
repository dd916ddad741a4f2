"""Batches of a set on disk, in the order that a run gives: read by threads or processes, ahead of the training.

A batch is a function of (row of the order, seed, epoch) alone, so that neither the number of worker processes, nor how
a batch is divided among the processes of a run, nor where the run was interrupted changes it.
"""

import contextlib
import gc
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int, Int32, UInt8

from bnn_jax.checks import require
from bnn_jax.cores import usable_cores
from bnn_jax.data.records import Records, read_batch
from bnn_jax.errors import RunError, UsageError
from bnn_jax.extras import import_extra

OnSkipped: TypeAlias = Callable[[int, str], None]
"""Called with the index of a corrupt example in its split, and the reason."""

MOST_THREADS = 8
BATCHES_PER_WORKER = 2
SHARED_MEMORY = Path("/dev/shm")


def padded_order(
    count: int | Int[np.ndarray, "count"], batch: int, multiple: int = 1
) -> Int32[np.ndarray, "steps size"]:
    """All examples once, in rows of `batch` rounded up to a multiple of `multiple`; -1 fills the last row.

    Args:
      count: number of examples, taken in their order, or the indices of the examples.
      batch: examples in a row.
      multiple: what the rows are divided among: processes or devices.

    Raises:
      ValueError: if a number is less than 1.

    >>> padded_order(5, 2)
    array([[ 0,  1],
           [ 2,  3],
           [ 4, -1]], dtype=int32)
    """
    order = np.arange(count) if np.ndim(count) == 0 else np.asarray(count)
    for name, value in (("count", len(order)), ("batch", batch), ("multiple", multiple)):
        require(name, value, value >= 1, "must be at least 1")
    size = -(-batch // multiple) * multiple
    rows = np.full((-(-len(order) // size), size), -1, np.int32)
    rows.flat[: len(order)] = order
    return rows


def batches(
    records: Records,
    order: Int[np.ndarray, "steps batch"],
    *,
    seed: int,
    epoch: int,
    training: bool,
    workers: int = 0,
    first_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    on_skipped: OnSkipped | None = None,
    strict: bool = False,
) -> "Batches":
    """Read the rows of `order` from disk, ahead of whoever takes them.

    Each process of a run gives its own `process_index` and gets its block of every row: all blocks side by side are the
    batch.  Reading starts with the call, so that the batches of the next epoch can be asked for before this one ends.
    A program that uses worker processes needs ``if __name__ == "__main__":``, as all that start processes by spawning.

    Args:
      records: of a split.
      order: indices of the examples of each batch, as :func:`padded_order` or a permutation gives them; -1 leaves a
        place empty: an image of zeros with the label -1.
      seed, epoch: decide, with the index of an example, what is random about it.
      training: crop at random, and put the next good example in the place of a corrupt one, which in evaluation stays
        empty.
      workers: processes that read and decode; 0 takes threads of this process.
      first_step: the row to begin with.
      process_index, process_count: which block of a row to read, of how many.
      on_skipped: told, in the thread that takes the batch, of every example that is corrupt.
      strict: refuse a corrupt example instead.

    Returns:
      An iterator of (images uint8 [batch / process_count,H,W,C], labels int32 [batch / process_count]); close it, or
      use it in a `with` statement.

    Raises:
      ValueError: for an order or numbers that do not go together.
      UsageError: without Grain; from the iterator, as :func:`bnn_jax.data.records.read_batch`.
      RunError: from the iterator, as :func:`bnn_jax.data.records.read_batch`.
    """
    order = np.asarray(order)
    _check(order, len(records), seed, epoch, workers, first_step, process_index, process_count)
    width = order.shape[1] // process_count
    rows = order[first_step:, process_index * width : (process_index + 1) * width].astype(np.int32)
    stop = Path(tempfile.gettempdir()) / f"bnn_jax-{os.getpid()}-{uuid.uuid4().hex}.stop"
    reader = _RowReader(records, seed, epoch, training, strict, os.fspath(stop))
    return Batches(
        _pipeline(rows, reader, min(workers, len(rows))), len(rows), min(workers, len(rows)), stop, on_skipped
    )


def _check(order, examples, seed, epoch, workers, first_step, process_index, process_count) -> None:
    if order.ndim != 2 or order.dtype.kind not in "iu" or order.shape[1] < 1:
        raise ValueError(
            f"`order` has shape {order.shape} and type {order.dtype}; it must be whole numbers [steps, batch]"
        )
    for name, value, holds, rule in (
        ("seed", seed, 0 <= seed < 2**64, "must be in [0, 2^64)"),
        ("epoch", epoch, 0 <= epoch < 2**64, "must be in [0, 2^64)"),
        ("workers", workers, workers >= 0, "must not be negative; 0 reads with threads of this process"),
        ("first_step", first_step, 0 <= first_step <= len(order), f"must be 0 to {len(order)}, the rows of `order`"),
        ("process_count", process_count, process_count >= 1, "must be at least 1"),
        ("process_index", process_index, 0 <= process_index < process_count, f"must be 0 to {process_count - 1}"),
        (
            "process_count",
            process_count,
            order.shape[1] % process_count == 0,
            f"must divide the {order.shape[1]} columns of `order`; make it with padded_order(..., multiple)",
        ),
    ):
        require(name, value, holds, rule)
    if order.size and not -1 <= order.min() <= order.max() < examples:
        raise ValueError(
            f"`order` has indices {order.min()} to {order.max()}; the split has 0 to {examples - 1}, -1 is none"
        )


# -- the pipeline


@dataclass(frozen=True)
class _RowReader:
    """row -> (images, labels, skipped examples as JSON); in every process or thread that reads."""

    records: Records
    seed: int
    epoch: int
    training: bool
    strict: bool
    stop: str

    def __call__(self, row: Int[np.ndarray, "batch"]) -> tuple[np.ndarray, np.ndarray, str]:
        images, labels, skipped = read_batch(
            self.records,
            row,
            seed=self.seed,
            epoch=self.epoch,
            training=self.training,
            strict=self.strict,
            stopped=lambda: os.path.exists(self.stop),
        )
        return images, labels, json.dumps(skipped)


def _pipeline(rows: np.ndarray, reader: _RowReader, workers: int) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """Grain's: the rows are divided among the workers one by one and come back in their order."""
    grain = _import_grain()
    # A batch for each thread: more of them would keep more batches in memory than are under way.
    threads = 0 if workers else min(MOST_THREADS, len(usable_cores()))
    dataset = grain.MapDataset.source(rows).map(reader)
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # Grain reads flags in the workers, and a program without absl has none.
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=BATCHES_PER_WORKER)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_initialise_worker)
        needed = rows.shape[1] * math.prod(reader.records.image_shape) * workers * 2 * (BATCHES_PER_WORKER + 1)
        sharing = grain.experimental.DatasetOptions(min_shm_size=_least_shared(needed))
        dataset = grain.experimental.WithOptionsIterDataset(dataset, sharing)
    return iter(dataset)


def _least_shared(needed: int) -> int:
    """From how many bytes on an array goes through shared memory rather than a pipe, which takes four times as long.

    Containers often have 64 MB of shared memory; who writes beyond that ends with a bus error.
    """
    enough = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= needed
    return 2**20 if enough else 2**62


def _import_grain() -> Any:
    grain = import_extra("grain", "reading a set while training", "load the set whole, without `--data.stream`")
    import_extra("grain.experimental", "reading a set while training")
    return grain


def _initialise_worker(index: int, count: int) -> None:
    """The parent decides when a worker ends: Ctrl-C and SIGTERM, which may reach all, are its to act on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if "jax" in sys.modules:  # Grain imports it; a worker leaves the accelerators alone.
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@dataclass
class _Reading:
    """A pipeline under way, `None` once it is closed, and the first batches, or the error in their place."""

    pipeline: Any
    workers: int
    stop: Path
    starting: threading.Thread
    ahead: deque[Any]
    lock: threading.Lock


class Batches:
    """An iterator of (images, labels) that is read ahead, made by :func:`batches`; `close` ends its workers."""

    def __init__(self, pipeline: Iterator, rows: int, workers: int, stop: Path, on_skipped: OnSkipped | None):
        # Grain starts a worker when its first batch is asked for, and closes those alone which have given one.
        first, ahead = min(rows, max(workers, 1)), deque()
        starting = threading.Thread(target=_start, args=(pipeline, first, ahead), name="start of workers", daemon=True)
        self._on_skipped = on_skipped
        self._reading = _Reading(pipeline, workers, stop, starting, ahead, threading.Lock())
        self._finalizer = weakref.finalize(self, _close, self._reading)
        starting.start()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[UInt8[np.ndarray, "batch height width channels"], Int32[np.ndarray, "batch"]]:
        try:
            images, labels, skipped = _next_batch(self._reading)
        except BaseException:
            self.close()
            raise
        for index, reason in json.loads(skipped):
            if self._on_skipped is not None:
                self._on_skipped(index, reason)
        # Copies: the memory that they come in is shared with the worker and goes away.
        return np.array(images), np.array(labels)

    def close(self) -> None:
        """End the workers; those in the middle of a batch leave it there."""
        self._finalizer()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _start(pipeline: Iterator, count: int, ahead: deque[Any]) -> None:
    """Take the first batches in a thread whose workers inherit its blocked signals.

    Between its start and :func:`_initialise_worker` a worker would answer Ctrl-C with a traceback.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        for _ in range(count):
            ahead.append(next(pipeline))
    except Exception as error:
        ahead.append(error)


def _next_batch(reading: _Reading) -> tuple[np.ndarray, np.ndarray, str]:
    reading.starting.join()
    try:
        with reading.lock:
            if reading.pipeline is None:
                raise StopIteration
            found = reading.ahead.popleft() if reading.ahead else next(reading.pipeline)
        if isinstance(found, BaseException):
            raise found
    except (RunError, UsageError) as error:
        raise type(error)(str(error)) from None  # without what Grain adds about its own frames
    except RuntimeError as error:
        code = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
        if code is None:
            raise
        raise RunError(
            f"a process that reads images ended with code {code[1]}, which is -9 where memory ran out; use fewer "
            "`workers`, or 0"
        ) from None
    return found


def _close(reading: _Reading) -> None:
    with contextlib.suppress(OSError):  # Then they finish the batch first.
        reading.stop.touch()
    reading.starting.join()
    with reading.lock:
        reading.pipeline.close()
        reading.pipeline = None
        reading.ahead.clear()
    reading.stop.unlink(missing_ok=True)
    if reading.workers:
        _free_shared_memory()


def _free_shared_memory() -> None:
    """Free what was not taken, now: shared memory that is left at the end of the program is warned about."""
    # Grain's exception for the end of a worker holds, in a cycle, the worker's last batch.
    gc.collect()
    with contextlib.suppress(ImportError, AttributeError):
        from grain._src.python.ipc.shared_memory_array import SharedMemoryArray

        if SharedMemoryArray._del_thread_pool is not None:
            SharedMemoryArray._del_thread_pool.apply(int)  # One thread, so that it comes after all before it.

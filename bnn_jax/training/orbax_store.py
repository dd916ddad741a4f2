"""Trees of named arrays on disk: saved by Orbax, and read array by array from the TensorStore that it writes.

Orbax saves and loads many arrays at once.  When one fails (full disk, damaged file), Orbax 0.12.8 closes its event loop
under the others, and each of them prints a traceback from TensorStore's threads, which nothing can mute; its own
threads log one more each.  These observed faults force what is unusual here:

* a load fails like that in loops of uvloop, which cannot be replaced: arrays are read by TensorStore itself, which also
  tells which array is damaged;
* a save fails like that in loops of asyncio: for its time, new loops are of :class:`_PatientLoop`;
* inside a running event loop (a notebook) Orbax takes uvloop's, and Ctrl-C leaves its threads writing into files that
  the caller is about to delete: a save has a thread of its own, whose end is waited for;
* folders that are made in the background leave a coroutine that was never awaited where that fails, and a warning of
  it: they are made before;
* `v1.save` waits for all processes of a run, whatever its context says: one process of several saves by the older
  interface, into the same format.
"""

import asyncio
import contextlib
import errno
import os
import re
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnn_jax.errors import UsageError


class StoreError(Exception):
    """A tree could not be saved or read; the text is the cause in one line.

    Attributes:
      refused: the operating system would not let us (permission, open files, I/O), which says nothing about the data.
    """

    def __init__(self, cause: str, *, refused: bool = False):
        super().__init__(cause)
        self.refused = refused


def save_tree(path: Path, tree: Any, *, together: bool = False) -> None:
    """Save a tree of numpy arrays, none of them empty, as the new Orbax checkpoint at the absolute `path`.

    One process of several does that while the others wait, or, with `together`, all of them do: process 0 writes what
    is in numpy, and of a jax array each process the parts that it holds.

    Raises:
      StoreError: with the file system's words ("No space left on device") where it is to blame.
    """
    threads = set(threading.enumerate())
    save = _save if together or jax.process_count() == 1 else _save_alone
    with _quiet(), ThreadPoolExecutor(max_workers=1) as executor:
        try:
            return executor.submit(save, path, jax.tree.map(_storable, tree)).result()
        except Exception as error:
            failure = _store_error(error)
        # Some of Orbax's threads outlive its failure: let them log it while it is quiet, and end before the caller
        # deletes the files that they may still be writing.
        executor.shutdown()
        for thread in set(threading.enumerate()) - threads:
            thread.join(timeout=5.0)
    raise failure


def _save(path: Path, tree: Any) -> None:
    from orbax.checkpoint import v1 as orbax

    context = orbax.Context()
    context.asynchronous.create_directories_asynchronously = False
    context.array.saving.use_compression = False
    with context:
        orbax.save(path, tree)


def _save_alone(path: Path, tree: Any) -> None:
    import orbax.checkpoint as orbax

    def alone() -> Any:
        return orbax.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )

    store = orbax.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, multiprocessing_options=alone())
    options = orbax.CompositeOptions(multiprocessing_options=alone())
    whole = orbax.CompositeCheckpointHandler(composite_options=options, state=store)
    with orbax.Checkpointer(whole, multiprocessing_options=alone()) as checkpointer:
        checkpointer.save(path, args=orbax.args.Composite(state=orbax.args.PyTreeSave(tree)))


class _PatientLoop(asyncio.SelectorEventLoop):
    """An event loop that lets its tasks end before it closes.

    It does not log what a task that nobody waits for any more failed of: the save has failed and tells why.
    """

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        if not self.is_closed() and not self.is_running() and (tasks := asyncio.all_tasks(self)):
            self.run_until_complete(asyncio.wait(tasks))
        super().close()


class _PatientLoops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _PatientLoop()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let Orbax's loops end their tasks, and keep its log and its warnings off stderr: our error tells once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from absl import logging

        verbosity, policy = logging.get_verbosity(), asyncio.get_event_loop_policy()
        logging.set_verbosity(logging.FATAL)
        asyncio.set_event_loop_policy(_PatientLoops())
        try:
            yield
        finally:
            asyncio.set_event_loop_policy(policy)
            logging.set_verbosity(verbosity)


def require_storable(argument: str, folder: Path) -> None:
    """Refuse a folder in which Orbax would not find again what it wrote: it reads the path as a pattern.

    Raises:
      UsageError: naming the folder.
    """
    if wrong := re.search(r"\[.*\]|\\", folder.resolve().as_posix()):
        raise UsageError(
            f"`{argument}` (={folder}) lies at a path with {wrong[0]!r}, which Orbax takes for a pattern and does not "
            "read back; choose a path without square brackets and backslashes"
        )


def read_arrays(path: Path, dtypes: dict[str, np.dtype]) -> dict[str, np.ndarray]:
    """Read arrays of the checkpoint at `path`.  Not everything that has changed them is noticed.

    Args:
      dtypes: name -> type of an array when it was saved; a name is its keys from the root of the tree, joined by dots.

    Raises:
      StoreError: names the array that cannot be read.
    """
    import tensorstore

    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 100_000_000}})
    base = {"driver": "file", "path": f"{path.resolve()}/state/"}  # the file driver refuses `..`

    def begin_to_open(name: str) -> Any:
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        spec = {"driver": "zarr3", "kvstore": store, "fill_missing_data_reads": False}
        return tensorstore.open(spec, open=True, read=True, context=context)

    opened, arrays = {name: begin_to_open(name) for name in dtypes}, {}
    for name, dtype in dtypes.items():
        try:
            arrays[name] = opened[name].result().read().result().view(dtype)
        except ValueError as error:
            raise _store_error(error, f"`{name}` cannot be read ({{}})") from None
    return arrays


def _storable(array: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """The array itself, or its bytes where TensorStore does not know the type (uint4)."""
    import tensorstore

    try:
        tensorstore.dtype(array.dtype.name)
    except (TypeError, ValueError):
        return array.view(f"uint{8 * array.dtype.itemsize}")
    return array


def _store_error(error: BaseException, text: str = "{}") -> StoreError:
    """`text` about the system's own words for what went wrong, where there are any, else the error's last ones."""
    link: BaseException | None = error
    while link is not None:
        reported = re.search(r"os_error_code='(\d+)'", str(link))
        code = int(reported[1]) if reported else link.errno if isinstance(link, OSError) else None
        if code:
            return StoreError(text.format(os.strerror(code)), refused=code not in (errno.ENOENT, errno.ENOTDIR))
        link = link.__cause__ or link.__context__
    sentence = re.split(r"\.\s|\n| \[\w+=", str(error))[0].split('": ')[-1]
    return StoreError(text.format(f"{type(error).__name__}: {sentence[:200]}"))

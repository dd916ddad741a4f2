"""Files that are there whole or not at all, and byte vectors stored by Orbax without its noise."""

import contextlib
import errno
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Put `data` (text as UTF-8) into `path` in one step: whoever reads sees the old file or the new one.

    The bytes go to ``<path>.tmp`` beside it, to the disk, and then take the name.  A failed write removes its ``.tmp``.

    Raises:
      OSError: what the file system said; `path` is as it was.
    """
    path = Path(path)
    pending = path.with_name(path.name + ".tmp")
    try:
        write_synced(pending, data)
        replace_synced(pending, path)
    except BaseException:
        with contextlib.suppress(OSError):
            pending.unlink()
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a draft beside `path`, which takes its name when the block ends and is gone if it fails.

    The folder is made if missing.  Nobody meets half of the file, also after the machine stopped.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "folder" / "file.txt"
    >>> with replacing(path) as draft:
    ...     _ = draft.write_text("whole")
    >>> path.read_text()
    'whole'
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        _sync(draft)
        replace_synced(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_synced(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path` and wait until the disk has it.  Not atomic."""
    with open(path, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(source: Path, target: Path) -> None:
    """Rename `source` to `target`, over a file already there, and wait until the disk has the new name."""
    os.replace(source, target)
    _sync(target.parent)


def sync_tree(folder: Path) -> None:
    """Wait until the disk has every file and folder under `folder`, and the name of `folder` itself."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a folder; the rename itself has then already happened.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


class VectorError(Exception):
    """A byte vector could not be written or read; the text is the cause in one line.

    Attributes:
      refused: the operating system would not let us (permission, open files, I/O), which says nothing about the data.
    """

    def __init__(self, cause: str, *, refused: bool = False):
        super().__init__(cause)
        self.refused = refused


def write_vector(path: Path, vector: UInt8[np.ndarray, "bytes"]) -> None:
    """Store `vector`, not empty, as the new Orbax checkpoint ``{"bytes": vector}`` at the absolute `path`.

    Raises:
      VectorError: with the file system's words ("No space left on device") where it is to blame.
    """
    if jax.process_count() == 1:
        _with_orbax(lambda orbax: orbax.save(path, {"bytes": vector}))
    else:
        _with_orbax(lambda orbax: _save_alone(path, {"bytes": vector}))


def _save_alone(path: Path, tree: dict[str, np.ndarray]) -> None:
    """The same from one process of several: the newer interface waits for all to save, whatever its context says."""
    import orbax.checkpoint as orbax

    alone = _alone(orbax.options.MultiprocessingOptions())
    store = orbax.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, multiprocessing_options=alone)
    options = orbax.CompositeOptions(multiprocessing_options=alone)
    whole = orbax.CompositeCheckpointHandler(composite_options=options, state=store)
    with orbax.Checkpointer(whole, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(path, args=orbax.args.Composite(state=orbax.args.PyTreeSave(tree)))


def _alone(options: Any) -> Any:
    """Options by which the other processes of a run are not waited for."""
    options.primary_host = jax.process_index()
    options.active_processes = {jax.process_index()}
    return options


def read_vector(path: Path) -> UInt8[np.ndarray, "bytes"]:
    """What :func:`write_vector` stored at `path`, if nothing has changed it: Orbax does not notice every change.

    Raises:
      VectorError: there is no such checkpoint, or Orbax does notice.
    """
    tree = _with_orbax(lambda orbax: orbax.load(path))
    vector = tree.get("bytes") if isinstance(tree, dict) else None
    if not (isinstance(vector, np.ndarray) and vector.dtype == np.uint8 and vector.ndim == 1):
        raise VectorError("it holds no byte vector")
    return vector


def _with_orbax(action: Callable[[Any], Any]) -> Any:
    """`action(orbax.checkpoint.v1)`, in a thread of its own.

    The thread makes it work where an event loop runs already (notebooks), and lets Ctrl-C wait for the end of a save.
    """
    threads = set(threading.enumerate())
    with _quiet() as orbax, ThreadPoolExecutor(max_workers=1) as executor:

        def act() -> Any:
            context = orbax.Context()
            context.asynchronous.create_directories_asynchronously = False
            context.array.saving.use_compression = False
            _alone(context.multiprocessing)
            with context:
                return action(orbax)

        try:
            return executor.submit(act).result()
        except Exception as error:
            failure = _vector_error(error)
        # Some of Orbax's threads outlive its failure: let them log it while it is quiet, and end before the caller
        # deletes the files that they may still be writing.
        executor.shutdown()
        for thread in set(threading.enumerate()) - threads:
            thread.join(timeout=5.0)
    raise failure


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Import Orbax, and keep its log and its warnings off stderr: what failed is told once, by our error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from absl import logging
        from orbax.checkpoint import v1 as orbax

        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.FATAL)
        try:
            yield orbax
        finally:
            logging.set_verbosity(verbosity)


def _vector_error(error: BaseException) -> VectorError:
    """The system's own words for what went wrong, where there are any in the chain, else the error's first sentence."""
    link: BaseException | None = error
    while link is not None:
        reported = re.search(r"os_error_code='(\d+)'", str(link))
        code = int(reported[1]) if reported else link.errno if isinstance(link, OSError) else None
        if code:
            return VectorError(os.strerror(code), refused=code not in (errno.ENOENT, errno.ENOTDIR))
        link = link.__cause__ or link.__context__
    first_sentence = re.split(r"\.\s|\n", str(error))[0]
    return VectorError(f"{type(error).__name__}: {first_sentence[:200]}")

"""Files that are there whole or not at all."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4


def write_atomically(path: Path, data: bytes | str) -> None:
    """Put `data` (text as UTF-8) into `path` in one step: whoever reads sees the old file or the new one.

    The bytes go to ``<path>.tmp`` beside it, to the disk, and then take the name.  A failed write removes its ``.tmp``.

    Raises:
      OSError: what the file system said; `path` is as it was.
    """
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
    draft = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
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
    if os.name == "nt":  # It opens no folders, and syncs no file that is open to be read.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a folder; the rename itself has then already happened.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)

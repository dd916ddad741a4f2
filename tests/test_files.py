import errno
import os

import pytest

from bnn_jax import files


def fail(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_write_atomically(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    files.write_atomically(path, "größer")
    assert path.read_bytes() == "größer".encode()
    files.write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device"):
        files.write_atomically(path, "new")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["result.json"]

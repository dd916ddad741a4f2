"""The folder of a run: whose it is, who trains in it, and what damage does to that."""

import errno
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bnn_jax.errors import RunError, UsageError
from bnn_jax.training.checkpoint import save_checkpoint
from bnn_jax.training.config import Config, ModelConfig, OptimConfig, to_dict
from bnn_jax.training.run_folder import (
    DamagedFileWarning,
    check_workdir,
    claim_workdir,
    locked,
    read_config,
    why_rejected,
    write_checksummed,
)

CONFIG = Config("mine", epochs=3, batch_size=8, model=ModelConfig("resnet6"), optim=OptimConfig("sgd"))
OTHER = replace(CONFIG, seed=7)


def save(workdir, step, config):
    save_checkpoint(workdir / "checkpoints", step, {"a": np.ones(2, np.float32)}, metadata={"config": to_dict(config)})


def test_why_rejected():
    as_read = lambda metadata: json.loads(json.dumps(metadata))
    assert why_rejected(CONFIG, as_read({"config": to_dict(CONFIG), "log": ""})) is None
    reason = why_rejected(CONFIG, as_read({"config": to_dict(OTHER)}))
    assert reason == "it is of another run, whose `seed` is 7, not 0"
    assert why_rejected(CONFIG, {}) == "it is of no run: its metadata hold no config"


def test_a_setting_that_came_later_makes_no_other_run():
    """Runs begun before a setting was there go on with its default."""
    values = json.loads(json.dumps(to_dict(CONFIG)))
    del values["data"]["flip"]
    assert why_rejected(CONFIG, {"config": values}) is None
    assert why_rejected(replace(CONFIG, data=replace(CONFIG.data, flip=True)), {"config": values}) is not None


def test_a_rejected_checkpoint_does_not_take_over_a_run_without_config(tmp_path):
    save(tmp_path, 1, CONFIG)
    save(tmp_path, 2, OTHER)
    (tmp_path / "config.json").write_text("{")
    with pytest.warns(DamagedFileWarning, match=f"skipped `{tmp_path}/config.json`: it is damaged"):
        claim_workdir(CONFIG, tmp_path)
    assert read_config(tmp_path) == CONFIG
    with pytest.raises(UsageError, match=r"`seed` is 7 now, but .* holds a run with 0; choose another `--workdir`"):
        claim_workdir(OTHER, tmp_path)


@pytest.mark.parametrize("end", ["result.json", "diverged.json"])
@pytest.mark.parametrize("damaged", [True, False])
def test_a_result_whose_config_is_lost_is_nobodys(tmp_path, end, damaged):
    write_checksummed(tmp_path / end, {"seed": 0, "epochs": 3})
    warned = pytest.warns(DamagedFileWarning) if damaged else nullcontext()
    if damaged:
        (tmp_path / "config.json").write_text("{")
    for function in (check_workdir, claim_workdir):
        with (
            warned,
            pytest.raises(
                UsageError,
                match=rf"^{tmp_path} holds the result of a run whose config is lost or damaged; move that folder away, "
                r"or train with `--overwrite`$",
            ),
        ):
            function(CONFIG, tmp_path)
    assert (tmp_path / end).exists()


def test_a_damaged_config_and_no_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with (
        pytest.warns(DamagedFileWarning),
        pytest.raises(RunError, match=r"config\.json is damaged and there is no checkpoint; remove .* to start anew"),
    ):
        read_config(tmp_path)


def test_a_held_lock_names_its_holder_if_it_can_be_read(tmp_path):
    with locked(tmp_path):
        with (
            pytest.raises(UsageError, match=rf"being trained in by process {os.getpid()} on .*; wait"),
            locked(tmp_path),
        ):
            pass
        (tmp_path / "lock").write_bytes(b"proc\xffess 3")
        with pytest.raises(UsageError, match="being trained in by proc\ufffdess 3; wait"), locked(tmp_path):
            pass
        (tmp_path / "lock").write_bytes(b"")
        with pytest.raises(UsageError, match="being trained in by another process; wait"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_a_lock_of_windows(tmp_path, monkeypatch):
    """It has no fcntl; a byte is locked, behind those that name the process."""
    places = []

    def locking(descriptor, mode, count):
        places.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, count))
        if len(places) > 1:
            raise OSError("locked")

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    with locked(tmp_path):
        assert (tmp_path / "lock").read_text().startswith("process ")
        with pytest.raises(UsageError, match=r"being trained in by process \d+ on .*; wait"), locked(tmp_path):
            pass
    assert places == [(2**30, 2, 1)] * 2


def test_a_full_disk_does_not_keep_from_the_lock(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(RunError, match=r"^what the run says$"), locked(tmp_path):
        raise RunError("what the run says")


def test_a_lock_that_cannot_be_opened(tmp_path):
    (tmp_path / "lock").mkdir()
    with (
        pytest.raises(RunError, match=rf"cannot write to {tmp_path} \(Is a directory\); make it writable"),
        locked(tmp_path),
    ):
        pass

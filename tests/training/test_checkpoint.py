import asyncio
import errno
import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_states import bits_of, own_hash, state_of

from bnn_jax.errors import RunError, UsageError
from bnn_jax.training import checkpoint, orbax_store
from bnn_jax.training.checkpoint import (
    CheckpointWarning,
    checkpoint_steps,
    read_metadata,
    restore_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from bnn_jax.training.run_folder import locked


@pytest.fixture(scope="module")
def saved_pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    for step in (1, 2):
        save_checkpoint(folder, step, state_of(step), metadata={"saved_at": step})
    return folder


@pytest.fixture
def pair(saved_pair, tmp_path) -> Path:
    """A folder of its own with good checkpoints 1 and 2."""
    return Path(shutil.copytree(saved_pair, tmp_path / "pair"))


def data_files(folder: Path, step: int) -> list[Path]:
    return sorted(path for path in (folder / str(step)).rglob("*") if path.is_file())


def kernel_file(folder: Path) -> Path:
    kernel = np.asarray(state_of(2)["kernel"]).tobytes()
    (path,) = [path for path in data_files(folder, 2) if kernel in path.read_bytes()]
    return path


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def flip_kernel_bit(folder: Path) -> None:
    path = kernel_file(folder)
    flip(path, 8 * path.read_bytes().index(np.asarray(state_of(2)["kernel"]).tobytes()) + 12345)


def interrupt(folder: Path) -> None:
    os.rename(folder / "2.json", folder / "2.json.tmp")
    kernel_file(folder).unlink()


def edit(path: Path, *, hashed: bool = False, **changes: Any) -> None:
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(manifest | {"sha256": own_hash(manifest)} if hashed else manifest))


NO_KERNEL, WRONG_KERNEL = r"`kernel` cannot be read \(.*\)$", "`kernel` does not match its hash"
WRONG_MANIFEST, NO_JSON = "its manifest does not match its own hash", "its manifest is not JSON"
NO_MANIFEST, NOT_READ = "it has no manifest `2.json`", r"its manifest cannot be read \(Is a directory\)"
OTHER_VERSION = "it has format version 1, this bnn_jax reads 2"
DAMAGES = {
    "bit flipped": (flip_kernel_bit, WRONG_KERNEL),
    "data truncated": (lambda at: os.truncate(kernel_file(at), 100), NO_KERNEL),
    "data emptied": (lambda at: os.truncate(kernel_file(at), 0), NO_KERNEL),
    "data file deleted": (lambda at: kernel_file(at).unlink(), NO_KERNEL),
    "store emptied": (lambda at: os.truncate(at / "2" / "state" / "manifest.ocdbt", 0), NO_KERNEL),
    "data deleted": (lambda at: shutil.rmtree(at / "2"), "its data folder is missing"),
    "data of another step": (lambda at: (shutil.rmtree(at / "2"), shutil.copytree(at / "1", at / "2")), WRONG_KERNEL),
    "empty folder": (lambda at: ((at / "2.json").unlink(), shutil.rmtree(at / "2"), (at / "2").mkdir()), NO_MANIFEST),
    "manifest deleted": (lambda at: (at / "2.json").unlink(), NO_MANIFEST),
    "manifest emptied": (lambda at: os.truncate(at / "2.json", 0), NO_JSON),
    "manifest truncated": (lambda at: os.truncate(at / "2.json", 200), NO_JSON),
    "manifest of bytes": (lambda at: (at / "2.json").write_bytes(b"\xff\x00"), NO_JSON),
    "manifest of another kind": (lambda at: (at / "2.json").write_text("[1]"), "not a manifest of bnn_jax"),
    "manifest of another step": (
        lambda at: shutil.copy(at / "1.json", at / "2.json"),
        "its manifest is that of step 1",
    ),
    "manifest alone": (lambda at: (at / "2.json").write_text('{"format": "bnn_jax checkpoint"}'), WRONG_MANIFEST),
    "manifest is a folder": (lambda at: ((at / "2.json").unlink(), (at / "2.json").mkdir()), NOT_READ),
    "metadata tampered with": (lambda at: edit(at / "2.json", metadata={"saved_at": 99}), WRONG_MANIFEST),
    "version garbled": (lambda at: edit(at / "2.json", format_version=3), WRONG_MANIFEST),
    "other version": (lambda at: edit(at / "2.json", hashed=True, format_version=1), OTHER_VERSION),
    "save interrupted": (interrupt, "its save was not finished"),
}
UNREADABLE = ("other version", "manifest is a folder")
"""What says nothing about the data, which are then left where they are."""


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_passed_over_quarantined_and_replaced(pair, tmp_path, name, capfd):
    damage, reason = DAMAGES[name]
    damage(pair)
    with pytest.warns(CheckpointWarning, match=reason) as caught:
        restored = restore_checkpoint(pair, state_of(0))
    ((text, place),) = [(str(warning.message), warning.filename) for warning in caught]
    assert (text.startswith(f"skipped checkpoint `{pair}/2`: "), "\n" in text, place) == (True, False, __file__)
    assert (restored.step, restored.metadata) == (1, {"saved_at": 1})
    assert bits_of(restored.state) == bits_of(state_of(1))
    assert capfd.readouterr().err == ""
    if name in UNREADABLE:
        return

    # A damaged step can be saved again.
    copy = Path(shutil.copytree(pair, tmp_path / "copy"))
    save_checkpoint(copy, 2, state_of(3), metadata={"saved_at": 3})
    restored = restore_checkpoint(copy, state_of(0))
    assert (restored.step, restored.metadata) == (2, {"saved_at": 3})
    assert bits_of(restored.state) == bits_of(state_of(3))
    assert sorted(os.listdir(copy)) == ["1", "1.json", "2", "2.json"]
    (pair / "1.json").write_text("{")
    if name == "save interrupted":  # which was no checkpoint yet
        (pair / "1.json").unlink()
        shutil.rmtree(pair / "1")
        with pytest.warns(CheckpointWarning, match=reason):
            assert restore_checkpoint(pair, state_of(0)) is None
        return

    # A run that has nothing left begins again, and can save at every step; the damaged checkpoints are kept.
    left = {f"quarantine-1/{path.relative_to(pair)}" for path in pair.rglob("*")}
    with pytest.warns(CheckpointWarning) as caught:
        assert restore_checkpoint(pair, state_of(0), quarantine=True) is None
    texts = [str(warning.message) for warning in caught]
    assert [text.split("`: ")[0] for text in texts[:2]] == [f"skipped checkpoint `{pair}/{step}" for step in (2, 1)]
    assert texts[2:] == [f"moved what there was of step 2, 1 to `{pair}/quarantine-1`"]
    assert {warning.filename for warning in caught} == {__file__}
    assert {str(path.relative_to(pair)) for path in pair.rglob("*")} == left | {"quarantine-1"}
    save_checkpoint(pair, 1, state_of(6))
    assert bits_of(restore_checkpoint(pair, state_of(0), quarantine=True).state) == bits_of(state_of(6))


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_only_cannot_be_read_is_neither_quarantined_nor_forgotten_nor_replaced(pair, name):
    DAMAGES[name][0](pair)
    with pytest.warns(CheckpointWarning, match=DAMAGES[name][1]):
        assert restore_checkpoint(pair, state_of(0), quarantine=True).step == 1
    with pytest.raises(UsageError, match=rf"/2` cannot be replaced: {DAMAGES[name][1]}.*; give another folder$"):
        save_checkpoint(pair, 2, state_of(2))
    (pair / "1.json").write_text("{")
    before = contents(pair)
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(RunError, match=rf"none of the 2 checkpoints .* \(step 2: .*{DAMAGES[name][1]}; step 1: its"),
    ):
        restore_checkpoint(pair, state_of(0), quarantine=True)
    assert contents(pair) == before


def restore_quietly(folder: Path, like: Any) -> tuple[Any, int]:
    with warnings.catch_warnings(record=True, action="always") as caught:
        restored = restore_checkpoint(folder, like)
    assert all(warning.category is CheckpointWarning for warning in caught)
    return restored, len(caught)


def test_flipped_bits_are_detected_or_harmless(pair, capfd):
    for path in [pair / "2.json", *data_files(pair, 2)]:
        size = path.stat().st_size * 8
        for bit in range(3, size, max(size // 9, 1)):
            flip(path, bit)
            restored, warned = restore_quietly(pair, state_of(0))
            flip(path, bit)
            assert (restored.step, warned) in {(2, 0), (1, 1)}
            assert restored.metadata == {"saved_at": restored.step}
            assert bits_of(restored.state) == bits_of(state_of(restored.step))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("folder", ["missing", "empty", "unrelated"])
def test_none_where_there_is_no_checkpoint(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    for name in ("tmp", "abc", "01", "-1", "2.5", "١"):
        (tmp_path / "unrelated" / name).mkdir(parents=True)
    (tmp_path / "unrelated" / "config.json").write_text("{}")
    assert restore_checkpoint(tmp_path / folder, state_of(0)) is None
    assert checkpoint_steps(tmp_path / folder) == []


def test_run_error_when_none_verifies(pair):
    kernel_file(pair).unlink()
    (pair / "1.json").write_text("{")
    expected = (
        rf"none of the 2 checkpoints in `{pair}` can be restored \(step 2: `kernel` cannot be read .*; "
        r"step 1: its manifest is not JSON\); put one back from a backup, or give another folder to start afresh$"
    )
    with pytest.warns(CheckpointWarning) as caught, pytest.raises(RunError, match=expected):
        restore_checkpoint(pair, state_of(0))
    assert len(caught) == 2


def test_rejected_checkpoints_and_damaged_ones_newer_than_the_one_restored_are_quarantined(pair):
    save_checkpoint(pair, 3, {"another": np.ones(3, np.float32)}, metadata={"saved_at": "elsewhere"}, keep=3)
    why = lambda metadata: "it is theirs" if metadata["saved_at"] == "elsewhere" else None
    with pytest.warns(CheckpointWarning, match=rf"skipped checkpoint `{pair}/3`: it is theirs$") as caught:
        assert restore_checkpoint(pair, state_of(0), why_rejected=why).step == 2
    assert len(caught) == 1
    (pair / "1.json").write_text("{")
    (pair / "quarantine-1").mkdir()
    with pytest.warns(CheckpointWarning) as caught:
        assert restore_checkpoint(pair, state_of(0), why_rejected=why, quarantine=True).step == 2
    assert str(caught[-1].message) == f"moved what there was of step 3 to `{pair}/quarantine-2`"
    assert restore_checkpoint(pair, state_of(0), why_rejected=why).step == 2
    assert sorted(os.listdir(pair)) == ["1", "1.json", "2", "2.json", "quarantine-1", "quarantine-2"]
    assert sorted(os.listdir(pair / "quarantine-2")) == ["3", "3.json"]


def test_only_the_step_asked_for_is_tried_and_metadata_need_no_model(pair):
    restored = restore_checkpoint(pair, state_of(0), step=1)
    assert (restored.step, restored.metadata) == (1, {"saved_at": 1})
    with pytest.raises(UsageError, match=rf"`step` \(=7\) is not in `{pair}`; the steps there are 1, 2$"):
        restore_checkpoint(pair, state_of(0), step=7)
    with pytest.raises(UsageError, match=r"`step` \(=7\) is not in `.*`; it holds no checkpoint$"):
        restore_checkpoint(pair / "none", state_of(0), step=7)
    flip_kernel_bit(pair)
    assert checkpoint_steps(pair) == [1, 2]
    assert read_metadata(pair, 2) == {"saved_at": 2}
    for action in (lambda: verify_checkpoint(pair, 2), lambda: restore_checkpoint(pair, state_of(0), step=2)):
        with pytest.raises(RunError, match=r"`.*/2` does not verify: `kernel` does not match its hash; try step 1$"):
            action()
    edit(pair / "2.json", metadata={})
    assert checkpoint_steps(pair) == [1]
    with pytest.raises(RunError, match=r"/2` does not verify: its manifest does not match its own hash; try step 1$"):
        read_metadata(pair, 2)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keeps_the_newest(tmp_path, keep):
    for step in (0, 10, 20, 30):
        save_checkpoint(tmp_path, step, state_of(step), keep=keep)
    assert checkpoint_steps(tmp_path) == [0, 10, 20, 30][-keep:]
    assert len(os.listdir(tmp_path)) == 2 * keep
    save_checkpoint(tmp_path, 5, state_of(0), keep=1)  # later steps are left alone
    assert checkpoint_steps(tmp_path)[-keep:] == [0, 10, 20, 30][-keep:]


def test_a_damaged_checkpoint_does_not_count_as_kept(pair):
    os.truncate(kernel_file(pair), 0)
    save_checkpoint(pair, 3, state_of(3), keep=2)
    verify_checkpoint(pair, 1)
    save_checkpoint(pair, 4, state_of(4), keep=2)
    assert checkpoint_steps(pair) == [3, 4]


def contents(folder: Path) -> dict[str, Any]:
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_saving_the_same_again_writes_nothing_but_new_metadata(pair):
    before = contents(pair)
    save_checkpoint(pair, 2, state_of(2), metadata={"saved_at": 2})
    with pytest.raises(UsageError, match=rf"`{pair}/2` holds another state of that step; give another folder"):
        save_checkpoint(pair, 2, state_of(3))
    assert contents(pair) == before
    save_checkpoint(pair, 2, state_of(2), metadata={"loss": float("nan"), 3: (1, 2)})
    assert {path for path, file in contents(pair).items() if file != before[path]} == {str(pair / "2.json")}
    assert repr(read_metadata(pair, 2)) == "{'loss': nan, '3': [1, 2]}"
    verify_checkpoint(pair, 2)


def test_what_is_not_ours_is_never_deleted_and_leftovers_are(pair):
    edit(pair / "2.json", hashed=True, format_version=1)
    (pair / "5").mkdir()
    (pair / "5" / "photo.jpg").write_text("mine")
    with pytest.raises(UsageError, match=r"`.*/5` is in the way and no checkpoint; give another folder$"):
        save_checkpoint(pair, 5, state_of(5))
    (pair / "abc").mkdir()
    (pair / "tmp").write_text("notes")
    shutil.copytree(pair / "1", pair / "8")
    (pair / "8.json.tmp").write_text("{")
    shutil.copytree(pair / "1", pair / "9.orbax-checkpoint-tmp")
    (pair / "2.json.tmp").write_text("{")
    for step in (6, 7):
        save_checkpoint(pair, step, state_of(step), keep=1)
    assert restore_checkpoint(pair, state_of(0)).step == 7
    assert sorted(os.listdir(pair)) == ["2", "2.json", "5", "7", "7.json", "abc", "tmp"]


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    actions = (lambda folder: save_checkpoint(folder, 1, state_of(1)), lambda folder: restore_checkpoint(folder, {}))
    for folder, action in itertools.product((tmp_path / "file", tmp_path / "file" / "below"), actions):
        with pytest.raises(UsageError, match=rf"`folder` \(={folder}\) is a file or lies below one; give the path of"):
            action(folder)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["write_synced", "save_tree", "sync_tree", "replace_synced"])
def test_whatever_fails_a_save_leaves_the_others(pair, monkeypatch, place, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(checkpoint, place, fail)
    before = contents(pair)
    expected = (
        rf"saving checkpoint `{pair}/3` failed: Input/output error; the last good checkpoint \(step 2\) is kept; "
    )
    raised, told = (RunError, expected) if isinstance(error, OSError) else (KeyboardInterrupt, None)
    with pytest.raises(raised, match=told):
        save_checkpoint(pair, 3, state_of(3))
    assert before.keys() == contents(pair).keys()
    assert checkpoint_steps(pair) == [1, 2]


def test_an_interrupt_after_the_commit_keeps_the_checkpoint(pair, monkeypatch):
    def replace_then_stop(source, target):
        os.replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "replace_synced", replace_then_stop)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(pair, 3, state_of(3))
    assert bits_of(restore_checkpoint(pair, state_of(0)).state) == bits_of(state_of(3))


def test_what_does_not_read_back_is_no_checkpoint(tmp_path, monkeypatch):
    save = lambda path, tree: orbax_store.save_tree(path, tree | {"kernel": -tree["kernel"]})
    monkeypatch.setattr(checkpoint, "save_tree", save)
    expected = (
        "failed: what was written does not read back, `kernel` .* its hash; there is no good checkpoint yet; make"
    )
    with pytest.raises(RunError, match=expected):
        save_checkpoint(tmp_path, 1, state_of(1))
    assert os.listdir(tmp_path) == []


DISK_FULL = """
import json, resource, sys
import numpy as np
from bnn_jax.errors import RunError
from bnn_jax.training.checkpoint import checkpoint_steps, save_checkpoint

folder, texts = sys.argv[1], []
rng = np.random.default_rng(0)
# The leaves may be written to several files; the last is beyond each limit on its own.
large = {str(n): rng.normal(size=20_000 if n < 19 else 250_000).astype(np.float32) for n in range(20)}
for limit, step in [(100_000, 0), (-1, 1), (100_000, 2), (20, 2), (250, 2), (5_000, 2), (800_000, 2)]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
    try:
        save_checkpoint(folder, step, large)
    except RunError as error:
        texts.append(str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
steps = checkpoint_steps(folder)
save_checkpoint(folder, 2, large)
print(json.dumps([texts, steps, checkpoint_steps(folder)]))
"""


@pytest.mark.full
def test_disk_full_is_told_in_one_sentence_and_costs_nothing(tmp_path, subprocess_env):
    folder = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", DISK_FULL, folder], capture_output=True, text=True, env=subprocess_env)
    assert (done.returncode, done.stderr) == (0, "")
    texts, steps, steps_after = json.loads(done.stdout)
    way_out = "make room or make the folder writable, then run again to go on from there"
    told = lambda step, kept: f"saving checkpoint `{folder}/{step}` failed: File too large; {kept}; {way_out}"
    last = "the last good checkpoint (step 1) is kept"
    assert texts == [told(0, "there is no good checkpoint yet")] + [told(2, last)] * 5
    assert (steps, steps_after) == ([1], [1, 2])
    assert sorted(os.listdir(folder)) == ["1", "1.json", "2", "2.json"]


def test_what_fails_after_the_save_has_failed_is_not_logged(capfd, caplog):
    async def fail():
        raise OSError("File too large")

    async def save():
        lost = asyncio.ensure_future(fail())
        await asyncio.sleep(0.01)
        assert lost.done()

    loop = orbax_store._PatientLoop()
    loop.run_until_complete(save())
    loop.close()
    gc.collect()
    assert (capfd.readouterr().err, caplog.records) == ("", [])


@pytest.fixture
def unprivileged(pair):
    """The pair in a folder that everybody can reach, and a user for whom modes count, if the tests run as root."""
    folder = Path(tempfile.mkdtemp(prefix="checkpoints"))
    shutil.copytree(pair, folder, dirs_exist_ok=True)
    user = os.geteuid()

    def become(mode: int, path: Path) -> None:
        path.chmod(mode)
        folder.chmod(0o555)
        if user == 0:
            os.seteuid(65534)

    yield folder, become
    os.seteuid(user)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_no_permission_to_save_or_to_quarantine(unprivileged):
    folder, become = unprivileged
    (folder / "1.json").write_text("{")
    become(0o555, folder)
    expected = rf"saving checkpoint `{folder}/3` failed: Permission denied; the last good checkpoint \(step 2\) is kept"
    with pytest.raises(RunError, match=expected):
        save_checkpoint(folder, 3, state_of(3))
    assert restore_checkpoint(folder, state_of(0)).step == 2
    expected = rf"cannot move checkpoints to `{folder}/quarantine-1` \(Permission denied\); make the folder writable"
    with pytest.warns(CheckpointWarning), pytest.raises(RunError, match=expected):
        restore_checkpoint(folder, state_of(0), why_rejected=lambda metadata: "it is theirs", quarantine=True)


@pytest.mark.parametrize("part", ["its manifest", "`kernel`"])
def test_no_permission_to_read_is_no_reason_to_replace(unprivileged, part):
    folder, become = unprivileged
    become(0o000, folder / "2.json" if part == "its manifest" else kernel_file(folder))
    with pytest.warns(CheckpointWarning, match=rf"{part} cannot be read \(Permission denied\)$"):
        assert restore_checkpoint(folder, state_of(0)).step == 1
    with pytest.raises(UsageError, match=rf"/2` cannot be replaced: {part} cannot be read \(Permission denied\); "):
        save_checkpoint(folder, 2, state_of(2))


SAVE_FOR_EVER = """
import itertools, sys
import numpy as np
from bnn_jax.training.checkpoint import save_checkpoint

for step in itertools.count(1):
    state = {str(n): np.random.default_rng([step, n]).integers(0, 2**32, 5_000, dtype=np.uint32) for n in range(4)}
    save_checkpoint(sys.argv[1], step, state)
    print(step, flush=True)
"""


def test_a_kill_loses_nothing_that_was_saved(tmp_path, subprocess_env):
    commands = [[sys.executable, "-c", SAVE_FOR_EVER, tmp_path / str(index)] for index in range(3)]
    pipe = {"stdout": subprocess.PIPE, "text": True, "env": subprocess_env}
    savers = [subprocess.Popen(command, **pipe) for command in commands]
    delays = np.random.default_rng(time.time_ns()).uniform(0.0, 0.3, len(savers))
    for command, saver, delay in zip(commands, savers, delays):
        assert saver.stdout.readline() == "1\n"
        time.sleep(delay)
        saver.send_signal(signal.SIGKILL)
        acknowledged = [1, *map(int, saver.communicate()[0].split())]
        (state, step, _), _ = restore_quietly(command[-1], {str(n): np.zeros(5_000, np.uint32) for n in range(4)})
        assert step in (acknowledged[-1], acknowledged[-1] + 1)
        for n in range(4):
            bits = np.random.default_rng([step, n])
            np.testing.assert_array_equal(state[str(n)], bits.integers(0, 2**32, 5_000, dtype=np.uint32))


@pytest.mark.parametrize("name", ["in/../saved", "./saved", "a b", "100%", "x#y?z", "ü"])
def test_any_path_that_the_file_system_takes(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    save_checkpoint(name, 1, state_of(1))
    assert bits_of(restore_checkpoint(name, state_of(0)).state) == bits_of(state_of(1))


@pytest.mark.parametrize("name", ["lr=[0.1]", "a\\b"])
def test_a_path_that_orbax_would_not_find_again_is_refused_before_training(tmp_path, name):
    part = r"\[0.1\]" if "[" in name else r"\\"
    with pytest.raises(UsageError, match=rf"`folder` \(=.*\) lies at a path with .*{part}.*; choose a path without"):
        save_checkpoint(tmp_path / name, 1, state_of(1))
    with pytest.raises(UsageError, match=r"`workdir` \(=.*\) lies at a path with"), locked(tmp_path / name):
        pytest.fail("was taken")
    assert not any(tmp_path.iterdir())

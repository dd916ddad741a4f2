import asyncio
import errno
import hashlib
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
from typing import Any, NamedTuple

import flax.struct
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnn_jax import files
from bnn_jax.errors import RunError, UsageError
from bnn_jax.training import checkpoint
from bnn_jax.training.checkpoint import (
    CheckpointWarning,
    checkpoint_steps,
    read_metadata,
    restore_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)


class Moments(NamedTuple):
    mean: Any
    square: Any


class Train(flax.struct.PyTreeNode):
    step: Any
    params: Any
    optimizer: Any


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from `step`."""
    bits = np.random.default_rng(step)
    return {
        "kernel": jnp.asarray(bits.normal(size=(30, 50)).astype(np.float32)),
        "mask": np.array([True, False, step % 2 == 0]),
        "step": jnp.int32(step),
    }


def bits_of(tree: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    return [(np.asarray(x).dtype.name, np.shape(x), np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def saved_pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    for step in (1, 2):
        save_checkpoint(folder, step, state_of(step), metadata={"saved_at": step})
    return folder


@pytest.fixture
def pair(saved_pair, tmp_path) -> Path:
    """A folder of its own with good checkpoints 1 and 2."""
    return Path(shutil.copytree(saved_pair, tmp_path / "pair"))


# ------------------------------------------------------------------------------------------------------- bit for bit

DTYPES = ["bool", "int8", "uint8", "int32", "uint32", "float16", "bfloat16", "float32", "complex64", "float8_e4m3fn"]


@st.composite
def raw_arrays(draw):
    """Arrays of any bits: NaN payloads, -0.0, subnormals, empty axes, scalars, Fortran order."""
    dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = int(np.prod(shape))
    raw = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
    if dtype.name == "bool":
        raw = bytes(byte & 1 for byte in raw)
    array = np.frombuffer(raw, dtype).reshape(shape)
    return np.asfortranarray(array) if draw(st.booleans()) else array


TREES = st.recursive(
    raw_arrays() | st.none() | st.just({}),
    lambda tree: (
        st.lists(tree, max_size=3)
        | st.dictionaries(st.text(max_size=3), tree, max_size=3)
        | st.builds(Moments, tree, tree)
        | st.tuples(tree)
    ),
    max_leaves=6,
)


@hypothesis.given(tree=TREES)
@hypothesis.settings(max_examples=25, deadline=None)
def test_any_tree_comes_back_bit_for_bit(tree):
    tree = {"tree": tree, "one": np.ones(1, np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(folder, 3, tree)
        restored = restore_checkpoint(folder, tree)
    assert jax.tree.structure(restored.state) == jax.tree.structure(tree)
    assert bits_of(restored.state) == bits_of(tree)
    assert all(isinstance(leaf, jax.Array) and not leaf.weak_type for leaf in jax.tree.leaves(restored.state))


def test_nan_payloads_and_signed_zeros_survive(tmp_path):
    words = np.array([0x7F800001, 0xFFC12345, 0x80000000, 0x00000001], np.uint32)
    state = {"float32": words.view(np.float32), "minus": np.full(3, -0.0, np.float16), "zero": np.zeros(4, np.float32)}
    save_checkpoint(tmp_path, 0, state)
    state = restore_checkpoint(tmp_path, state).state
    np.testing.assert_array_equal(np.asarray(state["float32"]).view(np.uint32), words)
    np.testing.assert_array_equal(np.asarray(state["minus"]).view(np.uint16), 0x8000)


def test_memory_order_does_not_matter(tmp_path):
    rows = np.arange(24, dtype=np.int32).reshape(4, 6)
    state = {"fortran": np.asfortranarray(rows), "every other": rows[:, ::2], "backwards": rows[::-1]}
    save_checkpoint(tmp_path, 1, state)
    restored = restore_checkpoint(tmp_path, state).state
    np.testing.assert_array_equal(restored["fortran"], rows)
    np.testing.assert_array_equal(restored["every other"], rows[:, [0, 2, 4]])
    np.testing.assert_array_equal(restored["backwards"], rows[[3, 2, 1, 0]])


def train_state(width: int) -> Train:
    params = {
        "conv": {"kernel": jnp.ones((3, 3, width)), "none": None, "empty": {}},
        "scale": jnp.ones((), jnp.bfloat16),
    }
    optimizer = optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9))
    return Train(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def test_restored_state_neither_recompiles_nor_refuses_donation(tmp_path):
    fresh = train_state(4)
    double = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 2, state), donate_argnums=0)
    save_checkpoint(tmp_path, 1, fresh)
    expected = bits_of(double(train_state(4)))
    restored = restore_checkpoint(tmp_path, jax.eval_shape(lambda: fresh))
    assert jax.tree.structure(restored.state) == jax.tree.structure(fresh)
    assert bits_of(double(restored.state)) == expected
    assert double._cache_size() == 1


def test_format_can_be_read_without_this_package(tmp_path):
    first, second = np.array([1.5, -0.0], np.float32), np.array([[7], [9]], np.uint8)
    path = save_checkpoint(tmp_path, 20, {"a": first, "b": [second]}, metadata={"lr": 0.1})
    assert path == tmp_path / "20"
    manifest = json.loads((tmp_path / "20.json").read_text())
    assert (manifest["format"], manifest["format_version"], manifest["step"]) == ("bnn_jax checkpoint", 1, 20)
    assert manifest["metadata"] == {"lr": 0.1}
    assert manifest["leaves"] == [
        {"path": "state['a']", "dtype": "float32", "shape": [2], "sha256": sha256(b"float32 [2]\n", first)},
        {"path": "state['b'][0]", "dtype": "uint8", "shape": [2, 1], "sha256": sha256(b"uint8 [2, 1]\n", second)},
    ]
    assert manifest["sha256"] == own_hash(manifest)
    with files._quiet() as orbax:
        assert orbax.load(path)["bytes"].tobytes() == first.tobytes() + second.tobytes()


def sha256(head: bytes, array: np.ndarray) -> str:
    return hashlib.sha256(head + array.tobytes()).hexdigest()


def own_hash(manifest: dict) -> str:
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def test_works_where_an_event_loop_runs(tmp_path):
    async def cell():
        save_checkpoint(tmp_path, 1, state_of(1))
        return restore_checkpoint(tmp_path, state_of(0))

    assert bits_of(asyncio.run(cell()).state) == bits_of(state_of(1))


# ------------------------------------------------------------------------------------------------------------ damage


def data_files(folder: Path, step: int) -> list[Path]:
    return sorted(path for path in (folder / str(step)).rglob("*") if path.is_file())


def largest_file(folder: Path) -> Path:
    return max(data_files(folder, 2), key=lambda path: path.stat().st_size)


def rewrite_manifest(folder: Path, *, rehash: bool, **changes: Any) -> None:
    path = folder / "2.json"
    manifest = json.loads(path.read_text()) | changes
    if rehash:
        manifest["sha256"] = own_hash(manifest)
    path.write_text(json.dumps(manifest))


def make_empty_folder(folder: Path) -> None:
    (folder / "2.json").unlink()
    shutil.rmtree(folder / "2")
    (folder / "2").mkdir()


def interrupt(folder: Path) -> None:
    os.rename(folder / "2.json", folder / "2.json.tmp")
    largest_file(folder).unlink()


DAMAGES = {
    "data truncated": (lambda folder: os.truncate(largest_file(folder), 100), "its data cannot be read"),
    "data emptied": (lambda folder: os.truncate(largest_file(folder), 0), "its data cannot be read"),
    "data file deleted": (lambda folder: largest_file(folder).unlink(), "its data cannot be read"),
    "data folder deleted": (lambda folder: shutil.rmtree(folder / "2"), "its data folder is missing"),
    "data folder of another step": (
        lambda folder: (shutil.rmtree(folder / "2"), shutil.copytree(folder / "1", folder / "2")),
        r"state\['kernel'\] does not match its hash",
    ),
    "empty numeric folder": (make_empty_folder, "it has no manifest `2.json`"),
    "manifest deleted": (lambda folder: (folder / "2.json").unlink(), "it has no manifest `2.json`"),
    "manifest emptied": (lambda folder: os.truncate(folder / "2.json", 0), "its manifest is not JSON"),
    "manifest truncated": (lambda folder: os.truncate(folder / "2.json", 200), "its manifest is not JSON"),
    "manifest of bytes": (lambda folder: (folder / "2.json").write_bytes(b"\xff\x00"), "its manifest is not JSON"),
    "manifest of another kind": (lambda folder: (folder / "2.json").write_text("[1]"), "not a manifest of bnn_jax"),
    "manifest of another step": (
        lambda folder: shutil.copy(folder / "1.json", folder / "2.json"),
        "its manifest is that of step 1",
    ),
    "manifest without hash": (
        lambda folder: (folder / "2.json").write_text('{"format": "bnn_jax checkpoint"}'),
        "does not match its own hash",
    ),
    "manifest is a folder": (
        lambda folder: ((folder / "2.json").unlink(), (folder / "2.json").mkdir()),
        r"its manifest cannot be read \(Is a directory\)",
    ),
    "metadata tampered with": (
        lambda folder: rewrite_manifest(folder, rehash=False, metadata={"saved_at": 99}),
        "does not match its own hash",
    ),
    "version garbled": (
        lambda folder: rewrite_manifest(folder, rehash=False, format_version=3),
        "does not match its own hash",
    ),
    "other version": (
        lambda folder: rewrite_manifest(folder, rehash=True, format_version=2),
        "it has format version 2, this bnn_jax reads 1",
    ),
    "save interrupted": (interrupt, "its save was not finished"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint_is_passed_over_with_one_warning(pair, name):
    damage, reason = DAMAGES[name]
    damage(pair)
    with pytest.warns(CheckpointWarning, match=reason) as caught:
        restored = restore_checkpoint(pair, state_of(0))
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"skipped checkpoint `{pair / '2'}`: ")
    assert "\n" not in str(caught[0].message)
    assert caught[0].filename == __file__
    assert (restored.step, restored.metadata) == (1, {"saved_at": 1})
    assert bits_of(restored.state) == bits_of(state_of(1))


def restore_quietly(folder: Path) -> tuple[Any, int]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        restored = restore_checkpoint(folder, state_of(0))
    assert all(warning.category is CheckpointWarning for warning in caught)
    return restored, len(caught)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_flipped_bits_are_detected_or_harmless(pair):
    for path in [pair / "2.json", *data_files(pair, 2)]:
        size = path.stat().st_size * 8
        for bit in range(3, size, max(size // 5, 1)):
            flip(path, bit)
            restored, warned = restore_quietly(pair)
            flip(path, bit)
            assert (restored.step, warned) in {(2, 0), (1, 1)}
            assert restored.metadata == {"saved_at": restored.step}
            assert bits_of(restored.state) == bits_of(state_of(restored.step))


def test_flipped_bits_of_a_leaf_are_detected(pair):
    kernel = np.asarray(state_of(2)["kernel"]).tobytes()
    (path,) = [path for path in data_files(pair, 2) if kernel in path.read_bytes()]
    start = path.read_bytes().index(kernel) * 8
    for bit in range(start, start + 8 * len(kernel), 801):
        flip(path, bit)
        with pytest.raises(RunError, match=r"state\['kernel'\] does not match its hash; try step 1"):
            verify_checkpoint(pair, 2)
        flip(path, bit)
    verify_checkpoint(pair, 2)


@pytest.mark.parametrize("folder", ["missing", "empty", "unrelated"])
def test_none_where_there_is_no_checkpoint(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    for name in ("tmp", "abc", "01", "-1", "2.5", "١"):
        (tmp_path / "unrelated" / name).mkdir(parents=True)
    (tmp_path / "unrelated" / "config.json").write_text("{}")
    assert restore_checkpoint(tmp_path / folder, state_of(0)) is None
    assert checkpoint_steps(tmp_path / folder) == []


def test_unrelated_names_change_nothing(pair):
    (pair / "abc").mkdir()
    (pair / "tmp").write_text("notes")
    save_checkpoint(pair, 3, state_of(3))
    assert restore_checkpoint(pair, state_of(0)).step == 3
    assert sorted(os.listdir(pair)) == ["2", "2.json", "3", "3.json", "abc", "tmp"]


def test_an_interrupted_first_save_is_no_checkpoint(pair):
    shutil.rmtree(pair / "1")
    (pair / "1.json").unlink()
    interrupt(pair)
    with pytest.warns(CheckpointWarning, match=r"/2`: its save was not finished"):
        assert restore_checkpoint(pair, state_of(0)) is None


def test_run_error_when_none_verifies(pair):
    largest_file(pair).unlink()
    (pair / "1.json").write_text("{")
    expected = (
        rf"none of the 2 checkpoints in `{pair}` can be restored \(step 2: its data cannot be read .*; "
        r"step 1: its manifest is not JSON\); put one back from a backup, or give another folder to start afresh$"
    )
    with pytest.warns(CheckpointWarning) as caught, pytest.raises(RunError, match=expected):
        restore_checkpoint(pair, state_of(0))
    assert len(caught) == 2


@pytest.mark.parametrize("name", sorted(set(DAMAGES) - {"other version", "manifest is a folder", "save interrupted"}))
def test_what_is_damaged_is_quarantine(pair, name):
    """A run that has nothing left begins again, and can save at every step; the damaged checkpoints are kept."""
    DAMAGES[name][0](pair)
    (pair / "1.json").write_text("{")
    left = {f"quarantine-1/{path.relative_to(pair)}" for path in pair.rglob("*")}
    with pytest.warns(CheckpointWarning) as caught:
        assert restore_checkpoint(pair, state_of(0), quarantine=True) is None
    texts = [str(warning.message) for warning in caught]
    assert [text.split("`: ")[0] for text in texts[:2]] == [f"skipped checkpoint `{pair}/{step}" for step in (2, 1)]
    assert texts[2:] == [f"moved what there was of step 2, 1 to `{pair}/quarantine-1`"]
    assert {warning.filename for warning in caught} == {__file__}
    assert {str(path.relative_to(pair)) for path in pair.rglob("*")} == left | {"quarantine-1"}
    for step in (1, 2):
        save_checkpoint(pair, step, state_of(step + 5))
    assert bits_of(restore_checkpoint(pair, state_of(0), quarantine=True).state) == bits_of(state_of(7))


def test_only_what_is_newer_than_the_one_restored_is_quarantine(pair):
    save_checkpoint(pair, 3, state_of(3), keep=3)
    for manifest in ("1.json", "3.json"):
        (pair / manifest).write_text("{")
    (pair / "quarantine-1").mkdir()
    with pytest.warns(CheckpointWarning) as caught:
        assert restore_checkpoint(pair, state_of(0), quarantine=True).step == 2
    assert str(caught[-1].message) == f"moved what there was of step 3 to `{pair}/quarantine-2`"
    assert sorted(os.listdir(pair)) == ["1", "1.json", "2", "2.json", "quarantine-1", "quarantine-2"]


@pytest.mark.parametrize("name", ["other version", "manifest is a folder"])
def test_what_only_cannot_be_read_is_neither_quarantined_nor_forgotten(pair, name):
    DAMAGES[name][0](pair)
    with pytest.warns(CheckpointWarning, match=DAMAGES[name][1]):
        assert restore_checkpoint(pair, state_of(0), quarantine=True).step == 1
    (pair / "1.json").write_text("{")
    before = contents(pair)
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(RunError, match=rf"none of the 2 checkpoints .* \(step 2: .*{DAMAGES[name][1]}; step 1: its"),
    ):
        restore_checkpoint(pair, state_of(0), quarantine=True)
    assert contents(pair) == before


def test_rejected_checkpoints_are_passed_over(pair):
    save_checkpoint(pair, 3, {"another": np.ones(3, np.float32)}, metadata={"saved_at": "elsewhere"}, keep=3)
    why = lambda metadata: "it is theirs" if metadata["saved_at"] == "elsewhere" else None
    with pytest.warns(CheckpointWarning, match=rf"skipped checkpoint `{pair}/3`: it is theirs$") as caught:
        assert restore_checkpoint(pair, state_of(0), why_rejected=why).step == 2
    assert len(caught) == 1
    with pytest.warns(CheckpointWarning) as caught:
        assert restore_checkpoint(pair, state_of(0), why_rejected=why, quarantine=True).step == 2
    assert len(caught) == 2
    assert restore_checkpoint(pair, state_of(0), why_rejected=why).step == 2
    assert sorted(os.listdir(pair / "quarantine-1")) == ["3", "3.json"]


def test_a_folder_in_which_nothing_can_be_moved(unprivileged):
    folder, become = unprivileged
    for step in (1, 2):
        (folder / f"{step}.json").write_text("{")
    become(0o755, folder)
    expected = rf"cannot move checkpoints to `{folder}/quarantine-1` \(Permission denied\); make the folder writable"
    with pytest.warns(CheckpointWarning), pytest.raises(RunError, match=expected):
        restore_checkpoint(folder, state_of(0), quarantine=True)


def test_only_the_step_asked_for_is_tried(pair):
    restored = restore_checkpoint(pair, state_of(0), step=1)
    assert (restored.step, restored.metadata) == (1, {"saved_at": 1})
    with pytest.raises(UsageError, match=rf"`step` \(=7\) is not in `{pair}`; the steps there are 1, 2$"):
        restore_checkpoint(pair, state_of(0), step=7)
    with pytest.raises(UsageError, match=r"`step` \(=7\) is not in `.*`; it holds no checkpoint$"):
        restore_checkpoint(pair / "none", state_of(0), step=7)
    os.truncate(largest_file(pair), 0)
    with pytest.raises(RunError, match=r"checkpoint `.*/2` does not verify: its data cannot be read .*; try step 1$"):
        restore_checkpoint(pair, state_of(0), step=2)


def test_steps_and_metadata_need_no_model(pair):
    assert checkpoint_steps(pair) == [1, 2]
    assert read_metadata(pair, 2) == {"saved_at": 2}
    rewrite_manifest(pair, rehash=False, metadata={})
    assert checkpoint_steps(pair) == [1]
    with pytest.raises(RunError, match=r"/2` does not verify: its manifest does not match its own hash; try step 1$"):
        read_metadata(pair, 2)
    with pytest.raises(UsageError, match=r"`step` \(=3\) is not in"):
        read_metadata(pair, 3)


MISMATCHES = {
    "shape": (
        state_of(0) | {"kernel": jnp.zeros((30, 4))},
        r"float32\[30, 4\] at state\['kernel'\].*float32\[30, 50\]",
    ),
    "dtype": (state_of(0) | {"step": jnp.zeros(())}, r"float32\[\] at state\['step'\].*has int32\[\]"),
    "new leaf": (state_of(0) | {"scale": jnp.ones(2)}, r"has float32\[2\] at state\['scale'\].*has nothing"),
    "leaf gone": (
        {"kernel": jnp.zeros((30, 50))},
        r"has nothing at state\['mask'\], the checkpoint `.*/2` has bool\[3\]",
    ),
    "structure": ([state_of(0)], r"has float32\[30, 50\] at state\[0\]\['kernel'\].*has nothing"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_another_model_is_a_usage_error(pair, name):
    like, expected = MISMATCHES[name]
    with pytest.raises(UsageError, match=f"^`like` has .*{expected.removeprefix('has ')}.*give another folder") as info:
        restore_checkpoint(pair, like)
    assert str(pair / "2") in str(info.value)


# ------------------------------------------------------------------------------------------------ saving and deleting


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keeps_the_newest(tmp_path, keep):
    for step in (0, 10, 20, 30):
        save_checkpoint(tmp_path, step, state_of(step), keep=keep)
    assert checkpoint_steps(tmp_path) == [0, 10, 20, 30][-keep:]
    assert len(os.listdir(tmp_path)) == 2 * keep


def test_a_damaged_checkpoint_does_not_count_as_kept(pair):
    os.truncate(largest_file(pair), 0)
    save_checkpoint(pair, 3, state_of(3), keep=2)
    verify_checkpoint(pair, 1)
    save_checkpoint(pair, 4, state_of(4), keep=2)
    assert checkpoint_steps(pair) == [3, 4]


def test_later_steps_are_left_alone(pair):
    save_checkpoint(pair, 0, state_of(0), keep=1)
    assert checkpoint_steps(pair) == [0, 1, 2]


def contents(folder: Path) -> dict[str, Any]:
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_saving_the_same_again_writes_nothing_but_new_metadata(pair):
    before = contents(pair)
    save_checkpoint(pair, 2, state_of(2), metadata={"saved_at": 2})
    assert contents(pair) == before
    save_checkpoint(pair, 2, state_of(2), metadata={"loss": float("nan"), 3: (1, 2)})
    assert {path for path, file in contents(pair).items() if file != before[path]} == {str(pair / "2.json")}
    assert repr(read_metadata(pair, 2)) == "{'loss': nan, '3': [1, 2]}"
    verify_checkpoint(pair, 2)


def test_another_state_at_a_good_step_is_a_usage_error(pair):
    before = contents(pair)
    with pytest.raises(UsageError, match=rf"`{pair}/2` holds another state of that step; give another folder"):
        save_checkpoint(pair, 2, state_of(3))
    assert contents(pair) == before


@pytest.mark.parametrize("name", sorted(set(DAMAGES) - {"other version", "manifest is a folder"}))
def test_a_damaged_step_is_replaced(pair, name):
    DAMAGES[name][0](pair)
    save_checkpoint(pair, 2, state_of(3), metadata={"saved_at": 3})
    restored = restore_checkpoint(pair, state_of(0))
    assert (restored.step, restored.metadata) == (2, {"saved_at": 3})
    assert bits_of(restored.state) == bits_of(state_of(3))
    assert sorted(os.listdir(pair)) == ["1", "1.json", "2", "2.json"]


def test_what_is_not_ours_is_never_deleted(pair):
    rewrite_manifest(pair, rehash=True, format_version=2)
    with pytest.raises(UsageError, match=r"/2` cannot be replaced: it has format version 2.*; give another folder$"):
        save_checkpoint(pair, 2, state_of(2))
    (pair / "5").mkdir()
    (pair / "5" / "photo.jpg").write_text("mine")
    with pytest.raises(UsageError, match=r"`.*/5` is in the way and no checkpoint; give another folder$"):
        save_checkpoint(pair, 5, state_of(5))
    for step in (6, 7):
        save_checkpoint(pair, step, state_of(step), keep=1)
    assert sorted(os.listdir(pair)) == ["2", "2.json", "5", "7", "7.json"]


def test_leftovers_of_interrupted_saves_are_cleared(pair):
    shutil.copytree(pair / "2", pair / "5")
    (pair / "5.json.tmp").write_text("{")
    shutil.copytree(pair / "2", pair / "6.orbax-checkpoint-tmp")
    (pair / "2.json.tmp").write_text("{")
    save_checkpoint(pair, 3, state_of(3), keep=3)
    assert sorted(os.listdir(pair)) == ["1", "1.json", "2", "2.json", "3", "3.json"]


class Twins:
    """A pytree node with two children under one key."""


jax.tree_util.register_pytree_with_keys(
    Twins,
    lambda twins: ([(jax.tree_util.DictKey("child"), np.ones(1, np.float32))] * 2, None),
    lambda _, children: Twins(),
)

REFUSED_STATES = {
    "Python number": ({"a": 3}, TypeError, r"`state` has 3 at state\['a'\], not an array; wrap it with jnp.asarray"),
    "typed key": (
        {"a": jax.random.key(0)},
        TypeError,
        r"typed PRNG key at state\['a'\]; give jax.random.key_data\(key\)",
    ),
    "float64": (np.zeros(2), TypeError, r"dtype float64 at state, which jax arrays cannot hold here; convert it"),
    "big-endian": ([np.zeros(2, ">f4")], TypeError, r"dtype >f4 at state\[0\], which jax arrays cannot hold here"),
    "text": (np.array("a"), TypeError, r"dtype <U1 at state, which jax arrays cannot hold here"),
    "nothing": ({"a": None, "b": np.zeros((0, 3), np.float32)}, ValueError, r"`state` holds no numbers to save"),
    "equal paths": (Twins(), ValueError, r"`state` has leaves with equal key paths"),
}


@pytest.mark.parametrize("name", REFUSED_STATES)
def test_states_that_cannot_be_kept_are_refused(tmp_path, name):
    state, error, expected = REFUSED_STATES[name]
    with pytest.raises(error, match=expected):
        save_checkpoint(tmp_path / "new", 1, state)
    assert not (tmp_path / "new").exists()


REFUSED_ARGUMENTS = {
    "step": ({"step": -1}, ValueError, r"`step` \(=-1\) must be 0 or larger"),
    "keep": ({"keep": 0}, ValueError, r"`keep` \(=0\) must be 1 or larger"),
    "array": (
        {"metadata": {"a": np.float32(1)}},
        TypeError,
        r"`metadata` must be made of .* convert arrays with float",
    ),
    "list": ({"metadata": [1]}, TypeError, r"`metadata` \(=\[1\]\) must be a dict"),
}


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
def test_arguments_are_checked(tmp_path, name):
    changes, error, expected = REFUSED_ARGUMENTS[name]
    arguments = {"step": 1, "state": state_of(1)} | changes
    with pytest.raises(error, match=expected):
        save_checkpoint(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        expected = rf"`folder` \(={folder}\) is a file or lies below one; give the path of a folder"
        with pytest.raises(UsageError, match=expected):
            save_checkpoint(folder, 1, state_of(1))
        with pytest.raises(UsageError, match=expected):
            restore_checkpoint(folder, state_of(1))


# ----------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["write_synced", "write_vector", "sync_tree", "replace_synced"])
def test_whatever_fails_a_save_leaves_the_others(pair, monkeypatch, place, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(checkpoint, place, fail)
    before = contents(pair)
    expected = (
        rf"saving checkpoint `{pair}/3` failed: Input/output error; the last good checkpoint \(step 2\) is kept; "
    )
    with pytest.raises(
        RunError if isinstance(error, OSError) else KeyboardInterrupt,
        match=expected if isinstance(error, OSError) else None,
    ):
        save_checkpoint(pair, 3, state_of(3))
    after = contents(pair)
    assert before.keys() - {str(pair)} == after.keys() - {str(pair)}
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
    def write_wrongly(path, vector):
        files.write_vector(path, vector ^ np.uint8(1))

    monkeypatch.setattr(checkpoint, "write_vector", write_wrongly)
    expected = r"failed: what was written does not read back, .* its hash; there is no good checkpoint yet; make room"
    with pytest.raises(RunError, match=expected):
        save_checkpoint(tmp_path, 1, state_of(1))
    assert os.listdir(tmp_path) == []


DISK_FULL = """
import json, resource, sys, warnings
import numpy as np
from bnn_jax.errors import RunError
from bnn_jax.training.checkpoint import checkpoint_steps, restore_checkpoint, save_checkpoint

folder, texts = sys.argv[1], []
small = {"a": np.arange(9, dtype=np.float32)}
large = {"a": np.random.default_rng(0).normal(size=200_000).astype(np.float32)}
for limit, step in [(100_000, 0), (-1, 1), (100_000, 2), (20, 2), (250, 2)]:
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


def test_disk_full_is_told_in_one_sentence_and_costs_nothing(tmp_path, subprocess_env):
    folder = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", DISK_FULL, folder], capture_output=True, text=True, env=subprocess_env)
    assert (done.returncode, done.stderr) == (0, "")
    texts, steps, steps_after = json.loads(done.stdout)
    way_out = "make room or make the folder writable, then run again to go on from there"
    kept = ["there is no good checkpoint yet"] + ["the last good checkpoint (step 1) is kept"] * 3
    assert texts == [
        f"saving checkpoint `{folder}/{step}` failed: File too large; {last}; {way_out}"
        for step, last in zip([0, 2, 2, 2], kept)
    ]
    assert (steps, steps_after) == ([1], [1, 2])
    assert sorted(os.listdir(folder)) == ["1", "1.json", "2", "2.json"]


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


def test_no_permission_to_save(unprivileged):
    folder, become = unprivileged
    become(0o555, folder)
    expected = rf"saving checkpoint `{folder}/3` failed: Permission denied; the last good checkpoint \(step 2\) is kept"
    with pytest.raises(RunError, match=expected):
        save_checkpoint(folder, 3, state_of(3))
    assert restore_checkpoint(folder, state_of(0)).step == 2


@pytest.mark.parametrize("part", ["manifest", "data"])
def test_no_permission_to_read_is_no_reason_to_replace(unprivileged, part):
    folder, become = unprivileged
    become(0o000, folder / "2.json" if part == "manifest" else largest_file(folder))
    with pytest.warns(CheckpointWarning, match=rf"its {part} cannot be read \(Permission denied\)$"):
        assert restore_checkpoint(folder, state_of(0)).step == 1
    with pytest.raises(UsageError, match=rf"/2` cannot be replaced: its {part} cannot be read \(Permission denied\); "):
        save_checkpoint(folder, 2, state_of(2))


SAVE_FOR_EVER = """
import itertools, sys
import numpy as np
from bnn_jax.training.checkpoint import save_checkpoint

for step in itertools.count(1):
    state = {"a": np.random.default_rng(step).integers(0, 2**32, 20_000, dtype=np.uint32)}
    save_checkpoint(sys.argv[1], step, state)
    print(step, flush=True)
"""


def test_a_kill_loses_nothing_that_was_saved(tmp_path, subprocess_env):
    savers = []
    for index in range(3):
        command = [sys.executable, "-c", SAVE_FOR_EVER, tmp_path / str(index)]
        savers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=subprocess_env))
    delays = np.random.default_rng(time.time_ns()).uniform(0.0, 0.3, len(savers))
    for index, (saver, delay) in enumerate(zip(savers, delays)):
        assert saver.stdout.readline() == "1\n"
        time.sleep(delay)
        saver.send_signal(signal.SIGKILL)
        acknowledged = [1, *map(int, saver.communicate()[0].split())]
        restored, _ = restore_quietly_like(tmp_path / str(index), {"a": np.zeros(20_000, np.uint32)})
        assert restored.step in (acknowledged[-1], acknowledged[-1] + 1)
        expected = np.random.default_rng(restored.step).integers(0, 2**32, 20_000, dtype=np.uint32)
        np.testing.assert_array_equal(restored.state["a"], expected)


def restore_quietly_like(folder: Path, like: Any) -> tuple[Any, int]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return restore_checkpoint(folder, like), len(caught)


# -------------------------------------------------------------------------------------------------------------- files


def test_write_atomically(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    files.write_atomically(path, "größer")
    assert path.read_bytes() == "größer".encode()
    files.write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device"):
        files.write_atomically(path, "new")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["result.json"]


def test_read_vector_tells_the_cause(tmp_path):
    with pytest.raises(files.VectorError, match="Could not recognize the checkpoint"):
        files.read_vector(tmp_path / "none")

"""What a checkpoint keeps of a tree: every bit, names that plain Orbax shows, and a manifest that tells all of it."""

import asyncio
import hashlib
import json
import tempfile
from typing import Any, NamedTuple

import flax.struct
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_states import bits_of, own_hash, state_of

from bnn_jax.errors import UsageError
from bnn_jax.training import orbax_store
from bnn_jax.training.checkpoint import restore_checkpoint, save_checkpoint


class Moments(NamedTuple):
    mean: Any
    square: Any


class Train(flax.struct.PyTreeNode):
    step: Any
    params: Any
    optimizer: Any


DTYPES = ["bool", "int4", "uint4", "int8", "uint8", "int32", "uint32", "float16", "bfloat16", "float32", "complex64"]
DTYPES += ["float8_e4m3fn", "float8_e4m3"]
FOUR_BITS = ("int4", "uint4")


@st.composite
def raw_arrays(draw):
    """Arrays of any bits: NaN payloads, -0.0, subnormals, empty axes, scalars, Fortran order."""
    dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = int(np.prod(shape))
    raw = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
    if dtype.name == "bool":
        raw = bytes(byte & 1 for byte in raw)
    array = np.frombuffer(raw, np.uint8).astype(dtype) if dtype.name in FOUR_BITS else np.frombuffer(raw, dtype)
    array = array.reshape(shape)
    return np.asfortranarray(array) if draw(st.booleans()) else array


TREES = st.recursive(
    raw_arrays() | st.none() | st.just({}),
    lambda tree: (
        st.lists(tree, max_size=3)
        | st.dictionaries(st.text(max_size=3).filter(lambda key: not set("./") & set(key)), tree, max_size=3)
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


def test_bits_names_and_orders_that_are_easily_lost(tmp_path):
    """NaN payloads, signed zeros, memory order, names with slashes, a list's order where the names sort otherwise."""
    words = np.array([0x7F800001, 0xFFC12345, 0x80000000, 0x00000001], np.uint32)
    rows = np.arange(24, dtype=np.int32).reshape(4, 6)
    state = {
        "nan/payload": words.view(np.float32),
        "minus": [np.full(3, -0.0, np.float16), np.zeros(3, np.float16)],
        "fortran": np.asfortranarray(rows),
        "strided": (rows[:, ::2], rows[::-1]),
        "eleven": [np.int32(n) for n in range(11)],
    }
    save_checkpoint(tmp_path, 0, state)
    assert bits_of(restore_checkpoint(tmp_path, state).state) == bits_of(state)
    like = state | {"eleven": {str(n): np.int32(0) for n in range(11)}}
    restored = restore_checkpoint(tmp_path, like).state["eleven"]
    assert {name: int(value) for name, value in restored.items()} == {str(n): n for n in range(11)}


def train_state(width: int) -> Train:
    params = {
        "conv": {"kernel": jnp.ones((3, 3, width)), "none": None, "empty": {}},
        "scale": jnp.ones((), jnp.bfloat16),
        "no_elements": jnp.ones((0, width)),
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


def test_plain_orbax_loads_the_tree_of_named_arrays(tmp_path):
    state = train_state(4)
    path = save_checkpoint(tmp_path, 20, state, metadata={"lr": 0.1})
    assert path == tmp_path / "20"
    with orbax_store._quiet():
        from orbax.checkpoint import v1 as orbax

        tree = orbax.load(path)
    assert tree["params"].keys() == {"conv", "scale", "no_elements"}
    assert tree["params"]["no_elements"] is None
    np.testing.assert_array_equal(tree["params"]["conv"]["kernel"], state.params["conv"]["kernel"])
    (trace,) = [part["trace"] for part in tree["optimizer"][1] if part]
    assert trace["scale"].dtype == jnp.bfloat16
    with orbax_store._quiet():
        assert bits_of(orbax.load(path, tree)) == bits_of(tree)


def test_the_manifest_can_be_read_without_this_package(tmp_path):
    first, second = np.array([1.5, -0.0], np.float32), np.array([[7], [9]], np.uint8)
    save_checkpoint(tmp_path, 20, {"a": first, "b": [second]}, metadata={"lr": 0.1})
    manifest = json.loads((tmp_path / "20.json").read_text())
    assert (manifest["format"], manifest["format_version"], manifest["step"]) == ("bnn_jax checkpoint", 2, 20)
    assert manifest["metadata"] == {"lr": 0.1}
    hash_of = lambda head, array: hashlib.sha256(head + array.tobytes()).hexdigest()
    assert manifest["leaves"] == [
        {"name": "a", "dtype": "float32", "shape": [2], "sha256": hash_of(b"float32 [2]\n", first)},
        {"name": "b.0", "dtype": "uint8", "shape": [2, 1], "sha256": hash_of(b"uint8 [2, 1]\n", second)},
    ]
    assert manifest["sha256"] == own_hash(manifest)


def test_works_where_an_event_loop_runs(tmp_path):
    async def cell():
        save_checkpoint(tmp_path, 1, state_of(1))
        return restore_checkpoint(tmp_path, state_of(0))

    assert bits_of(asyncio.run(cell()).state) == bits_of(state_of(1))


MISMATCHES = {
    "shape": (state_of(0) | {"kernel": jnp.zeros((30, 4))}, r"float32\[30, 4\] at `kernel`.*float32\[30, 50\]"),
    "dtype": (state_of(0) | {"step": jnp.zeros(())}, r"float32\[\] at `step`.*has int32\[\]"),
    "new leaf": (state_of(0) | {"scale": jnp.ones(2)}, r"has float32\[2\] at `scale`.*has nothing"),
    "leaf gone": ({"kernel": jnp.zeros((30, 50))}, r"has nothing at `mask`, the checkpoint `.*/2` has bool\[3\]"),
    "structure": ([state_of(0)], r"has float32\[30, 50\] at `0.kernel`.*has nothing"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("saved"), 2, state_of(2)).parent


@pytest.mark.parametrize("name", MISMATCHES)
def test_another_model_is_a_usage_error(saved, name):
    like, expected = MISMATCHES[name]
    with pytest.raises(UsageError, match=f"^`like` has .*{expected.removeprefix('has ')}.*give another folder") as info:
        restore_checkpoint(saved, like)
    assert str(saved / "2") in str(info.value)


REFUSED = {
    "Python number": ({"state": {"a": 3}}, TypeError, "`state` has 3 at `a`, not an array; wrap it with jnp.asarray"),
    "typed key": (
        {"state": {"a": jax.random.key(0)}},
        TypeError,
        r"typed PRNG key at `a`; give jax.random.key_data\(key\)",
    ),
    "float64": (
        {"state": [np.zeros(2)]},
        TypeError,
        "dtype float64 at `0`, which jax arrays cannot hold here; convert",
    ),
    "big-endian": ({"state": [np.zeros(2, ">f4")]}, TypeError, "dtype >f4 at `0`, which jax arrays cannot hold here"),
    "text": ({"state": {"b": np.array("a")}}, TypeError, "dtype <U1 at `b`, which jax arrays cannot hold here"),
    "nothing": ({"state": {"a": None, "b": np.zeros((0, 3), np.float32)}}, ValueError, "`state` holds no numbers"),
    "equal names": (
        {"state": {"a.b": np.ones(1, np.float32), "a": {"b": np.ones(1, np.float32)}}},
        ValueError,
        r"`state` has a leaf whose name \(`a.b`\) is that of another leaf as well; give",
    ),
    "slash": (
        {"state": {"/a": np.ones(1, np.float32)}},
        ValueError,
        r"`state` has a leaf whose name \(`/a`\) begins with a slash; give its pytree nodes other keys",
    ),
    "step": ({"step": -1}, ValueError, r"`step` \(=-1\) must be 0 or larger"),
    "keep": ({"keep": 0}, ValueError, r"`keep` \(=0\) must be 1 or larger"),
    "array": ({"metadata": {"a": np.float32(1)}}, TypeError, "`metadata` must be made of .* convert arrays with float"),
    "list": ({"metadata": [1]}, TypeError, r"`metadata` \(=\[1\]\) must be a dict"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_are_checked(tmp_path, name):
    changes, error, expected = REFUSED[name]
    arguments = {"step": 1, "state": state_of(1)} | changes
    with pytest.raises(error, match=expected):
        save_checkpoint(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()

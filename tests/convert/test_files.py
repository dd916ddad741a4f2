"""Files of weights: which they are is told by their endings and by the names in them."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from networks import random_variables

from bnn_jax.convert import from_arrays, load_weights
from bnn_jax.errors import UsageError
from bnn_jax.models.build import build_model

SHAPE = (4, 4, 1)
MODEL = build_model("mnist_mlp", num_classes=3, width=4, options={"hidden_layers": 1})


@pytest.fixture(scope="module")
def variables():
    return random_variables(MODEL, SHAPE)


def test_arrays_by_their_names_here_or_by_others(variables, tmp_path):
    flat = flatten_dict(variables, sep="/")
    np.savez(tmp_path / "weights.npz", **flat)
    found = load_weights(tmp_path / "weights.npz", MODEL, SHAPE)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, variables))
    # Kernels of a network in full precision; a module and a variable of other names.
    other = {name.replace("latent_kernel", "kernel").replace("params/dense1", "a"): x for name, x in flat.items()}
    other["mean"] = other.pop("batch_stats/norm1/mean")
    found = from_arrays(other, MODEL, SHAPE, names={"dense1": "a", "batch_stats/norm1/mean": "mean"})
    assert jax.tree.all(jax.tree.map(np.array_equal, found, variables))
    with pytest.raises(UsageError, match=r"missing: params/dense1/latent_kernel; unknown: a/kernel; give"):
        from_arrays(other, MODEL, SHAPE, names={"batch_stats/norm1/mean": "mean"})
    with pytest.raises(UsageError, match="`names` has dense7, which the network does not have; it has batch_stats/"):
        from_arrays(other, MODEL, SHAPE, names={"dense7": "a"})


def test_one_pattern_is_as_a_list_of_it(variables, tmp_path):
    flat = flatten_dict(variables, sep="/")
    del flat["params/head/latent_kernel"]
    extended = flat | {"optimizer/mu": np.ones(3)}
    np.savez(tmp_path / "weights.npz", **extended)
    for fresh, ignored in (("params/head/*", "optimizer/*"), (["params/head/*"], ["optimizer/*"])):
        for found in (
            from_arrays(extended, MODEL, SHAPE, fresh=fresh, ignored=ignored),
            load_weights(tmp_path / "weights.npz", MODEL, SHAPE, fresh=fresh, ignored=ignored),
        ):
            assert all(np.array_equal(x, flat[name]) for name, x in flatten_dict(found, sep="/").items())
            assert len(flatten_dict(found)) == len(flat)
    with pytest.raises(UsageError, match=r"; unknown: optimizer/mu; give"):
        from_arrays(extended, MODEL, SHAPE, ignored="params/*")


def test_a_pattern_of_no_variable_is_refused(variables):
    flat = flatten_dict(variables, sep="/")
    with pytest.raises(UsageError, match=r"network; `fresh` has 'head/\*', which matches no variable; give"):
        from_arrays(flat, MODEL, SHAPE, fresh=["params/head/*", "head/*"])


@pytest.mark.parametrize(
    ("array", "rule"),
    [
        (np.full((4, 3), 1e300), "not finite: params/head/latent_kernel as float32"),
        (np.full((4, 3), np.nan), "not finite: params/head/latent_kernel as float32"),
        (np.full((4, 3), 1 + 2j), r"not of real numbers: params/head/latent_kernel \(complex128\)"),
        (np.full((4, 3), "1"), r"not of real numbers: params/head/latent_kernel \(<U1\)"),
        (np.full((4, 3), b"12"), r"not of real numbers: params/head/latent_kernel \(\|S2\)"),
        (np.full((4, 3), None), r"not of real numbers: params/head/latent_kernel \(object\)"),
        (np.float32(1), r"of another shape: params/head/latent_kernel \(\) for params/head/latent_kernel \(4, 3\)"),
    ],
)
def test_what_is_no_array_of_finite_real_numbers_is_refused(variables, array, rule):
    flat = flatten_dict(variables, sep="/") | {"params/head/latent_kernel": array}
    with pytest.raises(UsageError, match=f"^the weights do not fit the network; {rule}; give the network's own"):
        from_arrays(flat, MODEL, SHAPE)


def test_every_kind_of_real_numbers_is_taken(variables):
    flat = flatten_dict(variables, sep="/")
    ones = np.ones((4, 3), np.float32)
    for dtype in (jnp.bfloat16, np.float16, np.float64, np.int8, np.uint16, np.bool_, jnp.float8_e4m3fn):
        found = from_arrays(flat | {"params/head/latent_kernel": ones.astype(dtype)}, MODEL, SHAPE)
        kernel = found["params"]["head"]["latent_kernel"]
        assert kernel.dtype == np.float32
        np.testing.assert_array_equal(kernel, ones)


def test_keys_that_are_no_names_are_refused(variables):
    with pytest.raises(UsageError, match=r"^`arrays` has the key 3, which is no name; give a mapping name -> array$"):
        from_arrays({**flatten_dict(variables, sep="/"), 3: np.ones(3)}, MODEL, SHAPE)


def test_an_npz_of_a_state_dict(variables, tmp_path):
    params, statistics = variables["params"], variables["batch_stats"]
    state = {f"{layer}.weight": params[layer]["latent_kernel"].T for layer in ("dense1", "head")}
    for norm in ("norm1", "head_norm"):
        state |= {f"{norm}.weight": params[norm]["scale"], f"{norm}.bias": params[norm]["bias"]}
        state |= {f"{norm}.running_mean": statistics[norm]["mean"], f"{norm}.running_var": statistics[norm]["var"]}
    np.savez(tmp_path / "state.npz", **state)
    names = {name: name for name in ("dense1", "head", "norm1", "head_norm")}
    # dense1 sees a flattened image of one channel, whose order is the same in both.
    found = load_weights(tmp_path / "state.npz", MODEL, SHAPE, names=names, epsilon=1e-4)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, variables))


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("x.onnx", r"must end in \.npz, \.pth, \.pt, \.bin, \.tar, \.h5, \.hdf5; save the arrays: numpy\.savez"),
        ("none.npz", "is not a file; give one that ends in"),
        ("text.npz", r"is no file of named arrays \(.*\); write one: numpy\.savez"),
        ("cut.npz", r"is no file of named arrays \(.*\); write one: numpy\.savez"),
        ("array.npz", r"is no file of named arrays \(.*\); write one: numpy\.savez"),
        ("text.pth", r"is read by the Python package torch, which is not installed; .*: pip install torch; or save it"),
        ("text.h5", r"reading a file of Keras's needs the Python package h5py, .*pip install 'bnn_jax\[keras\]'"),
    ],
)
def test_other_files_are_refused(tmp_path, monkeypatch, name, rule):
    for package in ("torch", "h5py"):
        monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / name
    if path.stem == "text":
        path.write_text("text")
    if path.stem == "cut":
        np.savez(path, weights=np.arange(1000))
        path.write_bytes(path.read_bytes()[:2000])
    if path.stem == "array":
        np.save(path.with_suffix(".npy"), np.arange(3))
        path.with_suffix(".npy").rename(path)
    with pytest.raises(UsageError, match=rule):
        load_weights(path, MODEL, SHAPE)


def test_a_file_of_torch_that_holds_no_state_dict(tmp_path, monkeypatch):
    torch = types.SimpleNamespace(load=lambda *given, **options: [1, 2])
    monkeypatch.setitem(sys.modules, "torch", torch)
    (tmp_path / "x.pt").touch()
    with pytest.raises(UsageError, match=r"is no state dict of PyTorch's but holds a list; save `state_dict\(\)`"):
        load_weights(tmp_path / "x.pt", MODEL, SHAPE)


def test_an_option_that_a_file_does_not_have(variables, tmp_path):
    np.savez(tmp_path / "weights.npz", **flatten_dict(variables, sep="/"))
    with pytest.raises(UsageError, match=r"`options` \(='layout'\) is not known"):
        load_weights(tmp_path / "weights.npz", MODEL, SHAPE, layout="bireal")

"""The file: what is in it, what comes back, what is refused and with which words."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.data import Split, in_batches
from bnn_jax.errors import RunError, UsageError
from bnn_jax.models.build import build_model
from bnn_jax.packed import artifact, freeze, load, packed_structure, save
from bnn_jax.packed.artifact import rounded

ROOT = Path(__file__).parents[2]
SETTINGS = {"name": "mnist_mlp", "width": 8, "kernel_quantizer": "xnor", "options": {"hidden_layers": 2}}
SHAPE = (6, 6, 2)
DESCRIBED = {"num_classes": 4, "image_shape": SHAPE, "mean": (100.5, 90.25), "std": (60.0, 55.5)}
TESTED = {"accuracy": 0.75, "split": "test", "data": {"name": "digits"}}


def load_script(name):
    specification = importlib.util.spec_from_file_location(name, ROOT / "tests" / "fuzz" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    # A dataclass looks its module up by name.
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


script = load_script("fuzz_artifact")


@pytest.fixture(scope="module")
def network():
    """The model and its packed variables, batch norms of both signs."""
    model = build_model(num_classes=4, **SETTINGS)
    rng = np.random.default_rng(0)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False))

    def random(path, leaf):
        values = rng.normal(size=leaf.shape).astype(leaf.dtype)
        return jnp.asarray(np.abs(values) + 0.5 if "var" in str(path[-1]) else values)

    return model, freeze(model, jax.tree_util.tree_map_with_path(random, dict(variables)), SHAPE)


@pytest.fixture(scope="module")
def path(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "model.bnn.safetensors"
    save(path, SETTINGS, network[1], **DESCRIBED, accounting={"bits": 7}, tested=TESTED)
    return path


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(0, 256, (5, *SHAPE)).astype(np.uint8)


def assert_same_bits(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# -- what is written and what comes back


def test_every_bit_comes_back(loaded, network):
    assert_same_bits(loaded.variables, network[1])
    assert (type(loaded.model), loaded.model.width, loaded.model.hidden_layers) == (type(network[0]), 8, 2)
    metadata = loaded.metadata
    assert {key: metadata[key] for key in DESCRIBED} == DESCRIBED
    assert metadata["model"] == SETTINGS
    assert (metadata["accounting"], metadata["tested"]) == ({"bits": 7}, TESTED)
    assert set(metadata["versions"]) == {"bnn_jax", "jax", "flax"}


def test_the_file_is_as_documented(path, network):
    """Written down again from the description of the format alone."""
    data = path.read_bytes()
    header, tensors = script.opened(data)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(network[1])]
    expected, start = b"", 0
    for name, dtype, code in (("words", "<u4", "U32"), ("thresholds", "<i4", "I32"), ("numbers", "<f4", "F32")):
        vector = np.concatenate([leaf.ravel() for leaf in leaves if leaf.dtype == np.dtype(dtype)])
        assert header[name] == {"dtype": code, "shape": [vector.size], "data_offsets": [start, start + 4 * vector.size]}
        start += 4 * vector.size
        expected += vector.astype(dtype).tobytes()
    assert tensors == expected
    assert len(data) - len(tensors) < 4096 and (len(data) - len(tensors)) % 8 == 0
    digest = header["__metadata__"]["sha256"]
    assert hashlib.sha256(data.replace(digest.encode(), b"0" * 64)).hexdigest() == digest
    assert all(isinstance(value, str) for value in header["__metadata__"].values())


def test_the_safetensors_package_reads_it(path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="the package safetensors is not installed")
    tensors = safetensors.load_file(path)
    assert list(tensors) and {name: a.dtype.name for name, a in tensors.items()} == {
        "words": "uint32",
        "thresholds": "int32",
        "numbers": "float32",
    }
    stored = b"".join(tensors[name].tobytes() for name in ("words", "thresholds", "numbers"))
    assert path.read_bytes().endswith(stored)


def test_save_returns_the_bytes_of_both_parts(tmp_path, network):
    header, tensors = save(tmp_path / "x", SETTINGS, network[1], **DESCRIBED)
    assert header + tensors == (tmp_path / "x").stat().st_size
    assert tensors == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(network[1]))


def test_predictions_are_those_of_the_packed_network(path, network, images):
    model, variables = network
    x = (images.astype(np.float32) - np.float32(DESCRIBED["mean"]).reshape(1, 1, 1, 2)) / np.float32(
        DESCRIBED["std"]
    ).reshape(1, 1, 1, 2)
    expected = jax.jit(lambda x: model.apply(variables, x, train=False)[0])(x)
    loaded = load(path)
    np.testing.assert_allclose(loaded.logits(images), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(loaded.predict(images), np.asarray(expected).argmax(1))
    labels = np.asarray(expected).argmax(1)
    labels[[1, 4]] = (labels[[1, 4]] + 1) % 4
    in_pairs = list(in_batches(Split(images, labels), 2))
    assert loaded.accuracy([(images, labels)]) == loaded.accuracy(in_pairs) == (3 / 5, 5)
    assert loaded._compiled._cache_size() == 2  # batches of 5 and of 2, the last of which is filled up


@pytest.fixture(scope="module")
def loaded(path):
    return load(path)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (np.zeros((2, *SHAPE), np.float32), r"`images` \(=float32 of shape \(2, 6, 6, 2\)\) must be uint8 of shape"),
        (np.zeros(SHAPE, np.uint8), r"`images` \(=uint8 of shape \(6, 6, 2\)\) must be .* \(batch, 6, 6, 2\)"),
        (np.zeros((0, *SHAPE), np.uint8), r"`images` \(=uint8 of shape \(0, 6, 6, 2\)\)"),
        ([[1]], r"`images` \(=list of shape \(1, 1\)\)"),
    ],
)
def test_images_of_another_kind(loaded, wrong, text):
    with pytest.raises(ValueError, match=text):
        loaded.logits(wrong)


def test_float16_halves_the_real_rest(path, network, tmp_path):
    half = tmp_path / "half.bnn.safetensors"
    save(half, SETTINGS, network[1], **DESCRIBED, accounting={"bits": 7}, tested=TESTED, float16=True)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(network[1]) if leaf.dtype == jnp.float32)
    assert script.opened(half.read_bytes())[0]["numbers"]["dtype"] == "F16"
    assert len(script.opened(path.read_bytes())[1]) - len(script.opened(half.read_bytes())[1]) == 2 * numbers
    loaded = load(half)
    assert_same_bits(loaded.variables, rounded(network[1]))
    for exact, kept in zip(jax.tree.leaves(network[1]), jax.tree.leaves(loaded.variables)):
        nearest = np.asarray(exact).astype(np.float16) if exact.dtype == jnp.float32 else exact
        np.testing.assert_array_equal(kept, np.asarray(nearest).astype(exact.dtype))


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65519.0, True), (65520.0, False), (np.inf, False)])
def test_numbers_that_float16_cannot_hold(value, fits):
    variables = {"packed": {"norm": {"gain": jnp.array([1.0, -value])}}}
    if fits:
        assert np.isfinite(rounded(variables)["packed"]["norm"]["gain"]).all()
        return
    with pytest.raises(UsageError, match=r"`float16` \(=True\) cannot hold .*, of packed/norm/gain; leave it out"):
        rounded(variables)


def test_the_header_does_not_grow_with_depth(tmp_path, monkeypatch):
    """150 layers of four variables, also of the rarer dtypes, in the place of the network's own."""
    dtypes = (jnp.uint32, jnp.float32, jnp.int32, jnp.bool_)
    layer = lambda i: {f"variable{j}": np.full((2, i % 3 + 1), i + j).astype(d) for j, d in enumerate(dtypes)}
    variables = {"packed": {f"stage{i}_block{i}_conv{i}": layer(i) for i in range(150)}}
    structure = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, variables))
    monkeypatch.setattr(artifact, "packed_structure", lambda model, image_shape: structure)
    header, tensors = save(tmp_path / "deep", SETTINGS, variables, **DESCRIBED)
    assert header < 2048
    assert tensors == 150 * 4 * (4 + 4 + 4 + 1)  # (2, 1), (2, 2) and (2, 3): four elements on average
    loaded = load(tmp_path / "deep")
    assert loaded.metadata["leaves"] == "600"
    assert_same_bits(loaded.variables, jax.tree.map(jnp.asarray, variables))


CLEAN = """
import sys
from importlib.abc import MetaPathFinder

FORBIDDEN = {forbidden}

class Forbid(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(f"{{name}} is forbidden here")

sys.meta_path.insert(0, Forbid())
import numpy as np
from bnn_jax.packed import load

model = load({path!r})
print(model.predict(np.zeros((2, *model.metadata["image_shape"]), np.uint8)).shape)
"""


def test_loading_needs_numpy_jax_and_flax_alone(path, subprocess_env):
    """What flax itself imports, as optax and rich, is allowed."""
    forbidden = {"tensorflow", "tensorflow_datasets", "orbax", "tyro", "sklearn", "matplotlib", "PIL"}
    forbidden |= {"safetensors", "torch", "grain", "array_record", "pandas", "hypothesis", "pytest"}
    code = CLEAN.format(forbidden=forbidden, path=str(path))
    done = subprocess.run([sys.executable, "-c", code], env=subprocess_env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "(2,)\n", done.stderr


# -- what cannot be written


def test_variables_of_another_network(tmp_path, network):
    wider = packed_structure(build_model(num_classes=4, **SETTINGS | {"width": 9}), SHAPE)
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), wider)
    with pytest.raises(ValueError, match=r"`variables` are not those of this network, frozen: packed/.* differs; give"):
        save(tmp_path / "x", SETTINGS, variables, **DESCRIBED)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"settings": SETTINGS | {"name": "mnist_mpl"}},
            r"cannot be built \(`name` \(='mnist_mpl'\) .* did you mean 'mnist",
        ),
        ({"settings": SETTINGS | {"options": {"f": print}}}, r"x cannot be written: .*not JSON serializable; correct"),
        ({"std": (0.0, 1.0)}, r"`mean` and `std` must have a finite number for each channel, and `std` a positive one"),
        ({"mean": (1.0,)}, r"`mean` and `std` must have a finite number for each channel"),
        ({"num_classes": 0}, r"`num_classes` and `image_shape` must be one and three positive whole numbers"),
        (
            {"tested": {"note": "n" * 4000}},
            r"would have a header of 4\d+ bytes .* at most 4096 and .* shorten `accounting`",
        ),
    ],
)
def test_descriptions_that_cannot_be_written(tmp_path, network, changes, text):
    arguments = {"settings": SETTINGS, "variables": network[1], **DESCRIBED} | changes
    with pytest.raises(UsageError, match=text):
        save(tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, network):
    path = tmp_path / "model"
    path.write_bytes(b"old")
    (tmp_path / "model.tmp").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*model \(Is a directory\); make room, or choose another path"):
        save(path, SETTINGS, network[1], **DESCRIBED)
    assert path.read_bytes() == b"old"
    with pytest.raises(RunError, match=r"cannot write .*missing/model \(No such file or directory\)"):
        save(tmp_path / "missing" / "model", SETTINGS, network[1], **DESCRIBED)


# -- what is refused


def test_every_byte_matters(path, tmp_path):
    """A bit of each byte in turn."""
    good, bad = path.read_bytes(), tmp_path / "bad"
    for place in range(len(good)):
        bad.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        with pytest.raises((RunError, UsageError)) as refused:
            load(bad)
        assert str(bad) in str(refused.value) and "\n" not in str(refused.value)


def rewritten(change):
    """A file whose header text is changed, with the length made right."""

    def apply(data):
        length = int.from_bytes(data[:8], "little")
        text = change(data[8 : 8 + length].decode()).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return apply


def forged(change):
    """A file whose header is changed, with the hash made right."""

    def apply(data):
        header, tensors = script.opened(data)
        return script.checksummed(change(header, header["__metadata__"]) or header, tensors)

    return apply


def with_entry(name, **entry):
    return forged(lambda header, metadata: header[name].update(entry))


def with_metadata(**texts):
    return forged(lambda header, metadata: metadata.update(texts))


def with_model(**settings):
    return with_metadata(model=json.dumps(SETTINGS | settings))


DAMAGE = {
    "empty": (
        lambda data: b"",
        r"is damaged, or no packed network: it has 0 bytes, too few for a header; copy it anew",
    ),
    "short": (lambda data: data[:7], r"it has 7 bytes, too few for a header"),
    "length": (lambda data: b"\xff" * 8 + data[8:], r"it claims a header of 18446744073709551615 bytes, but at most"),
    "large header": (
        lambda data: (5000).to_bytes(8, "little") + bytes(9000),
        r"claims a header of 5000 .* at most 4088 are",
    ),
    "cut header": (lambda data: data[:100], r"it claims a header of \d+ bytes, but at most 92 are possible"),
    "cut": (lambda data: data[:-1], r"its tensors claim (\d+) bytes, \d+ follow"),
    "appended": (lambda data: data + b"\0", r"its tensors claim (\d+) bytes, \d+ follow"),
    "last bit": (
        lambda data: data[:-1] + bytes([data[-1] ^ 128]),
        r"its bytes are not those that were written, by their",
    ),
    "not JSON": (rewritten(lambda text: text[1:]), r"its header is not that of a safetensors file \(Extra data"),
    "not ASCII": (rewritten(lambda text: "é" + text), r"its header is not that of a safetensors file \('ascii'"),
    "deep JSON": (
        lambda data: (3000).to_bytes(8, "little") + b"[" * 3000,
        r"not that of a safetensors file \(maximum rec",
    ),
    "list": (rewritten(lambda text: "[]"), r"its header is not that of a safetensors file"),
    "repeated key": (rewritten(lambda text: text.replace('"words"', '"words":1,"words"')), r"\(a key occurs twice\)"),
    "space": (rewritten(lambda text: text.replace(":", ": ", 1)), r"its header is not written as bnn_jax writes it"),
    "pickle": (lambda data: b"\x80\x04\x95" + data, r"it claims a header of"),
    "wrong hash": (
        rewritten(lambda text: text.replace("digits", "digitz")),
        r"its bytes are not those that were written",
    ),
    "another accuracy": (rewritten(lambda text: text.replace("0.75", "0.95")), r"its bytes are not those that were"),
    "numbers as metadata": (forged(lambda header, metadata: metadata.update(leaves=3)), r"its metadata are not text"),
    "missing metadata": (
        forged(lambda header, metadata: metadata.pop("mean") and None),
        r"its metadata are \['accounting'",
    ),
    "bad numbers": (
        with_metadata(mean="[1e999,2]"),
        r"do not describe a network \(`mean` and `std` must have a finite",
    ),
    "no list": (
        with_metadata(image_shape="7"),
        r"its metadata do not describe a network \('int' object is not iterable",
    ),
    "deep metadata": (with_metadata(tested="[" * 2000), r"its metadata do not describe a network \(maximum recursion"),
    "unknown network": (
        with_model(name="mnist_mpl"),
        r"cannot be built \(`name` \(='mnist_mpl'\) is not known; did you mean",
    ),
    "unknown setting": (with_model(code="print(1)"), r"cannot be built \(.*unexpected keyword argument 'code'"),
    "unknown option": (with_model(options={"depth": 3}), r"cannot be built \(.*unexpected keyword argument 'depth'"),
    "unknown quantizer": (with_model(kernel_quantizer="xnorr"), r"cannot be built .*did you mean 'xnor'"),
    "wider": (with_model(width=9), r"its tensors are .*, but the network that it describes needs"),
    "narrower": (with_model(width=7), r"its tensors are .*, but the network that it describes needs"),
    "huge width": (
        with_model(width=2**16),
        r"cannot be built \(its weights need more than the \d+ bits of the tensors",
    ),
    "hours of tracing": (
        with_model(options={"hidden_layers": 10**9}),
        r"`options` \(=1000000000\) must be at most 512",
    ),
    "terabytes of width": (with_model(width=2**40), r"`width` \(=1099511627776\) must be at most 65536"),
    "many bases": (
        with_model(kernel_quantizer="abc_net", kernel_quantizer_options={"bases": 10**6}),
        r"`bases` \(=1000000\) must be at most 16",
    ),
    "huge images": (
        with_metadata(image_shape="[1000000,1000000,2]"),
        r"`image_shape` \(=1000000\) must be at most 1024",
    ),
    "other images": (with_metadata(image_shape="[4,4,2]", num_classes="5"), r"the network that it describes needs"),
    "terabyte": (
        with_entry("numbers", shape=[2**38], data_offsets=[4, 2**40]),
        r"its tensors claim 1099511627776 bytes, \d+ ",
    ),
    "overlap": (
        with_entry("thresholds", data_offsets=[0, 48]),
        r"its tensors are .*, but the network that it describes",
    ),
    "other dtype": (with_entry("words", dtype="F32"), r"its tensors are .*, but the network that it describes needs"),
    "float sizes": (with_entry("words", shape=[60.0]), r"its tensors are .*, but the network that it describes needs"),
    "no offsets": (with_entry("words", data_offsets=None), r"its tensors claim None bytes"),
    "other variables": (
        with_metadata(structure="0" * 64),
        r"the network has other variables than in the versions that",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_and_forged_files(name, path, tmp_path):
    damage, text = DAMAGE[name]
    bad = tmp_path / "bad.bnn.safetensors"
    bad.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=text) as refused:
        load(bad)
    assert str(refused.value).startswith(f"{bad} is damaged, or no packed network: ") and "\n" not in str(refused.value)
    assert str(refused.value).endswith("export the run again: python scripts/export.py RUN -o model.bnn.safetensors")


@pytest.mark.parametrize("name", ["terabyte", "terabytes of width", "huge width", "huge images", "hours of tracing"])
def test_nothing_large_is_allocated_before_a_refusal(name, path, tmp_path):
    bad = tmp_path / "bad.bnn.safetensors"
    bad.write_bytes(DAMAGE[name][0](path.read_bytes()))
    tracemalloc.start()
    try:
        with pytest.raises(RunError):
            load(bad)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"format_version": "2"}, r"has the format version '2', newer than the installed bnn_jax reads; update it$"),
        (
            {"format_version": "0"},
            r"has the format version '0', not '1'; export the run again: python scripts/export\.py",
        ),
        ({"format_version": "one"}, r"has the format version 'one', not '1'"),
        ({"format": "pt"}, r"is a safetensors file, but holds no packed network of bnn_jax; export the run again"),
    ],
)
def test_files_of_another_kind_or_version(path, tmp_path, metadata, text):
    bad = tmp_path / "bad"
    bad.write_bytes(with_metadata(**metadata)(path.read_bytes()))
    with pytest.raises(UsageError, match=text):
        load(bad)


def test_a_safetensors_file_without_metadata(tmp_path):
    text = b'{"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "other").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(UsageError, match=r"other\) is a safetensors file, but holds no packed network"):
        load(tmp_path / "other")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", "", "pipe"):
        with pytest.raises(UsageError, match=r"is not a file; write one: python scripts/export\.py RUN -o "):
            load(tmp_path / name)


def test_a_terabyte_that_is_there(path, tmp_path):
    """A sparse file of the size that its header claims is not read."""
    bad = tmp_path / "sparse"
    size = 2**40
    data = with_entry("numbers", shape=[size // 4], data_offsets=[0, size])(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    bad.write_bytes(data[:header])
    os.truncate(bad, header + size)
    with pytest.raises(
        RunError, match=r"its tensors claim 1099511627776 bytes, 1099511627776 follow, and 4294967296 are"
    ):
        load(bad)


def test_mutated_files_are_refused_cleanly(tmp_path, path):
    damaged, _ = script.fuzz(path.read_bytes(), tmp_path, count=300, forged=0, seed=1)
    assert damaged.total() == 300
    assert damaged.keys() <= set(script.REASONS.values())
    assert len(damaged) >= 5


def test_the_fuzz_finds_what_is_not_clean(tmp_path, path, monkeypatch):
    monkeypatch.setattr(script, "load", lambda path: {}[path])
    damaged, _ = script.fuzz(path.read_bytes(), tmp_path, count=3, forged=0, seed=1)
    assert all(outcome.startswith("CRASH: KeyError") for outcome in damaged)

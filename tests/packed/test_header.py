"""Damaged and forged files are refused, each with one sentence, before anything of them is used."""

import json
import os
import tracemalloc

import pytest
from packed_file import SETTINGS, script

from bnn_jax.errors import RunError, UsageError
from bnn_jax.packed import load


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
    "a list of tests": (with_metadata(tested="[]"), r"describe a network \(`accounting` and `tested` must be obj"),
    "deep metadata": (with_metadata(tested="[" * 2000), r"its metadata do not describe a network \(maximum recursion"),
    "unknown network": (
        with_model(name="mnist_mpl"),
        r"cannot be built \(`name` \(='mnist_mpl'\) is not known; did you mean",
    ),
    "unknown setting": (with_model(code="print(1)"), r"cannot be built \(.*`setting` \(='code'\) is not known"),
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
    assert str(refused.value).endswith("export the run again: bnn-jax export RUN -o model.bnn.safetensors")


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
            r"has the format version '0', not '1'; export the run again: bnn-jax export",
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
        with pytest.raises(UsageError, match=r"is not a file; write one: bnn-jax export RUN -o "):
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

"""The name of a file says what is in it: an ending of another format is refused, before any work is done."""

import re

import pytest
from packed_file import packed_of
from run_script import run_script

from bnn_jax.analysis.figures import drawing
from bnn_jax.errors import UsageError
from bnn_jax.packed import save, write_tflite
from bnn_jax.paths import require_ending

OTHERS = (".onnx", ".h5", ".keras", ".pt", ".pth", ".npz", ".json", ".pb", ".msgpack")


def refused(argument, path, written, usual):
    return re.escape(f"`{argument}` (={path}) must end in {written}, the format that is written; name it {usual}")


@pytest.mark.parametrize("name", ["net.bnn.safetensors", "net.safetensors", "net.v2.SafeTensors", "net", "a.onnx/net"])
def test_names_that_are_taken(name):
    assert require_ending("output", name, ".bnn.safetensors") is None


@pytest.mark.parametrize(
    ("name", "usual"), [("net.onnx", "net"), ("a.b/net.v2.tflite", "net.v2"), (".bnn.onnx", ".bnn"), ("net.8", "net")]
)
def test_names_that_are_not(name, usual):
    with pytest.raises(UsageError, match=refused("output", name, ".bnn.safetensors", f"{usual}.bnn.safetensors")):
        require_ending("output", name, ".bnn.safetensors")


@pytest.mark.parametrize("ending", [*OTHERS, ".tflite", ".stablehlo"])
def test_a_packed_network_is_saved_under_no_other_ending(ending, tmp_path):
    path = tmp_path / f"net{ending}"
    with pytest.raises(UsageError, match=refused("path", path, ".bnn.safetensors", "net.bnn.safetensors")):
        save(path, packed_of({}))
    assert not path.exists()


@pytest.mark.parametrize("ending", [*OTHERS, ".bnn.safetensors", ".stablehlo"])
def test_a_tflite_file_has_no_other_ending(ending, tmp_path):
    path = tmp_path / f"net{ending}"
    with pytest.raises(UsageError, match=r"must end in .tflite, the format that is written; name it net.*\.tflite"):
        write_tflite(path, None, {}, (4, 4, 3))
    assert not path.exists()


@pytest.mark.parametrize("ending", [".svg", ".pdf", ".jpg", ".json"])
def test_a_picture_is_a_png(ending, tmp_path):
    path = tmp_path / f"a{ending}"
    with pytest.raises(UsageError, match=refused("path", path, ".png", "a.png")), drawing(path, (1.0, 1.0)):
        pass
    assert not list(tmp_path.iterdir())


EXPORTED = ".bnn.safetensors or .npz or .h or .tflite or .stablehlo"
SCRIPTS = [("export", ("no_run", "-o", f"m{ending}"), EXPORTED) for ending in OTHERS if ending != ".npz"]
SCRIPTS += [("benchmark", ("training", "--output", f"m{ending}"), ".json") for ending in (".csv", ".png", ".txt")]
SCRIPTS += [("summarize", ("lenet", "--json", f"m{ending}"), ".json") for ending in (".csv", ".png", ".yaml")]
SCRIPTS += [("summarize", ("lenet", "--diagram", f"m{ending}"), ".png") for ending in (".svg", ".pdf", ".jpg")]


@pytest.mark.parametrize(("script", "arguments", "endings"), SCRIPTS)
def test_scripts_refuse_it_before_they_begin(script, arguments, endings, tmp_path):
    *rest, name = arguments
    path = tmp_path / name
    done = run_script(script, *rest, path, code=2)
    option = {"-o": "output"}.get(rest[-1], rest[-1].removeprefix("--"))
    assert done.stderr.startswith(f"error: `--{option}` (={path}) must end in {endings}, the format")
    assert f"name it m{endings.split()[0]}\n" in done.stderr and not done.stdout and not path.exists()

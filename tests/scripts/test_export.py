"""A run packed into a file and evaluated from it, by the scripts."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import numpy_program
import pytest
from run_script import run_script

from bnn_jax.packed import load, save
from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig
from bnn_jax.training.evaluation import evaluate_run
from bnn_jax.training.loop import train

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
MLP = ModelConfig("mnist_mlp", width=16, options={"hidden_layers": 2})
CONFIG = Config(
    "test", epochs=3, batch_size=64, loss="cross_entropy", model=MLP, optim=OptimConfig("adam", learning_rate=0.03)
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Trained on images that were moved since."""
    folder = tmp_path_factory.mktemp("export")
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 256), ("validation", 64), ("test", 301)):
        labels = rng.integers(0, 3, count)
        images = rng.integers(0, 160, (count, 6, 6, 1)) + 45 * labels[:, None, None, None]
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    np.savez(folder / "data.npz", **arrays)
    train(replace(CONFIG, data=DataConfig(str(folder / "data.npz"))), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def exported(workdir):
    """The file, and what the script printed."""
    path = workdir.parent / "model.bnn.safetensors"
    return path, run_script("export", workdir, "-o", path).stdout


def test_a_run_is_exported_and_evaluated(workdir, exported):
    path, out = exported
    trained = evaluate_run(workdir)["accuracy"]
    assert trained > 0.5  # of three classes
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    float32_bytes = 4 * (36 * 16 + 16 * 16 + 16 * 3 + 4 * (16 + 16 + 3))
    size = path.stat().st_size
    assert f"model.bnn.safetensors: {size:,} bytes, of them {header:,} of header\n" in out
    assert f"in float32: {float32_bytes:,} bytes, {float32_bytes / size:.1f} times as many\n" in out
    tested = load(path).metadata["tested"]
    assert tested["accuracy"] == pytest.approx(trained)
    assert tested | {"accuracy": 0} == {
        "accuracy": 0,
        "examples": 301,
        "split": "test",
        "which": "best",
        "data": {
            "name": str(workdir.parent / "data.npz"),
            "validation_examples": None,
            "split_seed": 0,
            "stream": False,
            "preprocessing": "none",
            "image_size": None,
            "tokens": None,
        },
    }
    line = f"test: accuracy {100 * trained:.2f} % on 301 examples"
    assert f"{line} (best, packed)\n" in out
    assert run_script("evaluate", path).stdout == f"{line} (packed)\n"
    validation = evaluate_run(workdir, split="validation")["accuracy"]
    out = run_script("evaluate", path, "--split", "validation").stdout
    assert out == f"validation: accuracy {100 * validation:.2f} % on 64 examples (packed)\n"
    error = run_script("evaluate", path, "--which", "last", code=2).stderr
    assert "`--which` (=last) is for a run; a file holds one network; leave it out" in error
    error = run_script("evaluate", path, "--data-dir", "/nowhere", code=2).stderr
    assert "`--data-dir` (='/nowhere') is for sets stored in folders, not" in error and "leave it out" in error


def test_the_accounting_is_in_the_file(workdir, tmp_path):
    """Two hidden layers and the head of 16 units: binary weights, and a gain and an offset for each unit."""
    run_script("export", workdir, "-o", tmp_path / "x", "--which", "last", "--split", "validation")
    metadata = load(tmp_path / "x").metadata
    binary = 36 * 16 + 16 * 16 + 16 * 3
    assert metadata["accounting"]["weights_by_bits"] == {"1": binary, "32": 0}
    assert metadata["accounting"]["macs"] == binary
    # Filters of 36, 16 and 16 weights take 2, 1 and 1 words; the second norm became a threshold.
    assert metadata["accounting"]["payload_bytes"] == 4 * (2 * 16 + 16 + 3 + 2 * 16 + 16 + 2 * 3)
    data = (tmp_path / "x").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    assert len(data) == header + metadata["accounting"]["payload_bytes"] and header < 4096
    last = evaluate_run(workdir, split="validation", which="last")["accuracy"]
    assert metadata["tested"]["accuracy"] == pytest.approx(last)
    assert (metadata["tested"]["which"], metadata["tested"]["examples"]) == ("last", 64)


@pytest.mark.full
def test_float16_makes_it_smaller(workdir, exported, tmp_path):
    run_script("export", workdir, "-o", tmp_path / "half", "--float16")
    full, half = load(exported[0]), load(tmp_path / "half")
    saved = exported[0].stat().st_size - (tmp_path / "half").stat().st_size
    assert saved >= 2 * 2 * 16  # at least the gains and offsets behind the images
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 1)).astype(np.uint8)
    np.testing.assert_allclose(full.logits(images), half.logits(images), atol=0.05)
    assert half.metadata["tested"]["accuracy"] == pytest.approx(full.metadata["tested"]["accuracy"], abs=0.05)


def test_moved_data_and_data_that_do_not_fit(workdir, exported, tmp_path):
    path, moved = exported[0], tmp_path / "moved.npz"
    accuracy = load(path).metadata["tested"]["accuracy"]
    moved.write_bytes((workdir.parent / "data.npz").read_bytes())
    assert f"accuracy {100 * accuracy:.2f} %" in run_script("evaluate", path, "--data", moved).stdout
    error = run_script("evaluate", path, "--data", "digits", code=2).stderr
    assert "`--data` (='digits') has images of shape (8, 8, 1) in 10 classes, but" in error
    assert "takes images of shape (6, 6, 1) in 3; choose another `--data`" in error


def test_a_file_that_names_no_data(exported, tmp_path):
    network = load(exported[0])
    save(tmp_path / "y", network, tested={})
    error = run_script("evaluate", tmp_path / "y", code=2).stderr
    assert "`--data` must name a data set, for" in error and "y names none; as --data cifar10" in error


@pytest.mark.parametrize(
    ("script", "arguments", "code", "text"),
    [
        ("export", ("{tmp}",), 2, "`workdir` (={tmp}) holds no run: there is no"),
        (
            "export",
            ("{run}", "-o", "{data}/x"),
            2,
            "`--output` (={data}/x) cannot be written (",
        ),
        ("evaluate", ("{tmp}/x.safetensors",), 2, "`path` (={tmp}/x.safetensors) is not a file; write one: bnn-jax"),
        ("evaluate", ("{data}",), 1, "is damaged, or no packed network: it claims a header of"),
        (
            "evaluate",
            ("{run}", "--data", "digits"),
            2,
            "`--data` (='digits') is for a file; a run is evaluated on its own",
        ),
    ],
)
def test_what_cannot_be_done_is_one_sentence(workdir, tmp_path, script, arguments, code, text):
    names = {"tmp": tmp_path, "run": workdir, "data": workdir.parent / "data.npz"}
    error = run_script(script, *(argument.format(**names) for argument in arguments), code=code).stderr
    assert error.startswith("error: ") and text.format(**names) in error and len(error.splitlines()) == 1


def test_a_network_without_binary_weights(workdir, tmp_path):
    model = replace(MLP, input_quantizer="full_precision", kernel_quantizer="full_precision")
    data = DataConfig(json.loads((workdir / "config.json").read_text())["data"]["name"])
    train(replace(CONFIG, epochs=1, model=model, data=data), tmp_path / "run")
    error = run_script("export", tmp_path / "run", "-o", tmp_path / "x", code=2).stderr
    assert "holds a network that cannot be packed: `model`" in error and "no layer with quantized weights" in error
    assert not (tmp_path / "x").exists()


def test_a_stablehlo_file_gives_the_same_logits(workdir, exported):
    path = workdir.parent / "model.stablehlo"
    shown = run_script("export", workdir, "-o", path).stdout
    assert f"{path}: {path.stat().st_size:,} bytes" in shown
    network = load(workdir.parent / "model.bnn.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 1), dtype=np.uint8)
    called = jax.export.deserialize(bytearray(path.read_bytes())).call(images)
    np.testing.assert_allclose(called, network.logits(images), rtol=1e-6)


def test_arrays_and_a_c_header_are_written(workdir, exported):
    network, path = load(exported[0]), workdir.parent / "model.npz"
    shown = run_script("export", workdir, "--to", "npz", "-o", path).stdout
    assert f"model.npz: {path.stat().st_size:,} bytes; arrays and steps" in shown
    with np.load(workdir.parent / "data.npz") as data, np.load(path) as found:
        predictions = numpy_program.logits(dict(found), data["test_images"]).argmax(1)
        np.testing.assert_array_equal(predictions, network.predict(data["test_images"]))
    run_script("export", workdir, "-o", path.with_suffix(".h"))
    assert "static const int8_t dense1_kernel[36][16] = {{" in path.with_suffix(".h").read_text()
    error = run_script("export", workdir, "--to", "header", "-o", path, code=2).stderr
    assert "`--output` (=" in error
    assert "must end in .h, the format that is written; name it model.h" in error


def test_a_tflite_file_is_written(workdir):
    path = workdir.parent / "model.tflite"
    shown = run_script("export", workdir, "-o", path).stdout
    assert f"{path}: {path.stat().st_size:,} bytes" in shown
    assert path.read_bytes()[4:8] == b"TFL3"


def test_float16_is_for_one_format(workdir):
    error = run_script("export", workdir, "-o", workdir.parent / "half.tflite", "--float16", code=2).stderr
    assert "`--float16` (=True) is not for .tflite files" in error

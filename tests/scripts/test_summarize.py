"""scripts/summarize.py as a user runs it."""

import json

import pytest
from run_script import run_script

from bnn_jax.analysis.published_sizes import TABLE
from bnn_jax.cli import summarize


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def run(*arguments):
    printed = run_script("summarize", *arguments).stdout
    assert all(len(line) <= 100 for line in printed.splitlines())
    return printed


def test_a_network_in_the_terminal_and_as_json(tmp_path):
    file = tmp_path / "lenet.json"
    printed = run("lenet", "--input-quantizer", "tbn", "--json", file)
    assert "2,850 1-bit weights" in printed
    # 16 filters of 6x5x5 on 10x10 pixels.
    assert "240,000 ternary" in printed
    record = json.loads(file.read_text())
    assert record["quantized_weights"] == {"1": 2850}
    assert [layer["name"] for layer in record["layers"]][:2] == ["conv1/latent_kernel", "conv2/latent_kernel"]
    assert record["layers"][1]["macs"]["ternary"] == 240_000
    dense = 400 * 120 + 120 * 84 + 84 * 10
    assert record["full_precision_weights"] == dense
    # The classifier has ten biases, the other dense layers 120 and 84; the ternary inputs one threshold.
    assert record["megabits"] == (2850 + 32 * (dense + 214 + 1)) / 1e6


def test_options_of_the_network_its_quantizers_and_the_convention(tmp_path):
    file = tmp_path / "resnet.json"
    arguments = ("--width", 8, "--classes", 7, "--channels", 1, "--image-size", 16)
    quantizers = ("--input-quantizer", "dorefa", "--input-quantizer-options", "bits", 2, "--kernel-quantizer", "ttq")
    printed = run("resnet6", *arguments, *quantizers, "--no-batch-norm", "--no-scales", "--json", file)
    assert "batch norm, scales" in printed
    weights = 9 * (8 * 8 + 8 * 8 + 8 * 16 + 16 * 16)
    record = json.loads(file.read_text())
    assert record["quantized_weights"] == {"2": weights}
    assert record["megabits"] == (2 * weights + 32 * (72 + 16 * 7 + 7)) / 1e6


def test_layers_that_are_alike_share_a_line():
    printed = run("resnet20", "--options", "stage_sizes", 4, 4, 4)
    assert "stage1_block1/conv1 and 7 alike" in printed
    assert "stage3_block1/conv2 and 6 alike" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet2",), "`model` (='resnet2') is not known; did you mean 'resnet"),
        (("lenet", "--kernel-quantizer", "xnro"), "did you mean 'xnor'?"),
        (("lenet", "--image-size", "8"), "the network cannot be built: `images` (of 8x8) are too small for a LeNet"),
        (("lenet", "--image-size", "0"), "`--image-size` (=0) must be at least 1"),
        ((), "name a network, as `bnn-jax summarize resnet20`, or a `--table`"),
        (("lenet", "--table", "igp"), "`model` (='lenet') and `--table` (='igp') cannot go together"),
    ],
)
def test_what_cannot_be_summarized(arguments, message):
    assert message in run_script("summarize", *arguments, code=2).stderr


@pytest.mark.full
def test_the_picture_of_its_gradient_paths(tmp_path):
    picture = tmp_path / "paths.png"
    assert str(picture) in run("bireal_resnet20", "--width", 4, "--diagram", picture)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


@pytest.mark.full
def test_the_published_table(tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    names = ("XNOR ResNet18 #", "IR-ResNet18", "Full-precision ResNet18")
    monkeypatch.setattr(summarize, "TABLE", [row for row in TABLE if row.name in names])
    printed = run("--table", "igp", "--json", file)
    assert all(name in printed for name in names)
    rows = json.loads(file.read_text())["rows"]
    assert [row["verdict"] for row in rows] == ["ok", "+0.1 Mbit", "ok"]
    assert [round(row["megabits"], 3) for row in rows] == [28.026, 33.176, 374.064]
    assert [row["printed_megabits"] for row in rows] == [28.0, 33.1, 374.1]
    assert rows[0]["counted"] == "bias, scales; no FC MACs"

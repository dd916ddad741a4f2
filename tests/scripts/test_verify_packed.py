"""scripts/verify_packed.py on a run of a few steps."""

import runpy
import sys
from pathlib import Path

import pytest

from bnn_jax.training.config import Config, DataConfig, ModelConfig, OptimConfig
from bnn_jax.training.loop import train

SCRIPT = Path(__file__).parents[2] / "scripts" / "verify_packed.py"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = Config(
        "verified",
        epochs=1,
        batch_size=64,
        loss="cross_entropy",
        data=DataConfig("digits"),
        model=ModelConfig("resnet6", width=4, input_quantizer="ste_sign", kernel_quantizer="xnor"),
        optim=OptimConfig("adam", 0.01),
        scan_steps=100,
    )
    train(config, folder / "run")
    return folder / "run"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    main = runpy.run_path(str(SCRIPT))
    return main["exit_code_of"](main["main"])


def test_a_trained_run_is_proved_equal(workdir, monkeypatch, capsys):
    assert run(monkeypatch, workdir, "--batch-size", 200) == 0
    shown = capsys.readouterr().out
    assert "the packed network is the trained one" in shown
    assert "predictions that differ: 0 of 359" in shown
    for layer in ("stage1_block1/conv1", "stage1_block1/conv2", "stage2_block1/conv1", "stage2_block1/conv2"):
        (line,) = [line for line in shown.splitlines() if layer in line]
        counts = line.replace(",", "").split()
        assert counts[1] == counts[4] == "0" and int(counts[3]) > 0 and int(counts[6]) > 0


def test_bad_arguments_are_refused(workdir, monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, workdir, "--batch-size", 0) == 2
    assert "`batch_size` (=0) must be at least 1" in capsys.readouterr().err
    assert run(monkeypatch, tmp_path / "none") == 2
    assert str(tmp_path / "none") in capsys.readouterr().err

"""Weights out of a run and into one, as a user has them: installed, by commands and in a short program."""

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "docs" / "numpy_inference.py"
GOLDENS = ROOT / "tests" / "convert" / "goldens"

EXPORT_TEST = """
import numpy as np
from bnn_jax import load_dataset
test = load_dataset("digits").test
np.savez("test.npz", images=test.images, labels=test.labels)
"""

FROM_TORCH = """
import numpy as np
from bnn_jax import convert
from bnn_jax.models.build import build_model

model = build_model("bireal18", num_classes=7, width=2, options={{"stage_sizes": (2, 3)}})
variables = convert.load_weights("{folder}/bireal.npz", model, (32, 32, 3), ignored=("logits",))
images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
logits, _ = model.apply(variables, images, train=False)
print(np.abs(logits - np.load("{folder}/bireal.npz")["logits"]).max() < 1e-5)
try:
    convert.load_weights("{folder}/irnet_resnet20.npz", model, (32, 32, 3), layout="bireal")
except ValueError as error:
    print(error)
"""


@pytest.mark.full
def test_a_run_s_weights_in_numpy_and_as_the_start_of_another(wheel, tmp_path):
    common = ("train", "--config", "digits_xnor", "--epochs", "1", "--model.width", "8")
    wheel.run(*common, "--workdir", "first", cwd=tmp_path)
    said = wheel.run("export", "first", "--to", "npz", cwd=tmp_path).stdout
    wheel.python("-c", EXPORT_TEST, cwd=tmp_path)
    alone = wheel.python(PROGRAM, "model.npz", "test.npz", cwd=tmp_path).stdout
    accuracy, _, _, examples, _ = alone.split()
    assert f"test: accuracy {accuracy} % on {examples} examples" in said
    with np.load(tmp_path / "model.npz") as file:
        assert set(np.unique(file["stage1_block1/conv1/kernel"])) == {-1, 1}

    wheel.run(*common, "--workdir", "second", "--init-from", "first", cwd=tmp_path)
    assert json.loads((tmp_path / "second" / "config.json").read_text())["init_from"] == "first"


@pytest.mark.full
def test_a_state_dict_of_pytorch_without_pytorch(wheel, tmp_path):
    said = wheel.python("-c", FROM_TORCH.format(folder=GOLDENS), cwd=tmp_path).stdout
    first, second = said.splitlines()
    assert first == "True"
    assert "missing: fc.bias, fc.weight, " in second
    assert "unknown: " in second

"""A network of one's own: a module in a file, no table, no clone."""

import re
import runpy
import textwrap
from pathlib import Path

import numpy as np
import pytest

import bnn_jax
from bnn_jax.errors import UsageError
from bnn_jax.names import IN_MEMORY
from bnn_jax.training.config import Config, ModelConfig, OptimConfig

ROOT = Path(__file__).parents[2]
MYNET = '''
"""Thirty lines, as one writes Flax: plain logits, neither `train` nor `progress`, names in the place of quantizers."""

import flax.linen as nn
import jax.numpy as jnp

from bnn_jax import BinaryConv, BinaryDense, make_sign

gauss_sign = make_sign(lambda x: jnp.exp(-x * x))


class MyNet(nn.Module):
    num_classes: int = 10
    width: int = 16

    @nn.compact
    def __call__(self, x):
        x = nn.GroupNorm(4)(nn.Conv(self.width, (3, 3))(x))
        y = BinaryConv(self.width, input_quantizer="ste_sign", kernel_quantizer="xnor")(x)
        x = x + nn.GroupNorm(4)(y)
        y = BinaryConv(2 * self.width, 3, 2, input_quantizer=gauss_sign, kernel_quantizer="approx_sign")(x)
        x = nn.GroupNorm(4)(y)
        x = x.reshape(x.shape[0], -1)
        x = BinaryDense(32, input_quantizer="ste_sign", kernel_quantizer="xnor")(x)
        return nn.Dense(self.num_classes)(nn.relu(x))


def cross_entropy(logits, labels):
    log = logits - jnp.log(jnp.exp(logits).sum(-1, keepdims=True))
    return -jnp.take_along_axis(log, labels[:, None], -1)[:, 0]
'''
CONFIG = '''
"""The same by the things themselves."""

from bnn_jax.training.config import Config, ModelConfig, OptimConfig
from mynet import MyNet, cross_entropy, gauss_sign
import optax

def get_config():
    optim = OptimConfig(optax.lion, learning_rate=0.002)
    return Config("mine", epochs=1, batch_size=64, loss=cross_entropy, model=ModelConfig(MyNet(width=4)), optim=optim)
'''
REST = """
import sys
import jax, numpy as np
from bnn_jax.cli.main import main
from bnn_jax.packed import load
import bnn_jax

def command(*words):
    sys.argv = ["bnn-jax", *words]
    assert main() == 0, words

command("summarize", "mynet:MyNet", "--image-size", "8", "--channels", "1")
command("evaluate", "run")
command("verify", "run")
for ending in ("bnn.safetensors", "npz", "tflite", "stablehlo"):
    command("export", "run", "-o", f"model.{ending}")
command("evaluate", "model.bnn.safetensors")

run = bnn_jax.load_run("run")
images = run.dataset.test.images
with open("model.stablehlo", "rb") as file:
    stablehlo = jax.export.deserialize(bytearray(file.read()))
mean, std = np.float32(run.dataset.mean), np.float32(run.dataset.std)
np.savez(
    "predictions.npz",
    images=images,
    normalized=(images - mean) / std,
    run=run.predict(images),
    loaded=load("model.bnn.safetensors").predict(images),
    stablehlo=stablehlo.call(images).argmax(1),
)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mynet.py").write_text(MYNET)
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "rest.py").write_text(textwrap.dedent(REST))
    return tmp_path


@pytest.mark.full
def test_a_module_goes_all_the_way_by_commands(wheel, folder):
    """train -> evaluate -> summarize -> verify -> export -> load -> predict; every file predicts what the run does."""
    pytest.importorskip("flatbuffers", reason="the package flatbuffers is not installed")
    from tflite_interpreter import interpret

    named = ("--model.name", "mynet:MyNet", "--loss", "./mynet.py:cross_entropy", "--optim.name", "optax:lion")
    small = ("--optim.learning-rate", 0.002, "--epochs", 2, "--batch-size", 64, "--workdir", "run")
    wheel.run("train", "--config", "digits_xnor", *named, *small, cwd=folder)
    assert f'"loss": "{folder}/mynet.py:cross_entropy"' in (folder / "run" / "config.json").read_text()
    done = wheel.python("rest.py", cwd=folder)
    assert "the packed network is the trained one" in done.stdout
    accuracies = re.findall(r"^test: accuracy ([\d.]+) %", done.stdout, re.M)
    assert len(accuracies) == 6 and len(set(accuracies)) == 1
    found = dict(np.load(folder / "predictions.npz"))
    alone = runpy.run_path(str(ROOT / "docs" / "numpy_inference.py"))["logits"]
    found["npz"] = alone(dict(np.load(folder / "model.npz")), found["images"]).argmax(1)
    some = slice(0, 20)
    found["tflite"] = interpret((folder / "model.tflite").read_bytes(), found["normalized"][some]).argmax(1)
    for form in ("loaded", "stablehlo", "npz", "tflite"):
        np.testing.assert_array_equal(found[form], found["run"][: len(found[form])], form)
    assert len(set(found["run"].tolist())) > 3


@pytest.mark.full
def test_things_in_a_config_and_processes_of_a_sweep(wheel, folder):
    """What a config file has of its own is found by worker processes, and from another folder."""
    sweep = ("--seeds", 1, "--jobs", 1, "--execution", "processes", "--workdir", "swept")
    wheel.run("sweep", "--config", "config.py", *sweep, cwd=folder)
    (result,) = (folder / "swept").rglob("result.json")
    (folder / "elsewhere").mkdir()
    assert "accuracy" in wheel.run("evaluate", result.parent, cwd=folder / "elsewhere").stdout


@pytest.mark.full
def test_a_notebooks_class_trains_in_memory(tmp_path):
    """No import finds it again: the run is whole in this process, and its folder says why it is for no other."""
    import flax.linen as nn

    class Mine(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = bnn_jax.BinaryConv(4, input_quantizer="ste_sign", kernel_quantizer="xnor")(x)
            return nn.Dense(10)(x.mean((1, 2)))

    model, optim = ModelConfig(Mine), OptimConfig("adam", 0.01)
    config = Config("mine", epochs=1, batch_size=64, loss="cross_entropy", model=model, optim=optim)
    run = bnn_jax.train(config, tmp_path / "run", on_progress=lambda *_: None)
    images = run.dataset.test.images
    np.testing.assert_array_equal(run.freeze().predict(images), run.predict(images))
    assert run.evaluate()["accuracy"] == run.result["test_accuracy_best"]
    assert bnn_jax.train(config, tmp_path / "run", on_progress=lambda *_: None).result == run.result
    assert f'"name": "{IN_MEMORY}' in (tmp_path / "run" / "config.json").read_text()
    with pytest.raises(UsageError, match=r"`model.name` .*Mine.* was given as an object that no import finds again"):
        bnn_jax.load_run(tmp_path / "run").freeze()

"""The package as pip installs it: a terminal in some folder, no clone."""

import json
import zipfile

import pytest

import bnn_jax
from bnn_jax.cli.main import COMMANDS
from bnn_jax.extras import EXTRAS

pytestmark = pytest.mark.full
SMALL = ("--epochs", "1", "--model.width", "4", "--batch-size", "64")


def test_what_travels_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel.file).namelist()
    assert {name.split("/")[0] for name in names} == {"bnn_jax", f"bnn_jax-{bnn_jax.__version__}.dist-info"}
    assert "bnn_jax/configs/digits_xnor.py" in names
    assert "bnn_jax/zoo/files/digits_vit_tiny.bnn.safetensors" in names
    assert not [name for name in names if "test" in name or name.endswith((".json", ".png", ".npz"))]


def test_the_command_and_python_m_are_one(wheel, tmp_path):
    found = [wheel.run("--version", cwd=tmp_path), wheel.python("-m", "bnn_jax", "--version", cwd=tmp_path)]
    assert [done.stdout for done in found] == [f"{bnn_jax.__version__}\n"] * 2
    done = wheel.python("-c", "import bnn_jax; print(bnn_jax.__file__)", cwd=tmp_path)
    assert done.stdout.startswith(str(wheel.folder))


def test_every_command_is_there_and_lists_what_a_config_can_name(wheel, tmp_path):
    code = """
import sys
from bnn_jax.cli.main import COMMANDS, main
for line in [f"{name} --help" for name in COMMANDS] + ["list optimizers", "train --config digits"]:
    sys.argv = ["bnn-jax", *line.split()]
    try:
        ended = main()
    except SystemExit as help_shown:
        ended = help_shown.code
    print(f"{line}: {ended or 0}")
"""
    done = wheel.python("-c", code, cwd=tmp_path)
    for name in COMMANDS:
        assert f"usage: bnn-jax {name} " in done.stdout and f"\n{name} --help: 0\n" in done.stdout
    assert "Deep Frank-Wolfe" in done.stdout and "Helwegen et al." in done.stdout
    assert "list optimizers: 0\n" in done.stdout and "train --config digits: 2\n" in done.stdout
    assert "`--config` (=digits) does not exist" in done.stderr and "digits_xnor" in done.stderr


def test_importing_it_is_quick_and_light(wheel, tmp_path):
    code = """
import sys
import bnn_jax
assert "jax" not in sys.modules
from bnn_jax import *
print({"grain", "tensorflow_datasets", "matplotlib", "orbax", "sklearn", "scipy", "PIL"} & set(sys.modules))
"""
    clock = "\nimport time; print(time.process_time())"

    def seconds(code):
        return min(float(wheel.python("-c", code + clock, cwd=tmp_path).stdout.split()[-1]) for _ in range(3))

    assert wheel.python("-c", code, cwd=tmp_path).stdout == "set()\n"
    assert seconds(code) < 1.5 * seconds("import jax, flax.linen, optax, chex, jaxtyping")


def test_a_comparison_with_a_config_by_its_name(wheel, tmp_path):
    line = ("compare", "--config", "digits_xnor", "--optimizers", "adam", "--seeds", "0", "--workdir", "mine", *SMALL)
    printed = wheel.run(*line, "--execution", "sequential", cwd=tmp_path).stdout
    assert "adam" in printed and "mine: report.md" in printed
    assert "\nbnn-jax compare optimizers --config digits_xnor " in (tmp_path / "mine" / "report.md").read_text()
    accuracy = json.loads((tmp_path / "mine" / "adam" / "seed0" / "result.json").read_text())["test_accuracy_last"]
    done = wheel.python("-m", "bnn_jax", "evaluate", "mine/adam/seed0", "--which", "last", cwd=tmp_path)
    assert done.stdout.startswith(f"test: accuracy {100 * accuracy:.2f} %")


def test_training_in_memory_without_any_extra_and_without_posix(wheel, tmp_path):
    code = f"""
import sys, types
sys.modules.update(dict.fromkeys({["fcntl", "resource", *EXTRAS]}))  # Importing one of them raises ImportError.
from dataclasses import replace
from bnn_jax.errors import UsageError
from bnn_jax.training.config import ModelConfig, load_config
from bnn_jax.training.loop import train
config = load_config("digits_xnor")
config = replace(config, epochs=1, batch_size=64, model=replace(config.model, width=4), optim=config.optimizers[1])
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda *_: None)  # Windows has that.
print(train(config, "run")["test_accuracy_last"] > 0)
from bnn_jax.cli import main, plot, prepare
for words in (["plot", "run"], ["prepare", "mnist"], ["train", "--data.name", "cifar10", "--data.data-dir", "."]):
    sys.argv = ["bnn-jax", *words]
    assert main.main() == 2
"""
    done = wheel.python("-c", code, cwd=tmp_path)
    assert done.stdout.startswith("True\n")
    assert "pip install 'bnn_jax[plot]'" in done.stderr
    assert "pip install 'bnn_jax[tfds]'" in done.stderr

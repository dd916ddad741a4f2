"""The package as pip installs it, outside the checkout."""

import zipfile

import pytest

import bnn_jax

pytestmark = pytest.mark.full


def test_it_is_the_wheel_that_runs(wheel, tmp_path):
    done = wheel.python("-c", "import bnn_jax; print(bnn_jax.__file__, bnn_jax.__version__)", cwd=tmp_path)
    path, version = done.stdout.split()
    assert path.startswith(str(wheel.folder)) and version == bnn_jax.__version__


def test_what_travels_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel.file).namelist()
    assert "bnn_jax/configs/digits_xnor.py" in names
    assert {name.split("/")[0] for name in names} == {"bnn_jax", f"bnn_jax-{bnn_jax.__version__}.dist-info"}


def test_a_config_by_its_name_from_anywhere(wheel, tmp_path):
    size = ("--config", "digits_xnor", "--epochs", "1", "--model.width", "4")
    done = wheel.run("train", *size, "--workdir", "run", cwd=tmp_path)
    assert "test accuracy" in done.stdout and (tmp_path / "run" / "result.json").exists()
    done = wheel.python("-m", "bnn_jax", "evaluate", "run", cwd=tmp_path)
    assert done.stdout.startswith("test: accuracy")

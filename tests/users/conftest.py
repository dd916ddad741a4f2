"""What users have: the wheel, installed outside the checkout, with the environment's other packages."""

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "bnn_jax", "configs")


class Wheel:
    """An environment in which the package was installed from its wheel.

    Attributes:
      file: the wheel.
      folder: of the environment, which has no tests and no results; a working folder may lie in it.
    """

    def __init__(self, file: Path, folder: Path, env: dict[str, str]):
        self.file, self.folder = file, folder
        self.env = {name: value for name, value in env.items() if name != "PYTHONPATH"}

    def run(self, *arguments: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess:
        """Run `bnn-jax` with the arguments in the folder `cwd`; its exit code must be `code`."""
        return self._run("bnn-jax", *arguments, cwd=cwd, code=code)

    def python(self, *arguments: object, cwd: Path, code: int = 0) -> subprocess.CompletedProcess:
        """Run Python with the arguments, as :meth:`run`."""
        return self._run("python", *arguments, cwd=cwd, code=code)

    def _run(self, program: str, *arguments: object, cwd: Path, code: int) -> subprocess.CompletedProcess:
        command = [str(self.folder / "bin" / program), *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env=self.env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done


@pytest.fixture(scope="session")
def wheel(tmp_path_factory, worker_id, subprocess_env) -> Wheel:
    """The package as `pip install` leaves it; all test processes share the one that the first of them builds."""
    shared = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        shared = shared.parent
    folder = shared / "installed"
    with open(shared / "wheel.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "bin" / "bnn-jax").exists():
            install(build(shared), folder)
    (file,) = shared.glob("*.whl")
    return Wheel(file, folder, subprocess_env)


def build(folder: Path) -> Path:
    """Build the wheel from a copy of the sources, for a build leaves files beside them."""
    sources = folder / "sources"
    sources.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, sources / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources)
    (file,) = folder.glob("*.whl")
    return file


def install(file: Path, folder: Path) -> None:
    """Install the wheel into an environment of its own, which finds all other packages where this one does."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    # A path in a .pth file is searched for packages; .pth files in it, as that of an editable install, are not read.
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    Path(paths["purelib"], "others.pth").write_text(sysconfig.get_paths()["purelib"])
    pip("--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", "--force-reinstall", file)


def pip(*arguments: object) -> None:
    """Run this environment's pip."""
    options = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | options, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

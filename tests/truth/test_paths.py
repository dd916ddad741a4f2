"""A path that a user gives is one of this machine: URLs are refused by every script and every public function."""

import importlib
import inspect
import pkgutil
import re
import runpy
import typing
from pathlib import Path

import pytest
from run_script import run_script

import bnn_jax
from bnn_jax.cli.main import COMMANDS
from bnn_jax.data import load_dataset, open_stream, prepare_dataset
from bnn_jax.data.prepare import write_array_record
from bnn_jax.errors import UsageError
from bnn_jax.paths import cache_folder, local_path
from bnn_jax.stages.stage import Stage, check_stages, replace_stage
from bnn_jax.sweeps.comparison import compare
from bnn_jax.sweeps.engine import Run, run_all
from bnn_jax.training.config import Config, DataConfig, config_module, find_config, load_config
from bnn_jax.training.input_pipeline import load_data
from bnn_jax.training.loop import train, train_together

URL = "gs://bucket/run"
REFUSED = r"`{}` \(='gs://bucket/[\w./]*'\) is a URL, and only this machine's file system is read and written; mount"
ROOT = Path(bnn_jax.__file__).parents[1]
NEEDED = {
    "train_stages": ["dir_net"],
    "benchmark": ["training"],
    "prepare_data": ["mnist"],
    "evaluate": ["runs/mine"],
    "export": ["runs/mine"],
    "plot_run": ["runs/mine"],
    "verify_packed": ["runs/mine"],
    "summarize": ["lenet"],
}
"""Positional arguments that scripts need."""
WITHOUT_OPTIONS = {"check_tflite"}
"""It runs without this package."""


def arguments_of(script):
    """The dataclass of its options: of the command that the script calls, or its own."""
    called = re.search(r'run_command\("(.*)"\)', script.read_text())
    if called is None:
        return runpy.run_path(str(script))["Arguments"]
    return importlib.import_module(f"bnn_jax.cli.{COMMANDS[called[1]].module}").Arguments


def path_options():
    for file in sorted((ROOT / "scripts").glob("*.py")):
        if file.stem in WITHOUT_OPTIONS:
            continue
        for name, hint in typing.get_type_hints(arguments_of(file)).items():
            if hint is Path or Path in typing.get_args(hint):
                yield file.stem, name
        if file.stem in ("train", "compare_optimizers"):  # Settings of the config, which all read in one way.
            yield file.stem, "data.data_dir"
            yield file.stem, "data.name"


SCRIPTS = list(path_options())


@pytest.mark.parametrize(("script", "name"), SCRIPTS, ids=lambda value: value)
def test_every_path_of_every_script(script, name, tmp_path):
    needed = NEEDED.get(script, [])
    given = {
        "data.data_dir": ["--data.name", "mnist", "--data.data-dir", URL],
        "data.name": ["--data.name", f"{URL}.npz"],
    }
    is_run = needed == ["runs/mine"] and name in ("workdir", "workdirs")
    line = given.get(name) or ([URL] if is_run else [*needed, f"--{name}", URL])
    needed = needed if name in given else []
    workdir = [] if "workdir" in line or line[0] == URL or not given.get(name) else ["--workdir", tmp_path / "run"]
    execution = ["--execution", "sequential"] if given.get(name) and script.startswith(("sweep", "compare")) else []
    done = run_script(script, *needed, *line, *workdir, *execution, code=2)
    typed = "workdir" if is_run else f"--{name}".replace("_", "-")
    with pytest.raises(UsageError, match=f"^error: {REFUSED.format(typed)}"):
        raise UsageError(done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert not (ROOT / "gs:").exists() and not (tmp_path / "run").exists()


def test_commands_parse_their_options_in_one_way():
    """What takes paths past the check would run here."""
    programs = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "bnn_jax" / "cli").glob("*.py")]
    assert [program.name for program in programs if "tyro.cli(" in program.read_text()] == []


def test_a_file_that_is_not_there():
    done = run_script("check_tflite", f"{URL}.tflite", f"{URL}.npz", code=2)
    assert done.stderr.endswith("error: argument files: 'gs://bucket/run.tflite' is not a file of this machine\n")


def test_scripts_with_paths_are_all_there():
    assert {script for script, _ in SCRIPTS} == {
        file.stem for file in (ROOT / "scripts").glob("*.py") if file.stem not in WITHOUT_OPTIONS
    }


def functions_with_paths():
    """(function, parameter) of every public function that takes text or a path for one."""
    names = {module.name for module in pkgutil.walk_packages(bnn_jax.__path__, "bnn_jax.")}
    # The first one is written in PyTorch, without paths; the other one has the check itself.
    for module in sorted(names - {"bnn_jax.benchmarks.torch_peer", "bnn_jax.paths"}):
        for name, function in inspect.getmembers(importlib.import_module(module), inspect.isfunction):
            if function.__module__ != module or name.startswith("_"):
                continue
            for parameter in inspect.signature(function).parameters.values():
                kinds = {getattr(kind, "__name__", None) for kind in typing.get_args(parameter.annotation)}
                if {"str"} < kinds and kinds & {"Path", "PathLike"}:
                    yield pytest.param(function, parameter.name, id=f"{name}-{parameter.name}")


FUNCTIONS = list(functions_with_paths())
FIRST = {"name": "mnist", "seeds": (0,)}
"""What must be valid to come to a path."""


@pytest.mark.parametrize(("function", "name"), FUNCTIONS)
def test_every_path_of_every_function(function, name, unchecked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    required = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind != p.VAR_KEYWORD
    ]
    arguments = {needed: FIRST.get(needed, []) for needed in required} | {name: URL}
    if name == "output" and "workdirs" not in required:
        arguments["workdir"] = tmp_path
    shown = "--config" if function in (config_module, find_config, load_config) else name
    for url in (URL, Path(URL)):
        with pytest.raises(UsageError, match=REFUSED.format(shown)):
            function(**arguments | {name: url})
    assert list(tmp_path.iterdir()) == []


def test_many_functions_take_paths():
    found = {function.values[0].__name__ for function in FUNCTIONS}
    assert found >= {"train", "evaluate_run", "load_dataset", "open_stream", "save", "load", "write_tflite", "plot_run"}
    assert len(FUNCTIONS) >= 30


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: train_together([], [URL]), "workdirs"),
        (lambda: write_array_record("mnist", [URL], data_dir="data"), "archives"),
        (lambda: run_all([Run("mine", Config("mine", 1, 8), Path(URL))]), "workdir"),
        (lambda: check_stages([Stage("first", Config("mine", 1, 8), initialise_from=URL)]), "initialise_from"),
        (lambda: check_stages([Stage("first", Config("mine", 1, 8), teacher=URL)]), "teacher"),
        (lambda: replace_stage([Stage("first", Config("mine", 1, 8))], "first", URL), "folder"),
        (lambda: load_dataset("gs://bucket/mine.npz"), "name"),
        (lambda: load_dataset("gs://bucket/mnist"), "name"),
        (lambda: open_stream("gs://bucket/mnist"), "name"),
        (lambda: train(Config("mine", 1, 8), "run", data="gs://bucket/mine"), "data"),
        (lambda: compare({"mine": Config("mine", 1, 8)}, "runs", seeds=[0], data=Path("gs://bucket/mine.npz")), "data"),
        (lambda: load_data(DataConfig("mnist", data_dir=URL)), "data.data_dir"),
    ],
)
def test_paths_in_other_places(call, name):
    with pytest.raises(UsageError, match=REFUSED.format(name)):
        call()


def test_folders_that_the_environment_names(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", URL)
    monkeypatch.setenv("XDG_CACHE_HOME", "s3://bucket/cache")
    assert len(load_dataset("digits").test) == 359  # They do not matter to it.
    for call in (lambda: load_dataset("mnist", cache_dir="cache"), lambda: prepare_dataset("mnist")):
        with pytest.raises(UsageError, match=REFUSED.format(r"\$TFDS_DATA_DIR")):
            call()
    with pytest.raises(UsageError, match=r"`\$XDG_CACHE_HOME` \(='s3://bucket/cache'\) is a URL"):
        cache_folder()


@pytest.mark.parametrize(
    "url", ["file:///tmp/run", "s3://b", "http://host/run", "gs:/bucket", "memory://x", Path("hdfs://n/x")]
)
def test_urls(url):
    with pytest.raises(UsageError, match=r"`workdir` \(='\w+://\w*.*'\) is a URL"):
        local_path("workdir", url)


@pytest.mark.parametrize("path", ["runs/mine", "/runs/a:b/c", "C:/runs", "C:\\runs", "a:b", "run:", "./gs:/bucket"])
def test_paths(path):
    assert local_path("workdir", path) == Path(path)


def test_a_tilde_is_the_users_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert local_path("workdir", "~/runs") == Path("/home/someone/runs")
    with pytest.raises(UsageError, match=r"`workdir` \(='~nobody-here/runs'\) is no path \(.*\); write the folder out"):
        local_path("workdir", "~nobody-here/runs")
    assert local_path("workdir", "a~/b") == Path("a~/b")

"""The command `bnn-jax`: what it lists, what it refuses, what it imports."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import bnn_jax
from bnn_jax.cli import main as command
from bnn_jax.errors import UsageError
from bnn_jax.training.config import find_config, load_config

ROOT = Path(bnn_jax.__file__).parents[1]
IN_WORDS = "import sys, bnn_jax.cli.main as c; sys.argv[1:] = {}; print(c.main()); print(sorted({} & set(sys.modules)))"


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["bnn-jax", *words])
    code = command.main()
    return code, capsys.readouterr()


def test_help_names_every_command_and_starts_without_jax():
    heavy = {"jax", "numpy", "tyro", "flax"}
    done = subprocess.run([sys.executable, "-c", IN_WORDS.format(["--help"], heavy)], capture_output=True, text=True)
    assert done.stdout.endswith("0\n[]\n"), done.stdout + done.stderr
    for name in command.COMMANDS:
        assert f"\n  {name} " in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


@pytest.fixture
def own_handler():
    handler = lambda *_: None
    previous = signal.signal(signal.SIGTERM, handler)
    yield handler
    signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize("words", [("--help",), ("--no-such-option", "1"), ("--config", "none")], ids=" ".join)
def test_a_command_that_does_not_train_leaves_sigterm_as_it_was(monkeypatch, capsys, own_handler, words):
    with contextlib.suppress(SystemExit):
        run(monkeypatch, capsys, "train", *words)
    assert signal.getsignal(signal.SIGTERM) is own_handler


def test_a_command_runs_in_another_thread(monkeypatch, capsys):
    with ThreadPoolExecutor(1) as pool:
        code, printed = pool.submit(run, monkeypatch, capsys, "train", "--config", "none").result()
    assert code == 2
    assert "`--config` (=none) does not exist" in printed.err


def test_importing_the_package_is_lazy():
    """Nothing heavy is imported before it is used; the packages are there without an import of their own."""
    heavy = {"jax", "flax", "grain", "tensorflow_datasets", "matplotlib", "orbax", "sklearn", "scipy", "PIL"}
    code = f"""
import sys, bnn_jax
print({heavy} & set(sys.modules))
print(bnn_jax.layers.BinaryConv is bnn_jax.BinaryConv, bnn_jax.packed.load.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\nTrue load\n", done.stderr
    assert {"layers", "packed", "BinaryConv", "__version__"} <= set(dir(bnn_jax))
    with pytest.raises(AttributeError, match="module 'bnn_jax' has no attribute 'layer'"):
        bnn_jax.layer  # noqa: B018


@pytest.mark.parametrize("words", [("--help",), ("list", "models")], ids=" ".join)
def test_a_reader_that_has_seen_enough_is_no_error(words):
    """Its end of the pipe is closed before anything is written."""
    call = "import sys, bnn_jax.cli.main as c; sys.argv[1:] = {}; sys.exit(c.main())"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", call.format(list(words))], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.stderr == b"" and done.returncode == 141


def test_a_full_disk_behind_the_output_is_a_sentence_and_a_closed_output_nothing():
    call = [sys.executable, "-c", "import sys, bnn_jax.cli.main as c; sys.argv[1:] = ['--version']; sys.exit(c.main())"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        1,
        "error: cannot write what is printed (No space left on device); make room and run the command again\n",
    )
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *call], stderr=subprocess.PIPE, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")


@pytest.mark.full
def test_without_a_home_nothing_is_kept_and_a_folder_is_asked_for(tmp_path):
    """As in a container whose user is none that it knows."""
    call = (
        "import pathlib, sys\n"
        "def home(): raise RuntimeError('Could not determine home directory.')\n"
        "pathlib.Path.home = home\n"
        "import bnn_jax.cli.main as c; sys.argv[1:] = {}; sys.exit(c.main())"
    )
    known = ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR", "JAX_COMPILATION_CACHE_DIR")
    env = {name: value for name, value in os.environ.items() if name not in known}
    for words, code, text in (
        (["evaluate", "zoo:digits_xnor_resnet6"], 0, ""),
        (["prepare", "mnist"], 2, "error: `$TFDS_DATA_DIR` (unset) must name a folder, for there is no home folder\n"),
    ):
        program = [sys.executable, "-c", call.format(words)]
        done = subprocess.run(program, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, text)


def test_a_table_a_benchmark_and_a_network_that_are_nearly_named(monkeypatch, capsys):
    for words, text in (
        (("list", "modles"), "error: `TABLE` (='modles') is not known; did you mean 'models'?"),
        (("benchmark", "trainng"), "error: `BENCHMARK` (='trainng') is not known; did you mean 'training'?"),
        (("evaluate", "digits_xnor_resnet6"), "did you mean zoo:digits_xnor_resnet6?"),
        (
            ("evaluate", "mine.bnn.safetensor"),
            "is no folder of a run, no file of bnn-jax export and no zoo:NAME;",
        ),
    ):
        code, printed = run(monkeypatch, capsys, *words)
        assert code == 2 and text in printed.err
    assert run(monkeypatch, capsys, "help") == run(monkeypatch, capsys, "--help")


def test_the_version(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "--version") == (0, (f"{bnn_jax.__version__}\n", ""))


def test_no_command_and_an_unknown_one(monkeypatch, capsys):
    code, printed = run(monkeypatch, capsys)
    assert code == 2 and "commands:" in printed.out
    code, printed = run(monkeypatch, capsys, "trian")
    assert code == 2 and printed.err.startswith("error: `command` (='trian') is not known; did you mean 'train'?")
    code, printed = run(monkeypatch, capsys, "compare", "estimator")
    assert code == 2 and "did you mean 'compare estimators'?" in printed.err
    code, printed = run(monkeypatch, capsys, "compare", "")
    assert code == 2 and printed.err.startswith("error: `command` (='compare ') is not known")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name a network, as `bnn-jax summarize resnet20`, or a `--table`"),
        (
            ("lenet", "--table", "igp"),
            "`model` (='lenet') and `--table` (='igp') cannot go together; name a network or a",
        ),
        (("lenet", "--width", "0"), "`--width` (=0) must be at least 1"),
        (("lenet", "--kernel-quantizer", "xnr"), "`--kernel-quantizer` (='xnr') is not known; did you mean 'xnor'?"),
        (("lenet", "--options", "width", "2"), "`--options` (='width') is not known; choose one of: execution, extra_"),
        (("lenet", "--stem", "cifar"), "`--stem` (='cifar') is not an option of lenet; leave it out"),
        (
            ("resnet18", "--stem", "cifar", "--options", "stem", "imagenet"),
            "`--stem` (='cifar') is another than the stem of `--options`, imagenet; leave one out",
        ),
        (
            ("bitnet_lm", "--tokens", "8", "--image-size", "64"),
            "`--image-size` (=64) is for images, not for `--tokens`;",
        ),
        (
            ("bitnet_lm", "--tokens", "8", "--channels", "1"),
            "`--channels` (=1) is for images, not for `--tokens`; leave",
        ),
    ],
)
def test_what_cannot_be_summarized_is_named_as_it_was_typed(words, message, monkeypatch, capsys):
    code, printed = run(monkeypatch, capsys, "summarize", *words)
    assert code == 2 and printed.err.startswith(f"error: {message}")


def test_a_folder_with_spaces_is_quoted_in_the_command_to_go_on_with(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "my sets" / "imagenet2012" / "5.1.0"
    folder.mkdir(parents=True)
    monkeypatch.setattr("bnn_jax.cli.synthesize.write_synthetic_imagenet", lambda **_: folder)
    code, printed = run(monkeypatch, capsys, "synthesize", "--data-dir", str(tmp_path / "my sets"))
    assert code == 0 and f"--data.data-dir '{tmp_path}/my sets' --data.val" in " ".join(printed.out.split())


def test_what_a_table_does_not_count_has_the_name_of_its_option(monkeypatch, capsys):
    code, printed = run(monkeypatch, capsys, "summarize", "--table", "igp", "--no-batch-norm")
    assert (code, printed.err) == (2, "error: `--no-batch-norm` is for a network, not for a `--table`; leave it out\n")


@pytest.mark.parametrize(
    ("words", "program"),
    [
        (("compare", "--seeds", "3"), "bnn-jax compare optimizers"),
        (("compare", "estimators", "--seeds", "3"), "bnn-jax compare estimators"),
        (("train",), "bnn-jax train"),
    ],
)
def test_a_command_is_named_in_its_reports(words, program, monkeypatch):
    monkeypatch.setattr(command, "run_command", lambda name: 0)
    monkeypatch.setattr(sys, "argv", ["/some/where/bnn-jax", *words])
    assert command.main() == 0
    assert sys.argv == [program, *(word for word in words if word not in program.split())]


def test_every_script_calls_its_command():
    for script in (ROOT / "scripts").glob("*.py"):
        if called := re.search(r'run_command\("(.*)"\)', script.read_text()):
            assert called[1] in command.COMMANDS
            assert len(script.read_text().splitlines()) <= 10


def test_a_config_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("digits_xnor") == load_config(ROOT / "configs" / "digits_xnor.py")
    with pytest.raises(UsageError, match=r"`--config` \(=digits\) does not exist; .* by name alone: .*digits_xnor"):
        find_config("digits")
    (tmp_path / "digits_xnor").write_text("")
    assert find_config("digits_xnor") == Path("digits_xnor")

"""What export says of a file that it cannot write, and evaluate of what a file tells of its data."""

import errno

import pytest

from bnn_jax.cli import benchmark, evaluate, export, summarize
from bnn_jax.cli.options import write_output
from bnn_jax.errors import RunError, UsageError
from bnn_jax.packed import artifact, c_header, named_arrays
from bnn_jax.paths import require_writable
from bnn_jax.zoo import load

LONG = [pytest.param(ending, marks=pytest.mark.full) for ending in (".h", ".bnn.safetensors")]


@pytest.mark.parametrize("ending", [".npz", *LONG])
def test_a_file_that_cannot_be_written_is_told_in_a_sentence(ending, tmp_path, monkeypatch):
    network = load("digits_xnor_resnet6")
    monkeypatch.setattr(export, "pack", lambda arguments: (network.packed, network.variables))
    monkeypatch.setattr("sys.argv", ["export", "run", "-o", str(tmp_path / "made" / f"net{ending}")])
    export.main()
    assert [path.name for path in (tmp_path / "made").iterdir()] == [f"net{ending}"]

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    for module in (artifact, c_header, named_arrays):
        monkeypatch.setattr(module, "write_atomically", full)
    with pytest.raises(RunError, match=r"^cannot write .*made/net\..* \(No space left on device\); make room"):
        export.main()


@pytest.mark.parametrize(
    ("main", "words", "option"),
    [
        (export, ("run", "-o", "{file}/net.npz"), "output"),
        (summarize, ("lenet", "--diagram", "{file}/net.png"), "diagram"),
        (summarize, ("lenet", "--json", "{folder}/net.json"), "json"),
        (benchmark, ("training", "--output", "{file}/speed.json"), "output"),
    ],
)
def test_what_cannot_be_written_is_told_before_the_work(main, words, option, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder" / "net.json").mkdir(parents=True)
    places = {"file": tmp_path / "file", "folder": tmp_path / "folder"}
    monkeypatch.setattr("sys.argv", [main.__name__, *(word.format(**places) for word in words)])
    why = "Is a directory" if option == "json" else "Not a directory|File exists"
    with pytest.raises(UsageError, match=rf"^`{option}` \(=.*\) cannot be written \(({why})\); choose another file$"):
        main.main()
    assert (tmp_path / "file").read_text() == "mine"


def test_the_folder_of_an_output_is_made_when_it_is_written(tmp_path):
    output = tmp_path / "made" / "found.json"
    require_writable("json", output)
    assert not output.parent.exists()
    write_output("json", output, "{}")
    assert output.read_text() == "{}"


@pytest.mark.parametrize(
    ("recorded", "settings"),
    [
        ({"name": "digits", "split_seed": 3, "note": "by hand"}, {"name": "digits", "split_seed": 3}),
        ("digits", {"name": "digits"}),
        (["digits"], {}),
        (None, {}),
    ],
)
def test_what_a_file_says_of_its_data_may_be_anything(recorded, settings):
    assert evaluate._data_of(recorded) == settings

"""What export says of a file that it cannot write, and evaluate of what a file tells of its data."""

import pytest

from bnn_jax.cli import evaluate, export
from bnn_jax.errors import RunError
from bnn_jax.zoo import load

LONG = [pytest.param(ending, marks=pytest.mark.full) for ending in (".h", ".bnn.safetensors")]


@pytest.mark.parametrize("ending", [".npz", *LONG])
def test_a_file_that_cannot_be_written_is_told_in_a_sentence(ending, tmp_path, monkeypatch):
    network = load("digits_xnor_resnet6")
    monkeypatch.setattr(export, "pack", lambda arguments: (network.packed, network.variables))
    monkeypatch.setattr("sys.argv", ["export", "run", "-o", str(tmp_path / "missing" / f"net{ending}")])
    with pytest.raises(RunError, match=r"^cannot write .*missing/net\..* \(No such file or directory\); make room"):
        export.main()


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

"""Who has the README alone trains, verifies, exports and evaluates a network of their own, as it is printed there."""

import re

import pytest
from documentation_pages import ROOT, blocks_of, commands_of, python_of

README = ROOT / "README.md"


@pytest.mark.full
def test_the_readme_leads_to_a_network_of_ones_own(wheel, tmp_path, monkeypatch):
    monkeypatch.setitem(wheel.env, "XLA_FLAGS", "")  # it computes longer than it compiles
    eight, nets = python_of(README)
    assert len([line for line in eight.text.splitlines() if line]) == 8
    (tmp_path / "eight.py").write_text(eight.text)
    (tmp_path / nets.file).write_text(nets.text)
    accuracy, classes = wheel.python("eight.py", cwd=tmp_path).stdout.split(" ", 1)
    assert float(accuracy) > 0.95 and len(re.findall(r"\d", classes)) == 10
    assert (tmp_path / "digits.bnn.safetensors").stat().st_size < 17_000

    (own,) = [block.text for block in blocks_of(README) if "nets.py:Net" in block.text]
    commands = [command for command in commands_of(README) if command in own]
    assert [command.split()[1] for command in commands] == ["train", "verify", "export", "evaluate"]
    said = [wheel.run(*command.split()[1:], cwd=tmp_path).stdout for command in commands]
    assert "the packed network is the trained one" in said[1]
    found = float(re.search(r"accuracy ([\d.]+) % on 359 examples", said[3])[1])
    assert found > 93
    assert f"accuracy {found:.2f} % on 359" in said[2]

"""scripts/verify_packed.py on a run of a few steps."""

import pytest
from run_script import run_script


@pytest.mark.full
def test_a_trained_run_is_proved_equal(comparison):
    shown = run_script("verify_packed", comparison[0] / "adam" / "seed0", "--batch-size", 200).stdout
    assert "the packed network is the trained one" in shown
    assert "predictions that differ: 0 of 359" in shown
    for layer in ("stage1_block1/conv1", "stage1_block1/conv2", "stage2_block1/conv1", "stage2_block1/conv2"):
        (line,) = [line for line in shown.splitlines() if layer in line]
        counts = line.replace(",", "").split()
        assert counts[1] == counts[4] == "0" and int(counts[3]) > 0 and int(counts[6]) > 0


def test_bad_arguments_are_refused(comparison, tmp_path):
    done = run_script("verify_packed", comparison[0] / "adam" / "seed0", "--batch-size", 0, code=2)
    assert "`--batch-size` (=0) must be at least 1" in done.stderr
    assert str(tmp_path / "none") in run_script("verify_packed", tmp_path / "none", code=2).stderr

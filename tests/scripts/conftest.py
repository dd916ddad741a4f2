"""What the tests of scripts share: one comparison of a few short runs."""

import pytest
from run_script import run_script

SMALL = ("--epochs", "2", "--model.width", "4", "--batch-size", "64")


@pytest.fixture(scope="session")
def comparison(tmp_path_factory):
    """Folder and output of a comparison on digits: Deep Frank-Wolfe, and Adam with two losses, two seeds each."""
    workdir = tmp_path_factory.mktemp("comparison")
    rows = ("--optimizers", "dfw", "adam", "--seeds", "0", "1", "--loss", "cross_entropy")
    return workdir, run_script("compare_optimizers", "--workdir", workdir, *rows, *SMALL)

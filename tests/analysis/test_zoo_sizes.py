"""The sizes of all networks: counted by hand for some, and those of the committed file for each."""

import json
from pathlib import Path

import pytest

from bnn_jax.analysis.zoo_sizes import size_of
from bnn_jax.models import MODELS

FILE = Path(__file__).parents[2] / "results" / "zoo_sizes.json"


def test_sizes_of_lenet_by_hand():
    """Convolutions 3->6 and 6->16 of 5x5 without biases on 32x32, dense layers 400-120-84-10 with biases."""
    size = size_of("lenet")
    binary, real, biases = 450 + 2400, 400 * 120 + 120 * 84 + 84 * 10, 120 + 84 + 10
    assert size["parameters"] == binary + real + biases
    assert size["megabits"] == (binary + 32 * (real + biases)) / 1e6
    assert size["macs"]["full_precision"] == 450 * 28**2 + 2400 * 10**2 + real


CASES = [pytest.param(name, marks=() if name == "resnet6" else pytest.mark.full) for name in MODELS]


@pytest.mark.parametrize("name", CASES)
def test_the_committed_sizes_are_those_of_the_code(name):
    rows = {row["name"]: row for row in json.loads(FILE.read_text())["rows"]}
    assert list(rows) == list(MODELS)
    assert size_of(name) == rows[name]

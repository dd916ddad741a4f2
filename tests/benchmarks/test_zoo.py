"""What the benchmark of the zoo measures, at sizes that take no time; no number depends on a clock."""

import jax
import numpy as np
import pytest
from run_script import run_command

from bnn_jax.analysis.accounting import account_model
from bnn_jax.benchmarks.zoo import benchmark_zoo, in_full_precision, in_turn, initial_structure, made_up, print_zoo
from bnn_jax.models import MODELS
from bnn_jax.models.build import build_model
from bnn_jax.models.extents import Extent, extent_of
from bnn_jax.outputs import network_logits
from bnn_jax.packed import freeze, packed_structure

SMALL = Extent((8, 8, 1), 3)


@pytest.fixture(scope="module")
def found():
    calls = []
    measured = benchmark_zoo(
        networks=("resnet6", "densenet40_40", "mnist_mlp"),
        extents=lambda name: SMALL if name == "resnet6" else TINY[name],
        repeats=2,
        on_progress=lambda *call: calls.append(call),
    )
    return measured, calls


TINY = {
    "densenet40_40": Extent((8, 8, 1), 3, {"stage_sizes": (1, 1), "width": 4}),
    "mnist_mlp": Extent((8, 8, 1), 3, {"width": 8, "hidden_layers": 1}),
}


@pytest.mark.full
def test_packed_and_float32_of_each_network(found, capsys):
    measured, calls = found
    rows = {row["name"]: row for row in measured["network"]}
    assert list(rows) == ["mnist_mlp", "resnet6", "densenet40_40"]  # in the order of the table
    assert rows["resnet6"]["ms"].keys() == {"packed", "float32"} and rows["resnet6"]["path"] == "bits 4"
    assert rows["densenet40_40"]["ms"].keys() == {"float32"} and rows["densenet40_40"]["path"] == ""
    assert rows["densenet40_40"]["not_packed"] and "not_packed" not in rows["resnet6"]
    assert all(row["calls"] == 2 for row in rows.values()) and measured["not_measured"] == []
    assert [call[:2] for call in calls] == [(1, 3), (2, 3), (3, 3)]
    print_zoo(measured)
    assert "resnet6" in capsys.readouterr().out


def test_no_network_is_begun_when_the_time_is_over(capsys):
    measured = benchmark_zoo(networks=("resnet6", "lenet"), minutes=-1.0)
    assert measured["network"] == [] and measured["not_measured"] == ["resnet6", "lenet"]
    print_zoo(measured)
    assert "out of time before: resnet6, lenet" in capsys.readouterr().out


def test_one_of_each_family_comes_first():
    order = in_turn(MODELS)
    assert sorted(order) == sorted(MODELS)
    assert order.index("bireal18") < order.index("quicknet_small") < order.index("bireal34")


@pytest.mark.parametrize("name", ["vit_tiny", "bitnet_lm", "resnet6"])
def test_the_peer_in_full_precision_multiplies_no_codes(name):
    extent = extent_of(name)
    macs = account_model(in_full_precision(name, extent), extent.image_shape).macs()._asdict()
    assert macs.pop("full_precision") > 0 and not any(macs.values())


@pytest.mark.full
def test_made_up_variables_have_the_structure_of_frozen_ones():
    """What is measured is the program of a frozen network."""
    model, rng = build_model("resnet6", num_classes=3, width=4), np.random.default_rng(0)
    packed = made_up(packed_structure(model, SMALL.image_shape), rng)
    frozen = freeze(model, made_up(initial_structure(model, SMALL.image_shape), rng), SMALL.image_shape)
    assert jax.tree.structure(packed) == jax.tree.structure(frozen)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), packed) == jax.tree.map(lambda a: (a.shape, a.dtype), frozen)
    logits = network_logits(model, packed, rng.standard_normal((1, *SMALL.image_shape), np.float32))
    assert np.isfinite(logits).all()


def test_an_unknown_network_is_refused():
    done = run_command("benchmark", "zoo", "--networks", "bireal19", code=2)
    assert done.stderr.startswith("error: `--networks` (='bireal19') is not known; did you mean 'bireal18'?")


@pytest.mark.parametrize(("what", "minutes"), [("packed", "0"), ("zoo", "-1"), ("packed", "nan")])
def test_no_time_at_all_is_refused(what, minutes):
    done = run_command("benchmark", what, "--minutes", minutes, code=2)
    assert done.stderr.startswith("error: `--minutes` (=") and "leave it out for the usual time" in done.stderr

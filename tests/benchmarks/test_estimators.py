"""What the benchmarks measure, with clocks that are made up: no test here depends on how long something takes."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_script import run_script

from bnn_jax.benchmarks import estimators
from bnn_jax.benchmarks.estimators import (
    benchmark_estimators,
    compiled_temporaries,
    estimator_arguments,
    value_and_pullback,
)
from bnn_jax.estimators import ESTIMATORS, rbnn_sign, ste_sign

KEYED = {f"{name} with key" for name, estimator in ESTIMATORS.items() if estimator.stochastic}


@pytest.fixture(scope="module")
def found():
    calls = []
    measured = benchmark_estimators(values=20_000, repeats=3, on_progress=lambda *call: calls.append(call))
    return measured, calls


def test_every_estimator_has_its_row_in_one_group(found):
    measured, calls = found
    assert (measured["values"], measured["repeats"]) == (20_000, 3)
    assert set(measured["other"]) == {"dir_sign"} | KEYED
    assert set(measured["elementwise"]) == set(ESTIMATORS) - {"dir_sign"}
    assert set(measured["seconds"]) == set(ESTIMATORS) | KEYED
    assert [call[:2] for call in calls] == [(done, len(calls)) for done in range(1, len(calls) + 1)]
    assert [text for *_, text in calls] == list(measured["seconds"])
    assert json.loads(json.dumps(measured)) == measured


def test_rows_are_medians_of_the_times_and_their_ratio(found):
    measured, _ = found
    for name, row in (measured["elementwise"] | measured["other"]).items():
        seconds = measured["seconds"][name]
        assert set(row) == {"ms", "ste_sign_ms", "ratio", "temporaries"}
        assert row["ms"] == pytest.approx(1e3 * sorted(seconds["estimator"])[1])
        assert row["ste_sign_ms"] == pytest.approx(1e3 * sorted(seconds["ste_sign"])[1])
        assert row["ratio"] * row["ste_sign_ms"] == pytest.approx(row["ms"])
        assert len(seconds["estimator"]) == len(seconds["ste_sign"]) == 3


def test_no_estimator_needs_more_than_two_temporaries_of_the_input(found):
    measured, _ = found
    assert all(row["temporaries"] < 0.01 for row in measured["elementwise"].values())
    assert all(0.5 < row["temporaries"] <= 2 for row in measured["other"].values())


def test_the_ratio_is_the_estimator_over_the_straight_through_one(monkeypatch):
    def made_up(calls, *, repeats):
        for call in calls.values():
            codes, gradient = call()
            assert codes.shape == gradient.shape == (50,)
        assert repeats == 4
        return {"ste_sign": [2.0, 2.0, 90.0, 2.0], "estimator": [3.0, 50.0, 3.0, 3.0]}

    monkeypatch.setattr(estimators, "interleaved_seconds", made_up)
    row = benchmark_estimators(values=50, repeats=4)["elementwise"]["approx_sign"]
    assert (row["ms"], row["ste_sign_ms"], row["ratio"]) == (3000, 2000, 1.5)


def test_value_and_pullback_are_both_outputs():
    x, g = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
    codes, gradient = jax.jit(partial(value_and_pullback, rbnn_sign))(x, g, {"t": 2.0, "k": 0.5})
    np.testing.assert_array_equal(codes, np.where(x < 0, -1, 1))
    slope = 0.5 * np.maximum(2**0.5 * 2 - 4 * np.abs(x.astype(np.float64)), 0)
    np.testing.assert_allclose(gradient, g * slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("identity_sign", {}),
        ("ste_sign", {"clip_value": 1}),
        ("swish_sign", {"beta": 5}),
        ("ternary", {"delta": 0.4}),
        ("gumbel_sign", {"temperature": 0.3**0.5}),
        ("rbnn_sign", {"t": 0.1**0.5, "k": 10**0.5}),
        ("fda_sign", {"terms": 14, "frequency": 0.1}),
    ],
)
def test_arguments_are_those_of_the_schedule_half_way_or_the_defaults(name, numbers):
    assert estimator_arguments(name) == pytest.approx(numbers)


def test_numbers_of_an_estimator_are_not_folded_into_its_program():
    x = jnp.array([0.3, 0.7])
    program = jax.jit(partial(value_and_pullback, ste_sign)).lower(x, x, estimator_arguments("ste_sign")).compile()
    for clip_value, expected in ((1.0, [0.3, 0.7]), (0.5, [0.3, 0])):
        _, gradient = program(x, x, {"clip_value": jnp.float32(clip_value)})
        np.testing.assert_allclose(gradient, expected)


@pytest.mark.parametrize(
    ("function", "temporaries"),
    [
        (lambda x: 2 * x + 1, 0),
        (lambda x: jnp.sort(x), 0),  # in place, in the output
        (lambda x: jnp.sort(x)[:3], 1),
        (lambda x: jnp.sort(x)[:3] + jnp.sort(-x)[:3], 2),
    ],
)
def test_temporaries_are_neither_arguments_nor_outputs(function, temporaries):
    x = jnp.linspace(-1, 1, 50_000)
    program = jax.jit(function).lower(x).compile()
    assert compiled_temporaries(program, x) == pytest.approx(temporaries, abs=0.01)


def test_the_script_prints_a_table_and_writes_where_it_comes_from(tmp_path):
    output = tmp_path / "new" / "estimators.json"
    done = run_script("benchmark", "estimators", "--values", 100, "--repeats", 2, "--output", output)
    record = json.loads(output.read_text())
    assert set(record) == {"command", "values", "repeats", "elementwise", "other", "seconds", "provenance"}
    assert record["command"].startswith("python scripts/benchmark.py estimators --values 100 --repeats 2")
    assert record["provenance"]["versions"]["jax"] == jax.__version__
    assert (record["values"], record["repeats"]) == (100, 2)
    for name, row in (record["elementwise"] | record["other"]).items():
        assert re.search(rf"^ +{name} .* {row['ratio']:.2f} .* {row['temporaries']:.3f} *$", done.stdout, re.M)
    largest = max(row["ratio"] for row in record["elementwise"].values())
    assert f"elementwise: ratio at most {largest:.2f}" in done.stdout


@pytest.mark.parametrize(("option", "usual"), [("values", 10_000_000), ("repeats", 20)])
def test_a_number_below_one_is_refused(option, usual):
    done = run_script("benchmark", "estimators", f"--{option}", 0, code=2)
    assert done.stderr == f"error: `--{option}` (=0) must be at least 1; leave it out for {usual}\n"

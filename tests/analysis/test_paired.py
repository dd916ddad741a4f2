"""Paired differences: interval and smallest difference against scipy's tests and an integral over the spread."""

import numpy as np
import pytest
from made_up_results import a_comparison, a_row, a_run, diverge
from scipy import integrate, stats

from bnn_jax.analysis.paired import differences_from_first, differences_section, paired_difference, verdict

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("pairs", [2, 3, 5, 30])
def test_the_interval_is_that_of_scipy(pairs):
    first, second = RNG.normal(size=(2, pairs))
    found = paired_difference(list(second - first))
    wanted = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert found.pairs == pairs
    assert found.mean == pytest.approx(np.mean(second - first))
    np.testing.assert_allclose(found.interval, (wanted.low, wanted.high))


def power(shift, pairs):
    """P(t test rejects, with the right sign) for differences of mean `shift` and standard deviation 1, an integral."""
    degrees = pairs - 1
    critical = stats.t.ppf(0.975, degrees)

    def given(s):
        """With the sample standard deviation s, whose square is chi-square over its degrees of freedom."""
        density = stats.chi.pdf(s * np.sqrt(degrees), degrees) * np.sqrt(degrees)
        return stats.norm.sf(critical * s - np.sqrt(pairs) * shift) * density

    return integrate.quad(given, 0, 20, points=[0.01, 0.1, 1, 2], limit=200)[0]


@pytest.mark.parametrize("pairs", [2, 3, 5, 10, 30])
def test_the_smallest_difference_is_found_in_four_of_five_repetitions(pairs):
    differences = RNG.normal(size=pairs)
    found = paired_difference(list(differences))
    assert power(found.smallest / np.std(differences, ddof=1), pairs) == pytest.approx(0.8, abs=1e-5)


def test_it_is_found_in_as_many_of_a_simulation():
    differences = RNG.normal(size=3)
    smallest = paired_difference(list(differences)).smallest / np.std(differences, ddof=1)
    tests = stats.ttest_1samp(RNG.normal(smallest, 1, size=(20_000, 3)), 0, axis=1)
    assert np.mean((tests.pvalue < 0.05) & (tests.statistic > 0)) == pytest.approx(0.8, abs=0.01)


def test_one_pair_has_no_interval_and_none_no_mean():
    assert paired_difference([0.5]) == (1, 0.5, None, None)
    assert paired_difference([]) == (0, None, None, None)


def test_runs_are_paired_by_seed_not_by_place():
    rows = (
        a_row("a", [a_run(seed, 0.1 * seed) for seed in (3, 1, 2)]),
        a_row("b", [a_run(s, 0.1 * s) for s in (1, 2, 3)]),
    )
    (found,) = differences_from_first(a_comparison(*rows), "test_accuracy_best")
    assert (found.pairs, found.interval) == (3, (0.0, 0.0))
    diverge(rows[0].runs[0])
    (found,) = differences_from_first(a_comparison(*rows), "test_accuracy_best")
    assert found.pairs == 2


def test_the_verdict_says_which_rows_are_better_worse_or_neither():
    shifts = {"first": (0, 0, 0), "up": (0.01, 0.02, 0.03), "down": (-0.02, -0.02, -0.02), "near": (-0.01, 0.01, 0.0)}
    rows = [
        a_row(label, [a_run(seed, 0.5 + 0.1 * seed + shift) for seed, shift in enumerate(own)])
        for label, own in shifts.items()
    ]
    results = a_comparison(*rows)
    assert verdict(results) == (
        "At the best epoch, compared with first: up is not distinguishable (-0.48 to +4.48); down is worse by 2.00 "
        "points (-2.00 to -2.00); near is not distinguishable (-2.48 to +2.48)."
    )
    rows[1].runs[0] = a_run(0, 0.5 + 0.015)
    assert "up is better by 2.17 points (+0.27 to +4.06)" in verdict(results)
    assert differences_section(results).endswith(f"\n\n{verdict(results)}")
    alone = a_comparison(*(row for row in (a_row(name, [a_run(0, 0.5)]) for name in "ab")))
    assert verdict(alone) == "" and differences_section(alone).endswith("|")

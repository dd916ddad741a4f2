"""Differences between the rows of a comparison, seed by seed, and the smallest that so many seeds could have shown."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from bnn_jax.analysis.documents import inline, markdown_table, number
from bnn_jax.analysis.tables import TEXT, Tables, print_text
from bnn_jax.sweeps.results import Results, Row, is_finished

LEVEL, POWER = 0.05, 0.8
"""Of the two-sided test, as usual since Cohen, Statistical Power Analysis for the Behavioral Sciences, 1988."""

COMPARED = {"best": "test_accuracy_best", "last": "test_accuracy_last"}
"""The numbers of a run whose differences a report has."""


class Difference(NamedTuple):
    """What the pairs say of a difference; None where they are too few.

    Attributes:
      pairs: how many there are.
      mean: of the differences.
      interval: the ends of its 95 % confidence interval.
      smallest: the smallest difference that so many pairs of this spread could have shown.
    """

    pairs: int
    mean: float | None
    interval: tuple[float, float] | None
    smallest: float | None


def paired_difference(differences: Sequence[float]) -> Difference:
    r"""Mean, 95 % interval and smallest detectable size of a difference, from one number a pair.

    With n pairs, their mean m and sample standard deviation s, and t the 97.5 % quantile of Student's distribution with
    n - 1 degrees of freedom:

        interval  m - t s / sqrt(n)  to  m + t s / sqrt(n)
        smallest  the true difference d that the two-sided paired t test at 5 % finds, with its sign, in 80 % of
                  repetitions: P(T > t) = 0.8 for T noncentral t with n - 1 degrees of freedom and noncentrality
                  sqrt(n) d / s

    >>> found = paired_difference([1.0, 2.0, 3.0])
    >>> print(f"{found.mean:.1f}, {found.interval[0]:.2f} to {found.interval[1]:.2f}, {found.smallest:.2f}")
    2.0, -0.48 to 4.48, 3.26
    """
    n = len(differences)
    if n < 2:
        return Difference(n, fmean(differences) if n else None, None, None)
    from scipy import special

    mean, error = fmean(differences), stdev(differences) / math.sqrt(n)
    t = float(special.stdtrit(n - 1, 1 - LEVEL / 2))
    noncentrality = float(special.nctdtrinc(n - 1, 1 - POWER, t))
    return Difference(n, mean, (mean - t * error, mean + t * error), noncentrality * error)


def differences_from_first(results: Results, name: str) -> list[Difference]:
    """Of each row but the first: its number `name` less that of the first row, over the seeds that both finished."""
    first, *others = (_by_seed(row, name) for row in results.rows)
    return [paired_difference([own[seed] - first[seed] for seed in own if seed in first]) for own in others]


def _by_seed(row: Row, name: str) -> dict[int, float]:
    return {run["seed"]: run[name] for run in row.runs if is_finished(run)}


def verdict(results: Results) -> str:
    """Which rows are better or worse than the first at the best epoch, in a sentence; "" where no two seeds are paired.

    A row is better, or worse, where the 95 % interval of its difference, in points, does not hold 0.
    """
    parts = []
    for label, found in zip(results.labels[1:], differences_from_first(results, COMPARED["best"])):
        if found.interval is not None:
            low, high = found.interval
            kind = "better" if low > 0 else "worse" if high < 0 else None
            is_so = f"{kind} by {100 * abs(found.mean):.2f} points" if kind else "not distinguishable"
            parts.append(f"{label} is {is_so} ({_ends(found.interval)})")
    return f"At the best epoch, compared with {results.labels[0]}: {'; '.join(parts)}." if parts else ""


def differences_section(results: Results) -> str:
    """The differences as a section in Markdown; nothing where there is one row."""
    if len(results.rows) < 2:
        return ""
    first, labels = inline(results.labels[0]), results.labels[1:]
    header, rows = [results.compared], [[label] for label in labels]
    for which, name in COMPARED.items():
        header += [f"{which}: {what}" for what in ("difference", "95 % interval", "could have shown")]
        found = differences_from_first(results, name)
        rows = [[*row, *_cells(difference)] for row, difference in zip(rows, found)]
    rows = [[*row, str(difference.pairs)] for row, difference in zip(rows, found)]
    return (
        f"## Differences from {first}\n\n"
        f"Test accuracy less that of {first} with the same seed, in points: mean over the pairs that finished, its "
        "95 % interval (Student's t), and the smallest difference that so many pairs of this spread could have shown: "
        "a two-sided paired t test at the 5 % level finds it with a probability of 80 % (noncentral t). No interval "
        f"is corrected for the number of rows.\n\n{markdown_table([*header, 'pairs'], rows, texts=(0,))}"
        f"\n\n{inline(verdict(results))}".rstrip()
    )


def print_differences(results: Results, tables: Tables = TEXT) -> None:
    """Print the differences of the best accuracies; nothing where there is one row."""
    if len(results.rows) < 2:
        return
    first, *labels = results.labels
    found = differences_from_first(results, COMPARED["best"])
    rows = [[label, *_cells(difference), str(difference.pairs)] for label, difference in zip(labels, found)]
    header = [results.compared, "difference", "95 % interval", "could have\nshown", "pairs"]
    tables.print(header, rows, title=f"test accuracy, best, less that of {first} (points)")
    print_text(
        *filter(None, [verdict(results)]),
        "could have shown: the smallest difference that so many pairs find in 4 of 5 repetitions, at the 5 % level",
    )


def _cells(difference: Difference) -> list[str]:
    mean, smallest = difference.mean, difference.smallest
    interval = "-" if difference.interval is None else _ends(difference.interval)
    points = [None if share is None else 100 * share for share in (mean, smallest)]
    return [number(points[0], "+z.2f"), interval, number(points[1], ".2f")]


def _ends(interval: tuple[float, float]) -> str:
    return " to ".join(f"{100 * end:+z.2f}" for end in interval)

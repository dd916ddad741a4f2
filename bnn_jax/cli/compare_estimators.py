"""Compare gradient estimators over several seeds on one network and data set.

bnn-jax compare estimators --estimators ste_sign approx_sign swish_sign --seeds 0 1 2

bnn-jax compare estimators --config cifar10_lenet --data.data-dir DIR --tune

A config that defines get_rows(config) says itself what its rows are, and --rows picks among them; for another one there
is a row for each of --estimators, in the place of the estimator of inputs, kernels or both.
Writes report.md, report.html, results.json, accuracy.png and estimators.png into the workdir; finished runs are not run
again.
"""

from dataclasses import dataclass
from typing import Literal

from bnn_jax.cli.comparisons import estimator_rows_of, run_comparison, sign_estimators, weight_bits
from bnn_jax.cli.options import ComparisonOptions
from bnn_jax.training.overrides import parse


@dataclass(frozen=True, kw_only=True)
class Arguments(ComparisonOptions):
    estimators: tuple[str, ...] = ("ste_sign", "approx_sign", "swish_sign")
    """Rows for a config without get_rows()."""
    quantizes: Literal["inputs", "kernels", "both"] = "inputs"
    """What the estimators are for, in a config without get_rows()."""
    rows: tuple[str, ...] = ()
    """Labels to run of a config with get_rows(); all if none is named."""


def main() -> None:
    arguments = parse(Arguments, __doc__)
    rows = estimator_rows_of(arguments, arguments.rows)
    drawn = {"describe": weight_bits, "estimators": sign_estimators(rows)}
    run_comparison(arguments, rows, compared="estimator", name=f"estimators_{arguments.settings.name}", **drawn)

"""Compare optimizers over several seeds on one network and data set.

bnn-jax compare optimizers --config digits_xnor --optimizers dfw adam sgd --seeds 0 1 2
--loss cross_entropy adds a row with that loss for each optimizer but dfw, whose step size needs a hinge.

A config with get_rows(config) says itself what the rows are, and --rows picks among them.
Writes report.md, report.html, results.json, accuracy.png and step_size.png into the workdir; finished runs are not run
again.
"""

from dataclasses import dataclass

from bnn_jax.cli.comparisons import optimizer_rows_of, run_comparison
from bnn_jax.cli.options import ComparisonOptions
from bnn_jax.training.overrides import parse


@dataclass(frozen=True, kw_only=True)
class Arguments(ComparisonOptions):
    optimizers: tuple[str, ...] = ("dfw", "adam", "sgd")
    """Any of those whose settings the config keeps; by default of these three."""
    rows: tuple[str, ...] = ()
    """Labels of a config with get_rows(config) to run; all if none is named."""


def main() -> None:
    arguments = parse(Arguments, __doc__)
    rows = optimizer_rows_of(arguments, arguments.rows)
    run_comparison(arguments, rows, compared="optimizer", name=f"compare_{arguments.settings.name}")

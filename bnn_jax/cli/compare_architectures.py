"""Compare networks over several seeds on one data set: test error against the cost of their gradient paths.

bnn-jax compare architectures --config cifar10_architectures --data.data-dir DIR --tune

A config's get_rows(config) says what the rows are, and --rows picks among them.
Writes report.md, report.html, results.json, accuracy.png and paths.png into the workdir; finished runs are not run
again.
"""

from dataclasses import dataclass
from pathlib import Path

from bnn_jax.cli.comparisons import architecture_rows, costs_and_paths, run_comparison
from bnn_jax.cli.options import ComparisonOptions
from bnn_jax.training.overrides import parse


@dataclass(frozen=True, kw_only=True)
class Arguments(ComparisonOptions):
    config: Path = Path("cifar10_architectures")
    """Python file with get_config(), get_rows(config) and, if it likes, NOTES."""
    rows: tuple[str, ...] = ()
    """Labels to run; all if none is named."""


def main() -> None:
    arguments = parse(Arguments, __doc__)
    rows = architecture_rows(arguments, arguments.rows)
    name = f"compare_{arguments.settings.name}"
    run_comparison(arguments, rows, compared="architecture", name=name, describe=costs_and_paths)

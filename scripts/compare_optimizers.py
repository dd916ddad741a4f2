"""Compare optimizers over several seeds on one network and data set.

python scripts/compare_optimizers.py --config configs/digits_xnor.py --optimizers dfw adam sgd --seeds 0 1 2
--loss cross_entropy adds a row with that loss for each optimizer but dfw, whose step size needs a hinge.
Writes report.md, results.json, accuracy.png and step_size.png into the workdir; finished runs are not run again.
"""

import sys
from dataclasses import dataclass

from bnn_jax.cli.comparisons import optimizer_rows, run_comparison
from bnn_jax.cli.options import ComparisonOptions
from bnn_jax.errors import exit_code_of
from bnn_jax.training.config import load_config
from bnn_jax.training.overrides import parse


@dataclass(frozen=True, kw_only=True)
class Arguments(ComparisonOptions):
    optimizers: tuple[str, ...] = ("dfw", "adam", "sgd")
    """Any of those whose settings the config keeps."""


def main() -> None:
    arguments = parse(Arguments)
    config, before = arguments.settings, load_config(arguments.config)
    losses = {before.loss: before.loss_options} | {config.loss: config.loss_options}
    rows = optimizer_rows(config, arguments.optimizers, losses)
    run_comparison(arguments, rows, compared="optimizer", name=f"compare_{config.name}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

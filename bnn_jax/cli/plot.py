"""Draw a run, finished or not: bnn-jax plot runs/mine

Loss, accuracy, learning rate and Deep Frank-Wolfe's step size go to curves.png; what the diagnostics recorded goes to
diagnostics.png and histograms.png.  To record them, train with --diagnostics.every-steps 200.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from bnn_jax.analysis.run_plots import plot_run
from bnn_jax.cli.options import parse_options


@dataclass(frozen=True)
class Arguments:
    workdir: tyro.conf.Positional[Path]
    """Folder of a run."""
    output: Path | None = None
    """Folder for the pictures; by default that of the run."""


def main() -> None:
    arguments = parse_options(Arguments, __doc__)
    for path in plot_run(arguments.workdir, output=arguments.output):
        print(path)

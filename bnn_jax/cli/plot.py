"""Draw a run, finished or not, or several over each other: bnn-jax plot runs/mine, bnn-jax plot runs/a runs/b

Loss, accuracy, learning rate and Deep Frank-Wolfe's step size go to curves.png; what the diagnostics recorded goes to
diagnostics.png and histograms.png.  To record them, train with --diagnostics.every-steps 200.  Of several runs loss
and validation accuracy go to overlay.png.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from bnn_jax.analysis.run_plots import plot_run, plot_runs
from bnn_jax.cli.options import parse_options


@dataclass(frozen=True)
class Arguments:
    workdirs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    output: Path | None = None
    """Folder for the pictures; by default that of the run, of several runs the current one."""


def main() -> None:
    arguments = parse_options(Arguments, __doc__)
    output = arguments.output
    if len(arguments.workdirs) == 1:
        paths = plot_run(*arguments.workdirs, output=output)
    else:
        paths = plot_runs(arguments.workdirs, output=output or ".")
    print(*paths, sep="\n")

"""Compare optimizers over several seeds on one network and data set.

python scripts/compare_optimizers.py --config configs/digits_xnor.py --optimizers dfw adam sgd --seeds 0 1 2
--loss cross_entropy adds a row with that loss for each optimizer but dfw, whose step size needs a hinge.
Writes report.md, results.json, accuracy.png and step_size.png into the workdir; finished runs are not run again.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bnn_jax.analysis.provenance import provenance
from bnn_jax.analysis.report import print_table, write_report
from bnn_jax.errors import exit_code_of
from bnn_jax.sweeps.comparison import compare, optimizer_cells
from bnn_jax.training.config import Settings, load_config, parse, select_optimizer
from bnn_jax.training.programs import use_compilation_cache


@dataclass(frozen=True)
class Arguments:
    settings: Settings
    config: Path = Path("configs/digits_xnor.py")
    """Python file with get_config()."""
    workdir: Path | None = None
    """Folder of the comparison; by default runs/compare_<name>."""
    optimizers: tuple[str, ...] = ("dfw", "adam", "sgd")
    """Any of those whose settings the config keeps."""
    seeds: tuple[int, ...] = (0, 1, 2)
    tune: bool = False
    """Choose each learning rate on the validation split, the same number of trials for each optimizer."""
    execution: Literal["auto", "sequential", "processes", "vmapped"] = "auto"
    """One run after another, one process a core, or mapped together on the device; see scripts/sweep.py."""
    jobs: int | None = None
    """Processes at a time; None takes one for each core."""


def main() -> None:
    arguments = parse(Arguments)
    config = arguments.settings
    workdir = arguments.workdir or Path("runs") / f"compare_{config.name}"
    use_compilation_cache()
    cells = optimizer_cells(
        config,
        optimizers=[select_optimizer(config, name) for name in arguments.optimizers],
        losses=dict.fromkeys([load_config(arguments.config).loss, config.loss]),
    )
    ways = {"tune": arguments.tune, "execution": arguments.execution, "processes": arguments.jobs}
    results = compare(cells, workdir, seeds=arguments.seeds, **ways)
    results = {
        "name": f"compare_{config.name}",
        "command": "python " + shlex.join(sys.argv),
        "provenance": provenance(),
        **results,
    }
    write_report(results, workdir)
    print_table(results)
    print(f"{workdir}: report.md, results.json, accuracy.png, step_size.png")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

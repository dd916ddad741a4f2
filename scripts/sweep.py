"""Train a grid of settings over several seeds, and report mean and spread of each.

python scripts/sweep.py --config configs/digits_xnor.py --optimizer adam --seeds 5 --optim.learning_rate 0.003 0.03 0.3
Every option of the config that takes one value may be given several: the grid has all combinations.
Writes sweep.csv, sweep.jsonl, summary.json, report.md and sweep.png into the workdir; finished runs are not run again.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bnn_jax.analysis.provenance import provenance
from bnn_jax.analysis.sweep_report import print_sweep, write_sweep
from bnn_jax.errors import UsageError, exit_code_of
from bnn_jax.sweeps.comparison import sweep
from bnn_jax.sweeps.grid import parse_axes, split_axes
from bnn_jax.training.config import Settings, parse
from bnn_jax.training.programs import use_compilation_cache


@dataclass(frozen=True)
class Arguments:
    settings: Settings
    config: Path = Path("configs/digits_xnor.py")
    """Python file with get_config()."""
    workdir: Path | None = None
    """Folder of the sweep; by default runs/sweep_<name>_<optimizer>."""
    optimizer: str | None = None
    """Start from the settings that the config keeps for this optimizer."""
    seeds: int = 3
    """How many, counted up from --seed."""
    execution: Literal["auto", "sequential", "processes", "vmapped"] = "auto"
    """One run after another, one process a core, or mapped together on the device; auto measures, once, where it may
    pay."""
    jobs: int | None = None
    """Processes at a time; None takes one for each core."""
    group_size: int | None = None
    """Most runs that are mapped together; None sets no limit but the device's memory."""


def main() -> None:
    texts, argv = split_axes(sys.argv[1:])
    arguments = parse(Arguments, argv=argv)
    config = arguments.settings
    if arguments.seeds < 1:
        raise UsageError(f"`--seeds` (={arguments.seeds}) must be at least 1; it is the number of seeds")
    axes = parse_axes(config, texts)
    name = f"sweep_{config.name}_{config.optim.name}"
    workdir = arguments.workdir or Path("runs") / name
    use_compilation_cache()
    ways = {"execution": arguments.execution, "processes": arguments.jobs, "group_size": arguments.group_size}
    seeds = range(config.seed, config.seed + arguments.seeds)
    results = {
        "name": name,
        "command": "python " + shlex.join(sys.argv),
        "provenance": provenance(),
        **sweep(config, axes, workdir, seeds=seeds, **ways),
    }
    write_sweep(results, workdir)
    print_sweep(results)
    print(f"{workdir}: report.md, sweep.csv, sweep.jsonl, summary.json, sweep.png")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

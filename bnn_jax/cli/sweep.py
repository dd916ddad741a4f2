"""Train a grid of settings over several seeds, and report mean and spread of each.

bnn-jax sweep --config digits_xnor --optimizer adam --seeds 5 --optim.learning_rate 0.003 0.03 0.3

Every option of the config that takes one value may be given several: the grid has all combinations.  So may each
option of an optimizer, loss, schedule, quantizer or network, as --optim.options.threshold 1e-6 1e-5.
Writes sweep.csv, sweep.jsonl, summary.json, report.md, report.html and sweep.png into the workdir; finished runs are
not run again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from bnn_jax.cli.comparisons import report
from bnn_jax.cli.options import SweepOptions, refuse_unread
from bnn_jax.compilation import use_compilation_cache
from bnn_jax.errors import UsageError
from bnn_jax.extras import import_extra
from bnn_jax.names import last_part
from bnn_jax.sweeps.comparison import sweep
from bnn_jax.sweeps.grid import parse_axes, split_axes
from bnn_jax.training.overrides import parse_with_overrides


@dataclass(frozen=True, kw_only=True)
class Arguments(SweepOptions):
    optimizer: str | None = None
    """Start from the settings that the config keeps for this optimizer."""
    seeds: int = 3
    """How many, counted up from --seed."""
    group_size: int | None = None
    """Most runs that are mapped together; None sets no limit but the device's memory."""


def main() -> None:
    texts, argv = split_axes(sys.argv[1:])
    arguments, overrides = parse_with_overrides(Arguments, __doc__, argv=argv, axes=texts)
    config = arguments.settings
    if arguments.seeds < 1:
        raise UsageError(f"`--seeds` (={arguments.seeds}) must be at least 1; it is the number of seeds")
    axes, seeds = parse_axes(config, texts), range(config.seed, config.seed + arguments.seeds)
    name = f"sweep_{config.name}_{last_part(config.optim.name)}"
    workdir = arguments.workdir or Path("runs") / name
    import_extra("matplotlib", "the report")  # Missed now, not when all is trained.
    use_compilation_cache()
    if arguments.execution not in ("auto", "vmapped"):
        refuse_unread(arguments, ("group_size",), "is for `--execution vmapped`")
    overrides.pop("seed", None)  # In `seeds`.
    options = arguments.engine() | {"group_size": arguments.group_size, "overrides": overrides}
    with arguments.tables() as tables:
        report(sweep(config, axes, workdir, seeds=seeds, **options), name, workdir, tables)

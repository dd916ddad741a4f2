"""Compare networks over several seeds on one data set: test error against the cost of their gradient paths.

python scripts/compare_architectures.py --config configs/cifar10_architectures.py --data.data-dir DIR --tune
A config's get_rows(config) says what the rows are, and --rows picks among them.
Writes report.md, results.json, accuracy.png and paths.png into the workdir; finished runs are not run again.
"""

import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn

from bnn_jax.analysis.accounting import account_model
from bnn_jax.analysis.gradient_paths import module_gradient_paths
from bnn_jax.analysis.provenance import provenance
from bnn_jax.analysis.published_sizes import WEIGHTS
from bnn_jax.analysis.report import print_table, write_report
from bnn_jax.errors import UsageError, exit_code_of, unknown_name
from bnn_jax.sweeps.comparison import compare
from bnn_jax.training.config import Config, Settings, parse
from bnn_jax.training.experiment import make_model
from bnn_jax.training.programs import use_compilation_cache
from bnn_jax.training.validation import validate


@dataclass(frozen=True)
class Arguments:
    settings: Settings
    config: Path = Path("configs/cifar10_architectures.py")
    """Python file with get_config(), get_rows(config) and, if it likes, NOTES."""
    workdir: Path | None = None
    """Folder of the comparison; by default runs/compare_<name>."""
    rows: tuple[str, ...] = ()
    """Labels to run; all if none is named."""
    seeds: tuple[int, ...] = (0, 1, 2)
    tune: bool = False
    """Choose each learning rate on the validation split, the same number of trials for each row."""
    execution: Literal["auto", "sequential", "processes", "vmapped"] = "auto"
    """One run after another, one process a core, or mapped together on the device; see scripts/sweep.py."""
    jobs: int | None = None
    """Processes at a time; None takes one for each core."""


class FirstStage(nn.Module):
    """The output of a network's first stage; of the whole network, where it has no stages."""

    network: nn.Module

    def __call__(self, images, *, train: bool):
        logits, intermediates = self.network(images, train=train)
        return intermediates.get("stage1", logits)


def rows_of(arguments: Arguments) -> dict[str, tuple[Config, dict]]:
    """The rows of this comparison."""
    get_rows = runpy.run_path(str(arguments.config)).get("get_rows")
    if get_rows is None:
        raise UsageError(f"`--config` (={arguments.config}) must define a function get_rows(config), the networks")
    rows = get_rows(arguments.settings)
    for label in arguments.rows:
        if label not in rows:
            raise unknown_name("rows", label, rows)
    return {label: row for label, row in rows.items() if label in arguments.rows or not arguments.rows}


def analysed(network: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """What a row of the results gets of its network: the cells of the table, and the gradient paths."""
    account = account_model(network, image_shape)
    cells = {
        "storage (kbit)": f"{account.bits(WEIGHTS) / 1e3:,.1f}",
        "binary MACs (10^6)": f"{account.macs().binary / 1e6:.4g}",
        "FLOPs (10^6)": f"{account.flops(WEIGHTS) / 1e6:.4g}",
    }
    paths = {
        place: module_gradient_paths(module, (1, *image_shape), train=True)
        for place, module in (("whole network", network), ("first stage", FirstStage(network)))
    }
    for place, (costs, lengths) in paths.items():
        cells[f"N of the {place} (10^6)"] = ", ".join(f"{cost / 1e6:.3g}" for cost in costs)
        cells[f"L of the {place}"] = ", ".join(map(str, lengths))
    return {"columns": cells, "gradient_paths": {place: found._asdict() for place, found in paths.items()}}


def main() -> None:
    arguments = parse(Arguments)
    config = arguments.settings
    workdir = arguments.workdir or Path("runs") / f"compare_{config.name}"
    use_compilation_cache()
    rows = rows_of(arguments)
    cells = {label: validate(cell) for label, (cell, _) in rows.items()}
    ways = {"tune": arguments.tune, "execution": arguments.execution, "processes": arguments.jobs}
    results = compare(cells, workdir, seeds=arguments.seeds, **ways)
    images = results["dataset"]
    for row in results["rows"]:
        network = make_model(cells[row["label"]].model, num_classes=images["num_classes"])
        row |= analysed(network, tuple(images["shape"]))
        row["columns"] |= rows[row["label"]][1]
    results = {
        "name": f"compare_{config.name}",
        "compared": "architecture",
        "command": "python " + shlex.join(sys.argv),
        "provenance": provenance(),
        "notes": runpy.run_path(str(arguments.config)).get("NOTES", ""),
        **results,
    }
    write_report(results, workdir)
    print_table(results)
    print(f"{workdir}: report.md, results.json, accuracy.png, paths.png")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

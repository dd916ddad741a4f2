"""Compare gradient estimators over several seeds on one network and data set.

python scripts/compare_estimators.py --estimators ste_sign approx_sign swish_sign --seeds 0 1 2
python scripts/compare_estimators.py --config configs/cifar10_lenet.py --data.data-dir DIR --tune
A config that defines get_rows(config) says itself what its rows are, and --rows picks among them; for another one there
is a row for each of --estimators, in the place of the estimator of inputs, kernels or both.
Writes report.md, results.json, accuracy.png and estimators.png into the workdir; finished runs are not run again.
"""

import runpy
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bnn_jax.analysis.accounting import account_model
from bnn_jax.analysis.provenance import provenance
from bnn_jax.analysis.report import print_table, write_report
from bnn_jax.errors import exit_code_of, unknown_name
from bnn_jax.estimators import ESTIMATORS
from bnn_jax.sweeps.comparison import compare
from bnn_jax.training.config import Config, Settings, parse
from bnn_jax.training.experiment import make_model
from bnn_jax.training.programs import use_compilation_cache
from bnn_jax.training.validation import validate

SIGNS = [name for name, estimator in ESTIMATORS.items() if estimator.code_set == (-1, 1)]


@dataclass(frozen=True)
class Arguments:
    settings: Settings
    config: Path = Path("configs/digits_xnor.py")
    """Python file with get_config() and, if it likes, get_rows(config) and NOTES."""
    workdir: Path | None = None
    """Folder of the comparison; by default runs/estimators_<name>."""
    estimators: tuple[str, ...] = ("ste_sign", "approx_sign", "swish_sign")
    """Rows for a config without get_rows()."""
    quantizes: Literal["inputs", "kernels", "both"] = "inputs"
    """What the estimators are for, in a config without get_rows()."""
    rows: tuple[str, ...] = ()
    """Labels to run of a config with get_rows(); all if none is named."""
    seeds: tuple[int, ...] = (0, 1, 2)
    tune: bool = False
    """Choose each learning rate on the validation split, the same number of trials for each row."""
    execution: Literal["auto", "sequential", "processes", "vmapped"] = "auto"
    """One run after another, one process a core, or mapped together on the device; see scripts/sweep.py."""
    jobs: int | None = None
    """Processes at a time; None takes one for each core."""


def estimator_rows(config: Config, estimators: tuple[str, ...], quantizes: str) -> dict[str, tuple[Config, dict]]:
    """A row for each estimator, of the sign family, in its place of `config`."""
    rows, config = {}, validate(config)
    for name in estimators:
        if name not in SIGNS:
            raise unknown_name("estimators", name, SIGNS)
        model = config.model
        if quantizes != "kernels":
            model = replace(model, input_quantizer=name, input_quantizer_options={})
        if quantizes != "inputs":
            options = model.kernel_quantizer_options | {"estimator": name}
            model = replace(model, kernel_quantizer_options=options)
        rows[name] = (replace(config, model=model), {})
    return rows


def rows_of(arguments: Arguments) -> dict[str, tuple[Config, dict]]:
    """The rows of this comparison."""
    get_rows = runpy.run_path(str(arguments.config)).get("get_rows")
    if get_rows is None:
        return estimator_rows(arguments.settings, arguments.estimators, arguments.quantizes)
    rows = get_rows(arguments.settings)
    for label in arguments.rows:
        if label not in rows:
            raise unknown_name("rows", label, rows)
    return {label: row for label, row in rows.items() if label in arguments.rows or not arguments.rows}


def weight_bits(config: Config, image_shape: tuple[int, int, int], num_classes: int) -> str:
    """Bits of the convolution weights of the frozen network, as text for the table."""
    model = make_model(config.model, num_classes=num_classes)
    return f"{account_model(model, image_shape).convolution_bits:,}"


def estimators_of(cells: dict[str, Config]) -> list[str]:
    """The estimators of the table that the rows use, for the picture."""
    used = []
    for cell in cells.values():
        used += [cell.model.input_quantizer, cell.model.kernel_quantizer_options.get("estimator", "ste_sign")]
    return [name for name in dict.fromkeys(used) if name in SIGNS]


def main() -> None:
    arguments = parse(Arguments)
    config = arguments.settings
    workdir = arguments.workdir or Path("runs") / f"estimators_{config.name}"
    use_compilation_cache()
    rows = rows_of(arguments)
    cells = {label: validate(cell) for label, (cell, _) in rows.items()}
    ways = {"tune": arguments.tune, "execution": arguments.execution, "processes": arguments.jobs}
    results = compare(cells, workdir, seeds=arguments.seeds, **ways)
    for row in results["rows"]:
        bits = weight_bits(cells[row["label"]], results["dataset"]["shape"], results["dataset"]["num_classes"])
        row["columns"] = {"weight bits": bits} | rows[row["label"]][1]
    results = {
        "name": f"estimators_{config.name}",
        "compared": "estimator",
        "command": "python " + shlex.join(sys.argv),
        "provenance": provenance(),
        "notes": runpy.run_path(str(arguments.config)).get("NOTES", ""),
        "estimators": estimators_of(cells),
        **results,
    }
    write_report(results, workdir)
    print_table(results)
    print(f"{workdir}: report.md, results.json, accuracy.png, estimators.png")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

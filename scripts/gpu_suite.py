"""All that a GPU is wanted for, in a few minutes: python scripts/gpu_suite.py --minutes 11 --output results/gpu

Equality of what the accelerator computes, and of two runs with and without deterministic operations; the benchmarks of
training, packed bits and sweeps; with what is left the comparison of the config, its seeds mapped by vmap.  All of it
lies in one folder, which the same command goes on from.  --toy does the same at a size for a CPU.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from bnn_jax.benchmarks.suite import Task, run_suite
from bnn_jax.checks import require_positive
from bnn_jax.cli.options import flags_of, parse_options
from bnn_jax.errors import RunError, UsageError, exit_code_of
from bnn_jax.training.progress import progress_display


@dataclass(frozen=True)
class Arguments:
    minutes: float = 11.0
    """For everything."""
    output: Path = Path("results/gpu")
    """Folder of logs, benchmarks and the comparison."""
    config: Path = Path("configs/cifar10_xnor_resnet20.py")
    """Of the comparison."""
    data_dir: Path | None = None
    """Folder with the config's data set, where it is read from TFDS."""
    epochs: int = 200
    """Of each run of the comparison."""
    seeds: int = 8
    """Runs of each optimizer."""
    toy: bool = False
    """Few steps of a small network on the digits, to try the command itself."""


def tasks_of(arguments: Arguments) -> list[Task]:
    output, benchmark = arguments.output, "scripts/benchmark.py"
    config = ["--config", "configs/digits_xnor.py" if arguments.toy else str(arguments.config)]
    toy = ["--steps", "2", "--batch-size", "8"] if arguments.toy else []
    repeats = ["--repeats", "1" if arguments.toy else "10"]
    comparison = ["scripts/compare_optimizers.py", *config, "--workdir", str(output / "comparison")]
    comparison += ["--seeds", *map(str, range(arguments.seeds)), "--epochs", str(arguments.epochs)]
    comparison += [] if arguments.toy else ["--execution", "vmapped"]
    comparison += ["--data.data-dir", str(arguments.data_dir)] if arguments.data_dir else []
    return [
        Task("equality", ["-m", "bnn_jax.benchmarks.device_checks", *toy], 0.3),
        *(
            Task(what, [benchmark, what, *repeats, *options, "--output", str(output / f"benchmark_{what}.json")], share)
            for what, options, share in (("training", config, 0.3), ("packed", [], 0.3), ("sweep", config, 0.3))
            if not arguments.toy or what == "training"
        ),
        Task("comparison", comparison, resumes=True),
    ]


def main() -> None:
    arguments = parse_options(Arguments, __doc__)
    require_positive("minutes", arguments.minutes, "11 are enough on one modern GPU")
    for name in ("epochs", "seeds"):
        if (value := getattr(arguments, name)) < 1:
            raise UsageError(f"`--{name}` (={value}) must be at least 1; leave it out for {getattr(Arguments, name)}")
    tasks = tasks_of(arguments)
    with progress_display("suite") as on_progress:
        record = run_suite(tasks, arguments.output, minutes=arguments.minutes, on_progress=on_progress)
    for name, entry in record.items():
        print(f"{name:12} {entry['outcome']:24} {entry['seconds']:8.1f} s   {arguments.output / name}.log")
    failed = [name for name, entry in record.items() if entry["outcome"].startswith("failed")]
    if failed:
        raise RunError(f"`output` (={arguments.output}): {', '.join(failed)} failed; see the logs")


if __name__ == "__main__":
    sys.exit(exit_code_of(main, flags_of(Arguments)))

"""All that a GPU is wanted for, in a few minutes: python scripts/gpu_suite.py --minutes 11 --output results/gpu

Equality of what the accelerator computes, and of two runs with and without deterministic operations; the benchmarks of
training, packed bits and sweeps; with what is left the comparison of the config, its seeds mapped by vmap.  All of it
lies in one folder, which the same command goes on from: what passed is not run again.  --toy does the same at a size
for a CPU.
"""

import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from bnn_jax.benchmarks.suite import Task, run_suite
from bnn_jax.checks import require
from bnn_jax.cli.options import flags_of, parse_options
from bnn_jax.errors import RunError, UsageError, exit_code_of
from bnn_jax.training.config import load_config
from bnn_jax.training.input_pipeline import load_data
from bnn_jax.training.progress import progress_display

ROOT = Path(__file__).parents[1]
SHARES = {"equality": 0.2, "training": 0.15, "packed": 0.2, "sweep": 0.15}
"""Of the minutes, at most; the comparison has the rest."""
TOY_SHARES = {"equality": 0.4, "training": 0.3}
TOY_EPOCHS, TOY_SEEDS = 1, 2


@dataclass(frozen=True)
class Arguments:
    minutes: float = 11.0
    """For everything."""
    output: Path = Path("results/gpu")
    """Folder of logs, benchmarks and the comparison."""
    config: Path = Path("cifar10_xnor_resnet20")
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
    output, toy = arguments.output, arguments.toy
    shares = TOY_SHARES if toy else SHARES
    config = ["--config", str(ROOT / "configs" / "digits_xnor.py" if toy else arguments.config)]
    epochs, seeds = (TOY_EPOCHS, TOY_SEEDS) if toy else (arguments.epochs, arguments.seeds)
    comparison = [*config, "--workdir", str(output / "comparison")]
    comparison += ["--seeds", *map(str, range(seeds)), "--epochs", str(epochs)]
    comparison += [] if toy else ["--execution", "vmapped"]
    comparison += ["--data.data-dir", str(arguments.data_dir)] if arguments.data_dir else []
    small = ["--steps", "2", "--batch-size", "8"] if toy else []
    # Of packed bits what was measured in four fifths of its time.
    packed = ["--minutes", f"{0.8 * SHARES['packed'] * arguments.minutes:.2f}"]
    repeats = ["--repeats", "1" if toy else "10"]
    benchmarks = {"training": config} if toy else {"training": config, "packed": packed, "sweep": config}

    def benchmark(what: str, options: list[str]) -> Task:
        record = str(output / f"benchmark_{what}.json")
        command = [str(ROOT / "scripts" / "benchmark.py"), what, *repeats, *options, "--output", record]
        return Task(what, command, shares[what])

    return [
        Task("equality", ["-m", "bnn_jax.benchmarks.device_checks", *small], shares["equality"]),
        *(benchmark(what, options) for what, options in benchmarks.items()),
        Task("comparison", [str(ROOT / "scripts" / "compare_optimizers.py"), *comparison], resumes=True),
    ]


def check_data(arguments: Arguments) -> None:
    """Load what the comparison reads: data that is missing is told before the minutes begin."""
    data = load_config(arguments.config).data
    load_data(replace(data, data_dir=str(arguments.data_dir)) if arguments.data_dir else data)


def end(*_) -> None:
    """Let the task that runs save, when this process is asked to end."""
    sys.exit(128 + signal.SIGTERM)


def main() -> None:
    arguments = parse_options(Arguments, __doc__)
    minutes, advice = arguments.minutes, "11 are enough on one modern GPU"
    require("minutes", minutes, minutes > 0, "must be positive", advice, error=UsageError)
    for name in ("epochs", "seeds"):
        if (value := getattr(arguments, name)) < 1:
            raise UsageError(f"`--{name}` (={value}) must be at least 1; leave it out for {getattr(Arguments, name)}")
    if not arguments.toy:
        check_data(arguments)
    signal.signal(signal.SIGTERM, end)
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

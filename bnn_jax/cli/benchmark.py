"""Measure speed: bnn-jax benchmark training --output results/benchmark_training.json

  training: a step of Deep Frank-Wolfe against one of Adam, and a scan of 20 steps against 20 single ones.
  estimators: forward and backward of every gradient estimator against the clipped straight-through one; memory.
  packed: products, convolutions and whole networks on packed bits against float32, int8 and, if installed, PyTorch
and bnn-lab; with --output FILE.json a picture FILE.png too.
  input: images a second read from disk, and how long a GPU that trains ResNet-18 would wait for them.
  sweep: eight runs mapped by vmap against one after another and, on a CPU, four seeds through the sweep engine
against four single runs.
  zoo: one image through every network of the catalogue, packed and in full precision; again, what it compiled is kept.

Run it on an idle machine.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from bnn_jax.analysis.provenance import provenance
from bnn_jax.benchmarks.estimators import benchmark_estimators, print_estimators
from bnn_jax.benchmarks.input import GPU, GPU_IMAGES_PER_SECOND, benchmark_input, print_input
from bnn_jax.benchmarks.packed import benchmark_packed
from bnn_jax.benchmarks.packed_tables import plot_packed, print_packed
from bnn_jax.benchmarks.sweep import benchmark_sweep, print_sweep
from bnn_jax.benchmarks.training import benchmark_training, print_training
from bnn_jax.benchmarks.zoo import benchmark_zoo, print_zoo
from bnn_jax.checks import require
from bnn_jax.cli.options import TableOptions, command_line, parse_options, refuse_unread, write_output
from bnn_jax.compilation import use_compilation_cache
from bnn_jax.errors import UsageError, unknown_name
from bnn_jax.models import MODELS
from bnn_jax.paths import require_ending, require_writable
from bnn_jax.training.config import load_config
from bnn_jax.training.progress import progress_display


@dataclass(frozen=True)
class Arguments(TableOptions):
    what: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="BENCHMARK")]
    """One of the above."""
    config: Path = Path("cifar10_xnor_resnet20")
    """Gives the network, the batch size and the optimizers of training."""
    values: int = 10_000_000
    """Size of the input of the estimators."""
    repeats: int = 20
    """Measurements of each time, of which the median counts."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Numbers of processes that read the input; 0 stands for threads."""
    batch_size: int = 128
    """Images of a step of the input."""
    data_dir: Path | None = None
    """Folder with a set imagenet2012 for the input; without it 512 made-up photographs are written."""
    preprocessing: str = "random_resized_crop"
    """Of the input."""
    gpu: str = GPU
    """Name of the GPU whose step the input is measured beside."""
    gpu_images_per_second: float = GPU_IMAGES_PER_SECOND
    """Images of 224x224 on which it trains ResNet-18."""
    networks: tuple[str, ...] = ()
    """Names of the networks of the zoo; none are all."""
    minutes: float | None = None
    """After which nothing more of packed, or no other network of the zoo, is begun; by default no limit, and 6."""
    output: Path | None = None
    """JSON file with the times, versions, device and commit."""


def _limit_of(arguments: Arguments) -> dict[str, float]:
    return {} if arguments.minutes is None else {"minutes": arguments.minutes}


def measure_packed(arguments: Arguments, **options: Any) -> dict[str, Any]:
    # As those of PyTorch and bnn-lab, a call then ends with its work, and no hand-over to another thread is timed.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return {"async_dispatch": False} | benchmark_packed(repeats=arguments.repeats, **_limit_of(arguments), **options)


def measure_input(arguments: Arguments, **options: Any) -> dict[str, Any]:
    settings = {name: getattr(arguments, name) for name in INPUT}
    return benchmark_input(steps=arguments.repeats, **settings, **options)


def measure_sweep(arguments: Arguments, **options: Any) -> dict[str, Any]:
    config = load_config(arguments.config)
    if jax.default_backend() == "cpu":
        # Enough to show why runs are not mapped there, in seconds.
        config = replace(config, batch_size=32)
    engine_config = replace(load_config("digits_xnor"), epochs=5)
    return benchmark_sweep(engine_config, config, repeats=arguments.repeats, **options)


def measure_zoo(arguments: Arguments, **options: Any) -> dict[str, Any]:
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    for name in arguments.networks:
        if name not in MODELS:
            raise unknown_name("networks", name, MODELS)
    use_compilation_cache()
    settings = {"networks": arguments.networks or MODELS, "repeats": arguments.repeats} | _limit_of(arguments)
    return {"async_dispatch": False} | benchmark_zoo(**settings, **options)


INPUT = ("data_dir", "workers", "batch_size", "preprocessing", "gpu", "gpu_images_per_second")
BENCHMARKS = {
    "training": (
        lambda a, **_: benchmark_training(load_config(a.config), repeats=a.repeats),
        print_training,
        ("config",),
    ),
    "estimators": (
        lambda a, **o: benchmark_estimators(values=a.values, repeats=a.repeats, **o),
        print_estimators,
        ("values",),
    ),
    "packed": (measure_packed, print_packed, ("minutes",)),
    "input": (measure_input, print_input, INPUT),
    "sweep": (measure_sweep, print_sweep, ("config",)),
    "zoo": (measure_zoo, print_zoo, ("networks", "minutes")),
}
"""Of each what measures it, what prints the numbers, and the options that it reads beside `repeats` and `output`."""


def main() -> None:
    arguments = parse_options(Arguments, __doc__)
    if arguments.what not in BENCHMARKS:
        raise unknown_name("BENCHMARK", arguments.what, BENCHMARKS)
    if arguments.output:
        require_ending("output", arguments.output, ".json")
        require_writable("output", arguments.output)
    for name in ("values", "repeats"):
        if (value := getattr(arguments, name)) < 1:
            raise UsageError(f"`{name}` (={value}) must be at least 1; leave it out for {getattr(Arguments, name)}")
    if (minutes := arguments.minutes) is not None:
        advice = "leave it out for the usual time"
        require("minutes", minutes, minutes > 0, "must be positive", advice, error=UsageError)
    measure, show, options = BENCHMARKS[arguments.what]
    others = {name for _, _, names in BENCHMARKS.values() for name in names} - set(options)
    refuse_unread(arguments, sorted(others), f"is not for {arguments.what}")
    with progress_display(arguments.what) as on_progress:
        found = measure(arguments, on_progress=on_progress)
    with arguments.tables() as tables:
        show(found, tables)
        if arguments.output:
            record = {"command": command_line(), **found, "provenance": provenance()}
            write_output("output", arguments.output, json.dumps(record, indent=1))
            if arguments.what == "packed":
                print(plot_packed(found, arguments.output.with_suffix(".png")))

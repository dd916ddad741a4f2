"""Measure speed: python scripts/benchmark.py training --output results/benchmark_training.json

training: a step of Deep Frank-Wolfe against one of Adam, and a scan of 20 steps against 20 single ones.
estimators: forward and backward of every gradient estimator against the clipped straight-through one, and their memory.
packed: products, convolutions and whole networks on packed bits against float32, int8 and, if installed, PyTorch and
bnn-lab; with --output FILE.json a picture FILE.png too.
input: images a second read from disk, and how long a GPU that trains ResNet-18 would wait for them.
sweep: four seeds through the sweep engine against four single runs, and eight runs mapped by vmap against one after
another.
Run it on an idle machine.
"""

import json
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from bnn_jax.analysis.provenance import provenance
from bnn_jax.benchmarks.benchmark import benchmark_estimators, benchmark_training
from bnn_jax.benchmarks.input import GPU, GPU_IMAGES_PER_SECOND, benchmark_input
from bnn_jax.benchmarks.packed import NAMES, benchmark_packed, plot_packed
from bnn_jax.benchmarks.sweep import benchmark_engine, benchmark_vmapped
from bnn_jax.errors import UsageError, exit_code_of
from bnn_jax.training.config import load_config
from bnn_jax.training.metrics import write_file
from bnn_jax.training.progress import progress_display


@dataclass(frozen=True)
class Arguments:
    what: tyro.conf.Positional[Literal["training", "estimators", "packed", "input", "sweep"]]
    config: Path = Path("configs/cifar10_xnor_resnet20.py")
    """Gives the network, the batch size and the optimizers of training."""
    values: int = 10_000_000
    """Size of the input of the estimators."""
    repeats: int = 20
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
    output: Path | None = None
    """JSON file with the times, versions, device and commit."""


def measure_training(arguments: Arguments) -> dict[str, Any]:
    """Run the benchmark and print its numbers."""
    found = benchmark_training(load_config(arguments.config), repeats=arguments.repeats)
    for name, value in found.items():
        if name != "seconds":
            print(f"{name:24} {value:10.3f}")
    return found


def measure_estimators(arguments: Arguments) -> dict[str, Any]:
    """Run the benchmark and print its table."""
    with progress_display("estimators") as on_progress:
        found = benchmark_estimators(values=arguments.values, repeats=arguments.repeats, on_progress=on_progress)
    title = f"forward and backward of {found['values']:,} values, medians of {found['repeats']}"
    table = Table("estimator", title=title, box=box.SIMPLE)
    for header in ("ms", "ste_sign\nms", "ratio", "temporaries\n(inputs)"):
        table.add_column(header, justify="right")
    for group in ("elementwise", "other"):
        for name, row in found[group].items():
            times = (f"{row['ms']:.2f}", f"{row['ste_sign_ms']:.2f}", f"{row['ratio']:.2f}")
            table.add_row(name, *times, f"{row['temporaries']:.3f}")
        table.add_section()
    Console().print(table)
    largest = max(found["elementwise"], key=lambda name: found["elementwise"][name]["ratio"])
    print(f"elementwise: ratio at most {found['elementwise'][largest]['ratio']:.2f} ({largest})")
    print(f"{', '.join(found['other'])}: in need of the whole tensor or of random bits")
    return found


def measure_packed(arguments: Arguments) -> dict[str, Any]:
    """Run the benchmark and print its tables."""
    # As those of PyTorch and bnn-lab, a call then ends with its work, and no hand-over to another thread is timed.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    with progress_display("packed") as on_progress:
        found = {"async_dispatch": False} | benchmark_packed(repeats=arguments.repeats, on_progress=on_progress)
    for kind, unit in (("matmul", "gmacs"), ("conv", "gmacs"), ("network", "ms")):
        who = [name for name in NAMES if any(name in row[unit] for row in found[kind])]
        title = f"{kind}: {'10^9 multiply-accumulates a second' if unit == 'gmacs' else 'ms a batch'}"
        table = Table("shape", title=title, box=box.SIMPLE)
        for name in who:
            table.add_column(NAMES[name].replace(" ", "\n", 1), justify="right")
        for row in found[kind]:
            shape = "x".join(map(str, row["shape"])) if kind == "matmul" else f"{row['side']}^2"
            shape += f" {row['channels']}->{row['features']}, batch {row['batch']}" if kind == "conv" else ""
            shape = f"{row['name']} {shape}, batch {row['batch']}" if kind == "network" else shape
            table.add_row(shape, *(f"{row[unit][name]:.3g}" if name in row[unit] else "" for name in who))
        Console().print(table)
    for row in found["network"]:
        memory = ", ".join(f"{NAMES[who]} {size / 1e6:.1f}" for who, size in row["peak_memory"].items())
        print(f"{row['name']} batch {row['batch']}: file {row['file_bytes'] / 1e6:.3f} MB; peak memory in MB: {memory}")
    for name, ratios in found["summary"].items():
        print(f"{name}: geometric mean {ratios['geometric_mean']:.2f}, {ratios['worst']:.2f} to {ratios['best']:.2f}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        print(plot_packed(found, arguments.output.with_suffix(".png")))
    return found


def measure_input(arguments: Arguments) -> dict[str, Any]:
    """Run the benchmark and print its table."""
    with progress_display("input") as on_progress:
        found = benchmark_input(
            data_dir=arguments.data_dir,
            workers=arguments.workers,
            batch_size=arguments.batch_size,
            steps=arguments.repeats,
            preprocessing=arguments.preprocessing,
            gpu=arguments.gpu,
            gpu_images_per_second=arguments.gpu_images_per_second,
            on_progress=on_progress,
        )
    title = f"images from disk, {found['preprocessing']}, batch {found['batch_size']}, {found['steps']} steps"
    table = Table("workers", title=title, box=box.SIMPLE)
    for header in ("images/s", "first batch\nafter s", "beside a step:\nimages/s", "waiting\n%"):
        table.add_column(header, justify="right")
    for row in found["rows"]:
        rates = (
            f"{row['images_per_second']:.0f}",
            f"{row['start_seconds']:.1f}",
            f"{row['fed_images_per_second']:.0f}",
        )
        table.add_row(str(row["workers"] or "threads"), *rates, f"{100 * row['waiting_share']:.1f}")
    Console().print(table)
    print(
        f"{found['gpu']}: ResNet-18 trains on {found['gpu_images_per_second']:.0f} images/s, a step of "
        f"{found['step_ms']:.1f} ms; at {found['images_per_second_per_core']:.0f} images/s a core that takes "
        f"{found['cores_needed']:.1f} cores (here: {found['cores']})"
    )
    return found


def measure_sweep(arguments: Arguments) -> dict[str, Any]:
    """Run the benchmark and print its ratios."""
    engine_config = replace(load_config("configs/digits_xnor.py"), epochs=5)
    config = load_config(arguments.config)
    if jax.default_backend() == "cpu":
        # Enough to show why runs are not mapped there, in seconds.
        config = replace(config, batch_size=32)
    with progress_display("sweep") as on_progress:
        engine = benchmark_engine(engine_config, on_progress=on_progress)
    mapped = benchmark_vmapped(config, repeats=arguments.repeats)
    for found in (engine, mapped):
        for name, value in found.items():
            if isinstance(value, float):
                print(f"{name:34} {value:10.3f}")
    return {"engine": engine, "vmapped": mapped}


MEASURES = {
    "training": measure_training,
    "estimators": measure_estimators,
    "packed": measure_packed,
    "input": measure_input,
    "sweep": measure_sweep,
}


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    for name in ("values", "repeats"):
        if (value := getattr(arguments, name)) < 1:
            raise UsageError(f"`{name}` (={value}) must be at least 1; leave it out for {getattr(Arguments, name)}")
    found = MEASURES[arguments.what](arguments)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        command = "python " + shlex.join(sys.argv)
        record = {"command": command, **found, "provenance": provenance()}
        write_file(arguments.output, json.dumps(record, indent=1))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

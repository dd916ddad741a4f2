"""Measure speed: python scripts/benchmark.py training --output results/benchmark_training.json

training: a step of Deep Frank-Wolfe against one of Adam, and a scan of 20 steps against 20 single ones.
Run it on an idle machine.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from bnn_jax.analysis.benchmark import benchmark_training
from bnn_jax.analysis.provenance import provenance
from bnn_jax.errors import exit_code_of
from bnn_jax.training.config import load_config
from bnn_jax.training.metrics import write_file


@dataclass(frozen=True)
class Arguments:
    what: tyro.conf.Positional[Literal["training"]]
    config: Path = Path("configs/cifar10_xnor_resnet20.py")
    """Gives the network, the batch size and the optimizers."""
    repeats: int = 20
    output: Path | None = None
    """JSON file with the times, versions, device and commit."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    found = benchmark_training(load_config(arguments.config), repeats=arguments.repeats)
    for name, value in found.items():
        if name != "seconds":
            print(f"{name:24} {value:10.3f}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        command = "python " + shlex.join(sys.argv)
        record = {"command": command, **found, "provenance": provenance()}
        write_file(arguments.output, json.dumps(record, indent=1))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

"""Evaluate a run: python scripts/evaluate.py runs/mine --split test --which best"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from bnn_jax.errors import exit_code_of
from bnn_jax.training.loop import evaluate_run
from bnn_jax.training.programs import use_compilation_cache


@dataclass(frozen=True)
class Arguments:
    workdir: tyro.conf.Positional[Path]
    """Folder of a run, finished or not."""
    split: Literal["train", "validation", "test"] = "test"
    which: Literal["best", "last"] = "best"
    """The variables of the best validation epoch, or of the newest checkpoint."""
    data_dir: str | None = None
    """Where the data set lies now, if not where the run found it."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    use_compilation_cache()
    found = evaluate_run(arguments.workdir, split=arguments.split, which=arguments.which, data_dir=arguments.data_dir)
    print(f"{arguments.split}: accuracy {100 * found['accuracy']:.2f} %, loss {found['loss']:.4f} ", end="")
    print(f"on {found['examples']} examples ({arguments.which}, step {found['step']})")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

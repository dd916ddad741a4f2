"""Prove that a run's packed network is the trained one: python scripts/verify_packed.py runs/mine

On the whole split, for each binary layer: integers that differ from the trained layer's on equal inputs, and activation
bits that differ end to end; then logits and predictions.  Exit code 1 if anything that has to be equal differs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from bnn_jax.data import in_batches, normalize
from bnn_jax.errors import RunError, UsageError, exit_code_of
from bnn_jax.packed import verify
from bnn_jax.packed.runs import freeze_run
from bnn_jax.packed.verification import Verification
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
    batch_size: int = 250
    """Images compared at once."""


def print_verification(found: Verification) -> None:
    """The layers as a table, then the network."""
    table = Table("layer", title="differing / compared", box=box.SIMPLE)
    for header in ("integers", "activation bits\n(whole words)"):
        table.add_column(header, justify="right")
    for path, layer in found.layers.items():
        integers = f"{layer.differing_integers:,} / {layer.integers:,}"
        table.add_row(path, integers, f"{layer.differing_bits:,} / {layer.bits:,}")
    Console().print(table)
    print(f"predictions that differ: {found.differing_predictions:,} of {found.examples:,}")
    print(f"largest difference of logits: {found.largest_logit_difference:.3g}")


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.batch_size < 1:
        raise UsageError(f"`batch_size` (={arguments.batch_size}) must be at least 1; leave it out for 250")
    use_compilation_cache()
    run = freeze_run(arguments.workdir, which=arguments.which, data_dir=arguments.data_dir)
    found = in_batches(getattr(run.dataset, arguments.split), arguments.batch_size)
    batches = (images[labels >= 0] for images, labels in found)
    found = verify(
        run.model,
        run.variables,
        run.packed,
        (normalize(jnp.asarray(batch), mean=run.dataset.mean, std=run.dataset.std) for batch in batches),
    )
    print_verification(found)
    if not found.passed:
        raise RunError(f"`workdir` (={arguments.workdir}): the packed network is not the trained one; see the table")
    print("the packed network is the trained one")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

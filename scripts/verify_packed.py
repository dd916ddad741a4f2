"""Prove that a run's packed network is the trained one: python scripts/verify_packed.py runs/mine

On the whole split, for each binary layer: integers that differ from the trained layer's on equal inputs, and activation
bits that differ end to end; then logits and predictions.  Exit code 1 if anything that has to be equal differs.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from bnn_jax.data.augment import normalize
from bnn_jax.errors import RunError, UsageError, exit_code_of
from bnn_jax.packed import freeze, verify
from bnn_jax.packed.verification import Verification
from bnn_jax.training.experiment import make_model
from bnn_jax.training.loop import load_data, read_config
from bnn_jax.training.programs import use_compilation_cache
from bnn_jax.training.stages import load_network


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
    config = read_config(arguments.workdir)
    if arguments.data_dir is not None:
        config = replace(config, data=replace(config.data, data_dir=arguments.data_dir))
    dataset = load_data(config)
    settings, variables = load_network(arguments.workdir, dataset, which=arguments.which)
    model = make_model(settings, num_classes=dataset.num_classes)
    images = getattr(dataset, arguments.split).images
    try:
        packed = freeze(model, variables, images.shape[1:])
    except ValueError as error:
        raise UsageError(f"`workdir` (={arguments.workdir}) holds a network that cannot be packed: {error}") from None
    batches = (images[i : i + arguments.batch_size] for i in range(0, len(images), arguments.batch_size))
    found = verify(
        model,
        variables,
        packed,
        (normalize(jnp.asarray(batch), mean=dataset.mean, std=dataset.std) for batch in batches),
    )
    print_verification(found)
    if not found.passed:
        raise RunError(f"`workdir` (={arguments.workdir}): the packed network is not the trained one; see the table")
    print("the packed network is the trained one")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))

"""Prove that a run's packed network is the trained one: bnn-jax verify runs/mine

For each layer with quantized weights: codes that differ from the trained layer's; on the whole split, integers that
differ on equal inputs, and activation bits that differ end to end; then predictions, and logits, which may differ by
rounding.  Exit code 1 if anything else differs, or is not a number.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from bnn_jax.analysis.tables import Tables
from bnn_jax.cli.options import TableOptions, TrainedOptions, parse_options
from bnn_jax.compilation import use_compilation_cache
from bnn_jax.data import images_in_batches, normalize
from bnn_jax.errors import RunError, UsageError
from bnn_jax.packed import verify
from bnn_jax.packed.runs import freeze_run
from bnn_jax.packed.verification import Verification


@dataclass(frozen=True, kw_only=True)
class Arguments(TrainedOptions, TableOptions):
    batch_size: int = 250
    """Images compared at once."""


def print_verification(found: Verification, tables: Tables) -> None:
    """Print the layers as a table, then the network."""
    rows = [
        (name, *(f"{differing:,} / {compared:,}" for compared, differing in zip(layer[:6:2], layer[1:6:2])), layer.path)
        for name, layer in found.layers.items()
    ]
    columns = ("layer", "weights", "integers", "activation bits\n(whole words)", "multiplies\non")
    tables.print(columns, rows, texts=(0, 4), title="differing / compared")
    print(f"predictions that differ: {found.differing_predictions:,} of {found.examples:,}")
    largest = f"{found.largest_logit_difference:.3g} (of {found.largest_logit:.3g} at most)"
    print(f"largest difference of logits: {largest}")


def main() -> None:
    arguments = parse_options(Arguments, __doc__)
    if arguments.batch_size < 1:
        raise UsageError(f"`batch_size` (={arguments.batch_size}) must be at least 1; leave it out for 250")
    use_compilation_cache()
    run = freeze_run(arguments.workdir, which=arguments.which, data_dir=arguments.data_dir)
    batches = images_in_batches(getattr(run.dataset, arguments.split), arguments.batch_size)
    found = verify(
        run.model,
        run.variables,
        run.packed,
        (normalize(jnp.asarray(batch), mean=run.dataset.mean, std=run.dataset.std) for batch in batches),
    )
    with arguments.tables() as tables:
        print_verification(found, tables)
        if found.examples and found.passed:
            print("the packed network is the trained one")
    if not found.examples:
        raise RunError(f"`split` (={arguments.split!r}) has no image with a label to compare; choose another")
    if not found.passed:
        raise RunError(f"`workdir` (={arguments.workdir}): the packed network is not the trained one; see the table")

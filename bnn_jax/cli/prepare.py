"""Download an official set and store it for training, without TensorFlow: bnn-jax prepare cifar10

Archives that are in DATA_DIR/downloads/NAME already are verified and used instead of downloaded.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from bnn_jax.cli.options import parse_options
from bnn_jax.data.prepare import prepare_dataset


@dataclass(frozen=True)
class Arguments:
    name: tyro.conf.Positional[str]
    """cifar10, cifar100, mnist or fashion_mnist."""
    data_dir: Path | None = None
    """Folder of prepared sets; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""


def main() -> None:
    arguments = parse_options(Arguments, __doc__)
    folder = prepare_dataset(arguments.name, data_dir=arguments.data_dir)
    print(f"{folder}: load it with load_dataset({arguments.name!r}, data_dir={str(folder.parents[1])!r})")

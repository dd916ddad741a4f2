"""Write made-up images in ImageNet's format: bnn-jax synthesize --train-examples 2000

The images differ in size, some are grey, some CMYK, and one of each split is corrupt.  A config that streams
imagenet2012 then runs with --data.data-dir DATA_DIR --data.validation-examples 200, a tenth of the made-up images, and
--data.name NAME where the set has another one.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from bnn_jax.analysis.tables import print_text
from bnn_jax.cli.options import parse_options
from bnn_jax.data.prepare import default_data_dir
from bnn_jax.data.synthetic import write_synthetic_imagenet


@dataclass(frozen=True)
class Arguments:
    data_dir: Path | None = None
    """Folder of prepared sets; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    name: str = "imagenet2012"
    """Of the set; another one leaves the place of the real ImageNet free."""
    train_examples: int = 2000
    """Images of the training split."""
    validation_examples: int = 200
    """Images of the validation split."""
    classes: int = 1000
    """Of the labels."""
    corrupt: int = 1
    """Images of each split that are cut short."""
    grey: float = 0.05
    """Share of grey images."""
    cmyk: float = 0.02
    """Share of CMYK images."""
    short_side: tuple[int, int] = (200, 500)
    """Least and greatest length of the shorter side, in pixels."""
    aspect: tuple[float, float] = (0.5, 2.0)
    """Least and greatest width / height."""
    seed: int = 0
    """Decides the images."""


def main() -> None:
    arguments = parse_options(Arguments, __doc__)
    folder = write_synthetic_imagenet(**vars(arguments) | {"data_dir": arguments.data_dir or default_data_dir()})
    size = sum(path.stat().st_size for path in folder.iterdir())
    options = f"--data.data-dir {shlex.quote(str(folder.parents[1]))}"
    options += f" --data.validation-examples {max(1, arguments.train_examples // 10)}"
    named = "" if arguments.name == Arguments.name else f" --data.name {arguments.name}"
    print_text(
        f"{folder}: {arguments.train_examples} training and {arguments.validation_examples} validation images, "
        f"{size / 1e6:.1f} MB; train on it with {options}{named}"
    )

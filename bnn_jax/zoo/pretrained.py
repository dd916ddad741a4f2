"""A pretrained network: packed as it travels, and with variables that can be trained further."""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bnn_jax.data import in_batches
from bnn_jax.packed import PackedModel, latent_variables
from bnn_jax.packed import load as load_file
from bnn_jax.training.config import DataConfig
from bnn_jax.training.epoch import EVALUATION_BATCH
from bnn_jax.training.input_pipeline import load_data
from bnn_jax.types import Images
from bnn_jax.zoo.records import DATA, PRETRAINED, Record, file_of


@dataclass(frozen=True, eq=False, repr=False)
class Pretrained:
    """A pretrained network.

    Attributes:
      name: in PRETRAINED.
      record: how it was trained, and its accuracy.
      packed: the network on bits: ``packed.predict(images)`` of uint8 images.
    """

    name: str
    record: Record
    packed: PackedModel

    def __repr__(self) -> str:
        correct, examples, accuracy = self.record.correct, self.record.examples, self.record.accuracy
        return f"Pretrained({self.name}: {self.record.data}, {correct} of {examples} right, {100 * accuracy:.2f} %)"

    @property
    def model(self) -> Any:
        """The network, a Flax module, which takes normalized images; with latent or with packed variables."""
        return self.packed.model

    @cached_property
    def variables(self) -> dict[str, Any]:
        """Latent variables with the same logits in evaluation, see :func:`bnn_jax.packed.latent_variables`."""
        return latent_variables(self.packed)

    def variables_for(self, images: Images) -> dict[str, Any]:
        """Latent variables to train further, with the statistics of some hundred uint8 images of the training set.

        Raises:
          ValueError: for images of another dtype or shape.
        """
        return latent_variables(self.packed, images)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(height, width, channels) of an image."""
        return self.packed.metadata["image_shape"]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the logits."""
        return DATA[self.record.data].class_names

    @property
    def licence(self) -> str:
        """Of the data that it was trained on."""
        return DATA[self.record.data].licence

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return file_of(self.name).stat().st_size

    def count_correct(self, data_dir: str | os.PathLike[str] | None = None) -> tuple[int, int]:
        """Classify the test set again: how many images are right, and how many there are.

        Args:
          data_dir: folder of prepared sets; None is `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.  Digits need none.

        Raises:
          UsageError: if the data set is not there.
        """
        settings = self.packed.metadata["tested"]["data"]
        dataset = load_data(DataConfig(**settings, data_dir=None if data_dir is None else os.fspath(data_dir)))
        accuracy, examples = self.packed.accuracy(in_batches(dataset.test, EVALUATION_BATCH))
        return round(accuracy * examples), examples


def load(name: str) -> Pretrained:
    """A pretrained network by its name in PRETRAINED; `bnn-jax list pretrained` tells all.

    Raises:
      UsageError: for a name that is not there; the nearest is named.

    >>> network = load("digits_xnor_resnet6")
    >>> network.input_shape, network.class_names[3], network.packed.num_classes
    ((8, 8, 1), '3', 10)
    """
    return Pretrained(name, PRETRAINED.get(name), load_file(file_of(name)))

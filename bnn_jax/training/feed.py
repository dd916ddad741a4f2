"""What a run trains on, on the device: a whole set in memory, or batches that are read while it trains."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from bnn_jax.data import Dataset, load_dataset
from bnn_jax.training.config import Config
from bnn_jax.training.programs import Programs
from bnn_jax.training.state import TrainState
from bnn_jax.types import Images, Labels, Metrics, Params


class Block(NamedTuple):
    """Batches of an epoch that are on the device.

    Attributes:
      train: (state, hyper, first, count) -> (state, metrics of each), see `bnn_jax.training.programs`.
      batch: number of a batch -> its images and labels.
      rows: numbers of the batches to train on, in this block's own count.
    """

    train: Callable[..., tuple[TrainState, Metrics]]
    batch: Callable[[int], tuple[Images, Labels]]
    rows: range


class Feed(NamedTuple):
    """The data of a run.

    Attributes:
      blocks: (indices of the examples of each batch of the epoch, epoch, batches to leave out) -> the blocks in order.
      evaluate: (parameters, model state, name of a split) -> `loss`, `accuracy` and `examples` counted.
    """

    blocks: Callable[[Int[np.ndarray, "steps batch"], int, int], Iterator[Block]]
    evaluate: Callable[[Params, Any, str], dict[str, np.ndarray]]


def load_data(config: Config) -> Dataset:
    """The data set that `config.data` names, checked."""
    data = config.data
    return load_dataset(
        data.name, data_dir=data.data_dir, validation_examples=data.validation_examples, split_seed=data.split_seed
    )


def feed_from_memory(programs: Programs, dataset: Dataset) -> Feed:
    """Of a set that fits in the memory of the device, to which the training split goes once."""
    images, labels = jnp.asarray(dataset.train.images), jnp.asarray(dataset.train.labels)

    def blocks(order, epoch, begun):
        order = jnp.asarray(order)
        train = partial(programs.train, images=images, labels=labels, order=order)
        yield Block(train, lambda row: (images[order[row]], labels[order[row]]), range(begun, len(order)))

    def evaluate(params, model_state, name):
        split = getattr(dataset, name)
        found = programs.evaluate(params, model_state, jnp.asarray(split.images), jnp.asarray(split.labels))
        return jax.device_get(found)

    return Feed(blocks, evaluate)

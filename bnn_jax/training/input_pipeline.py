"""What a run trains on, on the device: a whole set in memory, or batches that are read while it trains."""

import math
import os
import warnings
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from bnn_jax.data import (
    Dataset,
    ImageStream,
    as_dataset,
    batches,
    batching,
    images_in_batches,
    load_dataset,
    open_stream,
    padded_order,
    prefetch,
)
from bnn_jax.errors import RunError, UsageError, renamed
from bnn_jax.paths import local_path
from bnn_jax.training.config import Config, DataConfig, require_config
from bnn_jax.training.devices import data_shards, place_batch, place_batches, process_part, replicate
from bnn_jax.training.epoch import EVALUATION_BATCH, Batches
from bnn_jax.training.programs import Programs
from bnn_jax.types import Params

BYTES_AT_ONCE = 2**28
"""Of images that go to the device together, where they are read while it trains; twice as many are on the way."""


class SkippedExampleWarning(UserWarning):
    """An image was left out; the text names it and the reason."""


class InputPipeline(NamedTuple):
    """The data of a run, on their way to the device.

    Attributes:
      batches: (indices of the examples of each batch of the epoch, epoch, number of batches to leave out) -> parts of
        the epoch in order, each with the numbers, in its own count, of the batches to train on; a generator to be
        closed.
      evaluate: (parameters, model state, name of a split) -> see :func:`bnn_jax.training.epoch.evaluate`.
      first_non_finite_output: (parameters, model state, name of a split) -> where in the network logits cease to be
        finite, in words; None if they do not.
    """

    batches: Callable[[Int[np.ndarray, "... steps batch"], int, int], Generator[tuple[Batches, range]]]
    evaluate: Callable[[Params, Any, str], dict[str, np.ndarray]]
    first_non_finite_output: Callable[[Params, Any, str], str | None]


def load_data(data: DataConfig) -> Dataset | ImageStream:
    """Load the data set that the settings name, checked, or open it to be read while it is used."""
    where = {
        "data_dir": data.data_dir,
        "validation_examples": data.validation_examples,
        "split_seed": data.split_seed,
        "preprocessing": data.preprocessing,
        "image_size": data.image_size,
    }
    try:
        if data.stream:
            return open_stream(data.name, **where)
        return load_dataset(data.name, **where, tokens=data.tokens)
    except (UsageError, RunError) as error:
        settings = {name: f"data.{name}" for name in ("name", *where, "tokens")}
        raise type(error)(renamed(str(error), settings)) from error


def with_data(config: Config, data: Any | None) -> tuple[Config, Dataset | ImageStream | None]:
    """The config that names the data that were given in place of its own, and those as a set.

    In the config of arrays in memory stands a hash of them, so that a run is resumed and evaluated with the same alone.

    Args:
      config: says how they are divided, if they are not.
      data: as :func:`bnn_jax.data.as_dataset` takes them, or what `data.name` would be; None leaves the config so.

    Raises:
      UsageError, RunError: as :func:`bnn_jax.data.as_dataset`.
    """
    require_config(config)
    if data is None:
        return config, None
    if isinstance(data, str | os.PathLike):
        return replace(config, data=replace(config.data, name=os.fspath(local_path("data", data)))), None
    made_by = ("validation_examples", "split_seed", "preprocessing", "image_size")
    try:
        dataset = as_dataset(data, **{name: getattr(config.data, name) for name in made_by})
    except (UsageError, RunError) as error:
        raise type(error)(renamed(str(error), {name: f"data.{name}" for name in made_by})) from error
    return replace(config, data=replace(config.data, **dataset.identity)), dataset


def make_input_pipeline(
    config: Config, programs: Programs, dataset: Dataset | ImageStream, *, workers: int = 0, strict: bool = False
) -> InputPipeline:
    """Make the input pipeline of a run from its data.

    Args:
      config: decides how many batches go to the device together, and what is random in preprocessing.
      workers: processes that read a stream; 0 takes threads.
      strict: refuse corrupt images of a stream instead of leaving them out with a warning.
    """
    if isinstance(dataset, ImageStream):
        return _from_stream(config, programs, dataset, workers=workers, strict=strict)
    return _from_memory(programs, dataset)


def _from_memory(programs: Programs, dataset: Dataset) -> InputPipeline:
    """Make that of a set that fits in the memory of each device, to which the training split goes once."""
    whole = replicate((dataset.train.images, dataset.train.labels), programs.devices)

    def epoch_batches(order, epoch, begun):
        yield Batches(*whole, replicate(order, programs.devices)), range(begun, order.shape[-2])

    def evaluate(params, model_state, name):
        split = getattr(dataset, name)
        arrays = replicate((split.images, split.labels), programs.devices)
        return jax.device_get(programs.evaluate(params, model_state, *arrays))

    return InputPipeline(epoch_batches, evaluate, partial(_first_non_finite_output, programs, dataset))


def _first_non_finite_output(
    programs: Programs, dataset: Dataset | ImageStream, params: Params, model_state: Any, name: str
) -> str | None:
    batches = images_in_batches(getattr(dataset, name), EVALUATION_BATCH)
    return programs.first_non_finite_output(params, model_state, batches)


def _from_stream(
    config: Config, programs: Programs, stream: ImageStream, *, workers: int, strict: bool
) -> InputPipeline:
    """Make that of a set on disk: while some batches are trained on, the next ones are read and go to the device."""
    devices = programs.devices
    index, count = process_part(devices)
    tell_skipped = _teller_of_skipped()
    size = max(1, min(config.scan_steps, programs.steps_per_epoch, BYTES_AT_ONCE // _batch_bytes(config, stream)))

    def read(name, order, *, epoch, training, first_step=0):
        return batches(
            getattr(stream, name),
            order,
            seed=config.seed,
            epoch=epoch,
            training=training,
            workers=workers,
            first_step=first_step,
            process_index=index,
            process_count=count,
            on_skipped=partial(tell_skipped, name),
            strict=strict,
        )

    def epoch_batches(order, epoch, begun):
        source = _Stacked(read("train", order, epoch=epoch, training=True, first_step=begun), size)
        with prefetch(source, lambda found: (found[0], place_batches(found[1], devices))) as found:
            for steps, (images, labels) in found:
                yield Batches(images, labels), range(steps)

    def evaluate(params, model_state, name):
        order = padded_order(len(getattr(stream, name)), EVALUATION_BATCH, data_shards(devices))
        totals: dict[str, Any] = {}
        with prefetch(read(name, order, epoch=0, training=False), partial(place_batch, devices=devices)) as found:
            for images, labels in found:
                one = jax.device_get(programs.evaluate(params, model_state, images, labels))
                weighted = {key: np.float64(value) * one["examples"] for key, value in one.items() if key != "examples"}
                totals = {
                    key: totals.get(key, 0.0) + value
                    for key, value in (weighted | {"examples": one["examples"]}).items()
                }
        examples = np.int32(totals.pop("examples"))
        return {key: np.float32(total / max(examples, 1)) for key, total in totals.items()} | {"examples": examples}

    return InputPipeline(epoch_batches, evaluate, partial(_first_non_finite_output, programs, stream))


def _batch_bytes(config: Config, stream: ImageStream) -> int:
    return config.batch_size * math.prod(stream.image_shape)


class _Stacked:
    """An iterator of (number of batches, images and labels as arrays [size, ...]), which another thread may close.

    Where fewer batches are left they are filled up with empty ones.
    """

    def __init__(self, source: batching.Batches, size: int):
        self._source, self._size = source, size
        self.close = source.close

    def __iter__(self) -> "_Stacked":
        return self

    def __next__(self) -> tuple[int, tuple[np.ndarray, np.ndarray]]:
        read = list(islice(self._source, self._size))
        if not read:
            raise StopIteration
        empty = tuple(np.zeros_like(part) for part in read[0])
        images, labels = (np.stack(part) for part in zip(*read, *[empty] * (self._size - len(read))))
        return len(read), (images, labels)


def _teller_of_skipped() -> Callable[[str, int, str], None]:
    """Make (split, index, reason) -> a warning with the number of corrupt examples so far, once for each example."""
    seen = set()

    def tell(split: str, index: int, reason: str) -> None:
        if (split, index) not in seen:
            seen.add((split, index))
            text = f"skipped example {index} of the {split} split ({len(seen)} corrupt so far): {reason}"
            warnings.warn(text, SkippedExampleWarning, stacklevel=2)

    return tell

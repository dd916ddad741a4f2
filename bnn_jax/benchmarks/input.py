"""How fast images come from disk: the input pipeline alone, and beside a step that takes as long as a GPU's."""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bnn_jax.analysis.tables import TEXT, Tables
from bnn_jax.checks import require
from bnn_jax.cores import usable_cores
from bnn_jax.data import ImageStream, batches, open_stream, prefetch
from bnn_jax.data.synthetic import write_synthetic_imagenet
from bnn_jax.errors import UsageError
from bnn_jax.paths import local_path
from bnn_jax.training.progress import OnProgress, silent

GPU = "NVIDIA RTX 3090"
GPU_IMAGES_PER_SECOND = 3482.0
"""ResNet-18 trained on 224x224 images in mixed precision, batch 512.

Published with timm (Wightman, PyTorch Image Models, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv).
"""

IMAGES = 512
SIDES, ASPECT = (375, 375), (4 / 3, 4 / 3)
"""Of the made-up photographs: 500x375, ImageNet's most frequent size."""


class FedLoop(NamedTuple):
    """A loop of steps that take a given time, and the batches it consumed.

    Attributes:
      seconds: of the steps and of waiting, the first batch left out.
      waited: of these, waiting for a batch.
      images: consumed in that time.
    """

    seconds: float
    waited: float
    images: int

    @property
    def waiting_share(self) -> float:
        """Of the time."""
        return self.waited / self.seconds


def fed_loop(source: Iterable[Any], step: Callable[[Any], None]) -> FedLoop:
    """Run `step` on each (images, labels) of `source`, from the second on, and say how long it waited for them.

    >>> loop = fed_loop([(np.zeros((4, 1)), None)] * 3, lambda batch: time.sleep(0.01))
    >>> loop.images, loop.waiting_share < 0.5
    (8, True)
    """
    items: Iterator[Any] = iter(source)
    next(items)
    began, waited, images = time.perf_counter(), 0.0, 0
    while True:
        asked = time.perf_counter()
        batch = next(items, None)
        if batch is None:
            # Once more than there are batches is asked for; this time is no step's.
            return FedLoop(asked - began, waited, images)
        waited += time.perf_counter() - asked
        images += len(batch[0])
        step(batch)


def benchmark_input(
    *,
    data_dir: str | Path | None = None,
    workers: Iterable[int] = (0, 1, 2),
    batch_size: int = 128,
    steps: int = 20,
    preprocessing: str = "random_resized_crop",
    gpu: str = GPU,
    gpu_images_per_second: float = GPU_IMAGES_PER_SECOND,
    on_progress: OnProgress = silent,
) -> dict[str, Any]:
    """Images a second of the input pipeline, and the share of time that a GPU would wait for it.

    For each number of workers the pipeline runs twice: as fast as it can, and beside a step that sleeps as long as the
    GPU would compute, each batch going to the device as in training.  The start, up to the first batch, is measured
    apart.  512 made-up photographs of 500x375 are written for it and read again and again, so from the cache of the
    operating system rather than from a disk.  Of a set on disk each photograph is read once, where it has enough.

    Args:
      data_dir: folder that holds a set imagenet2012, to read instead, in a random order of all of its photographs.
      workers: numbers of processes; 0 stands for threads.
      batch_size: images of a step.
      steps: batches that are timed.
      preprocessing: a name in PREPROCESSING.
      gpu: name of the GPU whose step is imitated.
      gpu_images_per_second: how many images it trains on.
      on_progress: called after each run.

    Returns:
      `rows`, one for each number of workers, with `images_per_second`, `start_seconds`, `fed_images_per_second` and
      `waiting_share`; `images_per_second_per_core`, the most of a row, which takes a core for each worker and one for
      what feeds the device; `cores_needed` by the GPU; and the settings.

    Raises:
      UsageError: for a number that is out of range.
    """
    data_dir = None if data_dir is None else local_path("data_dir", data_dir)
    workers = sorted(set(workers) | {1})
    cores, own = len(usable_cores()), data_dir is not None
    require("workers", workers[0], workers[0] >= 0, "must not be negative", "0 stands for threads", error=UsageError)
    require("batch_size", batch_size, batch_size >= 1, "must be at least 1", error=UsageError)
    require("steps", steps, steps >= 1, "must be at least 1", error=UsageError)
    rate = gpu_images_per_second
    require("gpu_images_per_second", rate, rate > 0, "must be positive", error=UsageError)
    step_seconds = batch_size / gpu_images_per_second
    with ExitStack() as stack:
        if data_dir is None:
            data_dir = stack.enter_context(tempfile.TemporaryDirectory())
            options = {"train_examples": IMAGES + 10, "validation_examples": 10, "classes": 10}
            options |= {"corrupt": 0, "grey": 0, "cmyk": 0}
            write_synthetic_imagenet(data_dir, short_side=SIDES, aspect=ASPECT, **options)
        opened = open_stream("imagenet2012", data_dir=data_dir, preprocessing=preprocessing, validation_examples=10)
        rows = []
        for done, count in enumerate(workers):
            images = len(opened.train) if own else min(len(opened.train), max(IMAGES, batch_size))
            run = partial(_run, opened, images, count, batch_size, steps)
            alone, start = run(0.0)
            on_progress(2 * done + 1, 2 * len(workers), f"{count} workers")
            fed, _ = run(step_seconds)
            on_progress(2 * done + 2, 2 * len(workers), f"{count} workers")
            rows.append(
                {
                    "workers": count,
                    "images_per_second": alone.images / alone.seconds,
                    "start_seconds": start,
                    "fed_images_per_second": fed.images / fed.seconds,
                    "waiting_share": fed.waiting_share,
                }
            )
    per_core = max(row["images_per_second"] / _cores_of(row["workers"], cores) for row in rows)
    return {
        "rows": rows,
        "images_per_second_per_core": per_core,
        "cores_needed": gpu_images_per_second / per_core,
        "cores": cores,
        "gpu": gpu,
        "gpu_images_per_second": gpu_images_per_second,
        "step_ms": 1e3 * step_seconds,
        "batch_size": batch_size,
        "steps": steps,
        "preprocessing": preprocessing,
    }


def _cores_of(workers: int, cores: int) -> int:
    """How many cores the pipeline takes: threads take all there are."""
    return min(cores, workers + 1) if workers else cores


def _run(
    opened: ImageStream, images: int, workers: int, batch_size: int, steps: int, step_seconds: float
) -> tuple[FedLoop, float]:
    """The loop over so many images, and the seconds up to its first batch."""
    # What may be ready when the first batch comes is left out, or the rate of a short run would be too high.
    ahead = 1 + 3 * max(workers, 1)
    order = np.resize(np.random.default_rng(0).permutation(images), (1 + ahead + 1 + steps, batch_size))
    began = time.perf_counter()
    source = batches(opened.train, order, seed=0, epoch=0, training=True, workers=workers)
    with prefetch(source, lambda batch: (jax.device_put(batch[0]), batch[1])) as ready:
        next(ready)
        start = time.perf_counter() - began
        step = (lambda _: time.sleep(step_seconds)) if step_seconds else (lambda _: None)
        for _ in range(ahead):
            step(next(ready))
        return fed_loop(ready, step), start


def print_input(found: dict[str, Any], tables: Tables = TEXT) -> None:
    """Print the table of :func:`benchmark_input`, and how many cores the GPU would need."""
    rows = [
        (
            str(row["workers"] or "threads"),
            f"{row['images_per_second']:.0f}",
            f"{row['start_seconds']:.1f}",
            f"{row['fed_images_per_second']:.0f}",
            f"{100 * row['waiting_share']:.1f}",
        )
        for row in found["rows"]
    ]
    title = f"images read and decoded, {found['preprocessing']}, batch {found['batch_size']}, {found['steps']} steps"
    tables.print(
        ("workers", "images/s", "first batch\nafter s", "beside a step:\nimages/s", "waiting\n%"), rows, title=title
    )
    print(
        f"{found['gpu']}: ResNet-18 trains on {found['gpu_images_per_second']:.0f} images/s, a step of "
        f"{found['step_ms']:.1f} ms; at {found['images_per_second_per_core']:.0f} images/s a core that takes "
        f"{found['cores_needed']:.1f} cores (here: {found['cores']})"
    )

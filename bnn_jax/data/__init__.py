"""Data: image sets in memory or read from disk, and what is done to a batch of them inside jit."""

from bnn_jax.data.augment import augment, lighting, mixup, normalize, random_area_crop, random_crop, random_flip
from bnn_jax.data.batching import batches, padded_order
from bnn_jax.data.imagenet import PREPROCESSING
from bnn_jax.data.in_memory import as_dataset
from bnn_jax.data.prefetching import prefetch
from bnn_jax.data.prepare import prepare_dataset
from bnn_jax.data.records import Records
from bnn_jax.data.sources import Dataset, Split, load_dataset
from bnn_jax.data.stream import ImageStream, images_in_batches, in_batches, open_stream
from bnn_jax.data.text import text_of, tokens_of

__all__ = [
    "PREPROCESSING",
    "Dataset",
    "ImageStream",
    "Records",
    "Split",
    "as_dataset",
    "augment",
    "batches",
    "images_in_batches",
    "in_batches",
    "lighting",
    "load_dataset",
    "mixup",
    "normalize",
    "open_stream",
    "padded_order",
    "prefetch",
    "prepare_dataset",
    "random_area_crop",
    "random_crop",
    "random_flip",
    "text_of",
    "tokens_of",
]

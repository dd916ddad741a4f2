"""Data: image sets in memory, and what is done to a batch of them inside jit."""

from bnn_jax.data.augment import augment, normalize, random_crop, random_flip
from bnn_jax.data.prepare import prepare_dataset
from bnn_jax.data.sources import Dataset, Split, load_dataset

__all__ = [
    "Dataset",
    "Split",
    "augment",
    "load_dataset",
    "normalize",
    "prepare_dataset",
    "random_crop",
    "random_flip",
]

"""Trained networks that come with the package, packed: their files, their records, and how they are loaded."""

from bnn_jax.zoo.pretrained import Pretrained, load
from bnn_jax.zoo.records import DATA, PRETRAINED, Record, file_of

__all__ = ["DATA", "PRETRAINED", "Pretrained", "Record", "file_of", "load"]

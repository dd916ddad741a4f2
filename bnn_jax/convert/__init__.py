"""Weights from outside: variables of networks here from those of PyTorch, of larq in Keras's files, and of arrays."""

from bnn_jax.convert.files import load_weights
from bnn_jax.convert.keras_files import from_keras
from bnn_jax.convert.torch_layouts import LAYOUTS, Joined, Negated, from_torch
from bnn_jax.convert.weights import from_arrays

__all__ = ["LAYOUTS", "Joined", "Negated", "from_arrays", "from_keras", "from_torch", "load_weights"]

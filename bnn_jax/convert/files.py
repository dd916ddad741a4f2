"""Weights of a file, whichever program wrote it."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from bnn_jax.checks import check_options
from bnn_jax.convert.keras_files import from_keras
from bnn_jax.convert.torch_layouts import from_torch
from bnn_jax.convert.weights import as_patterns, from_arrays
from bnn_jax.errors import UsageError
from bnn_jax.paths import local_path


def load_weights(
    path: str | os.PathLike[str], model: nn.Module, image_shape: Sequence[int], **options: Any
) -> dict[str, Any]:
    """The variables of a network from a file; what says how it is read is its ending.

      .npz                     arrays by their names here, as params/conv1/kernel: :func:`from_arrays`; or a state dict
                               of PyTorch's, whose names have dots: :func:`from_torch`
      .pth .pt .bin .tar       a state dict that PyTorch saved, or a checkpoint with one: :func:`from_torch`
      .h5 .hdf5                of Keras or larq, .weights.h5 too: :func:`from_keras`

    Args:
      path: of the file.
      model: the network.
      image_shape: (height, width, channels) of its images.
      **options: of the function.

    Raises:
      UsageError: as that function; for another ending, an option that it does not have, or a file of another kind.
    """
    path = local_path("path", path)
    if path.suffix.lower() not in _READERS:
        raise UsageError(f"`path` (={path}) must end in {', '.join(_READERS)}; save the arrays: numpy.savez")
    if not path.is_file():
        raise UsageError(f"`path` (={path}) is not a file; give one that ends in {', '.join(_READERS)}")
    convert = _READERS[path.suffix.lower()](path)
    options |= {name: as_patterns(name, options[name]) for name in ("ignored", "fresh") if name in options}
    check_options("options", convert, options)
    return convert(model, image_shape, **options)


def _of_npz(path: Path) -> Callable[..., dict[str, Any]]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # Of a dozen kinds, from zipfile, zlib, struct and NumPy.
        raise UsageError(f"`path` (={path}) is no file of named arrays ({error}); write one: numpy.savez") from None
    of_torch = any("." in name and "/" not in name for name in arrays)
    return partial(from_torch if of_torch else from_arrays, arrays)


def _of_torch(path: Path) -> Callable[..., dict[str, Any]]:
    try:
        import torch
    except ImportError:
        raise UsageError(
            f"`path` (={path}) is read by the Python package torch, which is not installed; install it with: "
            "pip install torch; or save it where it is: numpy.savez(FILE, **{k: v.cpu() for k, v in state.items()})"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Of many kinds: it is a pickle inside an archive.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"`path` (={path}) is no state dict of PyTorch's ({reason}); save `state_dict()`") from None
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise UsageError(f"`path` (={path}) is no state dict of PyTorch's but holds a {kind}; save `state_dict()`")
    return partial(from_torch, state)


def _of_keras(path: Path) -> Callable[..., dict[str, Any]]:
    return partial(from_keras, path)


_READERS = {
    ".npz": _of_npz,
    **dict.fromkeys((".pth", ".pt", ".bin", ".tar"), _of_torch),
    **dict.fromkeys((".h5", ".hdf5"), _of_keras),
}

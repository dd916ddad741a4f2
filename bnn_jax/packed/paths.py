"""On which of their paths the layers of a packed network multiply."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict
from jax import ShapeDtypeStruct

from bnn_jax.bitops.paths import PATHS
from bnn_jax.bitops.planes import PackedKernel
from bnn_jax.checks import require
from bnn_jax.layers.frozen import TAKEN
from bnn_jax.outputs import apply_network
from bnn_jax.tracing.constants import constants_of


def take_path(variables: Mapping[str, Any], path: str | None) -> dict[str, Any]:
    """Packed variables whose layers multiply on one of `PATHS`: "bits", or "float32" numbers, with the same integers.

    With None each layer takes the faster, by a static rule of its shape (:func:`bnn_jax.bitops.paths.chosen_path`).
    Where no product of bits can be taken, for inputs that are real or of more than two bits, layers multiply numbers.

    Raises:
      ValueError: for another path.
    """
    require("path", path, path in (None, *PATHS), f"must be one of {', '.join(PATHS)} or None")
    is_kernel = lambda node: isinstance(node, PackedKernel)
    return jax.tree.map(lambda x: replace(x, path=path) if is_kernel(x) else x, dict(variables), is_leaf=is_kernel)


def paths_of(model: nn.Module, variables: Mapping[str, Any], image_shape: tuple[int, ...]) -> dict[str, str]:
    """path of each packed layer -> the one of `PATHS` on which it multiplies; found by tracing, nothing is computed.

    Args: as those of :func:`bnn_jax.packed.freeze`, the variables packed.
    """
    taken = lambda variables, images: apply_network(model, variables, images, mutable=[TAKEN])[1].get(TAKEN, {})
    numbers = flatten_dict(constants_of(taken, variables, ShapeDtypeStruct((1, *image_shape), "float32")))
    return {"/".join(path[:-1]): PATHS[int(number[0])] for path, number in numbers.items()}

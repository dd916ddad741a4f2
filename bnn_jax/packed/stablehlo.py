"""A packed network as StableHLO, which runs without bnn_jax and Flax."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from bnn_jax.checks import require
from bnn_jax.extras import import_extra
from bnn_jax.finite import require_finite
from bnn_jax.packed.freezing import TRAIN_AGAIN
from bnn_jax.packed.model import PackedModel, require_packed_model

PLATFORMS = ("cpu", "cuda", "tpu")
KNOWN_PLATFORMS = (*PLATFORMS, "rocm")


def to_stablehlo(packed: PackedModel, *, platforms: str | Sequence[str] = PLATFORMS) -> bytes:
    """The function uint8 images -> logits with its packed variables inside, for a batch of any size.

    ``jax.export.deserialize(data).call(images)`` runs it.  jax promises to read such data for six months, and files of
    a newer jax are not read by an older one: it is a form to deploy, not one to keep.

    Args:
      packed: of :func:`bnn_jax.packed.load`.
      platforms: for which it is compiled when it is called, one or several of KNOWN_PLATFORMS: "cpu" counts bits,
        others multiply on matrix units.

    Raises:
      UsageError: if the package flatbuffers is not installed.
      ValueError: if a number of the packed variables is not finite, or for another platform.
    """
    from jax import export

    import_extra("flatbuffers", "`to_stablehlo`")
    require_packed_model(packed)
    require_finite("packed", packed.variables, TRAIN_AGAIN)
    platforms = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    known = bool(platforms) and set(platforms) <= set(KNOWN_PLATFORMS)
    require("platforms", platforms, known, f"must be among {', '.join(KNOWN_PLATFORMS)}", "as ('cpu',)")
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *packed.metadata["image_shape"]), jnp.uint8)
    function = jax.jit(lambda images: packed.apply(packed.variables, images))
    return export.export(function, platforms=platforms)(images).serialize()

"""States that tests of checkpoints save, and what they compare."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from `step`."""
    bits = np.random.default_rng(step)
    return {
        "kernel": jnp.asarray(bits.normal(size=(30, 50)).astype(np.float32)),
        "mask": np.array([True, False, step % 2 == 0]),
        "step": jnp.int32(step),
    }


def bits_of(tree: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of each leaf."""
    return [(np.asarray(x).dtype.name, np.shape(x), np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def own_hash(manifest: dict[str, Any]) -> str:
    """The SHA-256 that a manifest holds of the rest of it."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

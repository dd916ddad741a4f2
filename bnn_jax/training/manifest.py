"""The manifest of a checkpoint: what its arrays are called, their types and shapes, and a SHA-256 of each."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.errors import UsageError
from bnn_jax.finite import first_non_finite
from bnn_jax.training.orbax_store import StoreError, read_arrays

_FORMAT = "bnn_jax checkpoint"
_FORMAT_VERSION = 2


class Damaged(Exception):
    """The reason why a checkpoint does not verify, in words for the user."""


class Unreadable(Damaged):
    """Perhaps a good checkpoint, only not readable here and now (format version, permission): never to be deleted."""


def named_shapes(tree: Any, argument: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Name -> shape and dtype of the leaves of `tree`, in its order; a name is the leaf's keys joined by dots.

    Raises:
      TypeError, ValueError: a leaf that a checkpoint cannot hold; `argument` is what the sentence calls the tree.

    >>> named_shapes({"params": {"kernel": jnp.zeros((3, 2))}}, "state")
    {'params.kernel': ShapeDtypeStruct(shape=(3, 2), dtype=float32)}
    """
    paths_and_leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {}
    for path, leaf in paths_and_leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(f"`{argument}` has {leaf!r} at `{name}`, not an array; wrap it with jnp.asarray")
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"`{argument}` has a typed PRNG key at `{name}`; give jax.random.key_data(key) instead")
        if not _jax_keeps(leaf.dtype):
            raise TypeError(
                f"`{argument}` has dtype {leaf.dtype} at `{name}`, which jax arrays cannot hold here; convert it with "
                "jnp.asarray, or set jax_enable_x64 for 64-bit numbers"
            )
        if name in leaves or name.startswith("/"):
            rule = "begins with a slash" if name not in leaves else "is that of another leaf as well"
            raise ValueError(f"`{argument}` has a leaf whose name (`{name}`) {rule}; give its pytree nodes other keys")
        leaves[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return leaves


def _jax_keeps(dtype: Any) -> bool:
    try:
        return jax.device_put(np.zeros((), dtype)).dtype == dtype
    except TypeError:
        return False


def named_arrays(state: Any) -> dict[str, np.ndarray]:
    """Name -> leaf of `state` on the host, in C order; raises as :func:`named_shapes`, and where all are empty."""
    names = named_shapes(state, "state")
    arrays = [np.asarray(leaf, order="C") for leaf in jax.device_get(jax.tree_util.tree_leaves(state))]
    if not any(array.size for array in arrays):
        raise ValueError("`state` holds no numbers to save; give the train state")
    return dict(zip(names, arrays))


def make_manifest(step: int, arrays: dict[str, np.ndarray], metadata: dict[str, Any] | None) -> dict[str, Any]:
    """The manifest of a checkpoint of `arrays`, with the caller's `metadata`."""
    leaves = [
        {"name": name, "dtype": array.dtype.name, "shape": list(array.shape), "sha256": _leaf_hash(array)}
        for name, array in arrays.items()
    ]
    body = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "step": step,
        "metadata": _json_metadata(metadata),
        "leaves": leaves,
    }
    return {**body, "sha256": _body_hash(body)}


def manifest_text(manifest: dict[str, Any]) -> str:
    """What the file of a manifest holds."""
    return json.dumps(manifest, indent=1) + "\n"


def _leaf_hash(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype.name} {list(array.shape)}\n".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _json_metadata(metadata: dict[str, Any] | None) -> dict[str, Any]:
    """`metadata` as it will be read back: JSON turns tuples into lists and keys into strings."""
    if not isinstance(metadata, dict | None):
        raise TypeError(f"`metadata` (={metadata!r}) must be a dict; give for example {{'config': ...}}")
    try:
        return json.loads(json.dumps(metadata or {}))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`metadata` must be made of dicts, lists, strings, numbers, booleans and None, but: {error}; "
            "convert arrays with float() or .tolist()"
        ) from error


def _body_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of `step`, its own hash checked; raises Damaged."""
    path = folder / f"{step}.json"
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Damaged(f"it has no manifest `{path.name}`") from None
    except OSError as error:
        raise Unreadable(f"its manifest cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise Damaged("its manifest is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise Damaged(f"`{path.name}` is not a manifest of {_FORMAT}s")
    # Every format version hashes its manifest like this, so that a flipped bit is not taken for another version.
    if manifest.get("sha256") != _body_hash({key: value for key, value in manifest.items() if key != "sha256"}):
        raise Damaged("its manifest does not match its own hash")
    if manifest["format_version"] != _FORMAT_VERSION:
        raise Unreadable(f"it has format version {manifest['format_version']}, this bnn_jax reads {_FORMAT_VERSION}")
    if manifest["step"] != step:
        raise Damaged(f"its manifest is that of step {manifest['step']}")
    if not (folder / str(step)).is_dir():
        raise Damaged("its data folder is missing")
    return manifest


def read_leaves(folder: Path, step: int, manifest: dict[str, Any], *, finite: bool = False) -> dict[str, np.ndarray]:
    """Name -> leaf, each one's hash checked and with `finite` its numbers; raises Damaged."""
    leaves = {entry["name"]: np.empty(entry["shape"], jnp.dtype(entry["dtype"])) for entry in manifest["leaves"]}
    # Orbax cannot store an array without elements; the manifest says all there is to know of it.
    stored = {name: leaf.dtype for name, leaf in leaves.items() if leaf.size}
    try:
        leaves |= read_arrays(folder / str(step), stored)
    except StoreError as error:
        raise (Unreadable if error.refused else Damaged)(str(error)) from None
    for entry in manifest["leaves"]:
        if _leaf_hash(leaves[entry["name"]]) != entry["sha256"]:
            raise Damaged(f"`{entry['name']}` does not match its hash")
    if finite and (found := first_non_finite(leaves)) is not None:
        raise Damaged(f"it is not finite, first in {found}")
    return leaves


def check_same_leaves(wanted: dict[str, jax.ShapeDtypeStruct], manifest: dict[str, Any], path: Path) -> None:
    """Raise UsageError at the first leaf in which `like` and the manifest differ."""
    saved = {entry["name"]: f"{entry['dtype']}{entry['shape']}" for entry in manifest["leaves"]}
    asked = {name: f"{leaf.dtype.name}{list(leaf.shape)}" for name, leaf in wanted.items()}
    for name in asked | saved:
        here, there = asked.get(name, "nothing"), saved.get(name, "nothing")
        if here != there:
            raise UsageError(
                f"`like` has {here} at `{name}`, the checkpoint `{path}` has {there}; restore with the model and "
                "optimizer that were saved (see the checkpoint's metadata), or give another folder to start afresh"
            )

"""One file for a frozen network: packed weights, thresholds, the real rest, and what it takes to run them.

It is a safetensors file: 8 bytes with the length of a JSON header (little-endian), the header, and flat tensors that
follow each other without a gap:

    words       uint32   all packed bits
    thresholds  int32    of batch norms that became comparisons
    numbers     float32 or float16, the rest
    bfloat16    and the like, variables of another dtype

in the order in which `jax.tree_util` flattens the packed variables.  Their names and shapes are not stored: the network
that the metadata describe has them, by :func:`bnn_jax.packed.packed_structure`.  So the header stays below 4 KiB for a
network of any depth.  A SHA-256 in the metadata covers every other byte of the file.

A file is read with distrust: nothing of it is executed, and nothing is allocated before its size is proved right.
"""

import hashlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.bitops.planes import PackedKernel
from bnn_jax.errors import RunError, UsageError
from bnn_jax.files import write_atomically
from bnn_jax.finite import first_non_finite, require_finite
from bnn_jax.models.build import NetworkLike, build_model, check_extent, entry_of, latent_weights, settings_of
from bnn_jax.names import import_named, is_import, last_part
from bnn_jax.packed.freezing import TRAIN_AGAIN, packed_structure
from bnn_jax.packed.header import (
    DTYPES,
    EXPORT,
    FORMAT,
    FORMAT_VERSION,
    MOST_HEADER_BYTES,
    MOST_TENSOR_BYTES,
    TENSORS,
    VALUES,
    Damaged,
    Table,
    check_digest,
    check_format,
    check_size,
    header_bytes,
    parse_json,
    read_header,
    table_of,
)
from bnn_jax.packed.model import PackedModel, require_packed_model
from bnn_jax.packed.paths import take_path
from bnn_jax.paths import local_path, require_ending


def save(
    path: str | os.PathLike[str],
    packed: PackedModel,
    *,
    accounting: Mapping[str, Any] | None = None,
    tested: Mapping[str, Any] | None = None,
    float16: bool = False,
) -> tuple[int, int]:
    """Write a frozen network into one file, in one step: whoever reads sees the old file or the new one.

    The network itself is written by name: that of the table, or of a class that can be imported, with what was set.  Of
    another one the file has the variables alone, and :func:`load` needs the module.

    Args:
      path: named ``*.bnn.safetensors``, or without an ending.
      packed: the network, its variables of :func:`bnn_jax.packed.freeze`, and their description.
      accounting: what the network costs, as plain JSON values; None takes those of the description, if it has any.
      tested: how well it did on what, as plain JSON values; likewise.
      float16: store the real rest in half of the bytes, see :func:`rounded`.

    Returns:
      The bytes of the header and of the tensors; their sum is the size of the file.

    Raises:
      TypeError: if `packed` is no PackedModel.
      ValueError: if its variables are not packed variables of its network, or a number of them is not finite.
      UsageError: if the description is no network or too long for the header, a variable empty or of a dtype that no
        file holds, a number too large for a float16, or the name of the file ends as that of another format.
      RunError: if the file cannot be written.
    """
    path = local_path("path", path)
    require_ending("path", path, ".bnn.safetensors")
    require_packed_model(packed)
    variables, described = take_path(packed.variables, None), packed.metadata
    _require_stored(_structure(variables))
    values = {"versions": {name: version(name) for name in ("bnn_jax", "jax", "flax")}, "model": _settings(packed)}
    values |= {"num_classes": packed.num_classes}
    values |= {name: np.asarray(described[name]).tolist() for name in ("image_shape", "mean", "std")}
    values |= {"accounting": dict(described.get("accounting", {}) if accounting is None else accounting)}
    values |= {"tested": dict(described.get("tested", {}) if tested is None else tested)}
    try:
        texts = {key: json.dumps(values[key], separators=(",", ":"), allow_nan=False) for key in VALUES}
        found = _values(texts)
        _, structure = _network(found, packed.model if is_import(found["model"]["name"]) else None)
    except (Damaged, TypeError, ValueError) as error:
        raise UsageError(f"{path} cannot be written: {error}; correct what describes the network") from None
    _check_variables(variables, structure)
    require_finite("variables", variables, TRAIN_AGAIN)
    vectors = _flat(rounded(variables) if float16 else variables, float16=float16)
    tensors = b"".join(vector.tobytes() for vector in vectors.values())
    table = table_of({name: (vector.dtype.name, vector.size) for name, vector in vectors.items()})
    texts = {"format": FORMAT, "format_version": FORMAT_VERSION, **texts, **structure.summary, "sha256": "0" * 64}
    digest = hashlib.sha256(header_bytes(texts, table) + tensors).hexdigest()
    header = header_bytes(texts | {"sha256": digest}, table)
    if len(header) > MOST_HEADER_BYTES or len(tensors) > MOST_TENSOR_BYTES:
        raise UsageError(
            f"{path} would have a header of {len(header)} bytes and tensors of {len(tensors)}, but at most "
            f"{MOST_HEADER_BYTES} and {MOST_TENSOR_BYTES} are possible; shorten `accounting` or `tested`"
        )
    try:
        write_atomically(path, header + tensors)
    except OSError as error:
        raise RunError(f"cannot write {path} ({error.strerror}); make room, or choose another path") from None
    return len(header), len(tensors)


def _settings(packed: PackedModel) -> dict[str, Any]:
    """By which settings the network of a file is built again; its name is ":" and its class where none do that."""
    for settings in (packed.metadata.get("model"), settings_of(packed.model)):
        if settings and _is_safe(settings):
            return dict(settings)
    return {"name": f":{type(packed.model).__name__}"}


def _is_safe(settings: Mapping[str, Any]) -> bool:
    """Whether a file may have these settings: nothing but the class of the network is imported for them.

    A file's author must not choose what is run here.
    """
    name, others = settings.get("name"), [value for setting, value in settings.items() if setting != "name"]
    imports = any(is_import(value) or callable(value) for value in _inner(others))
    return not imports and (_is_class_to_import(name) if is_import(name) else isinstance(name, str))


def _inner(value: Any) -> Iterator[Any]:
    """All that is neither a mapping nor a sequence in nested ones."""
    if isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _inner(one)
    else:
        yield value


def _is_class_to_import(name: Any) -> bool:
    """Whether a name is that of a class of Flax modules, in a module on Python's path."""
    where, _, attribute = name.rpartition(":") if isinstance(name, str) else ("", "", "")
    package, parts = where.partition(".")[0], (*where.split("."), *attribute.split("."))
    if not all(map(str.isidentifier, parts)) or "__main__" in parts or package in sys.stdlib_module_names:
        return False
    if importlib.util.find_spec(package) is None:
        return False
    found = import_named("model", name)
    return isinstance(found, type) and issubclass(found, nn.Module)


def rounded(variables: Any) -> Any:
    """`variables` with every float32 rounded to the nearest float16, as a file with `float16` keeps them.

    Raises:
      UsageError: if a number is larger than the largest float16, or NaN.

    >>> rounded({"gain": jnp.array([1.0, 1.0001])})
    {'gain': Array([1., 1.], dtype=float32)}
    """

    def half(path, leaf):
        if leaf.dtype != jnp.float32:
            return leaf
        largest = float(jnp.abs(leaf).max(initial=0))
        if not largest < 65520:  # halfway from the largest float16 to the power of two that is infinite
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UsageError(f"`float16` (=True) cannot hold {largest:g}, of {name}; leave it out")
        return leaf.astype(jnp.float16).astype(jnp.float32)

    return jax.tree_util.tree_map_with_path(half, variables)


def load(path: str | os.PathLike[str], *, model: NetworkLike | None = None) -> PackedModel:
    """Read a file that :func:`save` wrote.

    A network that is in no table is imported, if the file has the name of a class that is on Python's path; its module
    is run by that.

    Args:
      path: of the file.
      model: the network, or what makes it with the settings of the file; None takes the one that the file names.

    Raises:
      UsageError: also if the file names no network that can be imported, or `model` is another one.
      UsageError: if there is no such file, or it is of another kind or version.
      RunError: if it is damaged, or a number in it is not finite; nothing of it has been used then.
    """
    path = local_path("path", path)
    if not path.is_file():
        raise UsageError(f"`path` (={path}) is not a file; write one: bnn-jax export RUN -o {path}")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, metadata, table = read_header(file, size)
            check_format(metadata, path)
            check_size(table, size - len(header))
            check_digest(file, header, metadata, table)
            values = _values(metadata)
            _check_model(path, values["model"], model)
            try:
                network, structure = _network(values, model, most_weights=8 * (size - len(header)))
                _check_table(table, structure, metadata)
            except Damaged as reason:
                if model is None:
                    raise
                name = _described(model)
                raise UsageError(
                    f"`model` (={name}) is not the network that {path} was written of: {reason}; give that one"
                ) from None
            variables = _read_variables(file, len(header), table, structure)
        if found := first_non_finite(variables):
            raise Damaged(f"its numbers must be finite; got {found}")
    except Damaged as reason:
        raise RunError(f"{path} is damaged, or no packed network: {reason}; copy it anew, or {EXPORT}") from None
    except OSError as error:
        raise RunError(f"cannot read {path} ({error.strerror}); copy it anew, or {EXPORT}") from None
    return PackedModel(network, variables, metadata | values)


def _check_model(path: Path, settings: Mapping[str, Any], model: NetworkLike | None) -> None:
    """Refuse what is no network, and settings of a file that would import anything but the class of the network."""
    if model is not None:
        entry_of(model, argument="model")
    named = settings if model is None else {**settings, "name": "given"}
    if not isinstance(model, nn.Module) and not _is_safe(named):
        name = str(settings.get("name")).removeprefix(":")
        raise UsageError(
            f"`model` must be given for {path}, whose network ({name}) is no class of Flax modules on Python's path or "
            "has other things that are in no table; as load(path, model=MyNet()), or --model package.module:MyNet"
        )


def _described(model: Any) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else last_part(model)


class _Structure(NamedTuple):
    """Packed variables without their values."""

    tree: Any
    names: tuple[str, ...]
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def counts(self) -> dict[str, tuple[str, int]]:
        """Name of a tensor -> dtype and number of its elements."""
        sizes: dict[str, int] = {}
        for leaf in self.leaves:
            sizes[leaf.dtype.name] = sizes.get(leaf.dtype.name, 0) + leaf.size
        order = [*TENSORS, *sorted(sizes.keys() - TENSORS.keys())]
        return {TENSORS.get(dtype, dtype): (dtype, sizes[dtype]) for dtype in order if dtype in sizes}

    @property
    def summary(self) -> dict[str, str]:
        """The metadata by which it is recognised."""
        lines = [f"{name} {leaf.dtype} {leaf.shape}" for name, leaf in zip(self.names, self.leaves)]
        tree = self.tree.unflatten(self.leaves)
        for kernel in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, PackedKernel)):
            if isinstance(kernel, PackedKernel):
                bases = [(base.values, base.constant) for base in kernel.bases]
                lines.append(f"{kernel.shape} {kernel.integers} {kernel.input_scale} {bases}")
        return {"leaves": str(len(self.leaves)), "structure": hashlib.sha256("\n".join(lines).encode()).hexdigest()}


def _structure(variables: Any) -> _Structure:
    found, tree = jax.tree_util.tree_flatten_with_path(variables)
    names = tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found)
    return _Structure(tree, names, tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for _, leaf in found))


def _network(
    values: Mapping[str, Any], given: NetworkLike | None = None, *, most_weights: float = math.inf
) -> tuple[nn.Module, _Structure]:
    """The network, the `given` one or that of the settings, and the structure of its packed variables, by tracing."""
    settings, num_classes, image_shape = values["model"], values["num_classes"], values["image_shape"]
    try:
        check_extent(num_classes=num_classes, image_shape=image_shape, **settings)
        network = given
        if not isinstance(given, nn.Module):
            network = build_model(num_classes=num_classes, **settings | ({} if given is None else {"name": given}))
        if latent_weights(network, image_shape) > most_weights:
            raise ValueError(f"its weights need more than the {most_weights} bits of the tensors")
        structure = _structure(packed_structure(network, image_shape))
        _require_stored(structure)
        return network, structure
    except Exception as error:  # Names, types and numbers may all be wrong, and any layer may be the one that says so.
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise Damaged(f"the network that it describes cannot be built ({cause})") from None


def _require_stored(structure: _Structure) -> None:
    """Refuse a variable that no tensor of a file holds."""
    for name, leaf in zip(structure.names, structure.leaves):
        if not leaf.size or leaf.dtype.name not in DTYPES.values():
            raise UsageError(
                f"`packed` has the variable {name} of {leaf.dtype} and shape {leaf.shape}; a file holds elements of "
                f"{', '.join(DTYPES.values())}: give its layer another `param_dtype`"
            )


def _check_variables(variables: Any, wanted: _Structure) -> None:
    given = _structure(variables)
    if given != wanted:
        one_sided = set(zip(given.names, given.leaves)) ^ set(zip(wanted.names, wanted.leaves))
        name = min((name for name, _ in one_sided), default="a static value")
        raise ValueError(f"`variables` are not those of this network, frozen: {name} differs; give those of `freeze`")


def _values(texts: Mapping[str, str]) -> dict[str, Any]:
    """The metadata that are JSON, read and checked; lists become tuples."""
    try:
        values = {key: parse_json(texts[key]) for key in VALUES}
        for key, options in values["model"].items():
            if key.endswith("options"):
                values["model"][key] = {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}
        if not all(isinstance(values[key], dict) for key in ("accounting", "tested")):
            raise ValueError("`accounting` and `tested` must be objects")
        shape, mean, std = (tuple(values[key]) for key in ("image_shape", "mean", "std"))
        if not 2 <= len(shape) <= 4 or not all(type(n) is int and n > 0 for n in (values["num_classes"], *shape)):
            raise ValueError("`num_classes` and `image_shape` must be one and two to four positive whole numbers")
        if not len(mean) == len(std) == shape[-1] or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError("`mean` and `std` must have a finite number for each channel, and `std` a positive one")
        return values | {"image_shape": shape, "mean": tuple(map(float, mean)), "std": tuple(map(float, std))}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Damaged(f"its metadata do not describe a network ({error})") from None


def _flat(variables: Any, *, float16: bool) -> dict[str, np.ndarray]:
    """Name of a tensor -> its elements, little-endian, in the order of the leaves."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(variables)]
    vectors = {}
    for name, (dtype, _) in _structure(variables).counts.items():
        stored = np.dtype("float16" if float16 and name == "numbers" else dtype).newbyteorder("<")
        vectors[name] = np.concatenate([leaf.reshape(-1) for leaf in leaves if leaf.dtype == dtype]).astype(stored)
    return vectors


def _check_table(table: Table, structure: _Structure, metadata: Mapping[str, str]) -> None:
    """The tensors are those of the network, one after the other, and its variables the very ones that were saved."""
    full = structure.counts
    half = full | ({"numbers": ("float16", full["numbers"][1])} if "numbers" in full else {})
    if json.dumps(table) not in (json.dumps(table_of(full)), json.dumps(table_of(half))):
        raise Damaged(f"its tensors are {table}, but the network that it describes needs {table_of(full)}")
    if any(metadata[key] != text for key, text in structure.summary.items()):
        raise Damaged(f"the network has other variables than in the versions that wrote it, {metadata['versions']!r}")


def _read_variables(file: BinaryIO, start: int, table: Table, structure: _Structure) -> Any:
    """The variables, every leaf with the next elements of its tensor."""
    vectors, leaves = {}, []
    for name, entry in table.items():
        file.seek(start + entry["data_offsets"][0])
        vectors[name] = np.fromfile(file, np.dtype(DTYPES[entry["dtype"]]).newbyteorder("<"), entry["shape"][0])
    for leaf in structure.leaves:
        name = TENSORS.get(leaf.dtype.name, leaf.dtype.name)
        values, vectors[name] = np.split(vectors[name], [leaf.size])
        leaves.append(jnp.asarray(values.reshape(leaf.shape), leaf.dtype))
    return jax.tree.unflatten(structure.tree, leaves)

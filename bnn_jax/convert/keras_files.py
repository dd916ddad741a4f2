r"""Weights of Keras's files, as larq and its zoo write them: `.h5`, `.weights.h5`.

Kernels are HWIO and (inputs, features), and images have the channels last, as here.  A batch norm's epsilon, 1e-3
unless the file holds the model's config, goes into its variance; one without scale or center has ones and zeros here.
"""

import fnmatch
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import numpy as np

from bnn_jax.convert.target import Target, describe, module_and_leaf
from bnn_jax.convert.weights import Source, as_patterns, assemble
from bnn_jax.errors import UsageError
from bnn_jax.extras import import_extra
from bnn_jax.paths import local_path
from bnn_jax.types import LATENT_KERNEL

EPSILON = 1e-3
"""Of Keras's batch norms, unless told otherwise."""

_LEAVES = {"kernel": "kernel", LATENT_KERNEL: "kernel", "bias": "bias", "scale": "gamma"}
_NORM_LEAVES = _LEAVES | {"bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
_USUAL = {"gamma": 1.0, "beta": 0.0}
"""What a batch norm without them has."""

_THREE = {"beta", "moving_mean", "moving_variance"}
"""Of a batch norm in a file whose variables have numbers: gamma could stand in the place of beta."""


class KerasWeights(NamedTuple):
    """The layers of a file that have weights, in its order.

    Attributes:
      layers: name -> variable -> array: kernel, bias; or gamma, beta, moving_mean, moving_variance.
      epsilons: of the batch norms, where the file tells.
      ordered: whether the file's order is the model's.
    """

    layers: dict[str, dict[str, np.ndarray]]
    epsilons: dict[str, float]
    ordered: bool


def from_keras(
    path: str | os.PathLike[str],
    model: nn.Module,
    image_shape: Sequence[int],
    *,
    names: Mapping[str, str] | None = None,
    branches: Literal["in_order", "shortcut_first"] | None = None,
    ignored: str | Sequence[str] = (),
    fresh: str | Sequence[str] = (),
    epsilon: float | Mapping[str, float] = EPSILON,
) -> dict[str, Any]:
    """The variables of a network from a file of Keras's or larq's.

    Without `names` layers are told by their order: convolutions, depthwise ones, dense layers and batch norms, each
    kind by itself and, where both are there, the quantized (named quant_...) apart from the others.  Where branches
    meet again the order in which a program makes layers may be another one than that of their calls here: it needs
    `names`, or `branches`, as for larq's zoo:

        from_keras(path, build_model("quicknet", num_classes=1000), (224, 224, 3), branches="in_order",
                   ignored=["depthwise_conv2d*"],
                   epsilon={"batch_normalization": 1e-3, "batch_normalization_[12]": 1e-3, "*": 1e-5})
        from_keras(path, build_model("bireal18", num_classes=1000, options={"same_padding": True}), (224, 224, 3),
                   branches="shortcut_first")

    Args:
      path: an .h5 file, with or without the model, or a .weights.h5 file.
      model: the same network here, with the same quantizers; larq's "ste_sign" is `ste_sign` and, of kernels, `binary`,
        its "magnitude_aware_sign" `magnitude_aware`.
      image_shape: (height, width, channels) of its images.
      names: path of a module here -> name of the layer there, as {"conv1": "quant_conv2d_3"}.
      branches: how layers are made there: "in_order" of their calls here, or "shortcut_first", but a block's shortcut
        (downsample) before its convolution.
      ignored: pattern, or patterns, of layers there that are not wanted.
      fresh: pattern, or patterns, of variables here, as params/head/*, that are left out, to be initialised.
      epsilon: of batch norms there, where the file does not hold the model; or by patterns of their names, of which the
        first that fits holds.

    Raises:
      UsageError: listing what is missing, unknown or of another shape; for a file that is none of these; for a layer
        that is a model itself; if the package h5py is not installed.

    Keras's padding "same" of strided windows is not `padding=1`, it is more at the end: layers here need "SAME",
    :class:`bnn_jax.models.birealnet.BiRealNet` and ResNetE `same_padding`.
    """
    found, target = read_keras(path, ignored), describe(model, image_shape)
    names = _by_order(found, target, branches) if names is None else dict(names)
    modules = {module_and_leaf(name)[0] for name in target.variables}
    if target.transposed:
        raise UsageError(
            f"`path` (={path}) is not read for networks with transposed convolutions, as {min(target.transposed)}; "
            "give `from_arrays` arrays whose windows are turned by 180 degrees and whose last two axes are exchanged, "
            "or as they are for layers with `transpose_kernel`"
        )
    for module, layer in names.items():
        leaves = found.layers.get(layer, {})
        if not found.ordered and leaves.keys() == _THREE and f"params/{module}/bias" not in target.variables:
            leaves["gamma"] = leaves.pop("beta")  # of three vectors the file does not say which is left out
    wrong = [f"`names` has {here}, which the network does not have" for here in sorted(names.keys() - modules)]
    arrays = {f"{layer}/{leaf}": array for layer, leaves in found.layers.items() for leaf, array in leaves.items()}
    sources = {}
    for name, like in target.variables.items():
        module, leaf = module_and_leaf(name)
        if module in names:
            layer, is_norm = names[module], module in target.norms
            theirs = (_NORM_LEAVES if is_norm else _LEAVES).get(leaf, leaf)
            groups = None
            if theirs == "kernel" and "depthwise_kernel" in found.layers.get(layer, {}):
                groups = target.grouped.get(module)
            theirs = "depthwise_kernel" if groups else theirs
            shift = _epsilon_of(layer, found, epsilon) - target.norms[module] if is_norm and leaf == "var" else 0.0
            make = partial(_made, like=like, shift=shift, groups=groups)
            sources[name] = Source((f"{layer}/{theirs}",), make)
            if is_norm and theirs in _USUAL and layer in found.layers and f"{layer}/{theirs}" not in arrays:
                sources[name] = Source((), partial(np.full, like.shape, _USUAL[theirs]))
    return assemble(arrays, target, sources, fresh=fresh, wrong=wrong)


def _made(array: np.ndarray, *, like: Any, shift: float, groups: int | None) -> np.ndarray:
    """A variable from an array there: a depthwise kernel (h, w, inputs, multiple), a 1x1 kernel of a dense layer.

    Args:
      array: of the file.
      like: the variable's shape.
      shift: added to it.
      groups: of the layer here, whose kernel there is depthwise; None for others.

    Raises:
      ValueError: for a depthwise kernel of other inputs.
    """
    if groups is not None:
        if array.shape[-2:-1] != (groups,):
            raise ValueError("other inputs")
        return array.reshape(*array.shape[:-2], 1, -1)
    if array.ndim == 4 and len(like.shape) == 2 and array.shape[:2] == (1, 1):
        return array[0, 0]
    return array.astype(np.float64) + shift if shift else array


def _epsilon_of(layer: str, found: KerasWeights, epsilon: float | Mapping[str, float]) -> float:
    if layer in found.epsilons or not isinstance(epsilon, Mapping):
        return found.epsilons.get(layer, epsilon)
    fitting = [value for pattern, value in epsilon.items() if fnmatch.fnmatchcase(layer, pattern)]
    if not fitting:
        raise UsageError(f"`epsilon` (={dict(epsilon)}) has none for {layer}; add one for '*'")
    return fitting[0]


def read_keras(path: str | os.PathLike[str], ignored: str | Sequence[str] = ()) -> KerasWeights:
    """The layers and arrays of an .h5 or .weights.h5 file, but the ignored ones.

    Raises:
      UsageError: as :func:`from_keras`.
    """
    path = local_path("path", path)
    h5py = import_extra("h5py", "reading a file of Keras's", "save the arrays as .npz: numpy.savez")
    if not path.is_file():
        raise UsageError(f"`path` (={path}) is not a file; give an .h5 or .weights.h5 file")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise UsageError(f"`path` (={path}) is no HDF5 file ({error}); give an .h5 or .weights.h5 file") from None
    patterns = as_patterns("ignored", ignored)
    wanted = lambda name: not any(fnmatch.fnmatchcase(name, p) for p in patterns)
    with file:
        root = file.get("model_weights", file)
        if "layer_names" in root.attrs:
            return KerasWeights(_legacy_layers(root, wanted), _epsilons(file), ordered=True)
        for group in ("layers", "_layer_checkpoint_dependencies"):
            if group in file:
                return KerasWeights(_numbered_layers(file[group], wanted), {}, ordered=False)
        held = ", ".join(file) or "nothing"
    raise UsageError(f"`path` (={path}) holds no layers of Keras's, but {held}; save them: model.save_weights(...)")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _legacy_layers(root: Any, wanted: Callable[[str], bool]) -> dict[str, dict[str, np.ndarray]]:
    layers = {}
    for name in filter(wanted, map(_text, root.attrs["layer_names"])):
        weights = [_text(weight) for weight in root[name].attrs["weight_names"]]
        leaves = {w.split("/")[-1].partition(":")[0]: np.asarray(root[name][w]) for w in weights}
        if len(leaves) < len(weights):
            raise UsageError(f"`path` has the layer {name!r}, which holds a model of its own; save its weights alone")
        layers |= {name: leaves} if leaves else {}
    return layers


def _epsilons(file: Any) -> dict[str, float]:
    """Of the batch norms of a model's config, if the file holds one."""
    config = json.loads(_text(file.attrs["model_config"])) if "model_config" in file.attrs else {}
    layers = (config.get("config") or {}).get("layers", []) if isinstance(config.get("config"), dict) else []
    settings = [layer.get("config", {}) for layer in layers]
    return {s["name"]: float(s["epsilon"]) for s in settings if "epsilon" in s and "name" in s}


def _numbered_layers(group: Any, wanted: Callable[[str], bool]) -> dict[str, dict[str, np.ndarray]]:
    """Variables have numbers; those of a batch norm are vectors.  Three of them are less gamma, two less beta too.

    Layers are stored by their places in the model; their own names, which count them as they were made, stand beside.
    """
    layers = {}
    for name in sorted(group, key=_natural):
        variables = group[name].get("vars", {})
        arrays = [np.asarray(variables[number]) for number in sorted(variables, key=int)]
        own = _text(variables.attrs.get("name", name)) if arrays else name
        if not arrays or not wanted(own):
            continue
        vectors = all(array.ndim == 1 for array in arrays)
        kernel = "depthwise_kernel" if "depthwise" in name else "kernel"
        leaves = ["gamma", "beta", "moving_mean", "moving_variance"][-len(arrays) :] if vectors else [kernel, "bias"]
        if len(arrays) > len(leaves):
            raise UsageError(f"`path` has the layer {name} of {len(arrays)} variables, which is none of those known")
        layers[own] = dict(zip(leaves, arrays))
    return layers


def _natural(name: str) -> tuple[str, int]:
    """quant_conv2d, quant_conv2d_1, ..., quant_conv2d_10."""
    match = re.fullmatch(r"(.*?)(?:_(\d+))?", name)
    return match[1], int(match[2] or 0)


def _by_order(found: KerasWeights, target: Target, branches: str | None) -> dict[str, str]:
    """Modules here -> layers there, each kind in its order."""
    if branches not in (None, "in_order", "shortcut_first"):
        raise UsageError(f"`branches` (={branches!r}) must be in_order or shortcut_first, or left out")
    if target.branches and branches is None:
        raise UsageError(
            "`names` (=None) must say which layer is which, as {'stem': 'conv2d'}, for branches of this network meet, "
            "or `branches` in which order they are made; "
            f"its modules are {', '.join((*target.layers, *target.norms))}, the file's layers {', '.join(found.layers)}"
        )
    theirs: dict[str, list[str]] = {"conv": [], "depthwise": [], "dense": [], "norm": []}
    for layer, leaves in found.layers.items():
        weights = "dense" if "kernel" in leaves and leaves["kernel"].ndim == 2 else "conv"
        kind = weights if "kernel" in leaves else "depthwise" if "depthwise_kernel" in leaves else "norm"
        theirs[kind].append(layer)
    shapes = {module_and_leaf(n)[0]: v.shape for n, v in target.variables.items() if n.endswith("kernel")}
    norms: list[str] = []
    for path in target.norms:
        first = branches == "shortcut_first" and path.endswith("downsample_norm")
        norms.insert(len(norms) - first, path)
    ours: dict[str, list[str]] = {"conv": [], "depthwise": [], "dense": [], "norm": norms}
    for path in target.layers:
        # Without dense layers there, a 1x1 convolution of a flattened image is one; and without depthwise ones there, a
        # convolution of as many groups as channels.
        weights = "dense" if len(shapes[path]) == 2 and theirs["dense"] else "conv"
        is_depthwise = path in target.grouped and shapes[path][-2] == 1 and theirs["depthwise"]
        ours["depthwise" if is_depthwise else weights].append(path)
    quantized = {module_and_leaf(name)[0] for name in target.variables if name.endswith(f"/{LATENT_KERNEL}")}
    names = {}
    for kind, layers in theirs.items():
        named = [layer.startswith("quant") for layer in layers]
        for is_quantized in (True, False):
            some = [layer for layer, is_named in zip(layers, named) if is_named == is_quantized]
            apart = any(named) and not all(named)
            paths = [path for path in ours[kind] if not apart or (path in quantized) == is_quantized]
            names |= dict(zip(paths, _in_order(some, found.ordered))) if some else {}
    return names


def _in_order(layers: list[str], ordered: bool) -> list[str]:
    """Layers with names that Keras gave, which count them, by their numbers; others as the file has them."""
    if len({_natural(layer)[0] for layer in layers}) == 1:
        return sorted(layers, key=_natural)
    if not ordered:
        listed = ", ".join(layers)
        raise UsageError(f"`names` (=None) must say which layer is which: the file has no order of {listed}")
    return layers

r"""Weights of PyTorch modules: the programs that authors of binary networks have published, and one's own.

Conventions are converted exactly: OIHW and flat kernels to HWIO; dense kernels to (inputs, features), of flattened
images with the channels last; a batch norm's epsilon into its variance; biases that are added before a sign or a PReLU
into thresholds that are subtracted.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from bnn_jax.checks import look_up
from bnn_jax.convert.target import Parts, Target, describe, module_and_leaf
from bnn_jax.convert.weights import Source, as_patterns, assemble, require_names
from bnn_jax.errors import UsageError
from bnn_jax.types import LATENT_KERNEL


class Negated(NamedTuple):
    """A parameter of the other sign: x + bias there is x - shift here."""

    name: str


class Joined(NamedTuple):
    """Modules whose outputs are concatenated there, and are one module's here."""

    names: tuple[str, ...]


class Layout(NamedTuple):
    """The names of a published program.

    Attributes:
      modules: module or parameter here -> there, as text to format.  `block` stands for stage3_block2, and a name that
        ends in 1 or 2 in it for both.  The text knows {stage} 1, 2, ...; {block} 0, 1, ... in the stage, {index} 0, 1,
        ... in the network; {unit} 0, 1, ... in the stage, of two to a block; {number} 1 or 2.  `first` stands for a
        stage's first block, where it differs.
      unused: patterns of names that the program keeps and does not use.
      centered: a shortcut puts the old channels in the middle of the new ones.
      reference: the paper.
    """

    modules: Mapping[str, str | Negated | Joined]
    unused: tuple[str, ...] = ()
    centered: bool = False
    reference: str = ""


_RESNET = {"stem": "conv1", "stem_norm": "bn1", "head": "fc"}
_BI_REAL = {
    **_RESNET,
    "block/conv": "layer{stage}.{unit}.binary_conv",
    "block/norm": "layer{stage}.{unit}.bn1",
    "block/downsample": "layer{stage}.{unit}.downsample.1",
    "block/downsample_norm": "layer{stage}.{unit}.downsample.2",
}
_IR_NET = {
    "stem": "conv1",
    "stem_norm": "bn1",
    "norm": "bn2",
    "block/conv": "layer{stage}.{block}.conv{number}",
    "block/norm": "layer{stage}.{block}.bn{number}",
}

LAYOUTS: dict[str, Layout] = {
    "bireal": Layout(_BI_REAL, reference="Liu et al., Bi-Real Net, 2018"),
    "reactnet_resnet": Layout(
        {
            **_BI_REAL,
            "block/conv/input_quantizer/shift": Negated("layer{stage}.{unit}.move0.bias"),
            "block/activation/input_shift": Negated("layer{stage}.{unit}.move1.bias"),
            "block/activation/slope": "layer{stage}.{unit}.prelu.weight",
            "block/activation/output_shift": "layer{stage}.{unit}.move2.bias",
        },
        reference="Liu et al., ReActNet, 2020, on ResNet",
    ),
    "reactnet_a": Layout(
        {
            "stem": "feature.0.conv1",
            "stem_norm": "feature.0.bn1",
            "head": "fc",
            "block/conv3x3": "feature.{index}.binary_3x3",
            "block/conv3x3/input_quantizer/shift": Negated("feature.{index}.move11.bias"),
            "block/norm3x3": "feature.{index}.bn1",
            "block/activation3x3/input_shift": Negated("feature.{index}.move12.bias"),
            "block/activation3x3/slope": "feature.{index}.prelu1.weight",
            "block/activation3x3/output_shift": "feature.{index}.move13.bias",
            "block/conv1x1": "feature.{index}.binary_pw",
            "first/conv1x1": Joined(("feature.{index}.binary_pw_down1", "feature.{index}.binary_pw_down2")),
            "block/conv1x1/input_quantizer/shift": Negated("feature.{index}.move21.bias"),
            "block/norm1x1": "feature.{index}.bn2",
            "first/norm1x1": Joined(("feature.{index}.bn2_1", "feature.{index}.bn2_2")),
            "block/activation1x1/input_shift": Negated("feature.{index}.move22.bias"),
            "block/activation1x1/slope": "feature.{index}.prelu2.weight",
            "block/activation1x1/output_shift": "feature.{index}.move23.bias",
        },
        reference="Liu et al., ReActNet, 2020; Liu et al., How Do Adam and Training Strategies Help BNNs, 2021",
    ),
    "irnet_resnet20": Layout(
        {**_IR_NET, "head": "linear"}, centered=True, reference="Qin et al., IR-Net, 2020, for CIFAR-10"
    ),
    "irnet_resnet18": Layout(
        {
            **_IR_NET,
            "head": "fc",
            "block/downsample": "layer{stage}.{block}.downsample.0",
            "block/downsample_norm": "layer{stage}.{block}.downsample.1",
        },
        unused=("bn3.*",),
        reference="Qin et al., IR-Net, 2020, for ImageNet",
    ),
}
"""name -> layout of a published program."""


class _Found(NamedTuple):
    """A module or parameter there: its name, or several that are joined; and whether its sign is the other one."""

    texts: tuple[str, ...]
    negated: bool

    def leaf(self, name: str) -> tuple[str, ...]:
        return tuple(f"{text}.{name}" for text in self.texts)


_BLOCK = re.compile(r"stage(\d+)_block(\d+)")
_LEAVES = {
    "kernel": ("weight", "weights"),
    LATENT_KERNEL: ("weight", "weights"),
    "scale": ("weight",),
    "bias": ("bias",),
    "mean": ("running_mean",),
    "var": ("running_var",),
    "slope": ("weight",),
}
"""Name of a variable here -> its names there."""


def from_torch(
    state: Mapping[str, Any],
    model: nn.Module,
    image_shape: Sequence[int],
    *,
    layout: str | None = None,
    names: Mapping[str, str | Negated | Joined] | None = None,
    ignored: str | Sequence[str] = (),
    fresh: str | Sequence[str] = (),
    epsilon: float = 1e-5,
) -> dict[str, Any]:
    r"""The variables of a network from the state dict of a PyTorch module.

    Args:
      state: name -> tensor or array; or a checkpoint that holds it as "state_dict".  "module.", which DataParallel puts
        in front of every name, is taken off.
      model: the same network here, with the same quantizers, as ``build_model("bireal18", num_classes=1000)``.
      image_shape: (height, width, channels) of its images.
      layout: of LAYOUTS, whose programs they are: bireal, reactnet_resnet, reactnet_a, irnet_resnet20, irnet_resnet18.
        None takes the one that fits.
      names: of another program: path of a module or a parameter here -> name there, as {"dense1": "fc1"}; see
        :class:`Negated` and :class:`Joined`.
      ignored: pattern, or patterns, of names there that are not wanted.
      fresh: pattern, or patterns, of variables here, as params/head/*, that are left out, to be initialised.
      epsilon: of the batch norms there.

    Returns:
      {"params": ..., "batch_stats": ...}, as `model.apply` and the `warm_start` of :func:`bnn_jax.train` take them.

    Raises:
      UsageError: listing the names that are missing, those that nothing wants, arrays of another shape and those that
        hold other things than finite real numbers; for a module in place of its state dict, a key that is no name, or
        patterns that are none; for flattened images that are mixed, as by a slice of them, in front of what has an
        order.

    Images that become (batch, pixels, channels) are tokens, as of `flatten(2).transpose(1, 2)` there, and in the same
    order when they are flattened.  Two things are not in a state dict: PyTorch's sign of 0 is 0, here it is +1; and
    logits are those before a logarithm of softmax.
    """
    state = plain_state(state)
    target = describe(model, image_shape)
    options = {"ignored": as_patterns("ignored", ignored), "fresh": fresh, "epsilon": epsilon}
    if names is not None:
        has = {place for name in target.variables for place in (module_and_leaf(name)[0], name.partition("/")[2])}
        missing = sorted(names.keys() - has)
        wrong = [f"`names` has {', '.join(missing)}, which the network does not have"] if missing else []
        modules = {here: _found(there, {}) for here, there in names.items()}
        return _converted(state, target, modules, {}, wrong=wrong, **options)
    if layout is not None:
        return _by_layout(state, target, look_up("layout", layout, LAYOUTS), **options)
    errors = {}
    for name, known in LAYOUTS.items():
        try:
            return _by_layout(state, target, known, **options)
        except UsageError as error:
            errors[name] = str(error)
    name = min(errors, key=lambda name: len(errors[name]))
    raise UsageError(
        f"`layout` (=None) must be named, or `names` given, for none of {', '.join(LAYOUTS)} fits; {name} is nearest: "
        f"{errors[name]}"
    )


def plain_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a state dict, or of a checkpoint that holds one; step counters are left out.

    Raises:
      UsageError: for what is no mapping, as a module, and for a key that is no string.

    >>> plain_state({"state_dict": {"module.fc.bias": 1.0, "module.bn.num_batches_tracked": 7}, "epoch": 3})
    {'fc.bias': 1.0}
    """
    require_names("state", state)
    inner = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), Mapping)), state)
    require_names("state", inner)
    wrapped = bool(inner) and all(name.startswith("module.") for name in inner)
    plain = {name.removeprefix("module.") if wrapped else name: array for name, array in inner.items()}
    return {name: array for name, array in plain.items() if not name.endswith("num_batches_tracked")}


def _by_layout(state, target, layout, *, ignored, **options):
    blocks = sorted({tuple(map(int, m)) for name in target.variables for m in _BLOCK.findall(name)})
    index = {block: number for number, block in enumerate(blocks, 1)}
    places = {place for name in target.variables for place in (module_and_leaf(name)[0], name.partition("/")[2])}
    modules = {place: found for place in places if (found := _find(layout, place, index)) is not None}
    permutations = _centered_channels(target) if layout.centered else {}
    return _converted(state, target, modules, permutations, ignored=(*layout.unused, *ignored), **options)


def _find(layout: Layout, path: str, index: Mapping[tuple[int, int], int]) -> _Found | None:
    """What a module or a parameter here is there."""
    block, _, rest = path.partition("/")
    match = _BLOCK.fullmatch(block)
    if match is None:
        return _found(layout.modules[path], {}) if path in layout.modules else None
    stage, number = map(int, match.groups())
    numbered = re.fullmatch(r"(conv|norm|activation)([12])(/.*)?", rest)
    unit = int(numbered[2]) if numbered else 1
    rest = f"{numbered[1]}{numbered[3] or ''}" if numbered else rest
    fields = {"stage": stage, "block": number - 1, "index": index[stage, number], "number": unit}
    fields["unit"] = 2 * (number - 1) + unit - 1
    theirs = layout.modules.get(f"first/{rest}") if number == 1 else None
    theirs = theirs or layout.modules.get(f"block/{rest}")
    return None if theirs is None else _found(theirs, fields)


def _found(theirs: str | Negated | Joined, fields: Mapping[str, int]) -> _Found:
    texts = theirs.names if isinstance(theirs, Joined) else (theirs.name if isinstance(theirs, Negated) else theirs,)
    return _Found(tuple(text.format(**fields) for text in texts), isinstance(theirs, Negated))


def _converted(state, target, modules, permutations, *, ignored, fresh, epsilon, wrong=()):
    sources = {}
    for name, like in target.variables.items():
        module, leaf = module_and_leaf(name)
        if (found := modules.get(name.partition("/")[2])) is not None:
            sign = -1 if found.negated else 1
            vector = partial(_vector, name=name, target=target, of=epsilon)
            make = lambda x, sign=sign, like=like, vector=vector: sign * vector(x).reshape(like.shape)
            sources[name] = Source(found.texts, make)
        elif (found := modules.get(module)) is not None and leaf in _LEAVES:
            candidates = [found.leaf(theirs) for theirs in _LEAVES[leaf]]
            names = next((c for c in candidates if set(c) <= state.keys()), candidates[0])
            sources[name] = Source(names, partial(_MAKERS.get(leaf, _vector), name=name, target=target, of=epsilon))
    return _permuted(assemble(state, target, sources, ignored=ignored, fresh=fresh, wrong=wrong), permutations)


def _squeezed(x: np.ndarray) -> np.ndarray:
    """A vector, as it is or among axes of size 1."""
    if max(x.shape, default=1) != x.size:
        raise ValueError("more than one axis")
    return x.reshape(-1)


def _vector(*parts, name, target, of):
    vector = np.concatenate([_squeezed(part) for part in parts])
    module, _ = module_and_leaf(name)
    parts = None if module in target.layers else target.flattened.get((module, vector.size))
    return vector if parts is None else _channels_last(vector, parts, name)


def _channels_last(x: np.ndarray, parts: Parts, name: str) -> np.ndarray:
    """What belongs to the pixels of flattened images, of which PyTorch's have channels first.

    Args:
      x: with the pixels along the last axis.
      parts: what these are.
      name: of the variable.

    Raises:
      UsageError: if the images are mixed.
    """
    if any(len(part) == 1 for part in parts):
        module, leaf = module_and_leaf(name)
        raise UsageError(
            f"`model` mixes flattened images in front of {module!r}, whose order in PyTorch is not known; "
            f"give `from_arrays` the {leaf} in the order of `model`"
        )
    images = np.split(x, np.cumsum([prod(part) for part in parts])[:-1], axis=-1)
    turned = [
        np.moveaxis(image.reshape(-1, channels, height, width), 1, -1).reshape(image.shape)
        for image, (height, width, channels) in zip(images, parts)
    ]
    return np.concatenate(turned, axis=-1)


def _variance(*parts, name, target, of):
    """var + epsilon there = var + epsilon here."""
    own = target.norms[module_and_leaf(name)[0]]
    variance = _vector(*parts, name=name, target=target, of=of)
    return variance if own == of else variance.astype(np.float64) + (of - own)


def _kernel(*parts, name, target, of):
    shape, (module, _) = target.variables[name].shape, module_and_leaf(name)
    if module in target.transposed:
        return _transposed(*parts, to_last_inputs=target.transposed[module])
    if len(shape) == 4:
        height, width, inputs, _ = shape
        for part in parts:
            if part.shape[1:] != (inputs, height, width):
                _squeezed(part)
        return np.concatenate([part.reshape(-1, inputs, height, width) for part in parts]).transpose(2, 3, 1, 0)
    for part in parts:
        if prod(part.shape[1:]) != shape[0]:
            _squeezed(part)
    kernel = np.concatenate([part.reshape(-1, shape[0]) for part in parts])
    images = target.flattened.get((module, shape[0]))
    return (kernel if images is None else _channels_last(kernel, images, name)).T


def _transposed(*parts, to_last_inputs):
    """From (inputs, outputs, height, width), whose window is that of the gradient of a convolution."""
    if any(part.ndim != 4 for part in parts):
        raise ValueError("other than 4 axes")
    part = np.concatenate(parts, axis=1)
    return part.transpose(2, 3, 1, 0) if to_last_inputs else part[..., ::-1, ::-1].transpose(2, 3, 0, 1)


_MAKERS = {"kernel": _kernel, LATENT_KERNEL: _kernel, "var": _variance}


def _centered_channels(target: Target) -> dict[int, np.ndarray]:
    """Stage -> for each channel here its number there, where shortcuts pad on both sides; 0 is the last stage.

    There the old n channels become numbers n/2 ... 3n/2 - 1 of 2n; here they stay the first.
    """
    stages = sorted({int(stage) for name in target.variables for stage, _ in _BLOCK.findall(name)})
    if not stages or "params/stem/kernel" not in target.variables:
        return {}  # no network of this layout, which the list of what is missing says
    width = target.variables["params/stem/kernel"].shape[-1]
    order = {1: np.arange(width)}
    for stage in stages[1:]:
        old = order[stage - 1]
        added, low = len(old), len(old) // 2
        order[stage] = np.concatenate([old + low, np.arange(low), np.arange(low + len(old), len(old) + added)])
    return order | {0: order[stages[-1]]}


def _permuted(variables: dict[str, Any], order: Mapping[int, np.ndarray]) -> dict[str, Any]:
    """The variables with the channels of each stage in this package's order."""
    if not order:
        return variables

    def block(path: str, leaf: str, array: np.ndarray) -> np.ndarray:
        match = _BLOCK.match(path)
        if match is None:
            if not path.startswith(("norm", "head")):
                return array
            return array[order[0]] if leaf != "bias" or path.startswith("norm") else array
        stage, number = map(int, match.groups())
        out = order[stage]
        if leaf not in ("kernel", LATENT_KERNEL):
            return array[out]
        enters = order[stage - 1] if number == 1 and stage > 1 and path.endswith("conv1") else out
        return array[:, :, enters][..., out]

    def walk(tree, path):
        return {
            key: walk(value, f"{path}/{key}" if path else key) if isinstance(value, dict) else block(path, key, value)
            for key, value in tree.items()
        }

    return {name: walk(collection, "") for name, collection in variables.items()}

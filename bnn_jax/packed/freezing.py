"""From the variables of a trained network to packed ones, with which the same network runs on bits."""

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import errors
from flax.core.meta import unbox
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import ShapeDtypeStruct
from jaxtyping import Array, Bool

from bnn_jax.bitops.planes import PackedBase, PackedKernel
from bnn_jax.bitops.thresholds import find_thresholds
from bnn_jax.checks import is_whole, require
from bnn_jax.finite import all_finite, require_finite
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryDense
from bnn_jax.layers.frozen import PACKED, scale_of
from bnn_jax.layers.norm import affine
from bnn_jax.layers.operands import input_channels
from bnn_jax.outputs import apply_network, init_network, network_logits
from bnn_jax.packed.chains import Chain, called_between_names, find_chains
from bnn_jax.packed.paths import take_path
from bnn_jax.quantizers import bases
from bnn_jax.tracing.constants import constants_of
from bnn_jax.tracing.trace import Trace, trace
from bnn_jax.types import LATENT_KERNEL

ImageShape = tuple[int, ...]
"""(height, width, channels), or the same of other numbers of spatial axes."""

FAR = 1e30
"""An input beyond every threshold of a quantizer."""

OF_OTHER_NETWORKS = (
    errors.ScopeCollectionNotFound,
    errors.ScopeParamNotFoundError,
    errors.ScopeParamShapeError,
    errors.ScopeVariableNotFoundError,
)
"""What Flax says of variables that a network does not have so."""

SEVERAL, FALLING = "has more than one threshold", "falls behind a max pool"
"""What an input quantizer may not do where thresholds take the place of a normalization."""

TRAIN_AGAIN = "the run has diverged: take an earlier checkpoint, or train again"


class _Plan(NamedTuple):
    """What freezing a network comes down to, decided without any array.

    Attributes:
      chains: where thresholds take the place of a normalization.
      constants: path of a layer -> the scale of each base where it is a constant, else None.
      input_scales: path of a consumer -> the constant scale of its inputs.
      modules: by path.
      shapes: of their kernels.
      kept: paths of the variables that the frozen network still reads.
    """

    chains: tuple[Chain, ...]
    constants: dict[str, list[float | None]]
    input_scales: dict[str, float]
    modules: Mapping[str, nn.Module]
    shapes: Mapping[str, tuple[int, ...]]
    kept: frozenset[tuple[str, ...]]


def freeze(
    model: nn.Module, variables: Mapping[str, Any], image_shape: ImageShape, *, path: str | None = None
) -> dict[str, Any]:
    r"""The packed variables of a trained network: ``model.apply(freeze(...), images, train=False)`` runs on bits.

    A quantized layer gets the bits of its codes and their scale in the place of latent weights; a normalization its
    statistics folded into a gain and an offset a channel, gamma / sqrt(var + eps) and beta - mean gain.  Where nothing
    but a normalization and a two-valued quantizer stand between two packed layers (see `bnn_jax.packed.chains`), the
    first returns integers, and one threshold a channel, which agrees with the network's own arithmetic for every
    integer, turns them into packed codes.  What the frozen network does not read is left out.

    Args:
      model: takes images and returns logits, or (logits, intermediates); `train` and `progress` where it takes them.
      variables: its trained variables.
      image_shape: (height, width, channels) of its images, or the same of other numbers of spatial axes.
      path: on which every layer multiplies, see :func:`bnn_jax.packed.take_path`; None is the faster, by its shape.

    Returns:
      {"packed": ..., and what stays real of "params", "batch_stats" and "quantizer_state"}.

    Raises:
      ValueError: if the model has no layer with quantized weights, or one whose quantizer has no codes in evaluation,
        one inside nn.vmap or nn.scan, or two-valued inputs with more than one threshold, or that fall behind a max pool
        by what they have learned; or if a number is not finite.  The layer is named.
      ValueError: if the variables are not those of the model, or `image_shape` is none.
    """
    collections, variables = sorted(variables), _as_dict(variables)
    trained = PACKED not in collections or any(path[-1] == LATENT_KERNEL for path in flatten_dict(variables))
    rule, way = "are frozen already", "give the trained ones, as `run.variables` has them"
    require("variables", collections, trained, rule, way)
    require_finite("variables", variables, TRAIN_AGAIN)
    try:
        plan = _plan(model, jax.eval_shape(lambda: variables), image_shape)
    except OF_OTHER_NETWORKS as error:
        reason = " ".join(str(error).split()).partition(" (https:")[0].rstrip(".")
        rule = f"are not those of `model` with images of {tuple(image_shape)} ({reason})"
        raise ValueError(f"`variables` (={collections}) {rule}; {way}") from None
    images = jnp.zeros((1, *image_shape))
    packed, broken, finite = jax.jit(partial(_packed, model, plan))(variables, images)
    for name, is_finite in finite.items():
        if not is_finite:
            raise ValueError(f"`variables` make {name!r} not finite; {TRAIN_AGAIN}")
    for (name, fault), channels in broken.items():
        if np.any(channels):
            raise ValueError(
                f"`model` cannot be packed: the input quantizer of layer {name!r} {fault} in channel "
                f"{int(np.argmax(channels))}; use one that rises once"
            )
    return take_path(_with_real(plan, packed, variables), path)


def packed_structure(model: nn.Module, image_shape: ImageShape) -> dict[str, Any]:
    """Shapes and dtypes of what :func:`freeze` returns; no array is made.

    Raises:
      ValueError: as :func:`freeze`, but for what depends on numbers.
    """
    images = _images(image_shape)
    rngs = {"params": jax.random.key(0)}
    variables = _as_dict(jax.eval_shape(partial(init_network, model, rngs), images)[1])
    plan = _plan(model, variables, image_shape)
    packed, *_ = jax.eval_shape(partial(_packed, model, plan), variables, images)
    return _with_real(plan, packed, variables)


def threshold_chains(model: nn.Module, variables: Mapping[str, Any], image_shape: ImageShape) -> tuple[Chain, ...]:
    """Where :func:`freeze` puts thresholds; the variables may be shapes.

    Raises:
      ValueError: if there are some, but another layer has real weights in evaluation.
    """
    variables = _as_dict(variables)
    modules, traced = _traced(model, variables, image_shape)
    chains = find_chains(traced, modules)
    if not chains:
        return ()
    constants = _constant_scales(model, variables, _images(image_shape))
    return _usable(chains, modules, constants, _latent_shapes(modules, variables))


def parts(path: str) -> tuple[str, ...]:
    """The names in the path of a module; none for a network that is a single layer."""
    return tuple(filter(None, path.split("/")))


def require_seen(called: Iterable[str], seen: Container[str]) -> None:
    """Refuse a network with a quantized layer of which a lifted transform of Flax hides what it would pack or compare.

    Raises:
      ValueError: naming the first such layer.
    """
    for path in called:
        if path not in seen:
            raise ValueError(
                f"`model` calls layer {path!r} inside nn.vmap, nn.scan or another transform that hides its variables "
                "from freezing and verification; call each layer by itself, as in a loop (nn.jit and nn.remat may stay)"
            )


def _as_dict(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The collections that are trained, out of Flax's boxes."""
    return {name: unbox(collection) for name, collection in dict(variables).items() if name != PACKED}


def _collect(model: nn.Module, variables: Mapping[str, Any], images: Array) -> dict[str, Any]:
    """What the layers put into the collection "packed"."""
    _, updated = apply_network(model, variables, images, mutable=[PACKED])
    return updated.get(PACKED, {})


def _images(image_shape: ImageShape) -> ShapeDtypeStruct:
    is_shape = np.ndim(image_shape) == 1 and all(is_whole(size, 0) for size in np.asarray(image_shape).tolist())
    require("image_shape", image_shape, is_shape, "must be the sizes of an image", "as (32, 32, 3)")
    return ShapeDtypeStruct((1, *image_shape), "float32")


def _traced(model: nn.Module, variables: dict[str, Any], image_shape: ImageShape) -> tuple[dict[str, nn.Module], Trace]:
    """The layers and normalizations of a network by path, and the traced computation of its logits."""
    modules: dict[str, nn.Module] = {}

    def remember(call, arguments, options, context):
        module = context.module
        if context.method_name == "__call__" and isinstance(module, BinaryConv | BinaryDense | BatchNorm):
            path = "/".join(module.path)
            modules[path] = module
            return called_between_names(call, arguments, options, path)
        return call(*arguments, **options)

    # Where nn.jit has traced a layer before it would not call it again, and no one could remember it.
    with nn.intercept_methods(remember), jax.disable_jit():
        traced = trace(partial(network_logits, model), variables, _images(image_shape))
    return modules, traced


def _latent_shapes(modules: Mapping[str, nn.Module], variables: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """path of a layer with quantized weights -> the shape of its kernel."""
    quantized = [path for path, module in modules.items() if getattr(module, "kernel_quantizer", None) is not None]
    parameters = {path: _of_module(variables["params"], path) for path in quantized}
    require_seen(quantized, [path for path in quantized if LATENT_KERNEL in parameters[path]])
    return {path: parameters[path][LATENT_KERNEL].shape for path in quantized}


def _usable(
    chains: tuple[Chain, ...],
    modules: Mapping[str, nn.Module],
    constants: Mapping[str, list[float | None]],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[Chain, ...]:
    """The chains whose consumer's input scale is a constant, as packed words need it; pooled ones of positive scale."""

    def usable(chain: Chain) -> bool:
        layer, consumer = modules[chain.layer], modules[chain.consumer]
        ranks = [len(shapes[path]) - 2 for path in (chain.layer, chain.consumer)]
        if chain.layer not in constants or _constant_input_scale(consumer, layer.features, ranks[1]) is None:
            return False
        if chain.codes_pooled and _falls(consumer, layer.features, ranks[1]):
            return False
        # A max pool of integers is one of the numbers if no scale, which training could make negative, comes between.
        scales = (_constant_input_scale(layer, 1, ranks[0]), *constants[chain.layer])
        return not chain.pooled or all(scale is not None and scale > 0 for scale in scales)

    return tuple(filter(usable, chains))


def _falls(layer: nn.Module, channels: int, rank: int) -> bool:
    """Whether no variable decides that the codes of large inputs are the lower ones."""

    def ends(parameters, x):
        codes = (_quantized(layer, jnp.full_like(x, end), parameters).codes for end in (-FAR, FAR))
        return [code.mean() for code in codes]

    low, high = constants_of(ends, *_parameters_and_inputs(layer, channels, rank))
    return None not in (low, high) and high < low


def _plan(model: nn.Module, variables: dict[str, Any], image_shape: ImageShape) -> _Plan:
    images = _images(image_shape)
    modules, traced = _traced(model, variables, image_shape)
    shapes = _latent_shapes(modules, variables)
    if not shapes:
        raise ValueError(
            f"`model` (={type(model).__name__}) has no layer with quantized weights, so that there is nothing to pack; "
            "give it a `kernel_quantizer`"
        )
    kernels = kernels_of(jax.eval_shape(partial(_collect, model), variables, images))
    # Inside a transform that maps the collection "packed" too, kernels have an axis less than their parameters.
    require_seen(shapes, {path for path, kernel in kernels.items() if kernel.shape == shapes[path]})
    constants = _constant_scales(model, variables, images)
    chains = _usable(find_chains(traced, modules), modules, constants, shapes)
    plan = _Plan(
        chains=chains,
        constants=constants,
        input_scales={
            c.consumer: _constant_input_scale(
                modules[c.consumer], modules[c.layer].features, len(shapes[c.consumer]) - 2
            )
            for c in chains
        },
        modules=modules,
        shapes=shapes,
        kept=frozenset(),
    )
    packed, *_ = jax.eval_shape(partial(_packed, model, plan), variables, images)
    return plan._replace(kept=_kept(model, plan, variables | {PACKED: packed}, images))


def _constant_scales(model: nn.Module, variables: dict[str, Any], images: Any) -> dict[str, list[float | None]]:
    """path of a layer -> the scale of each base of its kernel, where no variable decides it."""

    def scales(variables, images):
        kernels = kernels_of(_collect(model, variables, images))
        return {path: [base.scale for base in kernel.bases] for path, kernel in kernels.items()}

    return constants_of(scales, variables, images)


def _constant_input_scale(layer: nn.Module, channels: int, rank: int) -> float | None:
    """The scale of the input codes, with so many spatial axes, of a layer, if it is a constant."""
    quantizer = layer.input_quantizer
    if quantizer.init_state is not None:
        return None
    parameters, x = _parameters_and_inputs(layer, channels, rank)
    return constants_of(lambda parameters, x: _quantized(layer, x, parameters).scale, parameters, x)


def _parameters_and_inputs(layer: nn.Module, channels: int, rank: int) -> tuple[Any, ShapeDtypeStruct]:
    """The shapes of what an input quantizer learns, and of inputs with so many spatial axes."""
    quantizer = layer.input_quantizer
    x = ShapeDtypeStruct((1,) * (rank + 1) + (channels,), layer.dtype)
    return jax.eval_shape(lambda x: quantizer.init(jax.random.key(0), x), x) if quantizer.init else {}, x


def kernels_of(packed: Mapping[str, Any]) -> dict[str, PackedKernel]:
    """path of a layer -> its packed kernel."""
    flat = flatten_dict(packed, is_leaf=lambda _, value: isinstance(value, PackedKernel))
    return {"/".join(path[:-1]): value for path, value in flat.items() if isinstance(value, PackedKernel)}


def _packed(
    model: nn.Module, plan: _Plan, variables: dict[str, Any], images: Array
) -> tuple[Any, dict[tuple[str, str], Array], dict[str, Array]]:
    """The collection "packed"; for the consumer of each chain and each fault the channels that have it; what is finite.

    The last is told of kernels, gains and offsets by path, before thresholds take the place of some.
    """
    flat = flatten_dict(_collect(model, variables, images))
    finite = {"/".join(path): all_finite(leaf) for path, leaf in flat.items()}
    for path, constants in plan.constants.items():
        kernel = flat[(*parts(path), "kernel")]
        constant = [
            base if c is None else replace(base, scale=None, constant=c) for base, c in zip(kernel.bases, constants)
        ]
        scale = plan.input_scales.get(path, 1.0)
        flat[(*parts(path), "kernel")] = replace(kernel, bases=tuple(constant), input_scale=scale)
    broken = {}
    for chain in plan.chains:
        layer, norm = parts(chain.layer), parts(chain.norm)
        kernel = flat[(*layer, "kernel")]
        (base,) = kernel.bases
        gain, offset = flat.pop((*norm, "gain")), flat.pop((*norm, "offset"))
        flat[(*norm, "threshold")], faults = _thresholds(plan, chain, base, (gain, offset), variables)
        broken |= {(chain.consumer, fault): channels for fault, channels in faults.items()}
        bare = replace(base, scale=None, constant=1.0)
        flat[(*layer, "kernel")] = replace(kernel, bases=(bare,), integers=True)
    return unflatten_dict(flat), broken, finite


def _thresholds(
    plan: _Plan, chain: Chain, base: PackedBase, affine_of: tuple[Array, Array], variables: dict[str, Any]
) -> tuple[Array, dict[str, Bool[Array, "channels"]]]:
    """The thresholds of a chain, by the arithmetic of its layers for every integer that the product can be.

    Besides the channels of each fault.  The maximum of codes is the code of the maximum where the quantizer rises.
    """
    layer, consumer = plan.modules[chain.layer], plan.modules[chain.consumer]
    own = _of_module(variables.get("params", {}), chain.layer)
    scale = scale_of(base, layer.dtype).reshape(-1)
    input_scale = _input_scale(plan, chain.layer, variables)
    bias = own["bias"].astype(layer.dtype) if layer.use_bias else None
    given = _of_module(variables.get("params", {}), chain.consumer).get("input_quantizer", {})
    rank = len(plan.shapes[chain.consumer]) - 2

    def is_higher(v, index):
        some = lambda vector: vector if vector.shape[-1:] != (layer.features,) else jnp.take(vector, index, axis=-1)
        y = layer.scaled(v.astype(layer.dtype), input_scale, some(scale)[None])
        y = y if bias is None else y + some(bias)[None]
        y = affine(y, *map(some, affine_of))
        y = y.reshape(len(y), *(1,) * rank, -1)
        codes = _quantized(consumer, y, jax.tree.map(some, given)).codes
        return (codes > consumer.input_quantizer.code_set[0]).reshape(v.shape[0], -1)

    low, high = _range(layer, math.prod(plan.shapes[chain.layer][:-1]))
    thresholds, several = find_thresholds(is_higher, low, high, layer.features)
    if not chain.codes_pooled:
        return thresholds, {SEVERAL: several}
    rises = jnp.sign(affine_of[0]) * jnp.sign(scale) * jnp.sign(input_scale)
    falling = (rises == jnp.where(thresholds & 1, 1, -1)) & (thresholds >> 1 > low)
    return thresholds, {SEVERAL: several, FALLING: falling}


def _quantized(layer: nn.Module, x: Array, parameters: Mapping[str, Any], *state: Any) -> Any:
    """The only base of a layer's inputs in evaluation."""
    quantizer = layer.input_quantizer
    given = {"train": False, "progress": 1.0, "key": None}
    result = quantizer.apply(x, *state, **parameters, **{name: given[name] for name in quantizer.wants})
    return bases(result[0] if state else result)[0]


def _input_scale(plan: _Plan, path: str, variables: dict[str, Any]) -> Array:
    """The scale of the input codes of a layer of a chain; it does not depend on the inputs."""
    layer = plan.modules[path]
    shape = plan.shapes[path]
    x = jnp.zeros((1,) * (len(shape) - 1) + (input_channels(layer, shape),), layer.dtype)
    parameters = _of_module(variables.get("params", {}), path).get("input_quantizer", {})
    state = _of_module(variables.get("quantizer_state", {}), path).get("input_quantizer")
    return _quantized(layer, x, parameters, *(() if state is None else (state,))).scale.reshape(())


def _range(layer: nn.Module, size: int) -> tuple[int, int]:
    """The smallest and the largest sum of `size` products of a layer's codes; padding counts as none or as a code."""
    inputs, kernels = layer.input_quantizer.code_set, layer.kernel_quantizer.code_set
    products = [a * b for a in (*inputs, getattr(layer, "pad_value", 0)) for b in kernels]
    return size * min(0, *products), size * max(0, *products)


def _of_module(collection: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    for name in parts(path):
        collection = collection.get(name, {})
    return collection


def _kept(model: nn.Module, plan: _Plan, variables: dict[str, Any], images: Any) -> frozenset[tuple[str, ...]]:
    """Paths of the variables beside "packed" that decide the logits of the frozen network.

    Raises:
      ValueError: if the network takes a size from the shape of activations that are packed words now.
    """
    sizes = lambda module: (module.features, getattr(module, "feature_group_count", 1))

    def compare_sizes(call, arguments, options, context):
        module, path = context.module, "/".join(context.module.path)
        if context.method_name == "__call__" and path in plan.shapes and sizes(module) != sizes(plan.modules[path]):
            raise ValueError(f"layer {path!r} gets its size from the shape of its inputs")
        return call(*arguments, **options)

    try:
        with nn.intercept_methods(compare_sizes):
            traced = trace(partial(network_logits, model), variables, images)
    except Exception as error:  # Whatever in a network meets an array of another shape and dtype than it expects.
        if not plan.chains:
            raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"`model` does not run where layers hand on packed words, 32 channels in each ({reason}); give the sizes "
            "of layers as numbers, not as x.shape[-1], and flatten as x.reshape(x.shape[0], -1)"
        ) from None
    needed = set(traced.outputs)
    for operation in reversed(traced.operations):
        if not needed.isdisjoint(operation.outputs):
            needed.update(operation.inputs)
    paths = (path.split("/") for path, value in traced.arguments.items() if value in needed)
    return frozenset(tuple(path) for argument, *path in paths if argument == "0" and path[0] != PACKED)


def _with_real(plan: _Plan, packed: Any, variables: dict[str, Any]) -> dict[str, Any]:
    """The packed collection and what the frozen network reads besides."""
    real = {path: value for path, value in flatten_dict(variables).items() if path in plan.kept}
    return unflatten_dict(real) | {PACKED: packed}

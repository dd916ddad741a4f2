r"""Inside a binary network while it trains, computed in jit: flips, saturation, balance, mismatch, histograms.

Flips are counted in every training step; the rest is measured on one batch when a record is due.  Whatever is measured
is a sum and a count for each layer, named by its path in the network, so that the total is the share over all layers.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeAlias

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.core.meta import unbox
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from bnn_jax.estimators import sign
from bnn_jax.layers import BinaryConv, BinaryDense
from bnn_jax.quantizers import Quantizer, bases
from bnn_jax.training.config import DiagnosticsConfig
from bnn_jax.types import LATENT_KERNEL, Key, Params

COLLECTION = "diagnostics"
"""The Flax collection into which tapped quantizers sow."""

Parts: TypeAlias = Mapping[str, tuple[Array, Array]]
"""statistic -> (sum, count); a share is their ratio."""


def latent_kernels(params: Params) -> dict[str, Array]:
    """The latent weights by the path of their layer.

    >>> list(latent_kernels({"block": {"conv": {"latent_kernel": jnp.ones(2)}}, "head": {"kernel": jnp.ones(2)}}))
    ['block/conv']
    """
    leaves = jax.tree_util.tree_leaves_with_path(unbox(params))
    paths = [([str(getattr(key, "key", key)) for key in path], leaf) for path, leaf in leaves]
    return {"/".join(names[:-1]): leaf for names, leaf in paths if names and names[-1] == LATENT_KERNEL}


class Flips(flax.struct.PyTreeNode):
    """How often each latent weight has flipped since the last record, and whether it ever has.

    Attributes:
      counts: layer -> counts of its latent kernel's shape.
      never: layer -> whether the sign of a weight has been the same since counting began: with the run, or where
        diagnostics were switched on later.
      steps: training steps that were counted.
    """

    counts: dict[str, Int[Array, "..."]]
    never: dict[str, Bool[Array, "..."]]
    steps: Int[Array, ""]


def no_flips(params: Params) -> Flips:
    """The counts before the first step."""
    shapes = {layer: jnp.shape(w) for layer, w in latent_kernels(params).items()}
    counts = {layer: jnp.zeros(shape, jnp.int32) for layer, shape in shapes.items()}
    return Flips(counts, {layer: jnp.ones(shape, bool) for layer, shape in shapes.items()}, jnp.zeros((), jnp.int32))


def count_flips(flips: Flips, before: Params, after: Params) -> Flips:
    """The counts after one more step, from `before` to `after`; sign(0) = +1."""
    old, new = latent_kernels(before), latent_kernels(after)
    flipped = {layer: sign(old[layer]) != sign(new[layer]) for layer in flips.counts}
    counts = {layer: count + flipped[layer].astype(count.dtype) for layer, count in flips.counts.items()}
    return Flips(counts, {layer: never & ~flipped[layer] for layer, never in flips.never.items()}, flips.steps + 1)


def flip_parts(flips: Flips) -> dict[str, Parts]:
    r"""For each layer, of the c_i sign changes of weight i in the n steps since the last record, N weights:

    flips          sum_i c_i / (n N): the share of weights that flip in a step, the FF ratio averaged over the n steps
    net_flips      #{i : c_i odd} / N: the share whose sign is another than at the last record
    flip_flops     #{i : c_i >= 2} / N: the share that flipped and flipped back at least once in between
    never_flipped  the share whose sign has been the same since counting began, see :class:`Flips`

    A flip of a weight that has flipped before is an oscillation in the sense of Nagel et al.: with two values, every
    change is opposite to the previous one.  Their running frequency is not kept; the window is that of the records.
    Weights that have never flipped are what Xiang et al. observe, over half of a plain network's, and call silent; the
    silent weights that their method acts on are those whose running frequency of flips is below a threshold.

    Returns:
      layer -> statistic -> (sum, count).

    Reference: FF ratio of Liu et al., How Do Adam and Training Strategies Help BNNs Optimization?, 2021,
    arXiv:2106.11309, which is exp(pi_t) of Helwegen et al., Latent Weights Do Not Exist, 2019, arXiv:1906.02107, up
    to their e^-9; Nagel et al., Overcoming Oscillations in Quantization-Aware Training, 2022, arXiv:2203.11086; Xiang
    et al., OvSW: Overcoming Silent Weights for Accurate Binary Neural Networks, 2024, arXiv:2407.05257.
    """
    steps = jnp.maximum(flips.steps, 1).astype(jnp.float32)

    def of_layer(c, never):
        return {
            "flips": (c.astype(jnp.float32).sum(), steps * c.size),
            "net_flips": ((c % 2).sum(), jnp.float32(c.size)),
            "flip_flops": ((c >= 2).sum(), jnp.float32(c.size)),
            "never_flipped": (never.sum(), jnp.float32(c.size)),
        }

    return {layer: of_layer(count, flips.never[layer]) for layer, count in flips.counts.items()}


def tap_quantizers() -> AbstractContextManager:
    r"""Context in which quantized layers sow what their quantizers do into the Flax collection "diagnostics".

    balance     the mean of the codes, over all bases: 0 where as many are +1 as -1
    saturation  #{i : dx_i = 0} / #{i}, with dx the gradient that reaches the quantizer's argument from its codes

    A made-up gradient, nowhere zero, arrives at the codes, so that this holds for every quantizer: for the clipped
    straight-through estimator the saturated x have |x| > 1, for RSign |x - shift| >= 1, for the identity there are
    none.  Gradients through a scale are left out.

    Use it around `model.apply` with "diagnostics" among the `mutable` collections; outputs and gradients stay as they
    are.  :func:`tapped_parts` reads the collection.
    """
    return nn.intercept_methods(_tap)


def _tap(next_function, args, kwargs, context):
    module = context.module
    if context.method_name != "__call__" or not isinstance(module, BinaryConv | BinaryDense):
        return next_function(*args, **kwargs)
    quantizers = {"input": module.input_quantizer, "kernel": module.kernel_quantizer}
    present = {kind: quantizer for kind, quantizer in quantizers.items() if quantizer is not None}
    if not present or any(getattr(quantizer.apply, "func", None) is _apply_and_sow for quantizer in present.values()):
        return next_function(*args, **kwargs)
    tapped = {
        f"{kind}_quantizer": quantizer._replace(apply=partial(_apply_and_sow, module, kind, quantizer))
        for kind, quantizer in present.items()
    }
    # The clone works in the layer's own scope: parameters, states and random numbers are the same.
    return module.clone(parent=module.scope, **tapped)(*args, **kwargs)


def _apply_and_sow(module: nn.Module, kind: str, quantizer: Quantizer, x: Array, *state, **given):
    constant = lambda value: lax.stop_gradient(value) if isinstance(value, jax.Array) else value
    held_state, held = jax.tree.map(constant, (state, given))

    def codes_of(x):
        quantized = quantizer.apply(x, *held_state, **held)
        return tuple(base.codes for base in bases(quantized[0] if state else quantized))

    codes, pullback = jax.vjp(codes_of, lax.stop_gradient(x))
    (passed,) = pullback(tuple(_arriving(c, x.ravel()[0] + base) for base, c in enumerate(codes)))
    for statistic, total, size in (
        ("balance", sum(c.astype(jnp.float32).sum() for c in codes), sum(c.size for c in codes)),
        ("saturation", (passed == 0).sum().astype(jnp.float32), x.size),
    ):
        # A layer that is called more than once counts every call.
        value = jnp.stack([total, jnp.float32(size)])
        module.sow(COLLECTION, f"{kind}_{statistic}", value, reduce_fn=jnp.add, init_fn=lambda: jnp.zeros(2))
    return quantizer.apply(x, *state, **given)


def _arriving(codes: Array, phase: Array) -> Array:
    """A gradient of 0.5 to 2.5 without pattern; by a phase from the data, or the compiler evaluates it, slowly."""
    return (1.5 + jnp.cos(jnp.arange(codes.size, dtype=jnp.float32) + phase)).reshape(codes.shape).astype(codes.dtype)


def tapped_parts(collection: Mapping[str, Any]) -> dict[str, Parts]:
    """What :func:`tap_quantizers` sowed: layer -> {input,kernel}_{balance,saturation} -> (sum, count)."""
    parts: dict[str, dict] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(collection):
        *layer, statistic = (key.key for key in path)
        parts.setdefault("/".join(layer), {})[statistic] = (value[0], value[1])
    return parts


def sample_coordinates(key: Key, params: Params, count: int) -> dict[str, Int[Array, "count"]]:
    """`count` positions in the flattened latent kernel of each layer, drawn uniformly, with replacement."""
    kernels = latent_kernels(params)
    keys = jax.random.split(key, max(len(kernels), 1))
    return {layer: jax.random.randint(k, (count,), 0, w.size) for k, (layer, w) in zip(keys, kernels.items())}


def flip_slopes(
    loss: Callable[[Params], Float[Array, ""]], params: Params, coordinates: dict[str, Int[Array, "count"]]
) -> dict[str, Float[Array, "count"]]:
    r"""The slope of the loss across a flip, for some latent weights: what their gradient stands for.

    D_i = (L(w_i -> |w_i|) - L(w_i -> -|w_i|)) / 2 = sign(w_i) (L(w) - L(w with -w_i for w_i)) / 2

    This is the coordinate discrete gradient of Kim et al. with the step that turns the weight's code over and leaves
    its magnitude, and with it the scales, as they are; the paper has a fixed step, for real weights.  It costs a
    forward pass for each coordinate, one after another, and one more.  Codes 0 and weights 0 have slope 0.

    Args:
      loss: params -> scalar, jit-compatible, the same at every call.
      params: where.
      coordinates: layer -> positions in its flattened latent kernel, the same number for every layer.

    Returns:
      layer -> slopes, float32.

    Reference: Kim et al., BinaryDuo, 2020, arXiv:2002.06517.
    """
    kernels = latent_kernels(params)
    wanted = jnp.stack([coordinates[layer] for layer in kernels])
    here = loss(params)

    def difference(which):
        index, position = which
        turned = [_turn_over(w, jnp.where(index == i, position, w.size)) for i, w in enumerate(kernels.values())]
        return here - loss(_with_kernels(params, dict(zip(kernels, turned))))

    indices = jnp.broadcast_to(jnp.arange(len(kernels))[:, None], wanted.shape)
    differences = lax.map(difference, (indices.ravel(), wanted.ravel())).reshape(wanted.shape)
    signs = [sign(w.ravel()[coordinates[layer]]) for layer, w in kernels.items()]
    return {layer: s * d / 2 for layer, s, d in zip(kernels, signs, differences)}


def _turn_over(w: Array, position: Array) -> Array:
    """w with the sign of one entry changed; a position past the end changes none."""
    return w.ravel().at[position].multiply(-1, mode="drop").reshape(w.shape)


def _with_kernels(params: Params, kernels: dict[str, Array]) -> Params:
    replacements = iter(kernels.values())
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: next(replacements) if getattr(path[-1], "key", None) == LATENT_KERNEL else leaf, params
    )


def gradient_cosine(chosen: Params, reference: Params) -> Float[Array, ""]:
    r"""Cosine of the angle between two gradients, over all their leaves together; low values are gradient mismatch.

    cos = <chosen, reference> / (||chosen|| ||reference||), and 0 where one of the two is zero

    Args:
      chosen: tree of arrays, as `jax.grad` returns it for a loss with a chosen derivative.
      reference: tree of the same structure and shapes, as from
        :func:`bnn_jax.analysis.diagnostics.coordinate_discrete_gradient` or :func:`flip_slopes`.

    Returns:
      float32 scalar in [-1, 1]; the sizes of the gradients do not matter.

    Raises:
      ValueError: if structures or shapes differ.

    >>> gradient_cosine({"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([10.0, 0.0])})
    Array(0.6, dtype=float32)

    Reference: Kim et al., BinaryDuo, 2020, arXiv:2002.06517.
    """
    require_alike("chosen", chosen, "reference", reference)
    a, b = _unit(chosen), _unit(reference)
    return jnp.clip(sum(jnp.vdot(p, q) for p, q in zip(a, b)), -1.0, 1.0)


def _unit(tree: Params) -> list[Array]:
    """The leaves in float32, scaled to Euclidean norm 1; by the largest entry first, as a square can underflow."""
    leaves = [jnp.asarray(leaf, jnp.float32) for leaf in jax.tree.leaves(tree)]
    largest = jnp.stack([jnp.abs(leaf).max(initial=0.0) for leaf in leaves]).max()
    leaves = [leaf / jnp.where(largest == 0, 1, largest) for leaf in leaves]
    norm = jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in leaves))
    return [leaf / jnp.where(norm == 0, 1, norm) for leaf in leaves]


def require_alike(name: str, tree: Params, other_name: str, other: Params) -> None:
    """Raise a ValueError with the two arguments' names, if structures or shapes of the trees differ."""
    shapes, other_shapes = (jax.tree.map(jnp.shape, t) for t in (tree, other))
    if jax.tree.structure(tree) != jax.tree.structure(other):
        raise ValueError(f"`{name}` and `{other_name}` must be trees of the same structure, as of one network's params")
    if shapes != other_shapes:
        raise ValueError(f"`{name}` and `{other_name}` must have equal shapes; got {shapes} and {other_shapes}")


def histogram_bounds(box: tuple[float, float] | None) -> tuple[float, float]:
    """Where the histograms of latent weights begin and end: the bounds of their box, -1 and +1 where it has none."""
    return (float(box[0]), float(box[1])) if box is not None and all(map(math.isfinite, box)) else (-1.0, 1.0)


def histogram(w: Float[Array, "..."], *, bins: int, bounds: tuple[float, float]) -> Int[Array, "bins"]:
    """How many values are in each of `bins` equal parts of [lower, upper]; those outside count in the outermost.

    >>> histogram(jnp.array([-1.0, -0.2, 0.3, 1.0, 7.0]), bins=4, bounds=(-1.0, 1.0))
    Array([1, 1, 1, 2], dtype=int32)
    """
    lower, upper = bounds
    index = jnp.clip(jnp.floor((w - lower) * (bins / (upper - lower))), 0, bins - 1)
    return jnp.bincount(index.astype(jnp.int32).ravel(), length=bins)


def diagnose(
    loss: Callable[[Params], tuple[Float[Array, ""], Mapping[str, Any]]],
    params: Params,
    flips: Flips,
    key: Key,
    *,
    settings: DiagnosticsConfig,
    bounds: tuple[float, float],
) -> dict[str, Any]:
    """All diagnostics of a network on one batch, in a form that JSON takes once it is on the host.

    Args:
      loss: params -> (mean loss of the batch, the collection "diagnostics" of tapped quantizers).
      params: of the network.
      flips: since the last record.
      key: for the choice of coordinates.
      settings: bins and number of coordinates.
      bounds: of the histograms.

    Returns:
      `steps`, those since the last record; `layers`, layer -> statistic -> share, and `histogram`, counts; `total`, the
      same over all layers.  The statistics are those of :func:`flip_parts` and :func:`tapped_parts`, and with
      `mismatch_coordinates` the `gradient_cosine` of the estimators' gradient and :func:`flip_slopes` over as many
      weights of each layer.  A network without latent weights has those of its inputs alone.
    """
    kernels = latent_kernels(params)
    mismatch = bool(kernels) and settings.mismatch_coordinates > 0
    if mismatch:
        gradient, collection = jax.grad(loss, has_aux=True)(params)
        coordinates = sample_coordinates(key, params, settings.mismatch_coordinates)
        chosen = {name: g.ravel()[coordinates[name]] for name, g in latent_kernels(gradient).items()}
        slopes = flip_slopes(lambda params: loss(params)[0], params, coordinates)
    else:
        _, collection = loss(params)
    flipped, tapped = flip_parts(flips), tapped_parts(collection)
    parts = {layer: flipped.get(layer, {}) | tapped.get(layer, {}) for layer in flipped | tapped}
    layers = {layer: _shares(own) for layer, own in parts.items()}
    total = _total(parts)
    histograms = {layer: histogram(w, bins=settings.histogram_bins, bounds=bounds) for layer, w in kernels.items()}
    for layer, counts in histograms.items():
        layers[layer]["histogram"] = counts
        if mismatch:
            layers[layer]["gradient_cosine"] = gradient_cosine(chosen[layer], slopes[layer])
    if histograms:
        total["histogram"] = sum(histograms.values())
    if mismatch:
        total["gradient_cosine"] = gradient_cosine(chosen, slopes)
    return {"steps": flips.steps, "layers": layers, "total": total}


def _total(parts: Mapping[str, Parts]) -> dict[str, Array]:
    sums: Parts = {}
    for own in parts.values():
        for name, pair in own.items():
            sums[name] = jax.tree.map(jnp.add, sums[name], pair) if name in sums else pair
    return _shares(sums)


def _shares(parts: Parts) -> dict[str, Array]:
    as_float = lambda number: jnp.asarray(number, jnp.float32)
    return {name: as_float(total) / as_float(size) for name, (total, size) in parts.items()}

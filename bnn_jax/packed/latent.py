"""From packed variables back to latent ones, which can be trained further."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from bnn_jax.bitops.planes import PackedBase, PackedKernel, unpack_codes
from bnn_jax.layers import BatchNorm
from bnn_jax.layers.frozen import PACKED
from bnn_jax.outputs import init_network
from bnn_jax.packed.calls import input_of
from bnn_jax.packed.freezing import freeze, parts, threshold_chains
from bnn_jax.packed.model import PackedModel, require_images, require_packed_model
from bnn_jax.types import LATENT_KERNEL, Images

LEARNED_SCALES = {((-1, 1),): ("scale",), ((0, 1), (-1, 0)): ("positive_scale", "negative_scale")}
"""code sets of a kernel's bases -> what quantizers with such codes call the scale of each, where it is learned."""

ROUNDING = 1e-5
"""How far gains, offsets and scales may be from those of the file, as a share of the largest of an array."""


def latent_variables(packed: PackedModel, images: Images | None = None) -> dict[str, Any]:
    r"""Variables of which :func:`bnn_jax.packed.freeze` makes the packed ones again: to train a packed network further.

    Packed variables have the codes and scales of a kernel and not its latent weights; of a batch norm a gain and an
    offset a channel, or the threshold t of integers that took its place, and not its statistics.  What is returned
    gives the same, and the same logits but for rounding:

      kernels      w = code |scale|, so that sign(w) and the mean magnitude of a filter are those of the file; where a
                   threshold has swallowed the scale, and where positive and negative weights have a scale each, it is
                   1 / sqrt(n), n the fan-in; learned scales are those of the file
      thresholds   gain = the direction / sqrt(var + epsilon),  offset = -gain (t - 1/2) scale
      batch norms  mean and variance of their inputs in a pass of `images`;  gamma = gain sqrt(var + epsilon),
                   beta = offset + gain mean

    Without images the variance is what makes gamma the sign of the gain, and the mean what makes beta 0.  Logits of
    evaluation do not depend on that.  But in training a batch norm takes the statistics of its batch: only with images
    as those does further training begin at this network.

    Args:
      packed: of :func:`bnn_jax.packed.load`.
      images: uint8, of the training set; some hundred are enough.

    Raises:
      TypeError: if `packed` is no PackedModel.
      ValueError: if freezing does not give the packed variables again, for the quantizer makes its codes or scales in
        another way: of centred weights, residuals, thresholds that are learned.  For images of another kind.
    """
    require_packed_model(packed)
    is_kernel = lambda _, value: isinstance(value, PackedKernel)
    given, image_shape = flatten_dict(packed.variables, is_leaf=is_kernel), packed.metadata["image_shape"]
    shapes, modules = _network(packed.model, image_shape)
    known = {path: value for path, value in given.items() if path[0] != PACKED}
    norms = {}
    for path, value in given.items():
        if isinstance(value, PackedKernel):
            layer = ("params", *path[1:-1])
            known[(*layer, LATENT_KERNEL)] = _latent(value)
            known |= {(*layer, "kernel_quantizer", name): scale for name, scale in _learned_scales(value).items()}
        elif path[-1] == "gain":
            norms[path[1:-1]] = _of_gain(modules[path[1:-1]], value, given[(*path[:-1], "offset")])
    for chain in threshold_chains(packed.model, shapes, image_shape):
        layer, norm = parts(chain.layer), parts(chain.norm)
        thresholds, kernel = given[(PACKED, *norm, "threshold")], given[(PACKED, *layer, "kernel")]
        norms[norm] = _of_threshold(modules[norm], thresholds, kernel)
        known[("params", *layer, "bias")] = np.zeros_like(norms[norm].offset)
    variables = _filled(shapes, known | _of_norms(norms))
    if images is not None:
        found = _statistics(packed, variables, require_images(packed, images))
        variables = _filled(shapes, known | _of_norms(norms, found))
    again = flatten_dict(freeze(packed.model, variables, image_shape), is_leaf=is_kernel)
    _check(given, again, flatten_dict(variables.get("batch_stats", {})))
    return variables


def _network(model: nn.Module, image_shape: tuple[int, ...]) -> tuple[dict[str, Any], dict[tuple, BatchNorm]]:
    """The shapes of the trained variables, and the batch norms by path."""
    modules: dict[tuple, BatchNorm] = {}

    def remember(call, arguments, options, context):
        if isinstance(context.module, BatchNorm):
            modules[context.module.path] = context.module
        return call(*arguments, **options)

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(remember):
        _, shapes = jax.eval_shape(partial(init_network, model), jax.random.key(0), images)
    return {collection: values for collection, values in dict(shapes).items() if collection != PACKED}, modules


def _filled(shapes: Mapping[str, Any], known: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Variables of these shapes with the known values."""
    found = {}
    for path, like in flatten_dict(shapes).items():
        if path not in known:
            raise _refusal(f"{'/'.join(path)} is not among them")
        value = jnp.asarray(known[path], like.dtype)
        found[path] = value.reshape(like.shape) if value.ndim else jnp.full(like.shape, value)
    return unflatten_dict(found)


def _latent(kernel: PackedKernel) -> Float[Array, "..."]:
    """Latent weights of a kernel with one base, or with one for the positive and one for the negative weights."""
    codes = [unpack_codes(base, kernel.shape) for base in kernel.bases]
    if len(codes) == 1 and not kernel.integers:
        return codes[0] * jnp.abs(_scale(kernel.bases[0]))
    return sum(codes) * _scale_of_integers(kernel)


def _learned_scales(kernel: PackedKernel) -> dict[str, Any]:
    """Parameters that a quantizer owns where it learns its scales, by their names in bnn_jax.quantizers."""
    names = LEARNED_SCALES.get(tuple(base.values for base in kernel.bases), ())
    scale = lambda base: _scale_of_integers(kernel) if kernel.integers else _scale(base)
    return {name: scale(base) for name, base in zip(names, kernel.bases)}


def _scale(base: PackedBase) -> Float[Array, "..."] | float:
    return base.constant if base.scale is None else base.scale


def _scale_of_integers(kernel: PackedKernel) -> float:
    return math.prod(kernel.shape[:-1]) ** -0.5


class _Norm(NamedTuple):
    """A batch norm and what it computes: y = gain x + offset.

    Attributes:
      module: the norm.
      gain, offset: of each channel.
      middle: of a norm with thresholds, where y is 0; its gain may be any of that sign.
    """

    module: BatchNorm
    gain: np.ndarray
    offset: np.ndarray
    middle: np.ndarray | None = None

    def variables(self, mean: Any = None, var: Any = None) -> dict[tuple[str, str], np.ndarray]:
        """Its parameters and statistics, those given where parameters make up for them."""
        gain, offset, epsilon = self.gain, self.offset, self.module.epsilon
        some = np.where(gain == 0, 1, gain)
        if var is None or not (self.module.use_scale or self.middle is not None):
            # No variance makes 1 of a gain above 1 / sqrt(epsilon).
            var = np.maximum(some**-2 - epsilon, 0)
        var = np.asarray(var, np.float64)
        if self.middle is not None:
            gain = gain / np.sqrt(var + epsilon)
            offset = -gain * self.middle
        if mean is None or not self.module.use_bias:
            mean = np.where(gain == 0, 0, -offset / np.where(gain == 0, 1, gain))
        mean = np.asarray(mean, np.float64)
        found = {("batch_stats", "mean"): mean, ("batch_stats", "var"): var}
        return found | {("params", "scale"): gain * np.sqrt(var + epsilon), ("params", "bias"): offset + gain * mean}


def _of_gain(module: BatchNorm, gain: Any, offset: Any) -> _Norm:
    return _Norm(module, np.asarray(gain, np.float64), np.asarray(offset, np.float64))


def _of_threshold(module: BatchNorm, doubled: Any, kernel: PackedKernel) -> _Norm:
    doubled = np.asarray(doubled)
    direction, middle = 1.0 - 2.0 * (doubled & 1), ((doubled >> 1) - 0.5) * _scale_of_integers(kernel)
    return _Norm(module, direction, -direction * middle, middle)


def _of_norms(norms: Mapping[tuple[str, ...], _Norm], statistics: Mapping[str, Any] = {}) -> dict[tuple, np.ndarray]:
    """The parameters and statistics of batch norms by path."""
    found = {}
    for path, norm in norms.items():
        values = norm.variables(*statistics.get("/".join(path), ()))
        found |= {(collection, *path, name): value for (collection, name), value in values.items()}
    return found


def _statistics(packed: PackedModel, variables: dict[str, Any], images: Images) -> dict[str, tuple[Any, Any]]:
    """path of a batch norm -> mean and variance of each channel of its inputs, in evaluation."""
    found: dict[str, tuple[Any, Any]] = {}

    def remember(call, arguments, options, context):
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            x = input_of(arguments, options).astype(jnp.float32)
            found["/".join(context.module.path)] = (x.mean(range(x.ndim - 1)), x.var(range(x.ndim - 1)))
        return call(*arguments, **options)

    def run(variables, images):
        found.clear()
        with nn.intercept_methods(remember):
            packed.apply(variables, images)
        return dict(found)

    return jax.jit(run)(variables, jnp.asarray(images))


def _check(
    given: Mapping[tuple[str, ...], Any], made: Mapping[tuple[str, ...], Any], statistics: Mapping[tuple[str, ...], Any]
) -> None:
    """Compare the packed variables with those that the latent ones, with these statistics, are frozen to."""
    if given.keys() != made.keys():
        raise _refusal(f"{'/'.join(min(given.keys() ^ made.keys()))} is on one side alone")
    for path, values in given.items():
        for ours, theirs in zip(jax.tree.leaves(values), jax.tree.leaves(made[path]), strict=True):
            largest = np.abs(np.asarray(ours, np.float64)).max(initial=0)
            if path[-1] == "offset":  # The difference of beta and gain mean, which may be much larger.
                moved = np.asarray(given[(*path[:-1], "gain")]) * np.asarray(statistics[(*path[1:-1], "mean")])
                largest = max(largest, np.abs(moved).max(initial=0))
            tolerance = ROUNDING * largest if jnp.issubdtype(ours.dtype, jnp.floating) else 0
            if not np.allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=tolerance):
                raise _refusal(f"{'/'.join(path)} comes out as another one")


def _refusal(reason: str) -> ValueError:
    return ValueError(
        f"`packed` has no latent variables that freezing would pack to the same: {reason}; take those of its run"
    )

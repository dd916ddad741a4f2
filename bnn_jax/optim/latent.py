r"""Box constraints lower <= w <= upper on some of the parameters, and the label of latent weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey
from jaxtyping import Array

from bnn_jax.types import LATENT_KERNEL, Params

Box: TypeAlias = Any
"""None (unconstrained), (lower, upper), a prefix tree of the parameters with such leaves, or a :class:`LatentBox`."""


def is_latent(params: Params) -> Params:
    """A tree of booleans: True for the latent weights of quantized layers.

    Raises:
      TypeError: for a whole number, the step that `optax.inject_hyperparams` calls a function with.

    >>> is_latent({"conv": {"latent_kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}})
    {'conv': {'latent_kernel': True}, 'head': {'kernel': False}}
    """
    if isinstance(params, jax.Array) and jnp.issubdtype(params.dtype, jnp.integer):
        raise TypeError(
            f"`params` is an array of {params.dtype}, not a tree of parameters: optax.inject_hyperparams takes a "
            "function for a schedule; name the argument in its `static_args`, or give no function, as latent_box()"
        )

    def is_latent_leaf(path, _):
        # Below a box of Flax's, as nn.Partitioned, the last key is not that of a dict.
        return next((key.key for key in path[::-1] if isinstance(key, DictKey)), None) == LATENT_KERNEL

    return jax.tree_util.tree_map_with_path(is_latent_leaf, params)


@dataclass(frozen=True)
class LatentBox:
    """The bounds of latent weights; the rest is free.

    It is not a function of the parameters, for which `optax.inject_hyperparams` would take it for a schedule.
    """

    lower: float | Array
    upper: float | Array

    def of(self, params: Params) -> Box:
        """The box as a tree like the parameters."""
        return jax.tree.map(lambda latent: (self.lower, self.upper) if latent else None, is_latent(params))


def latent_box(lower: float | Array = -1.0, upper: float | Array = 1.0) -> LatentBox:
    """The box that holds for latent weights and leaves the rest free.

    >>> latent_box().of({"conv": {"latent_kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}})
    {'conv': {'latent_kernel': (-1.0, 1.0)}, 'head': {'kernel': None}}
    """
    return LatentBox(lower, upper)


def _is_bounds(node) -> bool:
    numbers = (int, float, np.ndarray, np.number, jax.Array)
    return node is None or (isinstance(node, tuple) and len(node) == 2 and all(isinstance(b, numbers) for b in node))


def resolve_box(box: Box | Callable[[Params], Box], params: Params) -> list[tuple[Array, Array] | None]:
    """The bounds of every leaf of `params`, in the order of `jax.tree.leaves`.

    Args:
      box: what :func:`latent_box` returns, bounds, a prefix tree of them, or a function of the parameters that returns
        such a tree.
      params: the parameters.

    Raises:
      ValueError: if `box` is no prefix tree of `params` with leaves None or (lower, upper), if a bound does not
        broadcast to its parameter's shape, or if lower > upper.
    """
    box = box.of(params) if isinstance(box, LatentBox) else box(params) if callable(box) else box
    try:
        broadcast = jax.tree.map(lambda b, subtree: jax.tree.map(lambda _: b, subtree), box, params, is_leaf=_is_bounds)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            "`box` must be None, a pair (lower, upper) or a prefix tree of the parameters with such leaves; "
            f"it does not fit the parameters: {' '.join(str(error).split())}"
        ) from None
    bounds = jax.tree.structure(params).flatten_up_to(broadcast)
    for pair, leaf in zip(bounds, jax.tree.leaves(params)):
        _check_bounds(pair, jnp.shape(leaf))
    return bounds


def _check_bounds(pair, shape: tuple[int, ...]) -> None:
    if pair is None:
        return
    if not _is_bounds(pair):
        raise ValueError(f"`box` must have leaves None or (lower, upper); got {pair!r}")
    for bound in map(jnp.shape, pair):
        if len(bound) > len(shape) or any(b not in (1, n) for b, n in zip(bound[::-1], shape[::-1])):
            raise ValueError(f"`box` must have bounds that broadcast to their parameter's shape {shape}; got {bound}")
    if not any(isinstance(b, jax.core.Tracer) for b in pair) and not np.all(np.less_equal(*pair)):
        raise ValueError(f"`box` must have lower <= upper; got {pair}")


def land_inside(param: Array, displacement: Array, bounds: tuple[Array, Array] | None) -> Array:
    r"""The update, in the parameter's dtype, for which param + update lies in the box exactly.

    param + (target - param) rounds, and can miss a bound by one unit in the last place; there the update is moved by
    one unit towards the inside, which suffices: its own rounding error is at most half of that.  Only from outside of a
    box that is less than two units in the last place of `param` wide can it take further updates.

    Args:
      param: current value.
      displacement: target - param with the target in the box.
      bounds: (lower, upper), or None.
    """
    update = displacement.astype(param.dtype)
    if bounds is None:
        return update
    lower, upper = (jnp.asarray(b, param.dtype) for b in bounds)
    landed = param + update
    inf = jnp.asarray(jnp.inf, param.dtype)
    update = jnp.where(landed > upper, jnp.nextafter(update, -inf), update)
    return jnp.where(landed < lower, jnp.nextafter(update, inf), update)


def clip_displacement(displacement: Array, param: Array, bounds: tuple[Array, Array] | None) -> Array:
    """Project param + displacement onto the box; return the displacement that is left."""
    if bounds is None:
        return displacement
    lower, upper = bounds
    return jnp.clip(displacement, lower - param, upper - param)


def keep_in_box(box: Box | Callable[[Params], Box]) -> optax.GradientTransformation:
    r"""Clip what another optimizer does to the box: the latent-weight clipping of BinaryConnect.

    update <- Pi(w + update) - w, so that after `optax.apply_updates` every weight is inside its bounds exactly.
    Put it last in a chain.

    Args:
      box: prefix tree of the parameters with leaves None or (lower, upper), a function that returns one from them, or
        :func:`latent_box`.

    Raises:
      ValueError: on update, if `params` are missing or `box` does not fit them.

    Reference: Courbariaux, Bengio, David, BinaryConnect, 2015, arXiv:1511.00363.
    """

    def init_fn(params):
        resolve_box(box, params)
        return optax.EmptyState()

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("`params` must be given to `update`: the box is about parameters, not updates")
        leaves, treedef = jax.tree.flatten(updates)
        kept = [
            land_inside(p, clip_displacement(u, p, b), b)
            for u, p, b in zip(leaves, jax.tree.leaves(params), resolve_box(box, params))
        ]
        return treedef.unflatten(kept), state

    return optax.GradientTransformation(init_fn, update_fn)


def latent_learning_rate_scale(shape: tuple[int, ...]) -> float:
    r"""W_LR_scale of BinaryConnect: 1 / sqrt(1.5 / (fan_in + fan_out)), the inverse of Glorot's bound but for a factor.

    fan_in = kh kw C_in and fan_out = kh kw C_out of an HWIO kernel, the two sides of an (inputs, features) matrix.

    Raises:
      ValueError: if `shape` has fewer than two axes.

    >>> latent_learning_rate_scale((3, 3, 16, 32))
    16.97056274847714

    Reference: Courbariaux, Bengio, David, BinaryConnect, 2015, arXiv:1511.00363.
    """
    if len(shape) < 2:
        raise ValueError(f"`shape` (={shape}) must end in the axes (inputs, features); a latent kernel has both")
    *window, inputs, features = shape
    return math.sqrt(math.prod(window) * (inputs + features) / 1.5)


def scale_latent_updates() -> optax.GradientTransformation:
    r"""Multiply what another optimizer does to latent weights by BinaryConnect's layer-wise learning-rate scale.

    update <- update / sqrt(1.5 / (fan_in + fan_out)) for the latent weights; the rest is left alone.  Adam steps have
    one size in every layer, while the weights of Glorot's initialiser do not.  Put it after the optimizer and before
    :func:`keep_in_box`: the authors scale the final update, then clip.

    Raises:
      ValueError: on update, if a latent weight has fewer than two axes.

    >>> optimizer = optax.chain(optax.adam(1e-3), scale_latent_updates(), keep_in_box(latent_box()))
    >>> updates = {"dense": {"latent_kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
    >>> scaled, _ = scale_latent_updates().update(updates, optax.EmptyState())
    >>> print(scaled["dense"]["latent_kernel"][0], scaled["dense"]["bias"])
    [2. 2.] [1. 1.]

    Reference: Courbariaux, Bengio, David, BinaryConnect, 2015, arXiv:1511.00363.
    """

    def scale(update, latent):
        return update * latent_learning_rate_scale(update.shape) if latent else update

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, is_latent(updates)))


def _count_on_bounds(param: Array, bounds: tuple[Array, Array]) -> Array:
    lower, upper = (jnp.asarray(b, param.dtype) for b in bounds)
    return ((param == lower) | (param == upper)).sum()


def bound_statistics(params: Params, box: Box | Callable[[Params], Box]) -> dict[str, Array]:
    """`max_abs_latent`, the largest |w| of the latent weights, and `share_on_bounds` of those that lie on their box.

    Both are 0 where there are no latent weights, the share also where there is no box.
    """
    latent = zip(jax.tree.leaves(params), jax.tree.leaves(is_latent(params)), resolve_box(box, params))
    latent = [(w, bounds) for w, flag, bounds in latent if flag]
    total = sum(w.size for w, _ in latent)
    largest = [jnp.abs(w).max() for w, _ in latent]
    on_bounds = [_count_on_bounds(w, bounds) for w, bounds in latent if bounds is not None]
    return {
        "max_abs_latent": jnp.stack(largest).max() if largest else jnp.zeros(()),
        "share_on_bounds": sum(on_bounds, start=jnp.zeros((), jnp.int32)) / max(total, 1),
    }

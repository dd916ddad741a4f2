r"""The push of BNEW: real weights in a box that an ever stronger concave penalty drives to its ends."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from bnn_jax.checks import require
from bnn_jax.estimators import is_negative
from bnn_jax.optim.latent import Box, clip_displacement, land_inside, resolve_box
from bnn_jax.precision import sum_dtype
from bnn_jax.types import Params

ORDERS = ("before", "after")


class PushToBoundsState(NamedTuple):
    """State of :func:`push_to_bounds`: `count`, the number of updates so far."""

    count: Int[Array, ""]


def push_to_bounds(
    box: Box | Callable[[Params], Box],
    *,
    total_steps: int,
    rate: float | Array = 1e-4,
    steps_per_epoch: int = 1,
    freeze_from: float | Array = 0.98,
    order: str = "before",
) -> optax.GradientTransformation:
    r"""Push weights to the ends of their box, step by step until they are binary: phase 2 of BNEW.

    With Pi the projection onto the box, u the update of the optimizer that comes before in the chain, r = rate,
    e = step // steps_per_epoch, E = total_steps / steps_per_epoch and r_e = r (e + 1) / E, the weights become

        order "before":  Pi(Pi(w + 2 r_e w) + u)     as the authors' code for CIFAR
        order "after":   Pi((1 + 2 r_e) (w + u))     as that for ImageNet

    and from step freeze_from * total_steps on, in short runs the last step at least, whatever u is, the upper bound if
    w >= 0 else the lower: sign(w) in the box [-1, 1].  (The code for CIFAR leaves the outer Pi to the next step's push,
    and so takes gradients outside of the box.)  A weight without a gradient grows by the factor 1 + 2 r_e a step and
    sticks at the bound; the push is a step on the penalty -r_e |w|^2 that no learning rate scales.  Every weight is
    inside its box exactly, and on +-1 exactly from the first frozen step on; an end that is no power of two can take
    two.

    Put it last in a chain, in the place of :func:`keep_in_box`.  The push is small: in bfloat16 it rounds away where
    2 r_e < 2^-9, so hold the weights in float32.

    Args:
      box: prefix tree of the parameters with leaves None (not pushed) or (lower, upper), both finite, a function
        that returns one from them, or :func:`latent_box`.
      total_steps: steps of the whole phase; the paper's has 1000 epochs.
      rate: r, not negative; may be traced.  1e-4 for CIFAR, 1e-6 for ImageNet.
      steps_per_epoch: r_e rises once in so many steps, 1 for the same line without stairs.
      freeze_from: fraction of `total_steps` in [0, 1] after which the weights are binary; may be traced.
      order: "before" or "after" the optimizer's step.

    Raises:
      ValueError: if an argument is out of range; on init and update, if `box` does not fit the parameters or has an
        infinite bound; on update, if `params` are missing.

    >>> optimizer = push_to_bounds((-1.0, 1.0), total_steps=4, rate=0.25, freeze_from=0.5)
    >>> w, state = jnp.array([0.5, -0.25]), optimizer.init(jnp.zeros(2))
    >>> for step in range(3):
    ...     updates, state = optimizer.update(jnp.zeros(2), state, w)
    ...     w = optax.apply_updates(w, updates)
    ...     print(w)
    [ 0.5625  -0.28125]
    [ 0.703125  -0.3515625]
    [ 1. -1.]

    Reference: Paren, Poudel, Training Binarized Neural Networks the Easy Way, BMVC 2022.
    """
    require("total_steps", total_steps, lambda steps: steps >= 1, "must be at least 1")
    require("steps_per_epoch", steps_per_epoch, lambda steps: steps >= 1, "must be at least 1")
    require("rate", rate, lambda r: r >= 0, "must not be negative", "1e-4 is usual")
    share = "must be in [0, 1], a share of `total_steps`"
    require("freeze_from", freeze_from, lambda f: (f >= 0) & (f <= 1), share)
    require("order", order, order in ORDERS, 'must be "before" or "after" the step of the optimizer')

    def init_fn(params):
        _finite_box(box, params)
        return PushToBoundsState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("`params` must be given to `update`: the push is about parameters, not updates")
        epoch = (state.count // steps_per_epoch).astype(float)
        growth = 2 * rate * (epoch + 1) * (steps_per_epoch / total_steps)
        last = jnp.where(jnp.asarray(freeze_from) < 1, total_steps - 1, total_steps).astype(float)
        frozen = state.count.astype(float) >= jnp.minimum(jnp.asarray(freeze_from * total_steps, float), last)

        def push(u, w, bounds):
            if bounds is None:
                return u
            wide = sum_dtype(w)
            displacement = _pushed(u.astype(wide), w.astype(wide), bounds, jnp.asarray(growth, wide), order)
            end = jnp.where(is_negative(w), *(jnp.asarray(bound, wide) for bound in bounds))
            return land_inside(w, jnp.where(frozen, end - w.astype(wide), displacement), bounds)

        leaves, treedef = jax.tree.flatten(updates)
        pushed = map(push, leaves, jax.tree.leaves(params), _finite_box(box, params))
        return treedef.unflatten(pushed), PushToBoundsState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init_fn, update_fn)


def _pushed(u: Array, w: Array, bounds: tuple[Array, Array], growth: Array, order: str) -> Array:
    """The displacement of w, inside the box."""
    proposed = clip_displacement(growth * w, w, bounds) + u if order == "before" else u + growth * (w + u)
    return clip_displacement(proposed, w, bounds)


def _finite_box(box, params) -> list[tuple[Array, Array] | None]:
    """:func:`resolve_box`, but an infinite bound, to which nothing can be pushed, is an error."""
    resolved = resolve_box(box, params)
    for bounds in resolved:
        concrete = bounds is not None and not any(isinstance(b, jax.core.Tracer) for b in bounds)
        if concrete and not all(np.isfinite(b).all() for b in bounds):
            raise ValueError(f"`box` must have finite bounds to push to, or None for a free parameter; got {bounds}")
    return resolved

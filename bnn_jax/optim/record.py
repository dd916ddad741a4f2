"""The record of an optimizer, what it is made from, and what all but Deep Frank-Wolfe do of weight decay and boxes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import optax
from jaxtyping import Array

from bnn_jax.checks import Rule
from bnn_jax.optim.frozen import is_trained
from bnn_jax.optim.latent import Box, is_latent, keep_in_box, scale_latent_updates
from bnn_jax.types import Params, Schedule


class Settings(NamedTuple):
    """What every optimizer of the table is made from; see :func:`make_optimizer`."""

    learning_rate: Schedule
    peak: float | Array
    momentum: float
    weight_decay: float
    decay_of: Callable[[Params], Params]
    box: Box | Callable[[Params], Box]
    total_steps: int | None
    scale_latent: bool


class Optimizer(NamedTuple):
    """An optimizer, and what it goes with.

    Attributes:
      make: (settings, **options) -> transform; refuses options out of range.
      takes_scale_latent: whether it can scale the updates of latent weights layer by layer.
      separate_decay: whether latent weights have a decay of their own, and parameters can be left out of decay.
      takes_clipping: whether gradients may be clipped before it; not where their size decides the size of the step.
      takes_inner_steps: whether several steps can be made on each linearised problem.
      exact_step: whether its step size is exact for a piecewise linear loss, which then is all that it can minimize.
      latent_box: the rule for the bounds of the latent weights, (lower, upper) or None.
      takes_momentum: whether it reads the momentum of the settings; one that does not has its own among its options.
      takes_learning_rate: whether it is made with a learning rate; a transform that is made already has its own.
      spans_the_run: whether its steps depend on how many there are in all.
    """

    make: Callable[..., optax.GradientTransformation]
    takes_scale_latent: bool = False
    separate_decay: bool = True
    takes_clipping: bool = True
    takes_inner_steps: bool = False
    exact_step: bool = False
    latent_box: Rule | None = None
    takes_momentum: bool = True
    takes_learning_rate: bool = True
    spans_the_run: bool = False


def decay_of_parameters(
    params: Params,
    *,
    weight_decay: float | Array,
    latent_weight_decay: float | Array = 0.0,
    decay_only: Sequence[str] = (),
) -> Params:
    """The decay of each parameter: `latent_weight_decay` of latent weights, `weight_decay` of the others.

    Args:
      params: or their shapes.
      weight_decay, latent_weight_decay: may be traced.
      decay_only: shell-style patterns of the parameters that are decayed, as *kernel; the others have 0; none decays
        all.

    Raises:
      ValueError: if a pattern matches no parameter.

    >>> params = {"conv": {"latent_kernel": 1.0, "bias": 1.0}, "head": {"kernel": 1.0}}
    >>> decay_of_parameters(params, weight_decay=0.1, latent_weight_decay=0.2, decay_only=["*kernel"])
    {'conv': {'bias': 0.0, 'latent_kernel': 0.2}, 'head': {'kernel': 0.1}}
    """
    everything = lambda: jax.tree.map(lambda _: True, params)
    chosen = is_trained(params, decay_only, argument="decay_only") if decay_only else everything()
    by_kind = lambda decayed, latent: (latent_weight_decay if latent else weight_decay) if decayed else 0.0
    return jax.tree.map(by_kind, chosen, is_latent(params))


def boxed(settings: Settings, *transforms: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transforms, one after another, after which latent weights stay in their box."""
    scaled = [scale_latent_updates()] if settings.scale_latent else []
    return optax.chain(*transforms, *scaled, keep_in_box(settings.box))


def added_decay(settings: Settings) -> optax.GradientTransformation:
    """Add to what comes in the weights times their decay: coupled before the optimizer's moments, decoupled after."""

    def add(update, weight, decay):
        if isinstance(decay, float) and decay == 0:
            return update
        return update + (decay * weight).astype(update.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(add, updates, params, settings.decay_of(params)))

"""Optimizers as optax transforms, and the table that names those a comparison can run."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from numbers import Real
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from optax import contrib

from bnn_jax.checks import Rule, check_options, look_up, require, require_positive
from bnn_jax.errors import UsageError
from bnn_jax.optim.bnew import PushToBoundsState, push_to_bounds
from bnn_jax.optim.bop import BopState, bop, bop_on_latent, check_rate
from bnn_jax.optim.deep_frank_wolfe import DeepFrankWolfeState, deep_frank_wolfe
from bnn_jax.optim.frozen import path_name
from bnn_jax.optim.latent import (
    Box,
    bound_statistics,
    is_latent,
    keep_in_box,
    latent_box,
    latent_learning_rate_scale,
    resolve_box,
    scale_latent_updates,
)
from bnn_jax.optim.record import Optimizer, Settings, added_decay, boxed, decay_of_parameters
from bnn_jax.optim.silent import SilentWeightsState, overcome_silent_weights
from bnn_jax.types import Params, Schedule


def _adam_steps(
    settings: Settings, *, b2: float = 0.999, eps: float = 1e-8, decoupled: bool = True
) -> optax.GradientTransformation:
    require("b2", b2, lambda b: (b >= 0) & (b < 1), "must be in [0, 1)", "0.999 is usual")
    require("eps", eps, lambda e: e >= 0, "must not be negative", "1e-8 is usual")
    adam, decay = optax.scale_by_adam(settings.momentum, b2, eps), added_decay(settings)
    steps = (adam, decay) if decoupled else (decay, adam)
    return optax.chain(*steps, optax.scale_by_learning_rate(settings.learning_rate))


def _dfw(
    settings: Settings, *, epsilon: float = 1e-5, target: float = 0.0, target_share: float = 0.0
) -> optax.GradientTransformation:
    """The optimizer of :func:`deep_frank_wolfe`."""
    return deep_frank_wolfe(
        settings.learning_rate,
        settings.momentum,
        settings.decay_of,
        box=settings.box,
        epsilon=epsilon,
        target=target,
        target_share=target_share,
    )


def _adam(
    settings: Settings, *, b2: float = 0.999, eps: float = 1e-8, decoupled: bool = True
) -> optax.GradientTransformation:
    """Adam, weight decay beside the step (AdamW) or in the gradient.

    Reference: Kingma and Ba, Adam, 2015, arXiv:1412.6980; Loshchilov and Hutter, Decoupled Weight Decay Regularization,
    2019, arXiv:1711.05101.
    """
    return boxed(settings, _adam_steps(settings, b2=b2, eps=eps, decoupled=decoupled))


def _sgd(settings: Settings, *, nesterov: bool = False) -> optax.GradientTransformation:
    """Stochastic gradient descent with heavy-ball or Nesterov momentum.

    Reference: Sutskever et al., On the Importance of Initialization and Momentum in Deep Learning, 2013.
    """
    sgd = optax.sgd(settings.learning_rate, momentum=settings.momentum, nesterov=nesterov)
    return boxed(settings, added_decay(settings), sgd)


def _polyak_sgd(settings: Settings, *, f_min: float = 0.0) -> optax.GradientTransformation:
    """SGD with Polyak's step size max(L - f_min, 0) / |g|^2, at most the learning rate.

    Reference: Loizou et al., Stochastic Polyak Step-size for SGD, 2021, arXiv:2002.10542.
    """

    # optax's bound takes no schedule, and its `scaling` scales the gradient whose norm is in the step size.
    def init(params):
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, value, **extra):
        polyak = optax.polyak_sgd(settings.learning_rate(state.count), f_min=f_min)
        above = jnp.maximum(value, f_min)  # the loss of a batch may be below that of the optimum
        steps, _ = polyak.update(updates, polyak.init(updates), value=above)
        steps = jax.tree.map(lambda step, gradient: step.astype(gradient.dtype), steps, updates)
        return steps, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    polyak = optax.GradientTransformationExtraArgs(init, update)
    return boxed(settings, added_decay(settings), polyak, optax.trace(settings.momentum))


def _momo(
    settings: Settings, *, lower_bound: float = 0.0, adapt_lower_bound: bool = False
) -> optax.GradientTransformation:
    """SGD whose momentum models the loss, and with it the step size, at most the learning rate.

    Reference: Schaipp et al., MoMo: Momentum Models for Adaptive Learning Rates, 2024, arXiv:2305.07583.
    """
    momo = contrib.momo(
        settings.learning_rate,
        beta=settings.momentum,
        weight_decay=settings.weight_decay,
        lower_bound=lower_bound,
        adapt_lower_bound=adapt_lower_bound,
    )
    return boxed(settings, momo)


def _bop(settings: Settings, *, threshold: float = 1e-6, adaptivity_rate: float = 1e-4) -> optax.GradientTransformation:
    """The optimizer of :func:`bop` for the latent weights, decoupled Adam for the others."""
    check_rate(adaptivity_rate)
    require_positive("peak", settings.peak, "give the highest value of `learning_rate`, which is 0 at step 0")

    def decayed(step):
        return adaptivity_rate * settings.learning_rate(step) / settings.peak

    return bop_on_latent(_adam_steps(settings), threshold=threshold, adaptivity_rate=decayed)


def _bnew(
    settings: Settings,
    *,
    rate: float = 1e-4,
    steps_per_epoch: int = 1,
    freeze_from: float = 0.98,
    order: str = "before",
) -> optax.GradientTransformation:
    """The optimizer of :func:`push_to_bounds` for the latent weights, behind decoupled Adam."""
    if settings.box is None or settings.total_steps is None:
        raise ValueError("`box` and `total_steps` must be given for bnew, which pushes to the bounds step by step")
    push = push_to_bounds(
        settings.box,
        total_steps=settings.total_steps,
        rate=rate,
        steps_per_epoch=steps_per_epoch,
        freeze_from=freeze_from,
        order=order,
    )
    return optax.chain(_adam_steps(settings), push)


def _ovsw(
    settings: Settings,
    *,
    least_ratio: float = 0.01,
    penalty: float = 2e-5,
    flip_momentum: float = 0.999,
    flip_threshold: float = 1e-4,
) -> optax.GradientTransformation:
    """The optimizer of :func:`overcome_silent_weights` for the latent weights, before SGD."""
    silent = overcome_silent_weights(
        least_ratio=least_ratio, penalty=penalty, flip_momentum=flip_momentum, flip_threshold=flip_threshold
    )
    return optax.chain(optax.masked(silent, is_latent), _sgd(settings))


OPTIMIZERS: dict[str, Optimizer] = {
    "dfw": Optimizer(_dfw, takes_clipping=False, takes_inner_steps=True, exact_step=True),
    "adam": Optimizer(_adam, takes_scale_latent=True),
    "sgd": Optimizer(_sgd, takes_scale_latent=True),
    "polyak_sgd": Optimizer(_polyak_sgd, takes_scale_latent=True, takes_clipping=False),
    "momo": Optimizer(_momo, takes_scale_latent=True, separate_decay=False, takes_clipping=False),
    "bop": Optimizer(
        _bop,
        separate_decay=False,
        latent_box=Rule(
            lambda box: box is None or box[0] <= -1 <= 1 <= box[1],
            "must contain -1 and 1 for bop, whose weights are those",
        ),
    ),
    "ovsw": Optimizer(_ovsw, takes_clipping=False),
    "bnew": Optimizer(
        _bnew, latent_box=Rule(lambda box: box is not None, "must not be None for bnew"), spans_the_run=True
    ),
}


OptimizerLike: TypeAlias = str | Optimizer | optax.GradientTransformation | Callable[..., optax.GradientTransformation]
"""What stands for an optimizer, see :func:`as_optimizer`."""


def as_optimizer(optimizer: OptimizerLike, *, argument: str = "optimizer") -> Optimizer:
    """The record of an optimizer.

    Args:
      optimizer: a name in OPTIMIZERS or ``package.module:Name``; a record; a function (learning rate, **options) -> a
        transform of optax, as `optax.lion`; or such a transform, which has a learning rate of its own.  Before the last
        two the weight decay is added to the gradient, after them latent weights are kept in their box; the momentum
        is one of their options, a decay that they make themselves is of all weights.
      argument: what the user calls it, for errors.

    Raises:
      UsageError: for a name that is not known, the nearest is named, or cannot be imported; for what is none of these.

    >>> as_optimizer("optax:lion").exact_step, as_optimizer("dfw").exact_step
    (False, True)
    """
    found = look_up(argument, optimizer, OPTIMIZERS)
    if isinstance(found, Optimizer):
        return found
    rule = "must be a name, an Optimizer, a transform of optax or a function that makes one from the learning rate"
    require(
        argument, optimizer, callable(found) or isinstance(found, optax.GradientTransformation), rule, error=UsageError
    )
    if isinstance(found, optax.GradientTransformation):
        make = lambda settings: boxed(settings, added_decay(settings), found)
        return _OF_OPTAX._replace(make=make, takes_learning_rate=False)

    @wraps(found)  # whose options these are
    def make(settings, **options):
        return boxed(settings, added_decay(settings), found(settings.learning_rate, **options))

    return _OF_OPTAX._replace(make=make)


_OF_OPTAX = Optimizer(None, takes_scale_latent=True, takes_momentum=False)


def with_options(optimizer: OptimizerLike, options: Mapping[str, Any]) -> Optimizer:
    """The record of an optimizer with options of its own, which may be called as arguments of :func:`make_optimizer`.

    Raises:
      UsageError, ValueError: as :func:`as_optimizer`, and for an option that is not known; the nearest is named.

    >>> with_options("optax:sgd", {"momentum": 0.5}).make.keywords
    {'momentum': 0.5}
    """
    found = as_optimizer(optimizer)
    check_options("options", found.make, options)
    return found._replace(make=partial(found.make, **options))


def make_optimizer(
    optimizer: OptimizerLike,
    *,
    learning_rate: Schedule | float,
    peak: float | Array | None = None,
    momentum: float | Array | None = None,
    weight_decay: float = 0.0,
    latent_weight_decay: float = 0.0,
    decay_only: Sequence[str] = (),
    box: Box | Callable[[Params], Box] = None,
    total_steps: int | None = None,
    scale_latent: bool = False,
    max_gradient_norm: float | Array | None = None,
    adaptive_clipping: float | Array | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of the table, with every weight kept inside its box.

    All are called as ``update(gradient, state, params, value=loss)``.  Their names, options and defaults:

    dfw         deep_frank_wolfe(): epsilon 1e-5, target 0, target_share 0
    adam        b2 0.999, eps 1e-8; decoupled True: weight decay as optax.adamw's, rate * decay * w beside the step;
                False: coupled as PyTorch's Adam and an L2 loss, decay * w in the gradient before the moments
    sgd         nesterov False
    polyak_sgd  f_min 0, the loss at the optimum
    momo        lower_bound 0 of the loss, adapt_lower_bound False
    bop         bop() on the latent weights, decoupled adam on the rest: threshold 1e-6, adaptivity_rate 1e-4,
                which is decayed like the learning rate
    ovsw        overcome_silent_weights() on the latent weights, then sgd: least_ratio 0.01, penalty 2e-5,
                flip_momentum 0.999, flip_threshold 1e-4
    bnew        decoupled adam and push_to_bounds(): rate 1e-4, steps_per_epoch 1, freeze_from 0.98, order
                before

    Args:
      optimizer: one of these names, or as :func:`as_optimizer` takes it.
      learning_rate: schedule, or a number that stays; for dfw the proximal eta, for polyak_sgd and momo the upper bound
        of the step size.
      peak: highest value of `learning_rate`, to which bop's adaptivity is put in proportion; None takes the value at
        step 0, right where there is no warm-up.
      momentum: Nesterov's for dfw, heavy-ball for sgd, ovsw and polyak_sgd, beta1 of adam, beta of momo; None takes
        0.9.  Optimizers from elsewhere take their own, as ``partial(optax.sgd, momentum=0.9)``.
      weight_decay: of all weights but the latent ones; momo's own decays all.  In the gradient (coupled) for sgd,
        ovsw and polyak_sgd, in the proximal problem for dfw, decoupled for momo, bop and bnew, either for adam.
      latent_weight_decay: of the latent weights, in the same way; not for momo and bop.
      decay_only: shell-style patterns of the parameters that are decayed, see :func:`decay_of_parameters`.
      box: of the latent weights, as :func:`latent_box`, or None.
      total_steps: of the training; for bnew.
      scale_latent: BinaryConnect's layer-wise learning-rate scale, for adam, sgd, polyak_sgd and momo.
      max_gradient_norm: the gradient g becomes g min(1, max_gradient_norm / |g|), |g| over all parameters, before
        weight decay; None leaves it.
      adaptive_clipping: lambda; the gradient of a unit, the weights of an output channel (the last axis) or a vector,
        is shrunk to lambda times their norm, at least 1e-3, except in the last layer, `head`; None leaves it.
      **options: of the optimizer, as above.

    Raises:
      ValueError: for a name or an option that is not known (the nearest is named), a value out of range, what the
        optimizer does not take, as clipping or a decay of latent weights, or bnew without `box` or `total_steps`.

    References: Kingma and Ba, Adam, 2015; Loizou et al., Stochastic Polyak Step-size, 2021; Schaipp et al., MoMo, 2024;
    Pascanu et al., On the Difficulty of Training Recurrent Neural Networks, 2013; Brock et al., High-Performance
    Large-Scale Image Recognition Without Normalization, 2021.
    """
    found = as_optimizer(optimizer)
    check_options("options", found.make, options)
    own = "is for the optimizers of the table; bind that of another one with functools.partial"
    require("momentum", momentum, momentum is None or found.takes_momentum, own)
    momentum = 0.9 if momentum is None else momentum
    numbers = {"momentum": momentum, "weight_decay": weight_decay, "latent_weight_decay": latent_weight_decay}
    numbers |= {} if callable(learning_rate) else {"learning_rate": learning_rate}
    for argument, value in numbers.items():
        is_number = isinstance(value, Real | np.ndarray | jax.Array)
        require(argument, value, is_number, "must be a number" + " or a schedule" * (argument == "learning_rate"))
    require("momentum", momentum, lambda m: (m >= 0) & (m < 1), "must be in [0, 1)", "0.9 is usual")
    for argument, value in (("weight_decay", weight_decay), ("latent_weight_decay", latent_weight_decay)):
        require(argument, value, lambda decay: decay >= 0, "must not be negative", "0 decays nothing")
    if not callable(learning_rate):
        require_positive("learning_rate", learning_rate, "give a positive number or a schedule")
        learning_rate = optax.constant_schedule(learning_rate)
    for argument, value, taken in (
        ("scale_latent", scale_latent, "takes_scale_latent"),
        ("latent_weight_decay", latent_weight_decay, "separate_decay"),
        ("decay_only", decay_only, "separate_decay"),
    ):
        takers = ", ".join(name for name, other in OPTIMIZERS.items() if getattr(other, taken))
        traced = isinstance(value, jax.core.Tracer)  # a traced 0 may be given to all
        holds = getattr(found, taken) or traced or not value
        require(argument, value, holds, f"is for {takers}", "leave it out")
    decays = {"weight_decay": weight_decay, "latent_weight_decay": latent_weight_decay, "decay_only": decay_only}
    settings = Settings(
        learning_rate=learning_rate,
        peak=learning_rate(0) if peak is None else peak,
        momentum=momentum,
        weight_decay=weight_decay,
        decay_of=partial(decay_of_parameters, **decays),
        box=box,
        total_steps=total_steps,
        scale_latent=scale_latent,
    )
    clipping = _clipping(found, max_gradient_norm=max_gradient_norm, adaptive_clipping=adaptive_clipping)
    made = found.make(settings, **options)
    return _promoting(settings, optax.with_extra_args_support(optax.chain(*clipping, made) if clipping else made))


def _clipping(
    found: Optimizer, *, max_gradient_norm: float | Array | None, adaptive_clipping: float | Array | None
) -> list[optax.GradientTransformation]:
    """What is done to gradients before they come to an optimizer."""
    given = {"max_gradient_norm": max_gradient_norm, "adaptive_clipping": adaptive_clipping}
    for argument, value in given.items():
        if value is not None:
            takers = ", ".join(name for name, other in OPTIMIZERS.items() if other.takes_clipping)
            rule = f"is for {takers}: the step sizes of the others come from the size of the gradient"
            require(argument, value, found.takes_clipping, rule)
            require_positive(argument, value, "None leaves gradients as they are")

    def of_rank(rank):
        """Parameters of so many axes, but those of the last layer."""
        chosen = lambda path, w: max(w.ndim, 1) == rank and not path_name(path).startswith("head/")
        return partial(jax.tree_util.tree_map_with_path, chosen)

    by_norm = [] if max_gradient_norm is None else [optax.clip_by_global_norm(max_gradient_norm)]
    if adaptive_clipping is None:
        return by_norm
    # Left to itself it takes kernels of three axes, and those that have one longer than 1, by other units.
    axes = {1: None} | {rank: tuple(range(rank - 1)) for rank in range(2, 6)}
    by_unit = [optax.masked(optax.adaptive_grad_clip(adaptive_clipping, axis=axes[n]), of_rank(n)) for n in axes]
    return [*by_norm, *by_unit]


def _promoting(
    settings: Settings, transform: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """Let a transform mix dtypes where this is otherwise forbidden: those of optax multiply by their step count."""

    def init(params):
        settings.decay_of(params)  # refuses patterns before the first step
        return transform.init(params)

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"):
            return transform.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


__all__ = [
    "OPTIMIZERS",
    "BopState",
    "Box",
    "DeepFrankWolfeState",
    "Optimizer",
    "OptimizerLike",
    "PushToBoundsState",
    "SilentWeightsState",
    "as_optimizer",
    "bop",
    "bop_on_latent",
    "bound_statistics",
    "decay_of_parameters",
    "deep_frank_wolfe",
    "is_latent",
    "keep_in_box",
    "latent_box",
    "latent_learning_rate_scale",
    "make_optimizer",
    "overcome_silent_weights",
    "push_to_bounds",
    "resolve_box",
    "scale_latent_updates",
    "with_options",
]

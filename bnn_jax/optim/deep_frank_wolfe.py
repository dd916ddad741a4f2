r"""Deep Frank-Wolfe: a proximal step on the linearised network, its step size exact, with or without a box.

At w_t the network is linearised and the hinge loss is kept.  The proximal problem

    min_w in W  |w - w_t|^2 / (2 eta) + r.(w - w_t) + max(mean_i max_c s_ic(w) - f*, 0),        r = weight_decay * w_t,

with the linearised augmented scores s_ic and the target f* (0 in the paper, where the outer maximum is idle), has a
dual over the convex hull of linear pieces (g, b), g a direction and b its offset at w_t.  A point of the dual stands
for w = Pi_W(w_t - eta (r + g)).  Frank-Wolfe starts at the piece of the outer maximum that is constant, g = b = 0; an
ordinary backward pass gives the vertex g^ = gradient of the batch loss, b^ = the loss - f*; and the step towards it,
g + gamma (g^ - g), maximises over gamma in [0, 1] a concave piecewise quadratic with

    D'(gamma) = (b^ - b) + (g^ - g).(w(gamma) - w_t) - epsilon gamma.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from bnn_jax.checks import require, require_positive
from bnn_jax.optim.latent import Box, clip_displacement, land_inside, resolve_box
from bnn_jax.precision import widened
from bnn_jax.types import Params, Schedule

LOSS_AVERAGE_DECAY = 0.99
MAX_NEWTON = 20
MAX_ITERATIONS = 64
TOLERANCE = 1e-6


class DeepFrankWolfeState(NamedTuple):
    """State of :func:`deep_frank_wolfe`.

    Attributes:
      count: calls of update, refused ones too; schedules follow it.
      velocity: the momentum buffer z, one array for each parameter.
      gamma: step size of the last update in [0, 1]; with several inner steps, the weight that has left the true labels.
      search_iterations: evaluations of D' in the last update; 0 where the closed form holds.
      loss_average: running mean of the losses, of which `target_share` is taken; not yet divided by
        1 - 0.99^(count - refused).
      refused: updates that were not made, because the loss, the gradient or a parameter was not finite.
    """

    count: Int[Array, ""]
    velocity: Params
    gamma: Float[Array, ""]
    search_iterations: Int[Array, ""]
    loss_average: Float[Array, ""]
    refused: Int[Array, ""]


class _Problem(NamedTuple):
    """One proximal problem; lists have one entry for each leaf of the parameters."""

    params: list[Array]
    decay: list[Array]
    bounds: list[tuple[Array, Array] | None]
    eta: Array
    epsilon: Array


class _DualPoint(NamedTuple):
    direction: list[Array]
    offset: Array
    weight: Array
    iterations: Array


def _inner(x: Array, y: Array) -> Array:
    """<x, y>, with float32 products on every machine, each device summing its part; `vdot` would flatten and gather."""
    return jnp.tensordot(x, y, axes=x.ndim, precision=lax.Precision.HIGHEST)


def _dot(xs, ys):
    return sum((_inner(x, y) for x, y in zip(xs, ys)), start=jnp.zeros(()))


def _displacement(problem: _Problem, direction: list[Array]) -> list[Array]:
    """w - w_t = Pi(w_t - eta (r + g)) - w_t, without the rounding of w itself."""
    steps = [-problem.eta * (r + g) for r, g in zip(problem.decay, direction)]
    return [clip_displacement(d, w, b) for d, w, b in zip(steps, problem.params, problem.bounds)]


def _dual_slope(problem, offset, start, change, gamma):
    """D'(gamma) and its derivative from the right."""
    slope, curvature = offset - problem.epsilon * gamma, problem.epsilon
    for w, r, g, c, bounds in zip(problem.params, problem.decay, start, change, problem.bounds):
        step = -problem.eta * (r + g + gamma * c)
        clipped = clip_displacement(step, w, bounds)
        slope += _inner(c, clipped)
        if bounds is not None:
            low, high = bounds[0] - w, bounds[1] - w
            moves = jnp.where(c > 0, (low < step) & (step <= high), (low <= step) & (step < high))
            c = jnp.where(moves, c, 0)
        curvature += problem.eta * _inner(c, c)
    return slope, -curvature


def _search(problem, offset, start, change):
    """argmax over [0, 1] of the dual by Newton's method on D' inside a bracket, and the number of evaluations."""

    def evaluate(gamma):
        return _dual_slope(problem, offset, start, change, gamma)

    def body(loop):
        gamma, low, high, bounded, iterations, _ = loop
        slope, curvature = evaluate(gamma)
        rising = slope > 0
        low, high = jnp.where(rising, gamma, low), jnp.where(rising, high, gamma)
        bounded = bounded | ~rising
        newton = gamma - slope / jnp.where(curvature == 0, -jnp.finfo(jnp.float32).tiny, curvature)
        trusted = (iterations < MAX_NEWTON) & (newton > low) & (newton < high)
        # Halving the logarithm finds a relative 1e-6 within MAX_ITERATIONS wherever in [1e-38, 1] the root is.
        middle = jnp.sqrt(jnp.maximum(low, 1e-6 * high)) * jnp.sqrt(high)
        proposal = jnp.where(trusted, newton, jnp.where(bounded, middle, 1.0))
        at_end = rising & (gamma >= 1)
        settled = jnp.abs(newton - gamma) <= TOLERANCE * gamma
        narrow = bounded & (high - low <= TOLERANCE * high)
        done = at_end | settled | narrow | (iterations >= MAX_ITERATIONS)
        final = jnp.where(at_end, gamma, jnp.where(settled, jnp.clip(newton, 0, 1), proposal))
        return jnp.where(done, final, proposal), low, high, bounded, iterations + 1, done

    zero = jnp.zeros_like(offset)
    loop = (zero, zero, zero + 1, jnp.array(False), jnp.zeros((), jnp.int32), jnp.array(False))
    gamma, *_, iterations, _ = lax.while_loop(lambda loop: ~loop[-1], body, loop)
    return gamma, iterations


def _closed_form(problem, offset, start, change):
    pull = [r + g for r, g in zip(problem.decay, start)]
    denominator = problem.eta * _dot(change, change) + problem.epsilon
    gamma = (offset - problem.eta * _dot(change, pull)) / jnp.maximum(denominator, jnp.finfo(jnp.float32).tiny)
    return jnp.clip(gamma, 0, 1), jnp.zeros((), jnp.int32)


def _advance(
    problem: _Problem, point: _DualPoint, vertex: list[Array], vertex_offset: Array, vertex_weight: float | Array = 1.0
) -> _DualPoint:
    """One Frank-Wolfe step of the dual towards a vertex, which has left the true labels or, of weight 0, has not."""
    change = [v - g for v, g in zip(vertex, point.direction)]
    line_search = _closed_form if all(b is None for b in problem.bounds) else _search
    gamma, iterations = line_search(problem, vertex_offset - point.offset, point.direction, change)
    # Not |change|^2 > 0: the square of a small gradient underflows, and its gamma is 1, not 0.
    moving = sum((jnp.abs(c).sum() for c in change), start=jnp.zeros(())) > 0
    gamma = jnp.where(moving, gamma, 0)
    return _DualPoint(
        [(g + gamma * c).astype(g.dtype) for g, c in zip(point.direction, change)],
        point.offset + gamma * (vertex_offset - point.offset),
        point.weight + gamma * (vertex_weight - point.weight),
        point.iterations + iterations,
    )


def _with_momentum(
    problem: _Problem, point: _DualPoint, velocity: list[Array], momentum: float | Array
) -> tuple[list[Array], list[Array]]:
    """Displacements after Nesterov's momentum, before the projection, and the new velocities."""
    pulls = zip(velocity, point.direction, problem.decay)
    velocity = [momentum * z - problem.eta * (g + point.weight * r) for z, g, r in pulls]
    return [d + momentum * z for d, z in zip(_displacement(problem, point.direction), velocity)], velocity


def deep_frank_wolfe(
    learning_rate: float | Array | Schedule,
    momentum: float | Array = 0.9,
    weight_decay: float | Array | Callable[[Params], Any] = 0.0,
    box: Box | Callable[[Params], Box] = None,
    epsilon: float | Array = 1e-5,
    target: float | Array | Schedule = 0.0,
    target_share: float | Array = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Deep Frank-Wolfe, unconstrained or with box constraints; its one hyper-parameter is the learning rate.

    With eta = learning_rate, r = weight_decay * w, delta the gradient, L the loss of the batch without the decay, and
    f* the target, 0 as a rule:

        gamma = argmax of the dual over [0, 1], one scalar for the whole tree: the root of
                D'(gamma) = L - f* + delta.(Pi(w - eta (r + gamma delta)) - w) - epsilon gamma, clipped to [0, 1]
        z <- momentum * z - eta gamma (delta + r)
        w <- Pi(Pi(w - eta (r + gamma delta)) + momentum * z)

    Pi is the projection onto the box.  Without one, gamma = clip((L - f* - eta delta.r) / (eta |delta|^2 + epsilon),
    0, 1), in closed form, and nothing is projected.  With one, D' is piecewise linear; a Newton search inside a bracket
    finds its root, in two or three passes over the parameters as a rule, to a relative 1e-6.  After
    `optax.apply_updates` every constrained weight is inside its bounds exactly.

    Where the network can fit every example, the loss goes to 0, gamma with it, and eta needs no decay.  Where it
    cannot, L stays large beside eta |delta|^2 and gamma at 1: the update is then projected Nesterov SGD with rate eta,
    and either eta needs a schedule or the loss a target above 0, the loss that can be reached:

        f* = target + target_share (m - target),      m the mean of the losses so far, weighted by 0.99^age

    The problem solved is that of max(L - f*, 0): a step reduces the linearised loss to f* and no further.  With a
    `target_share` close to 1 a step asks for a small relative decrease only, and gamma is eta's schedule.

    The loss should be convex and piecewise linear in the logits: :func:`bnn_jax.losses.multiclass_hinge`, smoothed or
    not.  A zero gradient gives gamma = 0, and so does a loss, gradient or parameter that is not finite: then
    parameters, velocity and the mean of the losses stay as they are, and `count` and `refused` go up by one.

    Call ``update(gradient, state, params, value=loss)``.  Under data parallelism both are means over the global batch.
    For k inner steps of Frank-Wolfe pass also ``oracle`` and ``inner_steps=k``: the oracle maps a displacement w - w_t
    to the (gradient, offset) of the hinge's active pieces there, on the network linearised at w_t.

    Do not put it under `optax.masked` or `optax.partition` (it would see some leaves only, and find another gamma),
    after a gradient clipping (the same), or in `optax.MultiSteps` (which hands over the last micro-batch's loss).

    Args:
      learning_rate: eta > 0, a scalar, traced or not, or a schedule.
      momentum: mu in [0, 1), Nesterov's.
      weight_decay: lambda >= 0 of lambda/2 |w|^2, the same for all parameters, or a function from the parameters to a
        prefix tree of such values: 0 leaves a parameter as it is.  Under `optax.inject_hyperparams` name a function in
        ``static_args``.
      box: None, (lower, upper) or a prefix tree of the parameters with such leaves, or a function that returns one from
        the parameters, as :func:`bnn_jax.optim.latent_box`.  Under `optax.inject_hyperparams` name a function in
        ``static_args``.
      epsilon: keeps the quotient finite, as in the authors' code.
      target: f*, the loss below which nothing is asked for; a number, or a schedule.
      target_share: in [0, 1), how far from `target` towards the running mean of the loss f* lies.

    Returns:
      A transform with :class:`DeepFrankWolfeState`.

    Raises:
      ValueError: on construction for `learning_rate` <= 0, `momentum` or `target_share` outside [0, 1), `weight_decay`,
        `epsilon` or `target` < 0; on update without `params` or `value`, with a `value` that is no scalar, or with a
        `box` or a tree of decays that does not fit.

    >>> optimizer = deep_frank_wolfe(learning_rate=1.0, momentum=0.0, box=(-1.0, 1.0), epsilon=0.0)
    >>> w = {"w": jnp.array([0.5, -0.9])}
    >>> state = optimizer.init(w)
    >>> updates, state = optimizer.update({"w": jnp.array([1.0, 1.0])}, state, w, value=jnp.array(0.3))
    >>> optax.apply_updates(w, updates)
    {'w': Array([ 0.3, -1. ], dtype=float32)}
    >>> print(f"{state.gamma:.4f}")
    0.2000

    Reference: Berrada, Zisserman, Kumar, Deep Frank-Wolfe for Neural Network Optimization, 2019, arXiv:1811.07591; the
    box is that of Paren et al., Binary Neural Networks, Oxford, whose text gives the primal problem alone: the exact
    search, the momentum and the projection after it are this library's.  A loss to aim at where the data cannot be
    fitted is the idea of Paren, Poudel, Kumar, Faking Interpolation Until You Make It, 2022, there for each example and
    a Polyak step; one target for all of them, and its running form, are this library's.
    """
    if not callable(learning_rate):
        require_positive("learning_rate", learning_rate, "1.0 is a good first choice")
    require("momentum", momentum, lambda mu: (mu >= 0) & (mu < 1), "must be in [0, 1)")
    if not callable(weight_decay):
        require("weight_decay", weight_decay, lambda decay: decay >= 0, "must not be negative")
    if not callable(target):
        require("target", target, lambda loss: loss >= 0, "must not be negative", "0 is the loss of a perfect fit")
    require("target_share", target_share, lambda share: (share >= 0) & (share < 1), "must be in [0, 1)")
    require("epsilon", epsilon, lambda e: e >= 0, "must not be negative")

    def init_fn(params):
        resolve_box(box, params)
        return DeepFrankWolfeState(
            count=jnp.zeros((), jnp.int32),
            velocity=optax.tree.zeros_like(params),
            gamma=jnp.zeros(()),
            search_iterations=jnp.zeros((), jnp.int32),
            loss_average=jnp.zeros(()),
            refused=jnp.zeros((), jnp.int32),
        )

    def aimed_at(count, accepted, average):
        lowest = jnp.asarray(target(count) if callable(target) else target, jnp.float32)
        share = jnp.asarray(target_share, jnp.float32)
        mean = average / -jnp.expm1(accepted.astype(jnp.float32) * math.log(LOSS_AVERAGE_DECAY))
        return lowest + share * (mean - lowest)

    def update_fn(updates, state, params=None, *, value=None, oracle=None, inner_steps=1, **extra_args):
        del extra_args
        _check_call(params, value, oracle, inner_steps)
        leaves, treedef = jax.tree.flatten(params)
        wide = [widened(w) for w in leaves]

        def flat(tree):
            return [x.astype(w.dtype) for x, w in zip(jax.tree.leaves(tree), wide)]

        eta = learning_rate(state.count) if callable(learning_rate) else learning_rate
        problem = _Problem(
            params=wide,
            decay=[d * w for d, w in zip(_decay_of_leaves(weight_decay, params), wide)],
            bounds=resolve_box(box, params),
            eta=jnp.asarray(eta, jnp.float32),
            epsilon=jnp.asarray(epsilon, jnp.float32),
        )
        vertex, loss = flat(updates), jnp.asarray(value, jnp.float32)
        average = LOSS_AVERAGE_DECAY * state.loss_average + (1 - LOSS_AVERAGE_DECAY) * loss
        aim = aimed_at(state.count, state.count - state.refused + 1, average)
        origin = _DualPoint([jnp.zeros_like(w) for w in wide], jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32))
        point = _advance(problem, origin, vertex, loss - aim)

        def inner_step(_, point):
            moved = _displacement(problem, point.direction)
            gradient, offset = oracle(treedef.unflatten(moved))
            gradient, offset = flat(gradient), offset - aim
            piece = offset + _dot(gradient, moved)
            reached = (piece <= 0) & jnp.isfinite(piece)  # there max(L - f*, 0) is constant
            vertex = [jnp.where(reached, 0, g) for g in gradient]
            return _advance(problem, point, vertex, jnp.where(reached, 0, offset), jnp.where(reached, 0.0, 1.0))

        if inner_steps > 1:
            point = lax.fori_loop(1, inner_steps, inner_step, point)

        moved, velocity = _with_momentum(problem, point, flat(state.velocity), momentum)
        norms = _dot(vertex, vertex) + _dot(point.direction, point.direction)
        lengths = sum((jnp.abs(d).sum() for d in moved), start=jnp.zeros(()))  # parameters and velocities are in it
        finite = jnp.isfinite(point.offset) & jnp.isfinite(norms) & jnp.isfinite(lengths)
        new_updates = [
            jnp.where(finite, land_inside(w, clip_displacement(d, u, b), b), 0)
            for w, u, d, b in zip(leaves, wide, moved, problem.bounds)
        ]
        new_velocity = [
            jnp.where(finite, new.astype(old.dtype), old) for new, old in zip(velocity, jax.tree.leaves(state.velocity))
        ]
        new_state = DeepFrankWolfeState(
            count=optax.safe_increment(state.count),
            velocity=treedef.unflatten(new_velocity),
            gamma=jnp.where(finite, point.weight, 0),
            search_iterations=point.iterations,
            loss_average=jnp.where(finite, average, state.loss_average),
            refused=jnp.where(finite, state.refused, optax.safe_increment(state.refused)),
        )
        return treedef.unflatten(new_updates), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_call(params, value, oracle, inner_steps) -> None:
    if params is None or value is None:
        raise ValueError("`params` and the loss, `value=loss`, must be given to the `update` of deep_frank_wolfe")
    if jnp.shape(value) != ():
        raise ValueError(f"`value` must be the scalar mean loss of the batch; got shape {jnp.shape(value)}")
    if inner_steps < 1 or (inner_steps > 1 and oracle is None):
        raise ValueError(f"`inner_steps` (={inner_steps}) must be 1, or more together with an `oracle`")


def _decay_of_leaves(weight_decay, params) -> list[Array]:
    """lambda for each leaf, in the order of `jax.tree.leaves`."""
    decay = weight_decay(params) if callable(weight_decay) else weight_decay
    try:
        tree = jax.tree.map(lambda value, subtree: jax.tree.map(lambda _: value, subtree), decay, params)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            "`weight_decay` must return a prefix tree of the parameters with a number at each leaf; it does not fit "
            f"the parameters: {' '.join(str(error).split())}"
        ) from None
    return [jnp.asarray(value, jnp.float32) for value in jax.tree.leaves(tree)]

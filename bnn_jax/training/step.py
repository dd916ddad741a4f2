"""The training step, pure: (state, batch) -> (state, metrics)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.core import DenyList
from flax.core.meta import unbox
from jax import lax
from jaxtyping import Array, Integer

from bnn_jax.data import augment, mixup, normalize
from bnn_jax.distillation import distilled, enqueue, initial_keys
from bnn_jax.layers import widened
from bnn_jax.losses import augmented_margins, rows_of
from bnn_jax.optim import DeepFrankWolfeState
from bnn_jax.outputs import Outputs, apply_network, init_network, logits_of, outputs_of
from bnn_jax.training.devices import keep_sharding, shard_batch
from bnn_jax.training.diagnostics import COLLECTION, count_flips, diagnose, no_flips, tap_quantizers
from bnn_jax.training.experiment import Experiment
from bnn_jax.training.one_value import told_of_one_value
from bnn_jax.training.phase_check import phase_is_told
from bnn_jax.training.state import TrainState
from bnn_jax.types import BatchLabels, BatchLogits, Images, Labels, Logits, Metrics, Params


def init_state(experiment: Experiment, seed: int | Integer[Array, ""], warm_start: Any | None = None) -> TrainState:
    """The state before the first step, which puts every weight that is initialised outside its box onto the bound.

    Args:
      seed: of the initialisation and of all that is random in training.
      warm_start: variables to start from instead, as collections of nested dicts; what they leave out is initialised,
        the parameters and states of quantizers from the given kernels.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    images = jnp.zeros((1, *experiment.info.shape))
    with phase_is_told():
        if warm_start is None:
            returned, variables = init_network(experiment.model, init_key, images)
        else:
            kept = {"mutable": DenyList("intermediates"), "rngs": {"params": init_key}}
            returned, variables = apply_network(experiment.model, warm_start, images, **kept)
            variables = unbox(variables)
    _check_classes(experiment, logits_of(returned).shape[-1])
    model_state = dict(variables)
    params = model_state.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=experiment.optimizer.init(params),
        seed=jax.random.key_data(run_key),
        keys=_initial_keys(experiment, init_key),
        flips=no_flips(params) if experiment.diagnostics.every_steps else None,
        average=None if experiment.ema_decay is None else _to_average(params, model_state),
    )


def _check_classes(experiment: Experiment, found: int) -> None:
    if found != experiment.info.num_classes:
        raise ValueError(
            f"`model` (={type(experiment.model).__name__}) returns logits of {found} classes, but the data have "
            f"{experiment.info.num_classes}; let it take `num_classes`, which it is told"
        )


def _to_average(params: Params, model_state: dict[str, Any]) -> dict[str, Any]:
    """The collections that are averaged: not the states of quantizers, which may be codes or counts."""
    return {"params": params} | {name: value for name, value in model_state.items() if name == "batch_stats"}


def _averaged(experiment: Experiment, state: TrainState, params: Params, model_state: dict[str, Any]) -> Any:
    r"""a_t = a_{t-1} + (1 - d) / (1 - d^t) (v_t - a_{t-1}): the exponential average of v_1..v_t, without bias."""
    if state.average is None:
        return None
    share = (1 - experiment.ema_decay) / (1 - experiment.ema_decay ** (state.step + 1).astype(jnp.float32))
    return optax.incremental_update(_to_average(params, model_state), state.average, share)


def _initial_keys(experiment: Experiment, key: Array) -> Array | None:
    settings = experiment.distillation
    if "similarity" not in settings.losses:
        return None
    key = jax.random.fold_in(key, 1)
    return initial_keys(key, count=settings.queue_size, size=experiment.info.num_classes)


class Targets(NamedTuple):
    """The labels of a batch: one an example, or several that share its loss, as of mixed images.

    Attributes:
      labels: arrays of one label an example, or one for each of its tokens.
      shares: of the loss, one for each array; they sum to 1.
    """

    labels: tuple[BatchLabels, ...]
    shares: tuple[float | Array, ...]

    def mean_of(self, function: Callable[[Logits, Labels], Array], logits: BatchLogits) -> Array:
        """The mean over the batch and its tokens of function(logits, labels), by the shares of the labels."""
        means = (function(*rows_of(logits, labels)).mean() for labels in self.labels)
        return sum(share * mean for share, mean in zip(self.shares, means))


def _objective(
    experiment: Experiment, targets: Targets, taught: Outputs | None, keys: Array | None, outputs: Outputs
) -> tuple[Array, dict[str, Array]]:
    """What is differentiated, less the regularizer, and the parts that a teacher adds."""
    loss = targets.mean_of(experiment.loss.apply, outputs.logits)
    if taught is None:
        return loss, {}
    settings = experiment.distillation
    rows = lambda of: of._replace(logits=of.logits.reshape(-1, of.logits.shape[-1]))
    outputs, taught = rows(outputs), rows(taught)
    weights = {"label_weight": settings.label_weight, "temperature": settings.temperature}
    return distilled(loss, outputs, taught, losses=settings.losses, keys=keys, **weights)


def _linear_oracle(logits: Array, targets: Targets, pullback: Callable) -> Callable:
    """displacement -> (gradient, offset) of the active hinge pieces on the network linearised where `pullback` is.

    Labels that share a loss have pieces of their own: a weighted sum of hinge losses is convex and piecewise linear.
    The Jacobian-vector product is the transpose of the pullback, which is linear: custom gradients have no other.
    """
    _, pushforward = jax.vjp(lambda cotangent: pullback(cotangent)[0], jnp.zeros_like(logits))
    count, classes = math.prod(logits.shape[:-1]), logits.shape[-1]

    def piece(moved: Array, labels: BatchLabels, share: float | Array) -> tuple[Array, Array]:
        active = augmented_margins(*rows_of(logits + moved, labels)).argmax(axis=1)
        margins = augmented_margins(*rows_of(logits, labels))
        offset = jnp.take_along_axis(margins, active[:, None], axis=1).mean()
        one_hot = partial(jax.nn.one_hot, num_classes=classes)
        return share * (one_hot(active) - one_hot(labels.reshape(-1))).reshape(logits.shape), share * offset

    def oracle(displacement: Params) -> tuple[Params, Array]:
        (moved,) = pushforward(displacement)
        pieces, offsets = zip(*(piece(moved, *target) for target in zip(*targets)))
        (gradient,) = pullback(sum(pieces) / count)
        return gradient, sum(offsets)

    return oracle


def augmented_batch(
    experiment: Experiment, state: TrainState, images: Images, labels: BatchLabels
) -> tuple[Array, Array, Targets]:
    """The key of a step, its batch, normalized and augmented, and what the batch is to be taken for."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.seed), state.step)
    x = normalize(images, mean=experiment.info.mean, std=experiment.info.std)
    data = experiment.data
    crops = {"padding": data.crop_padding, "flip": data.flip, "smallest_area": data.smallest_area}
    x = augment(key, x, **crops, lighting_std=data.lighting_std, pixel_std=experiment.info.std)
    targets = Targets((labels,), (1.0,))
    if data.mixup_alpha:
        x, others, share = mixup(jax.random.fold_in(key, 3), x, labels, alpha=data.mixup_alpha)
        targets = Targets((labels, others), (share, 1 - share))
    return key, shard_batch(x, experiment.devices), targets


def forward(experiment: Experiment, state: TrainState, params: Params, x: Array, key: Array, *also: str) -> Any:
    """Outputs of the network in training, and the collections it updates: those of the state and the names `also`.

    It computes in the experiment's precision; what is passed on from here is float32.
    """
    streams = ("quantizer", "dropout", "params")  # the last one is for every stream of another name
    with told_of_one_value():
        return apply_network(
            experiment.model,
            {"params": params} | state.model_state,
            x.astype(experiment.precision),
            train=True,
            progress=state.step / experiment.total_steps,
            mutable=[*state.model_state, *also],
            rngs=dict.fromkeys(streams, jax.random.fold_in(key, 1)),
        )


class _Pass(NamedTuple):
    """What a forward and a backward pass give; `taught` are the logits of the teacher, or None."""

    objective: Array
    parts: dict[str, Array]
    gradient: Params
    model_state: Any
    logits: BatchLogits
    taught: BatchLogits | None


def _pass(
    experiment: Experiment, state: TrainState, key: Array, x: Array, targets: Targets, teacher: Any | None
) -> tuple[_Pass, Callable]:
    """Both passes on images at once, and the pullback of the logits."""

    def network(params):
        returned, updated = forward(experiment, state, params, x, key)
        logits, intermediates = outputs_of(returned)
        intermediates = {} if experiment.teacher is None else jax.tree.map(widened, intermediates)
        return Outputs(logits, intermediates), updated

    outputs, pullback, model_state = jax.vjp(network, state.params, has_aux=True)
    taught = None if experiment.teacher is None else outputs_of(apply_network(experiment.teacher, teacher, x))
    objective_of = jax.value_and_grad(partial(_objective, experiment, targets, taught, state.keys), has_aux=True)
    (objective, parts), cotangents = objective_of(outputs)
    (gradient,) = pullback(cotangents)
    taught_logits = None if taught is None else taught.logits
    found = _Pass(objective, parts, gradient, model_state, outputs.logits, taught_logits)
    return found, lambda cotangent: pullback(Outputs(cotangent, {}))


def _accumulated(
    experiment: Experiment, state: TrainState, key: Array, x: Array, targets: Targets, teacher: Any | None
) -> _Pass:
    """The passes on parts of a batch, one after another: means over all of it, with statistics of each part.

    A part takes every k-th example, so that each device keeps its own.
    """
    count = experiment.accumulate_steps
    parted = lambda array: jnp.moveaxis(array.reshape(-1, count, *array.shape[1:]), 1, 0)
    joined = lambda array: jnp.moveaxis(array, 0, 1).reshape(-1, *array.shape[2:])

    def part_of(model_state, number, x, labels):
        own_key = jax.random.fold_in(jax.random.fold_in(key, 4), number)
        own = state.replace(model_state=model_state)
        x = shard_batch(x, experiment.devices)
        return _pass(experiment, own, own_key, x, targets._replace(labels=labels), teacher)[0]

    def body(carry, part):
        model_state, total = carry
        found = part_of(model_state, *part)
        means = (found.objective, found.parts, found.gradient)
        total = jax.tree.map(lambda sums, own: sums + own / count, total, means)
        return (found.model_state, total), (found.logits, found.taught)

    parts = (jnp.arange(count), parted(x), tuple(parted(labels) for labels in targets.labels))
    shapes = jax.eval_shape(part_of, state.model_state, *jax.tree.map(lambda array: array[0], parts))
    zeros = optax.tree.zeros_like((shapes.objective, shapes.parts, shapes.gradient))
    (model_state, (objective, *rest)), outputs = lax.scan(body, (state.model_state, zeros), parts)
    return _Pass(objective, *rest, model_state, *jax.tree.map(joined, outputs))


def train_step(
    experiment: Experiment, state: TrainState, images: Images, labels: BatchLabels, teacher: Any | None = None
) -> tuple[TrainState, Metrics]:
    """One step on a batch of uint8 images; augmentation and normalization inside.

    Args:
      teacher: the variables of `experiment.teacher`, which sees the same augmented images in evaluation mode.

    Returns:
      The next state, and scalars: `loss` (for the smoothed hinge the unsmoothed one), `objective` (what was
      differentiated), `accuracy`, `learning_rate` but of an optimizer that has its own, with a regularizer its
      `penalty`, which is in neither of the losses but in the value that step sizes follow, with a teacher the
      unweighted `distillation_<name>`, and for Deep Frank-Wolfe `gamma`, `search_iterations` and `refused`, the updates
      so far that were not finite and not made.
    """
    key, x, targets = augmented_batch(experiment, state, images, labels)
    inner = {}
    if experiment.accumulate_steps > 1:
        found = _accumulated(experiment, state, key, x, targets, teacher)
    else:
        found, pullback = _pass(experiment, state, key, x, targets, teacher)
        if experiment.inner_steps > 1:
            oracle = _linear_oracle(found.logits, targets, pullback)
            inner = {"oracle": oracle, "inner_steps": experiment.inner_steps}
    gradient, value = found.gradient, found.objective
    if experiment.penalty is not None:
        added, decay = jax.value_and_grad(experiment.penalty)(state.params, state.step)
        gradient, value = jax.tree.map(jnp.add, gradient, decay), value + added
    updates, opt_state = experiment.optimizer.update(gradient, state.opt_state, state.params, value=value, **inner)
    metrics = {
        "loss": targets.mean_of(experiment.loss.monitored, found.logits),
        "objective": found.objective,
        "accuracy": targets.mean_of(lambda logits, labels: logits.argmax(axis=1) == labels, found.logits),
    }
    if experiment.learning_rate is not None:
        metrics["learning_rate"] = jnp.asarray(experiment.learning_rate(state.step), jnp.float32)
    if experiment.penalty is not None:
        metrics["penalty"] = added
    metrics |= {f"distillation_{name}": part for name, part in found.parts.items()}
    if isinstance(opt_state, DeepFrankWolfeState):
        of_step = ("gamma", "search_iterations", "refused")
        metrics |= {name: getattr(opt_state, name) for name in of_step}
    params = optax.apply_updates(state.params, updates)
    new_state = state.replace(
        step=state.step + 1,
        params=params,
        model_state=found.model_state,
        opt_state=opt_state,
        keys=None if state.keys is None else enqueue(state.keys, found.taught.reshape(-1, found.taught.shape[-1])),
        flips=None if state.flips is None else count_flips(state.flips, state.params, params),
        average=_averaged(experiment, state, params, found.model_state),
    )
    return keep_sharding(new_state, experiment.devices), metrics


def diagnose_step(experiment: Experiment, state: TrainState, images: Images, labels: BatchLabels) -> dict[str, Any]:
    """What :func:`bnn_jax.training.diagnostics.diagnose` finds on a batch, with the loss of the labels alone.

    The batch is augmented as in the next training step, and runs through the network as there, but whole where
    `accumulate_steps` divides it.
    """
    key, x, targets = augmented_batch(experiment, state, images, labels)

    def loss(params):
        with tap_quantizers():
            returned, updated = forward(experiment, state, params, x, key, COLLECTION)
        return targets.mean_of(experiment.loss.apply, logits_of(returned)), updated.get(COLLECTION, {})

    return diagnose(
        loss,
        state.params,
        state.flips,
        jax.random.fold_in(key, 2),
        settings=experiment.diagnostics,
        bounds=experiment.histogram_bounds,
    )

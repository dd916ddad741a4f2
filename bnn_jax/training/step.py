"""The training step, pure: (state, batch) -> (state, metrics)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Integer

from bnn_jax.data import augment, normalize
from bnn_jax.distillation import distilled, enqueue, initial_keys
from bnn_jax.layers import widened
from bnn_jax.losses import augmented_margins
from bnn_jax.optim import DeepFrankWolfeState
from bnn_jax.outputs import Outputs, logits_of, outputs_of
from bnn_jax.training.devices import keep_sharding, shard_batch
from bnn_jax.training.diagnostics import COLLECTION, count_flips, diagnose, no_flips, tap_quantizers
from bnn_jax.training.experiment import Experiment
from bnn_jax.training.state import TrainState
from bnn_jax.types import Images, Labels, Metrics, Params


def init_state(experiment: Experiment, seed: int | Integer[Array, ""], warm_start: Any | None = None) -> TrainState:
    """The state before the first step; every initialised weight is inside its box.

    Args:
      seed: of the initialisation and of all that is random in training.
      warm_start: variables to start from instead, as collections of nested dicts; what they leave out is initialised,
        the parameters and states of quantizers from the given kernels.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    images = jnp.zeros((1, *experiment.info.shape))
    if warm_start is None:
        model_state = dict(experiment.model.init(init_key, images, train=False))
    else:
        rngs = {"params": init_key}
        model_state = dict(experiment.model.apply(warm_start, images, train=False, mutable=True, rngs=rngs)[1])
    params = model_state.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=experiment.optimizer.init(params),
        seed=jax.random.key_data(run_key),
        keys=_initial_keys(experiment, init_key),
        flips=no_flips(params) if experiment.diagnostics.every_steps else None,
    )


def _initial_keys(experiment: Experiment, key: Array) -> Array | None:
    settings = experiment.distillation
    if "similarity" not in settings.losses:
        return None
    key = jax.random.fold_in(key, 1)
    return initial_keys(key, count=settings.queue_size, size=experiment.info.num_classes)


def _objective(
    experiment: Experiment, labels: Labels, taught: Outputs | None, keys: Array | None, outputs: Outputs
) -> tuple[Array, dict[str, Array]]:
    """What is differentiated, less the regularizer, and the parts that a teacher adds."""
    loss = experiment.loss.apply(outputs.logits, labels).mean()
    if taught is None:
        return loss, {}
    settings = experiment.distillation
    weights = {"label_weight": settings.label_weight, "temperature": settings.temperature}
    return distilled(loss, outputs, taught, losses=settings.losses, keys=keys, **weights)


def _linear_oracle(logits: Array, labels: Labels, pullback: Callable) -> Callable:
    """displacement -> (gradient, offset) of the active hinge pieces on the network linearised where `pullback` is.

    The Jacobian-vector product is the transpose of the pullback, which is linear: custom gradients have no other.
    """
    _, pushforward = jax.vjp(lambda cotangent: pullback(cotangent)[0], jnp.zeros_like(logits))
    margins = augmented_margins(logits, labels)

    def oracle(displacement: Params) -> tuple[Params, Array]:
        (moved,) = pushforward(displacement)
        active = augmented_margins(logits + moved, labels).argmax(axis=1)
        classes = logits.shape[1]
        piece = jax.nn.one_hot(active, classes) - jax.nn.one_hot(labels, classes)
        (gradient,) = pullback(piece / len(labels))
        return gradient, jnp.take_along_axis(margins, active[:, None], axis=1).mean()

    return oracle


def augmented_batch(experiment: Experiment, state: TrainState, images: Images) -> tuple[Array, Array]:
    """The key of a step and its batch, normalized and augmented."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.seed), state.step)
    x = normalize(images, mean=experiment.info.mean, std=experiment.info.std)
    data = experiment.data
    crops = {"padding": data.crop_padding, "flip": data.flip}
    x = augment(key, x, **crops, lighting_std=data.lighting_std, pixel_std=experiment.info.std)
    return key, shard_batch(x, experiment.devices)


def forward(experiment: Experiment, state: TrainState, params: Params, x: Array, key: Array, *also: str) -> Any:
    """Outputs of the network in training, and the collections it updates: those of the state and the names `also`.

    It computes in the experiment's precision; what is passed on from here is float32.
    """
    return experiment.model.apply(
        {"params": params} | state.model_state,
        x.astype(experiment.precision),
        train=True,
        progress=state.step / experiment.total_steps,
        mutable=[*state.model_state, *also],
        rngs={"quantizer": jax.random.fold_in(key, 1)},
    )


def train_step(
    experiment: Experiment, state: TrainState, images: Images, labels: Labels, teacher: Any | None = None
) -> tuple[TrainState, Metrics]:
    """One step on a batch of uint8 images; augmentation and normalization inside.

    Args:
      teacher: the variables of `experiment.teacher`, which sees the same augmented images in evaluation mode.

    Returns:
      The next state, and scalars: `loss` (for the smoothed hinge the unsmoothed one), `objective` (what was
      differentiated), `accuracy`, `learning_rate`, with a regularizer its `penalty`, which is in neither of the
      losses, with a teacher the unweighted `distillation_<name>`, and for Deep Frank-Wolfe `gamma` and
      `search_iterations`.
    """
    key, x = augmented_batch(experiment, state, images)

    def network(params):
        returned, updated = forward(experiment, state, params, x, key)
        logits, intermediates = outputs_of(returned)
        intermediates = {} if experiment.teacher is None else jax.tree.map(widened, intermediates)
        return Outputs(logits, intermediates), updated

    outputs, pullback, model_state = jax.vjp(network, state.params, has_aux=True)
    taught = None if experiment.teacher is None else outputs_of(experiment.teacher.apply(teacher, x, train=False))
    objective_of = jax.value_and_grad(partial(_objective, experiment, labels, taught, state.keys), has_aux=True)
    (objective, parts), cotangents = objective_of(outputs)
    (gradient,) = pullback(cotangents)
    logits = outputs.logits
    inner = {}
    if experiment.inner_steps > 1:
        oracle = _linear_oracle(logits, labels, lambda cotangent: pullback(Outputs(cotangent, {})))
        inner = {"oracle": oracle, "inner_steps": experiment.inner_steps}
    if experiment.penalty is not None:
        added, decay = jax.value_and_grad(experiment.penalty)(state.params, state.step)
        gradient = jax.tree.map(jnp.add, gradient, decay)
    updates, opt_state = experiment.optimizer.update(gradient, state.opt_state, state.params, value=objective, **inner)
    metrics = {
        "loss": experiment.loss.monitored(logits, labels).mean(),
        "objective": objective,
        "accuracy": (logits.argmax(axis=1) == labels).mean(),
        "learning_rate": jnp.asarray(experiment.learning_rate(state.step), jnp.float32),
    }
    if experiment.penalty is not None:
        metrics["penalty"] = added
    metrics |= {f"distillation_{name}": part for name, part in parts.items()}
    if isinstance(opt_state, DeepFrankWolfeState):
        metrics |= {"gamma": opt_state.gamma, "search_iterations": opt_state.search_iterations}
    params = optax.apply_updates(state.params, updates)
    new_state = state.replace(
        step=state.step + 1,
        params=params,
        model_state=model_state,
        opt_state=opt_state,
        keys=None if state.keys is None else enqueue(state.keys, taught.logits),
        flips=None if state.flips is None else count_flips(state.flips, state.params, params),
    )
    return keep_sharding(new_state, experiment.devices), metrics


def diagnose_step(experiment: Experiment, state: TrainState, images: Images, labels: Labels) -> dict[str, Any]:
    """What :func:`bnn_jax.training.diagnostics.diagnose` finds on a batch, with the loss of the labels alone.

    The batch is augmented, and runs through the network, as in the next training step.
    """
    key, x = augmented_batch(experiment, state, images)

    def loss(params):
        with tap_quantizers():
            returned, updated = forward(experiment, state, params, x, key, COLLECTION)
        return experiment.loss.apply(logits_of(returned), labels).mean(), updated.get(COLLECTION, {})

    return diagnose(
        loss,
        state.params,
        state.flips,
        jax.random.fold_in(key, 2),
        settings=experiment.diagnostics,
        bounds=experiment.histogram_bounds,
    )

r"""The training step, pure: (state, batch) -> (state, metrics); and the jitted programs made of it."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from bnn_jax.data import augment, normalize
from bnn_jax.estimators import ESTIMATORS
from bnn_jax.losses import LOSSES, augmented_margins, multiclass_hinge, smoothed_multiclass_hinge
from bnn_jax.models import MODELS
from bnn_jax.optim import DeepFrankWolfeState, bound_statistics, latent_box, make_optimizer
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS, make_quantizer
from bnn_jax.regularizers import REGULARIZERS, penalty
from bnn_jax.schedules import SCHEDULES
from bnn_jax.training.config import Config, DataConfig, ModelConfig, with_published_quantizers
from bnn_jax.training.state import TrainState
from bnn_jax.types import Images, Labels, LossFunction, Metrics, Params

EVALUATION_BATCH = 250


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bnn_jax" / "compiled"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


class ImageInfo(NamedTuple):
    """What of a data set decides the programs: image shape, classes and the pixel statistics of the training split."""

    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Experiment(NamedTuple):
    """The functions that a training step is made of."""

    model: nn.Module
    loss: LossFunction
    optimizer: optax.GradientTransformationExtraArgs
    box: Callable[[Params], Any] | None
    learning_rate: Callable[[Array], Array]
    data: DataConfig
    info: ImageInfo
    inner_steps: int
    total_steps: int
    penalty: Callable[[Params, Array], Array] | None


def make_model(settings: ModelConfig, *, num_classes: int) -> nn.Module:
    """The network of a validated config."""
    settings = with_published_quantizers(settings)
    inputs, kernels = settings.input_quantizer_options, settings.kernel_quantizer_options
    return MODELS[settings.name](
        num_classes=num_classes,
        input_quantizer=make_quantizer(ACTIVATION_QUANTIZERS, settings.input_quantizer, **inputs),
        kernel_quantizer=make_quantizer(WEIGHT_QUANTIZERS, settings.kernel_quantizer, **kernels),
        **({} if settings.width is None else {"width": settings.width}),
        **({"input_scaling": True} if settings.input_scaling else {}),
        **settings.options,
    )


def make_experiment(config: Config, info: ImageInfo, *, total_steps: int, learning_rate: float | Array) -> Experiment:
    """Look up the names of a validated config; `learning_rate`, which may be traced, takes the place of its own."""
    model = make_model(config.model, num_classes=info.num_classes)
    optim = config.optim
    box = latent_box(*optim.latent_box) if optim.latent_box else None
    schedule = SCHEDULES[optim.schedule](learning_rate, total_steps)
    optimizer = make_optimizer(
        optim.name,
        learning_rate=schedule,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        box=box,
        total_steps=total_steps,
        scale_latent=optim.scale_latent,
    )
    return Experiment(
        model=model,
        loss=LOSSES[config.loss],
        optimizer=optimizer,
        box=box,
        learning_rate=schedule,
        data=config.data,
        info=info,
        inner_steps=optim.inner_steps,
        total_steps=total_steps,
        penalty=_make_penalty(config, total_steps),
    )


def _make_penalty(config: Config, total_steps: int) -> Callable[[Params, Array], Array] | None:
    """(params, step) -> the regularizer's share of the objective."""
    if config.regularizer == "none":
        return None
    strength = SCHEDULES[config.regularizer_schedule](config.regularizer_strength, total_steps)
    regularizer = REGULARIZERS[config.regularizer]
    return lambda params, step: strength(step) * penalty(params, regularizer)


def init_state(experiment: Experiment, seed: Int[Array, ""]) -> TrainState:
    """The state before the first step; every weight is inside its box."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    model_state = dict(experiment.model.init(init_key, jnp.zeros((1, *experiment.info.shape)), train=False))
    params = model_state.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=experiment.optimizer.init(params),
        seed=jax.random.key_data(run_key),
    )


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


def train_step(experiment: Experiment, state: TrainState, images: Images, labels: Labels) -> tuple[TrainState, Metrics]:
    """One step on a batch of uint8 images; augmentation and normalization inside.

    Returns:
      The next state, and scalars: `loss` (for the smoothed hinge the unsmoothed one), `objective` (what was
      differentiated), `accuracy`, `learning_rate`, with a regularizer its `penalty`, which is in neither of the
      losses, and for Deep Frank-Wolfe `gamma` and `search_iterations`.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.seed), state.step)
    x = normalize(images, mean=experiment.info.mean, std=experiment.info.std)
    x = augment(key, x, padding=experiment.data.crop_padding, flip=experiment.data.flip)

    def network(params):
        (logits, _), updated = experiment.model.apply(
            {"params": params} | state.model_state,
            x,
            train=True,
            progress=state.step / experiment.total_steps,
            mutable=list(state.model_state),
            rngs={"quantizer": jax.random.fold_in(key, 1)},
        )
        return logits, updated

    logits, pullback, model_state = jax.vjp(network, state.params, has_aux=True)
    objective, cotangent = jax.value_and_grad(lambda logits: experiment.loss(logits, labels).mean())(logits)
    (gradient,) = pullback(cotangent)
    inner = {}
    if experiment.inner_steps > 1:
        inner = {"oracle": _linear_oracle(logits, labels, pullback), "inner_steps": experiment.inner_steps}
    if experiment.penalty is not None:
        added, decay = jax.value_and_grad(experiment.penalty)(state.params, state.step)
        gradient = jax.tree.map(jnp.add, gradient, decay)
    updates, opt_state = experiment.optimizer.update(gradient, state.opt_state, state.params, value=objective, **inner)
    monitored = multiclass_hinge if experiment.loss is smoothed_multiclass_hinge else experiment.loss
    metrics = {
        "loss": monitored(logits, labels).mean(),
        "objective": objective,
        "accuracy": (logits.argmax(axis=1) == labels).mean(),
        "learning_rate": jnp.asarray(experiment.learning_rate(state.step), jnp.float32),
    }
    if experiment.penalty is not None:
        metrics["penalty"] = added
    if isinstance(opt_state, DeepFrankWolfeState):
        metrics |= {"gamma": opt_state.gamma, "search_iterations": opt_state.search_iterations}
    new_state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        model_state=model_state,
        opt_state=opt_state,
    )
    return new_state, metrics


def train_steps(
    experiment: Experiment, state: TrainState, images: Images, labels: Labels, order: Int[Array, "steps batch"]
) -> tuple[TrainState, Metrics]:
    """Scan :func:`train_step` over the batches that `order` picks from the whole set; metrics stacked over steps."""

    def body(state, indices):
        return train_step(experiment, state, images[indices], labels[indices])

    return lax.scan(body, state, order)


def evaluate(
    experiment: Experiment, params: Params, model_state: Any, images: Images, labels: Labels
) -> dict[str, Float[Array, ""]]:
    """Mean `loss` and `accuracy` over a split, with running batch-norm statistics; every example counts once."""
    count = len(labels)
    size = min(EVALUATION_BATCH, count)
    order = jnp.arange(-(-count // size) * size).reshape(-1, size)

    def body(totals, indices):
        counted = indices < count
        indices = jnp.minimum(indices, count - 1)
        x = normalize(images[indices], mean=experiment.info.mean, std=experiment.info.std)
        logits, _ = experiment.model.apply({"params": params} | model_state, x, train=False)
        monitored = multiclass_hinge if experiment.loss is smoothed_multiclass_hinge else experiment.loss
        losses = jnp.where(counted, monitored(logits, labels[indices]), 0)
        correct = counted & (logits.argmax(axis=1) == labels[indices])
        return (totals[0] + losses.sum(), totals[1] + correct.sum()), None

    (loss, correct), _ = lax.scan(body, (jnp.zeros(()), jnp.zeros((), jnp.int32)), order)
    return {"loss": loss / count, "accuracy": correct / count}


def epoch_order(seed: Array, epoch: Array, *, examples: int, batch_size: int) -> Int[Array, "steps batch"]:
    """The batches of one epoch: a permutation by (seed, epoch) alone; an incomplete last batch is left out."""
    steps = examples // batch_size
    orders = jax.random.fold_in(jax.random.wrap_key_data(seed), np.uint32(2**32 - 1))  # no step is ever this one
    return jax.random.permutation(jax.random.fold_in(orders, epoch), examples)[: steps * batch_size].reshape(
        steps, batch_size
    )


class Programs(NamedTuple):
    """The jitted functions of a run; seed and learning rate are arguments: other values do not compile again."""

    init: Callable[[Array], TrainState]
    train: Callable[[TrainState, Images, Labels, Array, Array], tuple[TrainState, Metrics]]
    evaluate: Callable[..., dict[str, Array]]
    order: Callable[[Array, Array], Array]
    bounds: Callable[[Params], dict[str, Array]]


def make_programs(config: Config, info: ImageInfo, *, examples: int) -> Programs:
    """The programs of `config` on `examples` training examples; one set for all seeds and learning rates."""
    optim = replace(config.optim, learning_rate=1.0, tune_learning_rates=())
    model = with_published_quantizers(config.model)
    config = replace(config, seed=0, name="", model=model, optim=optim, optimizers=())
    return _make_programs(config, info, examples, _named_functions(config))


def _named_functions(config: Config) -> tuple[Any, ...]:
    """What the names of the config stand for now: a notebook may put another function under a name."""
    model = config.model
    estimators = (
        options.get("estimator") for options in (model.input_quantizer_options, model.kernel_quantizer_options)
    )
    return (
        MODELS[model.name],
        ACTIVATION_QUANTIZERS[model.input_quantizer],
        WEIGHT_QUANTIZERS[model.kernel_quantizer],
        *(ESTIMATORS.get(name) for name in (model.input_quantizer, *estimators)),
        LOSSES[config.loss],
    )


@lru_cache(maxsize=8)
def _make_programs(config: Config, info: ImageInfo, examples: int, named_functions: tuple[Any, ...]) -> Programs:
    total_steps = config.epochs * (examples // config.batch_size)
    experiment_at = partial(make_experiment, config, info, total_steps=total_steps)
    experiment = experiment_at(learning_rate=1.0)  # where the learning rate does not enter

    def train(state, images, labels, order, learning_rate):
        return train_steps(experiment_at(learning_rate=learning_rate), state, images, labels, order)

    return Programs(
        init=jax.jit(partial(init_state, experiment)),
        train=jax.jit(train, donate_argnums=0),
        evaluate=jax.jit(partial(evaluate, experiment)),
        order=jax.jit(partial(epoch_order, examples=examples, batch_size=config.batch_size)),
        bounds=jax.jit(partial(bound_statistics, box=experiment.box)),
    )

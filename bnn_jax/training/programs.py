"""The jitted programs of a run."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

from bnn_jax.distillation import DISTILLATION_LOSSES
from bnn_jax.estimators import ESTIMATORS
from bnn_jax.losses import LOSSES
from bnn_jax.models import MODELS
from bnn_jax.optim import bound_statistics
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS
from bnn_jax.training.config import Config, ModelConfig
from bnn_jax.training.experiment import ImageInfo, make_experiment
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import diagnose_step, evaluate, init_state, train_steps
from bnn_jax.training.validation import with_published_quantizers
from bnn_jax.types import Metrics, Params

QUICK_COMPILATION = {"xla_backend_optimization_level": 0}
"""For what runs once: XLA compiles the many small random numbers of an initialisation eight times faster, same bits."""


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bnn_jax" / "compiled"
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def epoch_order(seed: Array, epoch: Array, *, examples: int, batch_size: int) -> Int[Array, "steps batch"]:
    """The batches of one epoch: a permutation by (seed, epoch) alone; an incomplete last batch is left out."""
    steps = examples // batch_size
    orders = jax.random.fold_in(jax.random.wrap_key_data(seed), np.uint32(2**32 - 1))  # no step is ever this one
    return jax.random.permutation(jax.random.fold_in(orders, epoch), examples)[: steps * batch_size].reshape(
        steps, batch_size
    )


class Programs(NamedTuple):
    """The jitted functions of a run.

    Seed, learning rate and the variables of the teacher are arguments: other values do not compile again.
    """

    init: Callable[..., TrainState]
    train: Callable[..., tuple[TrainState, Metrics]]
    evaluate: Callable[..., dict[str, Array]]
    order: Callable[[Array, Array], Array]
    bounds: Callable[[Params], dict[str, Array]]
    diagnose: Callable[..., dict[str, Any]]


def make_programs(config: Config, info: ImageInfo, *, examples: int, teacher: ModelConfig | None = None) -> Programs:
    """The programs of `config` on `examples` training examples; one set for all seeds and learning rates.

    ``init(seed, carried=None)``, ``train(state, images, labels, order, learning_rate, teacher_variables=None)``,
    ``evaluate(params, model_state, images, labels)``, ``order(seed, epoch)``, ``bounds(params)`` and
    ``diagnose(state, images, labels, indices)``.
    """
    optim = replace(config.optim, learning_rate=1.0, tune_learning_rates=())
    model = with_published_quantizers(config.model)
    config = replace(config, seed=0, name="", model=model, optim=optim, optimizers=())
    teacher = None if teacher is None else with_published_quantizers(teacher)
    functions = (*_named_functions(model), *(() if teacher is None else _named_functions(teacher)))
    losses = (LOSSES[config.loss], *(DISTILLATION_LOSSES[name] for name in config.distillation.losses))
    return _make_programs(config, info, examples, teacher, (*functions, *losses))


def _named_functions(model: ModelConfig) -> tuple[Any, ...]:
    """What the names of the model stand for now: a notebook may put another function under a name."""
    estimators = (
        options.get("estimator") for options in (model.input_quantizer_options, model.kernel_quantizer_options)
    )
    return (
        MODELS[model.name],
        ACTIVATION_QUANTIZERS[model.input_quantizer],
        WEIGHT_QUANTIZERS[model.kernel_quantizer],
        *(ESTIMATORS.get(name) for name in (model.input_quantizer, *estimators)),
    )


@lru_cache(maxsize=8)
def _make_programs(
    config: Config, info: ImageInfo, examples: int, teacher: ModelConfig | None, functions: tuple[Any, ...]
) -> Programs:
    total_steps = config.epochs * (examples // config.batch_size)
    experiment_at = partial(make_experiment, config, info, total_steps=total_steps, teacher=teacher)
    experiment = experiment_at(learning_rate=1.0)  # where the learning rate does not enter

    def train(state, images, labels, order, learning_rate, teacher_variables=None):
        experiment = experiment_at(learning_rate=learning_rate)
        return train_steps(experiment, state, images, labels, order, teacher_variables)

    def diagnose_batch(state, images, labels, indices):
        return diagnose_step(experiment, state, images[indices], labels[indices])

    return Programs(
        init=jax.jit(partial(init_state, experiment), compiler_options=QUICK_COMPILATION),
        train=jax.jit(train, donate_argnums=0),
        evaluate=jax.jit(partial(evaluate, experiment)),
        order=jax.jit(partial(epoch_order, examples=examples, batch_size=config.batch_size)),
        bounds=jax.jit(partial(bound_statistics, box=experiment.box)),
        diagnose=jax.jit(diagnose_batch),
    )

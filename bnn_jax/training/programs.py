"""The jitted programs of a run, and the state that they start from."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from bnn_jax.data import Dataset, ImageStream
from bnn_jax.distillation import DISTILLATION_LOSSES
from bnn_jax.errors import UsageError
from bnn_jax.estimators import ESTIMATORS
from bnn_jax.losses import LOSSES
from bnn_jax.models import MODELS
from bnn_jax.optim import bound_statistics
from bnn_jax.paths import cache_folder
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS
from bnn_jax.training.config import Config, ModelConfig
from bnn_jax.training.devices import check_batch_size, replicate, replicated
from bnn_jax.training.divergence import first_non_finite_layer
from bnn_jax.training.experiment import HyperParameters, ImageInfo, make_experiment
from bnn_jax.training.state import Best, RunState, TrainState
from bnn_jax.training.step import diagnose_step, evaluate, init_state, train_steps
from bnn_jax.training.validation import with_published_quantizers
from bnn_jax.types import Metrics, Params

QUICK_COMPILATION = {"xla_backend_optimization_level": 0}
"""For what runs once: XLA compiles the many small random numbers of an initialisation eight times faster, same bits."""


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
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

    Seed, hyper-parameters, the batches to train on and the variables of the teacher are arguments: other values do not
    compile again.
    """

    init: Callable[..., TrainState]
    train: Callable[..., tuple[TrainState, Metrics]]
    train_on_batches: Callable[..., tuple[TrainState, Metrics]]
    evaluate: Callable[..., dict[str, Array]]
    order: Callable[[Array, Array], Array]
    bounds: Callable[[Params], dict[str, Array]]
    diagnose: Callable[..., dict[str, Any]]
    locate: Callable[..., str | None]
    steps_per_epoch: int
    devices: Mesh | None


def make_programs(
    config: Config,
    info: ImageInfo,
    *,
    examples: int,
    teacher: ModelConfig | None = None,
    devices: Mesh | None = None,
) -> Programs:
    """The programs of `config` on `examples` training examples; one set for all seeds and hyper-parameters.

    * ``init(seed, warm_start=None)``
    * ``train(state, images, labels, order, hyper, first=0, count=None, teacher_variables=None)``: on the whole set and
      the indices `order` [steps, batch] of the batches' examples
    * ``train_on_batches(state, images, labels, hyper, first=0, count=None, teacher_variables=None)``: on images
      [steps, batch, ...] as they are
    * ``evaluate(params, model_state, images, labels)``, ``order(seed, epoch)``, ``bounds(params)``
    * ``diagnose(state, images, labels)``, ``locate(state, images, labels)``: on one batch, see
      :func:`bnn_jax.training.diagnostics.diagnose` and :func:`bnn_jax.training.divergence.first_non_finite_layer`

    `hyper` is what :func:`bnn_jax.training.experiment.hyper_parameters` gives; `first` and `count` choose batches, as
    in :func:`bnn_jax.training.step.train_steps`.

    With `devices` each of them but `init`, which runs on one, takes arrays that lie as
    :mod:`bnn_jax.training.devices` places them, and leaves the state so; whatever else comes out is on every device.
    """
    optim = replace(config.optim, learning_rate=1.0, momentum=0.0, weight_decay=0.0, tune_learning_rates=())
    model = with_published_quantizers(config.model)
    config = replace(config, seed=0, name="", model=model, optim=optim, optimizers=(), regularizer_strength=1.0)
    teacher = None if teacher is None else with_published_quantizers(teacher)
    functions = (*_named_functions(model), *(() if teacher is None else _named_functions(teacher)))
    losses = (LOSSES[config.loss], *(DISTILLATION_LOSSES[name] for name in config.distillation.losses))
    return _make_programs(config, info, examples, teacher, devices, (*functions, *losses))


def _named_functions(model: ModelConfig) -> tuple[Any, ...]:
    """What the names of the model stand for now: a notebook may put another function under a name."""
    estimators = (
        options.get("estimator") for options in (model.input_quantizer_options, model.kernel_quantizer_options)
    )
    return (
        MODELS[model.name].constructor,
        ACTIVATION_QUANTIZERS[model.input_quantizer],
        WEIGHT_QUANTIZERS[model.kernel_quantizer],
        *(ESTIMATORS.get(name) for name in (model.input_quantizer, *estimators)),
    )


@lru_cache(maxsize=8)
def _make_programs(
    config: Config,
    info: ImageInfo,
    examples: int,
    teacher: ModelConfig | None,
    devices: Mesh | None,
    functions: tuple[Any, ...],
) -> Programs:
    total_steps = config.epochs * (examples // config.batch_size)
    experiment_at = partial(make_experiment, config, info, total_steps=total_steps, teacher=teacher, devices=devices)
    experiment = experiment_at()  # where the hyper-parameters do not enter
    order = partial(epoch_order, examples=examples, batch_size=config.batch_size)
    whole = None if devices is None else replicated(devices)

    def train(state, images, labels, order, hyper: HyperParameters, first=0, count=None, teacher_variables=None):
        steps = partial(train_steps, length=len(order), first=first, count=count, teacher=teacher_variables)
        return steps(experiment_at(**hyper), state, lambda number: (images[order[number]], labels[order[number]]))

    def train_on_batches(state, images, labels, hyper: HyperParameters, first=0, count=None, teacher_variables=None):
        steps = partial(train_steps, length=len(labels), first=first, count=count, teacher=teacher_variables)
        return steps(experiment_at(**hyper), state, lambda number: (images[number], labels[number]))

    return Programs(
        init=jax.jit(partial(init_state, experiment), compiler_options=QUICK_COMPILATION),
        train=jax.jit(train, out_shardings=(None, whole)),
        train_on_batches=jax.jit(train_on_batches, out_shardings=(None, whole)),
        evaluate=jax.jit(partial(evaluate, experiment), out_shardings=whole),
        order=jax.jit(order, out_shardings=whole),
        bounds=jax.jit(partial(bound_statistics, box=experiment.box), out_shardings=whole),
        diagnose=jax.jit(partial(diagnose_step, experiment), out_shardings=whole),
        locate=partial(first_non_finite_layer, experiment),
        steps_per_epoch=examples // config.batch_size,
        devices=devices,
    )


class Teacher(NamedTuple):
    """A trained network that teaches another: its settings and its variables, as `model.apply` takes them."""

    settings: ModelConfig
    variables: Any


def image_info(dataset: Dataset | ImageStream) -> ImageInfo:
    """What of a data set decides the programs."""
    return ImageInfo(tuple(dataset.image_shape), dataset.num_classes, tuple(dataset.mean), tuple(dataset.std))


def programs_of(
    config: Config, dataset: Dataset | ImageStream, *, teacher: Teacher | None = None, devices: Mesh | None = None
) -> Programs:
    """The jitted functions of `config` on `dataset`, the training program with the variables of its `teacher`.

    Raises:
      UsageError: if a batch is larger than the training split, or cannot be divided among the devices.
    """
    check_batch_size(config.batch_size, devices)
    examples = len(dataset.train)
    if config.batch_size > examples:
        raise UsageError(f"`batch_size` (={config.batch_size}) is larger than the {examples} training examples")
    info = image_info(dataset)
    if teacher is None:
        return make_programs(config, info, examples=examples, devices=devices)
    programs = make_programs(config, info, examples=examples, teacher=teacher.settings, devices=devices)
    variables = replicate(teacher.variables, devices)
    return programs._replace(
        train=partial(programs.train, teacher_variables=variables),
        train_on_batches=partial(programs.train_on_batches, teacher_variables=variables),
    )


def initial_state(programs: Programs, seed: int, *, warm_start: Any | None = None) -> RunState:
    """The state of a run before its first step; the variables `warm_start`, if any, start from given values.

    Raises:
      UsageError: if network, quantizers and images do not go together.
    """
    try:
        train = programs.init(np.uint32(seed), warm_start)
    except (ValueError, TypeError) as error:
        raise UsageError(f"the network cannot be built: {error}") from None
    return RunState(train, _best_so_far(train))


def _best_so_far(train: TrainState) -> Best:
    return Best(train.params, train.model_state, jnp.full((), -1.0), jnp.zeros((), jnp.int32))


def state_shapes(programs: Programs) -> RunState:
    """Shapes and dtypes of a run's state, at no cost; of a run without a warm start."""
    train = programs.init.eval_shape(np.uint32(0))
    return RunState(train, jax.eval_shape(_best_so_far, train))

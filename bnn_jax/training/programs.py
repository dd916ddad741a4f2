"""The jitted programs of a run, and the state that they start from."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.core.meta import unbox
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array

from bnn_jax.checks import look_up, require
from bnn_jax.compilation import QUICK_COMPILATION, training_options
from bnn_jax.data import Dataset, ImageStream
from bnn_jax.distillation import DISTILLATION_LOSSES
from bnn_jax.errors import UsageError, renamed
from bnn_jax.estimators import as_estimator
from bnn_jax.finite import all_finite, require_finite
from bnn_jax.layers.arguments import QUANTIZERS
from bnn_jax.losses import LOSSES, check_loss
from bnn_jax.models.build import entry_of
from bnn_jax.names import last_part, name_of
from bnn_jax.optim import OPTIMIZERS, as_optimizer
from bnn_jax.quantizers import named_quantizer
from bnn_jax.regularizers import REGULARIZERS
from bnn_jax.schedules import SCHEDULES
from bnn_jax.training.config import Config, ModelConfig, without_tuning
from bnn_jax.training.devices import check_batch_size, replicate, replicated
from bnn_jax.training.divergence import (
    checks_of_evaluation,
    checks_of_step,
    first_non_finite_layer,
    first_non_finite_output,
)
from bnn_jax.training.epoch import Batches, end_epoch, epoch_permutation, evaluate, first_state, train_steps
from bnn_jax.training.experiment import OPTIMIZER_NUMBERS, HyperParameters, ImageInfo, make_experiment
from bnn_jax.training.state import Best, RunState, TrainState
from bnn_jax.training.step import diagnose_step, init_state
from bnn_jax.training.validation import with_published_quantizers
from bnn_jax.types import Metrics


class Programs(NamedTuple):
    """The jitted functions of a run, and what they were made for.

    Seed, hyper-parameters, the batches to train on and the variables of the teacher are arguments: other values do not
    compile again.

    Attributes:
      init: (seed, warm start or None) -> the state before the first step.
      train: (state, batches, hyper, first=0, count=None, teacher_variables=None) -> the state after some of the steps
        and their metrics, see :func:`bnn_jax.training.epoch.train_steps`; `hyper` is what
        :func:`bnn_jax.training.experiment.hyper_parameters` gives.
      evaluate: (params, model_state, images, labels) -> see :func:`bnn_jax.training.epoch.evaluate`.
      epoch_permutation: (seed, epoch) -> see :func:`bnn_jax.training.epoch.epoch_permutation`.
      end_epoch: (best, state, accuracy, epoch) -> see :func:`bnn_jax.training.epoch.end_epoch`.
      diagnose: (state, images, labels) -> see :func:`bnn_jax.training.step.diagnose_step`.
      is_finite: (state) -> whether all of it is, see :func:`bnn_jax.finite.all_finite`.
      first_non_finite_layer: (state, images, labels, hyper, teacher_variables=None) -> in words, see
        :mod:`bnn_jax.training.divergence`.
      first_non_finite_output: (params, model_state, batches of images) -> likewise.
      steps_per_epoch: of a run.
      devices: among which batches are divided, or None.
    """

    init: Callable[..., TrainState]
    train: Callable[..., tuple[TrainState, Metrics]]
    evaluate: Callable[..., dict[str, Array]]
    epoch_permutation: Callable[[Array, Array], Array]
    end_epoch: Callable[..., tuple[Best, dict[str, Array]]]
    diagnose: Callable[..., dict[str, Any]]
    is_finite: Callable[[TrainState], Array]
    first_non_finite_layer: Callable[..., str | None]
    first_non_finite_output: Callable[..., str | None]
    steps_per_epoch: int
    devices: Mesh | None


def program_key(config: Config) -> Config:
    """Make the same what is an argument of programs: configs with equal keys share them."""
    config = without_tuning(config)
    unread = () if as_optimizer(config.optim.name).separate_decay else ("latent_weight_decay",)
    set_numbers = [n for n in OPTIMIZER_NUMBERS if n not in unread and getattr(config.optim, n) is not None]
    optim = replace(config.optim, **dict.fromkeys(set_numbers, 0.5))
    same = {"seed": 0, "name": "", "regularizer_strength": 1.0}
    same |= {"init_from": None, "init_options": {}, "init_sha256": None}
    return replace(config, model=with_published_quantizers(config.model), optim=optim, **same)


def make_programs(
    config: Config,
    info: ImageInfo,
    *,
    examples: int,
    teacher: ModelConfig | None = None,
    devices: Mesh | None = None,
) -> Programs:
    """Make the programs of `config` on `examples` training examples; one set for all seeds and hyper-parameters.

    With `devices` each of them but `init`, which runs on one, takes arrays that lie as
    :mod:`bnn_jax.training.devices` places them, and leaves the state so; whatever else comes out is on every device.
    """
    taught_by = tuple(look_up("distillation.losses", name, DISTILLATION_LOSSES) for name in config.distillation.losses)
    teacher = None if teacher is None else _resolve_model(with_published_quantizers(teacher))
    return _make_programs(_resolve(program_key(config)), info, examples, teacher, devices, taught_by)


def _resolve(config: Config) -> Config:
    """Replace the names of a config by what they stand for now: a notebook may give a name to something else."""
    schedule = look_up("optim.schedule", config.optim.schedule, SCHEDULES)
    optimizer = look_up("optim.name", config.optim.name, OPTIMIZERS)
    return replace(
        config,
        model=_resolve_model(config.model),
        loss=look_up("loss", config.loss, LOSSES),
        optim=replace(config.optim, name=optimizer, schedule=schedule),
        regularizer=look_up("regularizer", config.regularizer, {"none": None, **REGULARIZERS}),
        regularizer_schedule=look_up("regularizer_schedule", config.regularizer_schedule, SCHEDULES),
    )


def _resolve_model(model: ModelConfig) -> ModelConfig:
    changed: dict[str, Any] = {"name": entry_of(model.name, argument="model.name").constructor}
    for kind, table in QUANTIZERS.items():
        options = getattr(model, f"{kind}_options")
        estimator = {"estimator": as_estimator(options["estimator"])} if "estimator" in options else {}
        changed[kind] = named_quantizer(table, getattr(model, kind), argument=f"model.{kind}")
        changed[f"{kind}_options"] = {**options, **estimator}
    return replace(model, **changed)


@lru_cache(maxsize=8)
def _make_programs(
    config: Config,
    info: ImageInfo,
    examples: int,
    teacher: ModelConfig | None,
    devices: Mesh | None,
    taught_by: tuple[Callable[..., Array], ...],
) -> Programs:
    steps_per_epoch = examples // config.batch_size
    experiment_at = partial(
        make_experiment, config, info, total_steps=config.epochs * steps_per_epoch, teacher=teacher, devices=devices
    )
    experiment = experiment_at()  # where the hyper-parameters do not enter
    check_loss(experiment.loss, info.num_classes, named=last_part(name_of(config.loss) or config.loss))
    permutation = partial(epoch_permutation, examples=examples, batch_size=config.batch_size)
    whole = None if devices is None else replicated(devices)

    def train(state, batches: Batches, hyper: HyperParameters, first=0, count=None, teacher_variables=None):
        steps = partial(train_steps, first=first, count=count, teacher=teacher_variables)
        return steps(experiment_at(**hyper), state, batches)

    def step_checks(state, images, labels, hyper: HyperParameters, teacher_variables=None):
        return checks_of_step(experiment_at(**hyper), state, images, labels, teacher_variables)

    return Programs(
        init=jax.jit(partial(init_state, experiment), compiler_options=QUICK_COMPILATION),
        train=jax.jit(train, out_shardings=(None, whole), compiler_options=training_options()),
        evaluate=jax.jit(partial(evaluate, experiment), out_shardings=whole, compiler_options=training_options()),
        epoch_permutation=jax.jit(permutation, out_shardings=whole),
        end_epoch=jax.jit(partial(end_epoch, experiment), out_shardings=(None, whole)),
        diagnose=jax.jit(partial(diagnose_step, experiment), out_shardings=whole),
        is_finite=jax.jit(all_finite, out_shardings=whole),
        first_non_finite_layer=partial(first_non_finite_layer, jax.jit(step_checks)),
        first_non_finite_output=partial(first_non_finite_output, jax.jit(partial(checks_of_evaluation, experiment))),
        steps_per_epoch=steps_per_epoch,
        devices=devices,
    )


@lru_cache(maxsize=8)
def over_members(programs: Programs) -> Programs:
    """Map programs by vmap over several runs: states, orders of batches and `hyper` have a first axis.

    The others, `init`, `diagnose` and those that tell where a number is not finite, stay those of one run.
    """
    order_alone = Batches(images=None, labels=None, order=0)
    train, evaluate = map(_uncompiled, (programs.train, programs.evaluate))
    compiled = partial(jax.jit, compiler_options=training_options())
    return programs._replace(
        train=compiled(jax.vmap(train, in_axes=(0, order_alone, 0, None, None))),
        evaluate=compiled(jax.vmap(evaluate, in_axes=(0, 0, None, None))),
        epoch_permutation=jax.jit(jax.vmap(programs.epoch_permutation, in_axes=(0, None))),
        end_epoch=jax.jit(jax.vmap(programs.end_epoch, in_axes=(0, 0, 0, None))),
        is_finite=jax.jit(jax.vmap(programs.is_finite)),
    )


def _uncompiled(program: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a program; options of the compiler go with the outermost one alone."""
    if isinstance(program, partial):
        return partial(_uncompiled(program.func), *program.args, **program.keywords)
    return program.__wrapped__


class Teacher(NamedTuple):
    """A trained network that teaches another: its settings and its variables, as `model.apply` takes them."""

    settings: ModelConfig
    variables: Any


def image_info(dataset: Dataset | ImageStream) -> ImageInfo:
    """Return what of a data set decides the programs."""
    return ImageInfo(tuple(dataset.image_shape), dataset.num_classes, tuple(dataset.mean), tuple(dataset.std))


def programs_of(
    config: Config, dataset: Dataset | ImageStream, *, teacher: Teacher | None = None, devices: Mesh | None = None
) -> Programs:
    """Make the programs of `config` on `dataset`, that of training with the variables of its `teacher`.

    Raises:
      UsageError: if a batch is larger than the training split, or cannot be divided among the devices.
    """
    check_batch_size(config.batch_size, devices, parts=config.accumulate_steps)
    examples = len(dataset.train)
    if config.batch_size > examples:
        raise UsageError(f"`batch_size` (={config.batch_size}) is larger than the {examples} training examples")
    info = image_info(dataset)
    if teacher is None:
        return make_programs(config, info, examples=examples, devices=devices)
    programs = make_programs(config, info, examples=examples, teacher=teacher.settings, devices=devices)
    variables = replicate(teacher.variables, devices)
    locate = programs.first_non_finite_layer
    return programs._replace(
        train=partial(programs.train, teacher_variables=variables),
        first_non_finite_layer=lambda *of_step: locate(*of_step, variables),
    )


def initial_state(programs: Programs, seed: int, *, warm_start: Any | None = None) -> RunState:
    """Initialise the state of a run; the variables `warm_start`, if any, start from given values.

    Raises:
      UsageError: if network, quantizers and images do not go together, or `warm_start` holds none, some that the
        network does not have, or values of another shape or dtype, or some that are not finite.
    """
    if warm_start is not None:
        rule, way = "must be variables, as `run.variables` has them", "`config.init_from` takes the folder of a run"
        require("warm_start", warm_start, isinstance(warm_start, Mapping), rule, way, error=UsageError)
        require_finite("warm_start", warm_start, "give the variables of a run that did not diverge", error=UsageError)
        warm_start = _start_in_dtypes(warm_start, programs)
    try:
        train = programs.init(np.uint32(seed), warm_start)
    except (ValueError, TypeError) as error:
        text = renamed(str(error), {name: f"optim.{name}" for name in ("decay_only", "train_only")})
        raise UsageError(text if text.startswith("`optim.") else f"the network cannot be built: {text}") from None
    return first_state(train)


def _start_in_dtypes(warm_start: Any, programs: Programs) -> dict[str, Any]:
    """The variables to start from, real numbers in the dtypes of the network's.

    Raises:
      UsageError: for variables that the network does not have, or has otherwise.
    """
    train = state_shapes(programs).train
    known = flatten_dict({"params": train.params, **train.model_state}, sep="/")
    given = flatten_dict(unbox(unfreeze(warm_start)), sep="/")
    given = {name: jnp.asarray(value) for name, value in given.items() if value is not None}
    require("warm_start", warm_start, bool(given), "must hold variables", "None starts at random", error=UsageError)
    if unknown := sorted(given.keys() - known.keys()):
        raise UsageError(
            f"`warm_start` has {', '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''}, which the network does "
            "not have; give variables as `run.variables` has them, {'params': {...}, 'batch_stats': {...}}"
        )
    for name, value in given.items():
        like, kind = known[name], jnp.floating if jnp.issubdtype(known[name].dtype, jnp.floating) else known[name].dtype
        if value.shape != like.shape or not jnp.issubdtype(value.dtype, kind):
            raise UsageError(
                f"`warm_start` has {name} as {value.dtype}{list(value.shape)}, the network has it as "
                f"{like.dtype}{list(like.shape)}; convert it, or leave it out to have it initialised"
            )
    cast = {name: value.astype(known[name].dtype) for name, value in given.items()}
    return unflatten_dict(cast, sep="/")


def state_shapes(programs: Programs) -> RunState:
    """Return shapes and dtypes of a run's state, at no cost."""
    train = programs.init.eval_shape(np.uint32(0))
    return jax.eval_shape(first_state, train)

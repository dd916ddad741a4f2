"""A whole run as one pure function of seed, hyper-parameters and data, for jit to compile and vmap to map.

It takes the training steps, the order of the examples and the evaluation of the loop, and its runs leave in their
folders what the loop leaves there.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Float, Int, Num, UInt32

from bnn_jax.data import Dataset
from bnn_jax.errors import UsageError
from bnn_jax.optim import bound_statistics
from bnn_jax.training.checkpoint import restore_checkpoint
from bnn_jax.training.config import Config
from bnn_jax.training.experiment import HyperParameters, ImageInfo, hyper_parameters, make_experiment
from bnn_jax.training.interrupts import interrupts
from bnn_jax.training.metrics import (
    append_metrics,
    first_non_finite,
    step_records,
    unpack_log,
    write_file,
)
from bnn_jax.training.programs import Programs, epoch_order, image_info, initial_state, programs_of
from bnn_jax.training.progress import OnProgress, silent
from bnn_jax.training.run_folder import claim_workdir, locked, save_run, why_rejected, write_result
from bnn_jax.training.state import Best, RunState, TrainState
from bnn_jax.training.step import evaluate, init_state, train_steps
from bnn_jax.types import Images, Labels

Data: TypeAlias = dict[str, tuple[Images, Labels]]
"""The splits "train", "validation" and "test", on the device."""

OnEpoch: TypeAlias = Callable[[np.ndarray, np.ndarray], bool]
"""Called on the host with (epochs done, mean loss of the last one), before the first one too; whether to go on."""


class Outcome(NamedTuple):
    """All that a run ends with.

    Attributes:
      run: the state after the last epoch, and the best variables.
      steps: metrics of every step; 0 where a run did not get to.
      evaluations: after each epoch `validation_loss`, `validation_accuracy` and what bounds the latent weights.
      test: accuracy on the test split of the "best" and the "last" variables.
      epochs: how many are done; fewer than asked for if the host stopped the run.
    """

    run: RunState
    steps: dict[str, Num[Array, "epochs steps"]]
    evaluations: dict[str, Float[Array, " epochs"]]
    test: dict[str, Float[Array, ""]]
    epochs: Int[Array, ""]


def whole_run(config: Config, info: ImageInfo, *, examples: int, on_epoch: OnEpoch | None = None) -> Callable:
    """``(seed, hyper, data, begun=None, first=0) -> Outcome``, pure but for what `on_epoch` does.

    Like the loop it keeps the variables of the best validation accuracy, the earliest on a tie.  `begun`, the state
    after `first` epochs, is gone on with; without it the run starts from `seed`.

    Args:
      config: validated; its seed and :func:`bnn_jax.training.experiment.hyper_parameters` do not enter.
      info, examples: of the training split.
      on_epoch: called at the start and after every epoch; of runs under vmap once for all of them, with the mean of
        their losses.
    """
    steps = examples // config.batch_size
    experiment_at = partial(make_experiment, config, info, total_steps=config.epochs * steps)

    def run(seed: UInt32[Array, ""], hyper: HyperParameters, data: Data, begun: RunState | None = None, first=0):
        experiment = experiment_at(**hyper)
        one_epoch = partial(_one_epoch, experiment, data, config.batch_size)
        if begun is None:
            begun = _start(init_state(experiment, seed))
        shapes = jax.eval_shape(one_epoch, begun, jnp.zeros((), jnp.int32))[1]
        stacked = jax.tree.map(lambda row: jnp.zeros((config.epochs, *row.shape), row.dtype), shapes)
        ask = _ask_host(on_epoch)

        def body(carry):
            epoch, _, state, stacked = carry
            state, found = one_epoch(state, epoch + 1)
            stacked = jax.tree.map(lambda rows, row: rows.at[epoch].set(row), stacked, found)
            return epoch + 1, ask(epoch + 1, found[0]["loss"].mean()), state, stacked

        first = jnp.asarray(first, jnp.int32)
        # What it asks with is known when the state is.
        carry = (first, ask(first, begun.train.step.astype(jnp.float32)), begun, stacked)
        epochs, _, state, stacked = lax.while_loop(lambda carry: (carry[0] < config.epochs) & carry[1], body, carry)
        test = {
            name: evaluate(experiment, variables.params, variables.model_state, *data["test"])["accuracy"]
            for name, variables in (("best", state.best), ("last", state.train))
        }
        return Outcome(state, *stacked, test, epochs)

    return run


def _start(train: TrainState) -> RunState:
    return RunState(train, Best(train.params, train.model_state, jnp.full((), -1.0), jnp.zeros((), jnp.int32)))


def _one_epoch(experiment, data: Data, batch_size: int, run: RunState, epoch: Array) -> tuple[RunState, tuple]:
    """The state after an epoch, with the metrics of its steps and of its evaluation."""
    images, labels = data["train"]
    order = epoch_order(run.train.seed, epoch, examples=len(labels), batch_size=batch_size)
    train, steps = train_steps(
        experiment, run.train, lambda number: (images[order[number]], labels[order[number]]), length=len(order)
    )
    found = evaluate(experiment, train.params, train.model_state, *data["validation"])
    evaluation = {"validation_loss": found["loss"], "validation_accuracy": found["accuracy"]}
    evaluation |= bound_statistics(train.params, box=experiment.box)
    better = found["accuracy"] > run.best.accuracy
    best = Best(train.params, train.model_state, found["accuracy"], epoch)
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), best, run.best)
    return RunState(train, best), (steps, evaluation)


def _ask_host(on_epoch: OnEpoch | None) -> Callable[[Array, Array], Bool[Array, ""]]:
    """The call of `on_epoch` inside a compiled run; vmap makes one call with the mean over the runs."""
    if on_epoch is None:
        return lambda epoch, loss: jnp.array(True)

    @custom_vmap
    def ask(epoch, loss):
        # An epoch's loss is its last value to be known, so the host hears of an epoch when it is over.
        answer = jax.ShapeDtypeStruct((), jnp.bool_)
        return io_callback(lambda epoch, loss: np.bool_(on_epoch(epoch, loss)), answer, epoch, loss)

    @ask.def_vmap
    def ask_once(size, batched, epoch, loss):
        return ask(epoch, jnp.nanmean(loss)), False

    return ask


def why_not_whole(config: Config) -> str | None:
    """What in a config only the loop can do, in words; None if the run can be one program."""
    if config.diagnostics.every_steps:
        return f"`diagnostics.every_steps` (={config.diagnostics.every_steps})"
    if config.data.stream:
        return "`data.stream` (=True)"
    if config.distillation.losses:
        return f"`distillation.losses` (={', '.join(config.distillation.losses)})"
    return None


def program_key(config: Config) -> Config:
    """`config` with all that is an argument of the program made the same: runs with equal keys share a program."""
    optim = replace(config.optim, learning_rate=1.0, momentum=0.0, weight_decay=0.0, tune_learning_rates=())
    return replace(config, seed=0, name="", optim=optim, optimizers=(), regularizer_strength=1.0, tune_epochs=1)


def train_together(
    configs: Sequence[Config], workdirs: Sequence[Path], *, dataset: Dataset, on_progress: OnProgress = silent
) -> list[dict[str, Any] | str]:
    """Train runs that differ in seed and hyper-parameters as one program, each with the folder that the loop makes.

    One run is jitted as it is, more are mapped by vmap.  Ctrl-C and SIGTERM end it after the epoch under way, saved;
    runs that were saved after the same epoch go on there.  A run whose metrics cease to be finite takes nothing from
    the others.  `step_time_ms` is the time of an epoch, evaluation included, over all of its steps in all runs.

    Args:
      configs: validated.
      workdirs: one for each.
      dataset: of all of them.
      on_progress: called after every epoch.

    Returns:
      Of each run its result, as in `result.json`, or, if it diverged, the sentence that says so.

    Raises:
      UsageError: for configs of different programs, or what only the loop can do; a `workdir` of another config.
      RunError: if the disk is full.
    """
    _check_together(configs)
    config, total = configs[0], sum(config.epochs for config in configs)
    programs = programs_of(config, dataset)
    last_saved = "the same command goes on from what was saved before"
    with interrupts(lambda: last_saved) as asked, ExitStack() as locks:
        for own, workdir in zip(configs, workdirs, strict=True):
            claim_workdir(own, workdir)
            locks.enter_context(locked(workdir))
        begun, logs = _begun(configs, workdirs, programs)
        first = int(begun[0].train.step) // programs.steps_per_epoch
        clock: list[float] = []

        def on_epoch(epoch, loss):
            clock.append(time.perf_counter())
            if epoch == first:
                return not asked()
            pace = 1e3 * (clock[-1] - clock[-2]) / (programs.steps_per_epoch * len(configs))
            text = f"epoch {epoch}/{config.epochs}  loss {loss:.3f}  {pace:.1f} ms/step"
            on_progress(int(epoch) * len(configs), total, text)
            return not asked()

        outcomes = _compute(configs, dataset, programs, begun, first, on_epoch)
        paces = [1e3 * seconds / (programs.steps_per_epoch * len(configs)) for seconds in np.diff(clock).tolist()]
        found = [_leave(*member, first, paces) for member in zip(configs, workdirs, logs, outcomes)]
        if asked():
            number = f"{len(configs)} run{'s' if len(configs) > 1 else ''}"
            epochs = f"epoch {int(outcomes[0].epochs)} of {config.epochs}"
            raise asked()(f"{number} saved after {epochs}; the same command resumes there")
    return found


def _check_together(configs: Sequence[Config]) -> None:
    for config in configs:
        if (reason := why_not_whole(config)) is not None:
            raise UsageError(f"{reason} needs the training loop, for it is not part of a whole run in one program")
        if program_key(config) != program_key(configs[0]):
            raise UsageError(
                "`configs` must differ only in `seed`, `optim.learning_rate`, `optim.momentum`, `optim.weight_decay` "
                "and `regularizer_strength` to be one program; train the others apart"
            )


def _begun(configs, workdirs, programs: Programs) -> tuple[list[RunState], list[str]]:
    """States and logs after the same whole epoch of all runs, if they were saved there; else of their starts."""
    # Compiled apart, as the loop does, initialisations take a tenth of the time.
    starts = [initial_state(programs, config.seed) for config in configs]
    saved = [
        restore_checkpoint(workdir / "checkpoints", start, why_rejected=partial(why_rejected, config), quarantine=True)
        for config, workdir, start in zip(configs, workdirs, starts)
    ]
    steps = {None if one is None else int(one.state.train.step) for one in saved}
    if len(steps) > 1 or None in steps or steps.pop() % programs.steps_per_epoch:
        return starts, [""] * len(starts)
    return [one.state for one in saved], [unpack_log(one.metadata["log"]) for one in saved]


def _compute(
    configs: Sequence[Config],
    dataset: Dataset,
    programs: Programs,
    begun: list[RunState],
    first: int,
    on_epoch: OnEpoch,
) -> list[Outcome]:
    """The outcome of each run, on the host."""
    together = len(configs) > 1
    program, listeners = _compiled(program_key(configs[0]), programs, image_info(dataset), len(dataset.train), together)
    hyper = [hyper_parameters(config) for config in configs]
    hyper, begun = (jax.tree.map(lambda *x: jnp.stack(x), *one) if together else one[0] for one in (hyper, begun))
    # A start is weakly typed in part, which would compile once more than what was restored.
    begun = jax.tree.map(lambda x: lax.convert_element_type(x, np.dtype(x.dtype)), begun)
    splits = {name: getattr(dataset, name) for name in ("train", "validation", "test")}
    data = {name: (jnp.asarray(split.images), jnp.asarray(split.labels)) for name, split in splits.items()}
    listeners[:] = [on_epoch]
    # In a thread of its own, so that this one hears signals while XLA computes.
    with ThreadPoolExecutor(max_workers=1) as executor:
        compute = lambda: jax.device_get(program(None, hyper, data, begun, np.int32(first)))
        outcome = executor.submit(compute).result()
    return [jax.tree.map(lambda x, i=i: x[i], outcome) for i in range(len(configs))] if together else [outcome]


@lru_cache(maxsize=8)
def _compiled(
    key: Config, programs: Programs, info: ImageInfo, examples: int, together: bool
) -> tuple[Callable[..., Outcome], list[OnEpoch]]:
    """A program and whom it tells of its epochs; JAX's own cache on disk takes none that calls the host.

    `programs` are those of the loop, other ones where a name in the config stands for another function.
    """
    listeners: list[OnEpoch] = []
    run = whole_run(key, info, examples=examples, on_epoch=lambda *found: listeners[0](*found))
    return jax.jit(jax.vmap(run, in_axes=(None, 0, None, 0, None)) if together else run), listeners


def _leave(config: Config, workdir: Path, log: str, outcome: Outcome, first: int, paces: Sequence[float]):
    """Write a run's records, checkpoint and result, as far as it got; the result, or why there is none."""
    records = _records(outcome, first, paces)
    bad = first_non_finite([record for record in records if record["kind"] == "train"])
    write_file(workdir / "metrics.jsonl", log)
    if bad is not None:
        step, metric, value = bad
        append_metrics(workdir / "metrics.jsonl", [record for record in records if record["step"] < step])
        return (
            f"`{metric}` became {value} at step {step} of {workdir}; "
            f"lower `optim.learning_rate` (={config.optim.learning_rate})"
        )
    append_metrics(workdir / "metrics.jsonl", records)
    save_run(config, workdir, outcome.run)
    if int(outcome.epochs) < config.epochs:
        return f"{workdir} was stopped after epoch {int(outcome.epochs)}"
    accuracies = {name: float(accuracy) for name, accuracy in outcome.test.items()}
    return write_result(config, workdir, outcome.run, **accuracies)


def _records(outcome: Outcome, first: int, paces: Sequence[float]) -> list[dict[str, Any]]:
    """Those of the epochs after `first`, as the loop writes them."""
    records = []
    for epoch, pace in enumerate(paces, start=first + 1):
        stacked = {name: values[epoch - 1] for name, values in outcome.steps.items()}
        steps = len(stacked["loss"])
        rows = step_records(stacked, first_step=(epoch - 1) * steps + 1, epoch=epoch)
        records += rows
        records.append(
            {"kind": "evaluation", "step": epoch * steps, "epoch": epoch}
            | {f"train_{name}": float(np.mean([row[name] for row in rows])) for name in ("loss", "accuracy")}
            | {"step_time_ms": pace}
            | {name: float(values[epoch - 1]) for name, values in outcome.evaluations.items()}
        )
    return records

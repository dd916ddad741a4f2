"""train(config, workdir): a run from its config to its result, resumable at any moment, on one machine bit for bit.

A workdir holds `config.json` (resolved), `metrics.jsonl` (a line a step, an evaluation and a record of diagnostics),
`checkpoints/` and, when the run is finished, `result.json`.  Where a run has several processes, all of them call the
same functions in the same order, and process 0 alone reads and writes the workdir.
"""

import time
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from bnn_jax.checks import require
from bnn_jax.data import Dataset, ImageStream
from bnn_jax.errors import UsageError
from bnn_jax.paths import local_path
from bnn_jax.training.callbacks import Callback, check_callbacks
from bnn_jax.training.config import Config, to_dict
from bnn_jax.training.devices import (
    check_batch_size,
    ended_with_the_others,
    is_first_process,
    largest,
    on_first_process,
    place_state,
    to_host,
)
from bnn_jax.training.diagnostics import no_flips
from bnn_jax.training.epoch import Batches, epoch
from bnn_jax.training.experiment import HyperParameters, hyper_parameters
from bnn_jax.training.initial import check_not_own, start_of, with_start
from bnn_jax.training.input_pipeline import InputPipeline, load_data, make_input_pipeline, with_data
from bnn_jax.training.interrupts import Asked, agreed, interrupts
from bnn_jax.training.members import (
    Diverged,
    Member,
    check_together,
    claim,
    finished_results,
    raise_if_all_diverged,
    resume,
    save,
    stack,
    steps_done,
    unstack,
    write_results,
)
from bnn_jax.training.metrics import diagnostics_record, first_diverged, step_records
from bnn_jax.training.pace import Pace
from bnn_jax.training.programs import Programs, Teacher, initial_state, over_members, programs_of
from bnn_jax.training.progress import OnProgress, silent
from bnn_jax.training.run_folder import last_saved
from bnn_jax.training.state import Best, RunState, TrainState
from bnn_jax.training.step_size import warn_if_it_did_not_act
from bnn_jax.training.validation import check_of_tokens, check_teacher, validate
from bnn_jax.types import BatchLabels, Images


def train(
    config: Config,
    workdir: str | Path,
    *,
    data: Any | None = None,
    on_progress: OnProgress = silent,
    callbacks: Sequence[Callback] = (),
    overwrite: bool = False,
    extend: bool = False,
    warm_start: Any | None = None,
    teacher: Teacher | None = None,
    devices: Mesh | None = None,
    workers: int = 0,
    strict: bool = False,
    stage: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run `config` in `workdir`, or resume it from its newest good checkpoint, or return the result it already has.

    A run goes on in its folder with other settings that change no number
    (:data:`bnn_jax.training.resuming.CHANGE_NO_NUMBER`), and for more epochs where it thereby becomes, bit for bit, the
    longer run that was started with them: where no schedule, quantizer or optimizer spans the whole run.

    Ctrl-C saves after the training steps under way and raises KeyboardInterrupt, SIGTERM saves and raises Preempted; a
    second Ctrl-C stops at once.  What is under way 8 seconds after SIGTERM is not waited for: the process ends with 0.

    Args:
      config: the run; validated first.
      workdir: folder of the run, made if missing.
      data: in place of what `config.data` names, as :func:`bnn_jax.data.as_dataset` takes them: ``(images, labels)``, a
        dict of splits, a Dataset, loaded once for several runs or made by hand.  The run's config names them, arrays
        in memory by a hash.
      on_progress: called before it compiles, after every jitted call, and with the line of every epoch.
      callbacks: told of the start, every record and the end, see :mod:`bnn_jax.training.callbacks`; of a run that is
        finished already they hear nothing.
      overwrite: start anew where a run has begun.  When data, network and start are there, the old run is moved to
        `<workdir>.replaced-<n>`, and a warning says so; nothing is deleted.
      extend: go on for more epochs also where something spans the whole run; it goes on as if it had been laid over
        the longer one from the beginning.
      warm_start: variables of the network to start from, as :func:`bnn_jax.training.step.init_state` takes them and
        :mod:`bnn_jax.convert` makes them; without meaning for a run that is resumed.  `config.init_from` names a file
        or another run instead, whose hash the run keeps.
      teacher: for the losses of `config.distillation`, and needed by them; see `bnn_jax.stages.stage`.
      devices: to divide each batch among, by :func:`bnn_jax.training.devices.make_devices`; a run can be resumed on
        others.  With several processes all of them call this with the same arguments.
      workers, strict: of data that are read while training, see
        :func:`bnn_jax.training.input_pipeline.make_input_pipeline`.
      stage: what a checkpoint keeps of the stage that the run is, see `bnn_jax.stages.stage`.

    Returns:
      The result: test accuracy at the best validation epoch and at the last, curves, step time; see `result.json`, and
      :func:`bnn_jax.run.train` for a Run.  Of Deep Frank-Wolfe with gamma 1 throughout a warning says so.

    Raises:
      UsageError: for a config that cannot run, there or on `devices`, or a `workdir` that holds a run of another, or
        one that cannot be extended as it is; with several processes also where their configs differ.
      Diverged: when a metric or the state is not finite any more, the loss beyond
        :data:`bnn_jax.training.metrics.LARGEST_LOSS`, or an update refused; names step and layer, and NaN or infinite.
      RunError: when the disk is full, or checkpoints cannot be read here.
    """
    workdir, (config, dataset) = local_path("workdir", workdir), with_data(config, data)
    config = with_start(validate(config), workdir)
    rule = "does not go with `warm_start`; give one of them"
    require("init_from", config.init_from, None in (config.init_from, warm_start), rule, error=UsageError)
    check_callbacks(callbacks)
    way = "bnn_jax.stages.teachers.load_network makes one of the folder of a run"
    is_teacher = teacher is None or isinstance(teacher, Teacher)
    require("teacher", teacher, is_teacher, "must be of type Teacher", way, error=UsageError)
    check_teacher(config, teacher is not None)
    is_mesh, way = devices is None or isinstance(devices, Mesh), "bnn_jax.training.devices.make_devices(2) makes one"
    require("devices", devices, is_mesh, "must be a mesh", way, error=UsageError)
    check_batch_size(config.batch_size, devices, parts=config.accumulate_steps)
    require("extend", extend, not (extend and overwrite), "does not go with `overwrite`", error=UsageError)
    start = {"warm_start": warm_start, "teacher": teacher, "devices": devices}
    start |= {"overwrite": overwrite, "extend": extend}
    reading = {"dataset": dataset, "workers": workers, "strict": strict}
    member = Member(config, workdir, stage, callbacks if is_first_process() else ())
    (result,) = _train([member], on_progress, **start, **reading)
    if isinstance(result, Diverged):
        raise result
    if is_first_process():
        warn_if_it_did_not_act(config.optim, result)
    return result


def train_together(
    configs: Sequence[Config],
    workdirs: Sequence[str | Path],
    *,
    data: Any | None = None,
    on_progress: OnProgress = silent,
) -> list[dict[str, Any] | Diverged]:
    """Train runs that differ in seed and hyper-parameters as one program that vmap maps over them.

    Each has the folder, and ends with the result, that :func:`train` would leave, and saves when it would.  A run whose
    numbers cease to be finite takes nothing from the others.  `step_time_ms` is the time of a step of all of them
    divided by their number.

    Args:
      configs: validated.
      workdirs: one for each.
      data: of all of them, as :func:`train` takes them.
      on_progress: called after every jitted call, with the steps of all runs.

    Returns:
      Of each run its result, or the error that says why it diverged.

    Raises:
      UsageError: for configs of different programs, or settings that cannot be mapped; for a `workdir` of another
        config, or runs that were saved at different steps.
      RunError: if the disk is full.
    """
    folders = [local_path("workdirs", workdir) for workdir in workdirs]
    rule = f"must be one config or more, and as many as `workdirs`, {len(folders)}"
    require("len(configs)", len(configs), 0 < len(configs) == len(folders), rule, error=UsageError)
    _, dataset = with_data(configs[0], data)
    configs = [with_data(config, data if dataset is None else dataset)[0] for config in configs]
    configs = [with_start(config, folder) for config, folder in zip(configs, folders)]
    check_together(configs)
    members = [Member(config, folder) for config, folder in zip(configs, folders)]
    return _train(members, on_progress, dataset=dataset)


class _Job(NamedTuple):
    """What stays the same from the first epoch to the last; `begun` is the step at which the run was taken up."""

    members: list[Member]
    programs: Programs
    pipeline: InputPipeline
    hyper: HyperParameters
    pace: Pace
    begun: int
    asked: Asked
    on_progress: OnProgress

    @property
    def config(self) -> Config:
        """Of the first member; seed and hyper-parameters aside, that of all."""
        return self.members[0].config


def _train(
    members: list[Member],
    on_progress: OnProgress,
    *,
    dataset: Dataset | ImageStream | None,
    warm_start: Any | None = None,
    teacher: Teacher | None = None,
    devices: Mesh | None = None,
    overwrite: bool = False,
    extend: bool = False,
    **reading: Any,
) -> list[dict[str, Any] | Diverged]:
    """Prepare, claim the folders, train from where the runs are to the end of their last epoch, write the results."""
    config, workdir = members[0].config, members[0].workdir
    for member in members:
        check_not_own(member.config.init_from, member.workdir)
    with interrupts(partial(last_saved, workdir)) as asked_here, ExitStack() as locks, ended_with_the_others():
        asked = agreed(asked_here)
        _check_same(config)
        results = None if overwrite else on_first_process(partial(finished_results, members, extend=extend))
        if results is None:
            dataset = load_data(config.data) if dataset is None else dataset
            if isinstance(dataset, Dataset) and dataset.train.labels.ndim > 1:
                check_of_tokens(config.data)
            rule = f"is for RGB images; those of {config.data.name} are of shape {tuple(dataset.image_shape)}"
            holds = dataset.image_shape[-1] == 3 or config.data.lighting_std == 0
            require("data.lighting_std", config.data.lighting_std, holds, rule, "leave it out", error=UsageError)
            programs = programs_of(config, dataset, teacher=teacher, devices=devices)
            begun_from = [start_of(m.config, dataset) if warm_start is None else warm_start for m in members]
            starts = [initial_state(programs, m.config.seed, warm_start=own) for m, own in zip(members, begun_from)]
            # Only now, for until here a start can fail that another command mends.
            on_first_process(partial(claim, members, locks, dataset, overwrite=overwrite, extend=extend))
            run = place_state(stack(on_first_process(partial(resume, members, starts))), devices)
            programs = programs if len(members) == 1 else over_members(programs)
            pipeline = make_input_pipeline(config, programs, dataset, **reading)
            hyper = stack([hyper_parameters(member.config) for member in members])
            pace = Pace(config.scan_steps, len(members))
            for member in members:
                locks.enter_context(member.told())
            try:
                begun = steps_done(run.train)
                results = _run_epochs(_Job(members, programs, pipeline, hyper, pace, begun, asked, on_progress), run)
            except Diverged:
                results = [member.diverged for member in members]
        ending = asked()
        if ending is not None:
            raise ending(f"the run in {workdir} is finished")
    return results


def _check_same(config: Config) -> None:
    differs = to_dict(config) != on_first_process(partial(to_dict, config))
    if largest(float(differs)):
        raise UsageError("the config of a process differs from that of process 0; start all with the same files")


REPORTED = ("accuracy", "top5_accuracy", "perplexity")
"""What a result says of the test split, of all that an evaluation finds."""


def _run_epochs(job: _Job, run: RunState) -> list[dict[str, Any] | Diverged]:
    """Train to the end of the last epoch, saving on the way; evaluate on the test split; write the results."""
    config, programs = job.config, job.programs
    parts = {"evaluate": job.pace.timed(partial(job.pipeline.evaluate, name="validation")), "end": programs.end_epoch}
    for number in range(steps_done(run.train) // programs.steps_per_epoch + 1, config.epochs + 1):
        run, _, evaluation = epoch(run, number, train=partial(_train_epoch, job, run.best), **parts)
        _check_evaluation(job, evaluation, run.train, "validation", number)
        _record_evaluation(job, evaluation, number)
        if job.asked() is not None or number % config.checkpoint_every_epochs == 0 or number == config.epochs:
            save(job.members, run)
        _show_epoch(job, run, number)
    tested = {}
    for which, variables in (("best", run.best), ("last", run.train)):
        found = job.pipeline.evaluate(*variables.evaluated, "test")
        found = {f"test_{name}_{which}": value for name, value in found.items() if name in REPORTED}
        _check_evaluation(job, found, variables, "test", config.epochs)
        tested |= found
    return write_results(job.members, to_host(run), tested)


def _train_epoch(job: _Job, best: Best, state: TrainState, number: int) -> tuple[TrainState, None]:
    """Make the steps of an epoch that are left, in jitted calls, recording them.

    Raises:
      KeyboardInterrupt, Preempted: what is asked for, when the state is saved.
      Diverged: when every member has.
    """
    done, every_steps = steps_done(state), job.config.diagnostics.every_steps
    begun = done % job.programs.steps_per_epoch
    for member in job.members:
        member.begin_epoch(number, midway=begun > 0)
    order = np.asarray(job.programs.epoch_permutation(state.seed, np.int32(number)))
    with closing(job.pipeline.batches(order, number, begun)) as parts:
        for batches, first, count in job.pace.calls(parts, done=done, every_steps=every_steps):
            ending = job.asked()
            if ending is not None:
                if steps_done(state) > job.begun or job.begun == 0:  # else it is there, perhaps without counts of flips
                    save(job.members, RunState(state, best))
                gone = ", ".join(str(member.workdir) for member in job.members if member.diverged)
                resumed = (
                    f"the others resume there, for {gone} has diverged" if gone else "the same command resumes there"
                )
                raise ending(f"saved at step {steps_done(state)}; {resumed}")
            if not job.pace.milliseconds:
                _compile(job, state, batches, number)
            state = _train_steps(job, state, batches, first, count, number)
            if every_steps and steps_done(state) % every_steps == 0:
                state = _record_diagnostics(job, state, batches.at(np.int32(first + count - 1)), number)
            if steps_done(state) % job.programs.steps_per_epoch:  # else the line of the epoch follows
                _show_progress(job, state, number)
    return state, None


def _compile(job: _Job, state: TrainState, batches: Batches, number: int) -> None:
    """Compile the training steps by making none of them, so that no time of a step holds that of compiling."""
    _tell(job, state, f"epoch {number}/{job.config.epochs}  compiling ...")
    try:
        after, _ = job.programs.train(state, batches, job.hyper, np.int32(0), np.int32(0))
    except (ValueError, TypeError) as error:
        raise UsageError(f"the training step cannot be made: {error}") from error
    jax.block_until_ready(job.programs.is_finite(after))


def _train_steps(job: _Job, state: TrainState, batches: Batches, first: int, count: int, number: int) -> TrainState:
    """Make some steps in one jitted call, and record them: of a run that diverges those before."""
    done, began = steps_done(state), time.perf_counter()
    after_steps = lambda n: job.programs.train(state, batches, job.hyper, np.int32(first), np.int32(n))
    after, metrics = after_steps(count)
    finite = np.ravel(job.programs.is_finite(after))  # once a call: in a state, what is not finite stays so
    metrics = {name: np.asarray(values)[..., first : first + count] for name, values in metrics.items()}
    job.pace.took(time.perf_counter() - began, count)
    for index, member, own in _going_on(job, metrics):
        records = step_records(own, first_step=done + 1, epoch=number)
        good, became = first_diverged(records) or (count, None)
        if became is not None or not finite[index]:
            ended = lambda n, index=index: not np.ravel(job.programs.is_finite(after_steps(n)[0]))[index]
            of_state = bisect_left(range(1, good + 1), True, key=ended)
            where = _first_non_finite_layer(job, index, after_steps(of_state)[0], batches, first + of_state)
            if of_state < good or became is None:
                became = "`state` became non-finite"
                broken = after_steps(of_state + 1)[0]  # for what happens only where the steps are compiled together
                where = where or _first_non_finite_layer(job, index, broken, batches, first + of_state)
            member.diverge(became, step=done + of_state + 1, epoch=number, where=where)
            records = records[:of_state]
        member.record(records)
    raise_if_all_diverged(job.members)
    return after


def _going_on(job: _Job, tree: Any) -> list[tuple[int, Member, Any]]:
    """Pair each member that has not diverged with its number and its part of a tree."""
    parts = unstack(tree, len(job.members))
    each = zip(range(len(parts)), job.members, parts, strict=True)
    return [(index, member, own) for index, member, own in each if member.diverged is None]


def _first_non_finite_layer(job: _Job, index: int, state: TrainState, batches: Batches, row: int) -> str | None:
    hyper = unstack(job.hyper, len(job.members))[index]
    if len(job.members) > 1:
        state = unstack(to_host(state), len(job.members))[index]
        batches = batches._replace(order=batches.order[index])
    return job.programs.first_non_finite_layer(state, *batches.at(np.int32(row)), hyper)


def _record_diagnostics(job: _Job, state: TrainState, batch: tuple[Images, BatchLabels], number: int) -> TrainState:
    """Measure on the batch of the last step, write the record, count flips from zero again."""
    (member,) = job.members
    found = jax.device_get(job.programs.diagnose(state, *batch))
    member.record([diagnostics_record(found, step=steps_done(state), epoch=number)])
    zero = place_state(no_flips(state.params), job.programs.devices)
    return state.replace(flips=zero.replace(never=state.flips.never))


def _tell(job: _Job, state: TrainState, text: str) -> None:
    runs, total = len(job.members), job.config.epochs * job.programs.steps_per_epoch
    job.on_progress(steps_done(state) * runs, total * runs, text)


def _show_progress(job: _Job, state: TrainState, number: int) -> None:
    losses = [member.rows[-1]["loss"] for member in job.members if member.diverged is None]
    text = f"epoch {number}/{job.config.epochs}  loss {np.mean(losses):.3f}  {job.pace.milliseconds[-1]:.1f} ms/step"
    _tell(job, state, text)


def _show_epoch(job: _Job, run: RunState, number: int) -> None:
    """Show the line of an epoch; of several runs the means."""
    config, left = job.config, job.config.epochs - number
    accuracy, epoch = np.mean(to_host(run.best.accuracy)), np.ravel(to_host(run.best.epoch))
    shown = [member.evaluation for member in job.members if member.diverged is None]
    parts = [f"epoch {number}/{config.epochs}", f"loss {np.mean([found['train_loss'] for found in shown]):.3f}"]
    parts += [f"validation {100 * np.mean([found['validation_accuracy'] for found in shown]):.2f} %"]
    parts += [f"best {100 * accuracy:.2f} %" + (f" (epoch {epoch[0]})" if len(epoch) == 1 else "")]
    parts += job.pace.told(config.batch_size, steps=left * job.programs.steps_per_epoch, evaluations=left)
    _tell(job, run.train, "  ".join(parts) + "\n")


def _check_evaluation(job: _Job, found: dict[str, Any], variables: TrainState | Best, split: str, number: int) -> None:
    """Mark the members whose evaluation is not finite as diverged.

    Raises:
      Diverged: when every member has.
    """
    for index, member, own in _going_on(job, jax.device_get(found)):
        _, became = first_diverged([{name: float(value) for name, value in own.items()}]) or (0, None)
        if became is not None:
            where = job.pipeline.first_non_finite_output(*unstack(variables.evaluated, len(job.members))[index], split)
            member.diverge(became, step=number * job.programs.steps_per_epoch, epoch=number, where=where)
    raise_if_all_diverged(job.members)


def _record_evaluation(job: _Job, evaluation: dict[str, Any], number: int) -> None:
    """Write the record of an epoch: what its evaluation found, and the means over its steps."""
    for _, member, own in _going_on(job, jax.device_get(evaluation)):
        record = {"kind": "evaluation", "step": number * job.programs.steps_per_epoch, "epoch": number}
        record |= {name: float(value) for name, value in own.items()}
        record |= {f"train_{name}": float(np.mean([row[name] for row in member.rows])) for name in ("loss", "accuracy")}
        member.evaluation = record | {"step_time_ms": job.pace.median}
        member.record([member.evaluation])

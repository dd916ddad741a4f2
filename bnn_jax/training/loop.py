"""train(config, workdir): a run from its config to its result, resumable at any moment, bit for bit.

A workdir holds `config.json` (resolved), `metrics.jsonl` (a line a step, an evaluation and a record of diagnostics),
`checkpoints/` and, when the run is finished, `result.json`.  Where a run has several processes, all of them call the
same functions in the same order, and process 0 alone reads and writes the workdir.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bnn_jax.data import Dataset, ImageStream
from bnn_jax.errors import Preempted, RunError, UsageError
from bnn_jax.training.checkpoint import checkpoint_steps, restore_checkpoint
from bnn_jax.training.config import Config, to_dict
from bnn_jax.training.devices import (
    check_batch_size,
    ended_with_the_others,
    largest,
    on_first_process,
    place_state,
    to_host,
)
from bnn_jax.training.diagnostics import no_flips
from bnn_jax.training.experiment import hyper_parameters
from bnn_jax.training.input_pipeline import Feed, load_data, make_feed
from bnn_jax.training.interrupts import interrupts
from bnn_jax.training.metrics import (
    append_metrics,
    diagnostics_record,
    first_non_finite,
    read_metrics,
    step_records,
    unpack_log,
    write_file,
)
from bnn_jax.training.programs import Teacher, initial_state, programs_of, state_shapes
from bnn_jax.training.progress import OnProgress, silent
from bnn_jax.training.run_folder import (
    claim_workdir,
    locked,
    read_checksummed,
    read_config,
    save_run,
    why_rejected,
    write_result,
)
from bnn_jax.training.state import Best, RunState
from bnn_jax.training.validation import validate

LONGEST_CALL = 3.0
"""Seconds of a jitted call, after which progress shows and a run can be stopped and saved."""

Asked: TypeAlias = Callable[[], type[KeyboardInterrupt] | None]
"""The exception with which the run shall end, None before."""


class Diverged(RunError):
    """A metric became infinite or not a number."""


def train(
    config: Config,
    workdir: str | Path,
    *,
    dataset: Dataset | ImageStream | None = None,
    on_progress: OnProgress = silent,
    warm_start: Any | None = None,
    teacher: Teacher | None = None,
    devices: Mesh | None = None,
    workers: int = 0,
    strict: bool = False,
    stage: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run `config` in `workdir`, or resume it from its newest good checkpoint, or return the result it already has.

    Ctrl-C saves after the training steps under way and raises KeyboardInterrupt, SIGTERM likewise Preempted; a second
    Ctrl-C stops at once.

    Args:
      config: the run; validated first.
      workdir: folder of the run, made if missing.
      dataset: the loaded data of `config.data`, to load them once for several runs.
      on_progress: called after every jitted call.
      warm_start: variables of the network to start from, as :func:`bnn_jax.training.step.init_state` takes them;
        without meaning for a run that is resumed.
      teacher: for the losses of `config.distillation`, and needed by them; see `bnn_jax.stages.stage`.
      devices: to divide each batch among, by :func:`bnn_jax.training.devices.make_devices`; a run can be resumed on
        others.  With several processes all of them call this with the same arguments.
      workers, strict: of data that are read while training, see :func:`bnn_jax.training.input_pipeline.make_feed`.
      stage: what a checkpoint keeps of the stage that the run is, see `bnn_jax.stages.stage`.

    Returns:
      The result: test accuracy at the best validation epoch and at the last, curves, step time; see `result.json`.

    Raises:
      UsageError: for a config that cannot run, there or on `devices`, or a `workdir` that holds a run of another;
        with several processes also where their configs differ.
      Diverged: when a metric is not finite; names step, metric and the layer where it began.
      RunError: when the disk is full, or checkpoints cannot be read here.
    """
    config, workdir = validate(config), Path(workdir)
    _check_teacher(config, teacher)
    check_batch_size(config.batch_size, devices)
    with interrupts(partial(_last_saved, workdir)) as asked_here, ExitStack() as held, ended_with_the_others():
        asked = _agreed(asked_here)
        _check_same(config)
        result = on_first_process(partial(_claim, config, workdir, held))
        if result is None:
            dataset = load_data(config.data) if dataset is None else dataset
            programs = programs_of(config, dataset, teacher=teacher, devices=devices)
            feed = make_feed(config, programs, dataset, workers=workers, strict=strict)
            save = partial(_save, config, workdir, stage)
            run = initial_state(programs, config.seed, warm_start=warm_start)
            run = place_state(on_first_process(partial(_restore, config, workdir, run)), devices)
            run = _train_epochs(config, workdir, programs, feed, run, save, on_progress, asked)
            result = _finish(config, workdir, feed, run)
        ending = asked()
        if ending is not None:
            raise ending(f"the run in {workdir} is finished")
    return result


def _claim(config: Config, workdir: Path, held: ExitStack) -> dict[str, Any] | None:
    """The result of a run that is finished; else None, and its folder is locked while it is `held`."""
    claim_workdir(config, workdir)
    result = read_checksummed(workdir / "result.json")
    if result is None:
        held.enter_context(locked(workdir))
    return result


def _check_same(config: Config) -> None:
    differs = to_dict(config) != on_first_process(partial(to_dict, config))
    if largest(float(differs)):
        raise UsageError("the config of a process differs from that of process 0; start all with the same files")


def _agreed(asked: Asked) -> Asked:
    """What one of the processes at least is asked for."""
    endings = (None, KeyboardInterrupt, Preempted)
    return lambda: endings[int(largest(endings.index(asked())))]


def _restore(config: Config, workdir: Path, run: RunState) -> RunState:
    """The state of the newest good checkpoint, and its log as `metrics.jsonl`; else `run` and an empty one."""
    why = partial(why_rejected, config)
    restored = restore_checkpoint(workdir / "checkpoints", run, why_rejected=why, quarantine=True)
    log = "" if restored is None else unpack_log(restored.metadata["log"])
    write_file(workdir / "metrics.jsonl", log)
    return run if restored is None else restored.state


def _train_epochs(config, workdir, programs, feed, run, save, on_progress, asked) -> RunState:
    """From where `run` is to the end of the last epoch, saving on the way.

    Raises:
      KeyboardInterrupt, Preempted: what `asked` asks for, when the state is saved.
    """
    steps_per_epoch = programs.steps_per_epoch
    pace = _Pace(config.scan_steps)
    for epoch in range(int(run.train.step) // steps_per_epoch + 1, config.epochs + 1):
        begun = int(run.train.step) % steps_per_epoch
        order = np.asarray(programs.order(run.train.seed, np.int32(epoch)))
        rows = on_first_process(partial(_records_of, workdir, epoch)) if begun else []
        with closing(feed.blocks(order, epoch, begun)) as blocks:
            for block in blocks:
                done = block.rows.start
                while done < block.rows.stop:
                    ending = asked()
                    if ending is not None:
                        save(run)
                        raise ending(_saved_text(run))
                    count = min(block.rows.stop - done, pace.steps, _until_record(config, run))
                    run, records = _train_steps(config, workdir, programs, run, block, done, count, epoch, pace)
                    done, rows = done + count, rows + records
                    if _until_record(config, run) == 0:
                        run = _record_diagnostics(workdir, programs, run, block.batch(done - 1), epoch)
                    text = f"epoch {epoch}/{config.epochs}  loss {records[-1]['loss']:.3f}  {pace.text}"
                    on_progress(int(run.train.step), config.epochs * steps_per_epoch, text)
        run = _end_epoch(workdir, programs, feed, run, epoch, rows, pace)
        if asked() is not None or epoch % config.checkpoint_every_epochs == 0 or epoch == config.epochs:
            save(run)
    return run


def _records_of(workdir: Path, epoch: int) -> list[dict[str, Any]]:
    records = read_metrics(workdir / "metrics.jsonl")
    return [record for record in records if record["kind"] == "train" and record["epoch"] == epoch]


def _append(workdir: Path, records: list[dict[str, Any]]) -> None:
    on_first_process(partial(append_metrics, workdir / "metrics.jsonl", records))


class _Pace:
    """How many steps a jitted call makes: as many as end within :data:`LONGEST_CALL`, `most` at most."""

    def __init__(self, most: int):
        self.most = most
        self.steps = 1  # the first call, which compiles, tells little of what a step takes
        self.seconds: list[float] = []

    def took(self, seconds: float) -> None:
        seconds = largest(seconds)  # all make calls of the same length
        self.seconds.append(seconds)
        self.steps = max(1, min(self.most, int(LONGEST_CALL / seconds)))

    @property
    def text(self) -> str:
        return f"{1e3 * self.seconds[-1]:.1f} ms/step"


def _until_record(config: Config, run: RunState) -> int:
    """Steps until the next record of diagnostics."""
    if run.train.flips is None:
        return config.scan_steps
    return config.diagnostics.every_steps - int(run.train.flips.steps)


def _check_teacher(config: Config, teacher: Teacher | None) -> None:
    losses = config.distillation.losses
    if losses and teacher is None:
        raise UsageError(
            f"`distillation.losses` (={', '.join(losses)}) needs a teacher; train this as a stage that names one, as "
            "the recipes of scripts/train_stages.py do"
        )
    if teacher is not None and not losses:
        raise UsageError("`distillation.losses` (={}) must name what to learn from the teacher; or leave it out")


def _train_steps(config, workdir, programs, run, block, first, count, epoch, pace):
    """A few steps in one jitted call: the next state and their records, which are also in `metrics.jsonl`."""
    first_step = int(run.train.step) + 1
    began = time.perf_counter()
    hyper = hyper_parameters(config)
    state, stacked = block.train(run.train, hyper=hyper, first=np.int32(first), count=np.int32(count))
    stacked = {name: np.asarray(values)[first : first + count] for name, values in stacked.items()}
    pace.took((time.perf_counter() - began) / count)
    records = step_records(stacked, first_step=first_step, epoch=epoch)
    bad = first_non_finite(records)
    if bad is not None:
        step, metric, value = bad
        _append(workdir, [r for r in records if r["step"] < step])
        before, _ = block.train(run.train, hyper=hyper, first=np.int32(first), count=np.int32(step - first_step))
        where = programs.locate(before, *block.batch(first + step - first_step))
        raise Diverged(
            f"`{metric}` became {value} at step {step} (epoch {epoch}) of {workdir}"
            f"{f', first in {where}' if where else ''}; lower `optim.learning_rate` "
            f"(={config.optim.learning_rate}); the last good checkpoint is kept"
        )
    _append(workdir, records)
    return run.replace(train=state), records


def _record_diagnostics(workdir, programs, run, batch, epoch) -> RunState:
    """Measure on the batch of the last step, write the record, count flips from zero again."""
    found = jax.device_get(programs.diagnose(run.train, *batch))
    _append(workdir, [diagnostics_record(found, step=int(run.train.step), epoch=epoch)])
    flips = place_state(no_flips(run.train.params), programs.devices)
    return run.replace(train=run.train.replace(flips=flips))


def _end_epoch(workdir, programs, feed, run, epoch, rows, pace) -> RunState:
    """Evaluate on the validation split, write the record, remember the best variables."""
    found = feed.evaluate(run.train.params, run.train.model_state, "validation")
    record = {
        "kind": "evaluation",
        "step": int(run.train.step),
        "epoch": epoch,
        "validation_loss": float(found["loss"]),
        "validation_accuracy": float(found["accuracy"]),
        "train_loss": float(np.mean([r["loss"] for r in rows])),
        "train_accuracy": float(np.mean([r["accuracy"] for r in rows])),
        "step_time_ms": 1e3 * float(np.median(pace.seconds[1:] or pace.seconds or [0.0])),
        **{name: float(value) for name, value in programs.bounds(run.train.params).items()},
    }
    _append(workdir, [record])
    if record["validation_accuracy"] <= float(run.best.accuracy):
        return run
    best = Best(run.train.params, run.train.model_state, jnp.asarray(found["accuracy"]), jnp.asarray(epoch, jnp.int32))
    return run.replace(best=best)


def _finish(config: Config, workdir: Path, feed: Feed, run: RunState) -> dict[str, Any]:
    """Evaluate on the test split, once for the best variables and once for the last; write result.json."""

    def test_accuracy(variables):
        return float(feed.evaluate(variables.params, variables.model_state, "test")["accuracy"])

    accuracies = {"best": test_accuracy(run.best), "last": test_accuracy(run.train)}
    return on_first_process(partial(write_result, config, workdir, run, **accuracies))


def evaluate_run(
    workdir: str | Path, *, split: str = "test", which: str = "best", data_dir: str | None = None
) -> dict[str, Any]:
    """Loss and accuracy of a run's newest good checkpoint on one split.

    Args:
      workdir: folder of the run, finished or not.
      split: "train" (not augmented), "validation" or "test".
      which: "best", the variables of the best validation epoch, or "last", those of the checkpoint's step.
      data_dir: where the data set lies now; None takes the run's own.

    Returns:
      `accuracy`, `loss`, `examples`, and `step`, of the checkpoint.

    Raises:
      UsageError: if `workdir` holds no run, or no checkpoint yet.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    why = partial(why_rejected, config)
    if data_dir is not None:
        config = replace(config, data=replace(config.data, data_dir=data_dir))
    dataset = load_data(config.data)
    programs = programs_of(config, dataset)
    restored = restore_checkpoint(workdir / "checkpoints", state_shapes(programs), why_rejected=why)
    if restored is None:
        raise UsageError(f"`workdir` (={workdir}) holds no checkpoint yet; train it first: python scripts/train.py")
    variables = restored.state.best if which == "best" else restored.state.train
    found = make_feed(config, programs, dataset).evaluate(variables.params, variables.model_state, split)
    return {
        "accuracy": float(found["accuracy"]),
        "loss": float(found["loss"]),
        "examples": int(found["examples"]),
        "step": int(restored.state.train.step),
    }


def _save(config: Config, workdir: Path, stage: dict[str, Any] | None, run: RunState) -> None:
    on_first_process(partial(save_run, config, workdir, to_host(run), stage=stage))


def _saved_text(run: RunState) -> str:
    return f"saved at step {int(run.train.step)}; the same command resumes there"


def _last_saved(workdir: Path) -> str:
    folder = workdir / "checkpoints"
    steps = checkpoint_steps(folder) if folder.is_dir() else []
    where = f"from step {steps[-1]}, saved before" if steps else "from the start; nothing was saved yet"
    return f"the same command goes on {where}"

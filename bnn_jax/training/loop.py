"""train(config, workdir): a run from its config to its result, resumable at any moment, bit for bit.

A workdir holds `config.json` (resolved), `metrics.jsonl` (a line a step, an evaluation and a record of diagnostics),
`checkpoints/` and, when the run is finished, `result.json`.
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bnn_jax.data import Dataset, Split, load_dataset
from bnn_jax.errors import RunError, UsageError
from bnn_jax.training.checkpoint import restore_checkpoint, save_checkpoint
from bnn_jax.training.config import Config, ModelConfig, flatten, from_dict, to_dict
from bnn_jax.training.experiment import ImageInfo
from bnn_jax.training.metrics import (
    append_metrics,
    diagnostics_record,
    first_non_finite,
    read_metrics,
    step_records,
    truncate_metrics,
    write_file,
)
from bnn_jax.training.programs import Programs, make_programs
from bnn_jax.training.progress import OnProgress, silent
from bnn_jax.training.state import TrainState
from bnn_jax.training.validation import validate


class Diverged(RunError):
    """A metric became infinite or not a number."""


class Best(flax.struct.PyTreeNode):
    """The variables of the epoch with the highest validation accuracy so far, the earliest on a tie."""

    params: Any
    model_state: Any
    accuracy: Array
    epoch: Array


class Teacher(NamedTuple):
    """A trained network that teaches another: its settings and its variables, as `model.apply` takes them."""

    settings: ModelConfig
    variables: Any


class RunState(flax.struct.PyTreeNode):
    """What a checkpoint of a run holds."""

    train: TrainState
    best: Best


def load_data(config: Config) -> Dataset:
    """The data set that `config.data` names, checked."""
    data = config.data
    return load_dataset(
        data.name, data_dir=data.data_dir, validation_examples=data.validation_examples, split_seed=data.split_seed
    )


def programs_of(config: Config, dataset: Dataset, *, teacher: Teacher | None = None) -> Programs:
    """The jitted functions of `config` on `dataset`, the training program with the variables of its `teacher`.

    Raises:
      UsageError: if a batch is larger than the training split.
    """
    examples = len(dataset.train.labels)
    if config.batch_size > examples:
        raise UsageError(f"`batch_size` (={config.batch_size}) is larger than the {examples} training examples")
    info = ImageInfo(dataset.train.images.shape[1:], dataset.num_classes, tuple(dataset.mean), tuple(dataset.std))
    if teacher is None:
        return make_programs(config, info, examples=examples)
    programs = make_programs(config, info, examples=examples, teacher=teacher.settings)
    return programs._replace(train=partial(programs.train, teacher_variables=teacher.variables))


def initial_state(programs: Programs, seed: int, *, carried: Any | None = None) -> RunState:
    """The state of a run before its first step; the variables `carried`, if any, start from given values.

    Raises:
      UsageError: if network, quantizers and images do not go together.
    """
    try:
        # Copies: what jit passes through would be the caller's own arrays, which training takes over.
        train = jax.tree.map(jnp.copy, programs.init(np.uint32(seed), carried))
    except (ValueError, TypeError) as error:
        raise UsageError(f"the network cannot be built: {error}") from None
    # The training program takes over the memory of its state; the best variables need their own.
    return RunState(train, jax.tree.map(jnp.copy, _best_so_far(train)))


def _best_so_far(train: TrainState) -> Best:
    return Best(train.params, train.model_state, jnp.full((), -1.0), jnp.zeros((), jnp.int32))


def state_shapes(programs: Programs) -> RunState:
    """Shapes and dtypes of a run's state, at no cost; of a run that carries nothing over."""
    train = programs.init.eval_shape(np.uint32(0))
    return RunState(train, jax.eval_shape(_best_so_far, train))


def train(
    config: Config,
    workdir: str | Path,
    *,
    dataset: Dataset | None = None,
    on_progress: OnProgress = silent,
    carried: Any | None = None,
    teacher: Teacher | None = None,
) -> dict[str, Any]:
    """Run `config` in `workdir`, or resume it from its newest good checkpoint, or return the result it already has.

    Ctrl-C saves after the training steps under way and raises KeyboardInterrupt; a second one stops at once.

    Args:
      config: the run; validated first.
      workdir: folder of the run, made if missing.
      dataset: the loaded data of `config.data`, to load them once for several runs.
      on_progress: called after every jitted call.
      carried: variables of the network that start from given values, as :func:`bnn_jax.training.step.init_state` takes
        them; without meaning for a run that is resumed.
      teacher: for the losses of `config.distillation`, and needed by them; see `bnn_jax.training.stages`.

    Returns:
      The result: test accuracy at the best validation epoch and at the last, curves, step time; see `result.json`.

    Raises:
      UsageError: for a config that cannot run, or a `workdir` that holds a run of another config.
      Diverged: when a metric is not finite; names step and metric.
      RunError: when the disk is full or no checkpoint can be restored.
    """
    config, workdir = validate(config), Path(workdir)
    _check_teacher(config, teacher)
    claim_workdir(config, workdir)
    if (workdir / "result.json").exists():
        return json.loads((workdir / "result.json").read_text())
    dataset = load_data(config) if dataset is None else dataset
    programs = programs_of(config, dataset, teacher=teacher)
    run = initial_state(programs, config.seed, carried=carried)
    restored = restore_checkpoint(workdir / "checkpoints", run)
    run = run if restored is None else restored.state
    records = truncate_metrics(workdir / "metrics.jsonl", int(run.train.step))
    images, labels = jnp.asarray(dataset.train.images), jnp.asarray(dataset.train.labels)
    steps_per_epoch = len(labels) // config.batch_size

    with interrupts() as interrupted:
        while int(run.train.step) < config.epochs * steps_per_epoch:
            epoch, begun = int(run.train.step) // steps_per_epoch + 1, int(run.train.step) % steps_per_epoch
            order = np.asarray(programs.order(run.train.seed, np.int32(epoch)))
            rows = [r for r in records if r["kind"] == "train" and r["epoch"] == epoch]
            seconds = []
            for first in range(begun, steps_per_epoch, config.scan_steps):
                chunk = order[first : first + config.scan_steps]
                run, chunk_rows, chunk_seconds = _train_chunk(
                    config, workdir, programs, run, images, labels, chunk, epoch
                )
                rows += chunk_rows
                if run.train.flips is not None and int(run.train.flips.steps) >= config.diagnostics.every_steps:
                    run = _record_diagnostics(workdir, programs, run, images, labels, chunk[-1], epoch)
                seconds.append(chunk_seconds)
                text = f"epoch {epoch}/{config.epochs}  loss {rows[-1]['loss']:.3f}  {1e3 * chunk_seconds:.1f} ms/step"
                on_progress(int(run.train.step), config.epochs * steps_per_epoch, text)
                if interrupted() and first + config.scan_steps < steps_per_epoch:
                    _save(config, workdir, run)
                    raise KeyboardInterrupt(_saved_text(run))
            run = _end_epoch(workdir, programs, run, dataset.validation, epoch, rows, seconds)
            if interrupted() or epoch % config.checkpoint_every_epochs == 0 or epoch == config.epochs:
                _save(config, workdir, run)
            if interrupted() and epoch < config.epochs:
                raise KeyboardInterrupt(_saved_text(run))
    return _finish(config, workdir, programs, run, dataset)


def _check_teacher(config: Config, teacher: Teacher | None) -> None:
    losses = config.distillation.losses
    if losses and teacher is None:
        raise UsageError(
            f"`distillation.losses` (={', '.join(losses)}) needs a teacher; train this as a stage that names one, as "
            "the recipes of scripts/train_stages.py do"
        )
    if teacher is not None and not losses:
        raise UsageError("`distillation.losses` (={}) must name what to learn from the teacher; or leave it out")


def _train_chunk(config, workdir, programs, run, images, labels, chunk, epoch):
    """A few steps in one jitted call: the next state, their records and the seconds a step."""
    first_step = int(run.train.step) + 1
    began = time.perf_counter()
    rate = np.float32(config.optim.learning_rate)
    state, stacked = programs.train(run.train, images, labels, jnp.asarray(chunk), rate)
    stacked = {name: np.asarray(values) for name, values in stacked.items()}
    seconds = (time.perf_counter() - began) / len(chunk)
    records = step_records(stacked, first_step=first_step, epoch=epoch)
    bad = first_non_finite(records)
    if bad is not None:
        step, metric, value = bad
        append_metrics(workdir / "metrics.jsonl", [r for r in records if r["step"] < step])
        raise Diverged(
            f"`{metric}` became {value} at step {step} (epoch {epoch}) of {workdir}; lower `optim.learning_rate` "
            f"(={config.optim.learning_rate}); the last good checkpoint is kept"
        )
    append_metrics(workdir / "metrics.jsonl", records)
    return run.replace(train=state), records, seconds


def _record_diagnostics(workdir, programs, run, images, labels, indices, epoch) -> RunState:
    """Measure on the batch of the last step, write the record, count flips from zero again."""
    found = jax.device_get(programs.diagnose(run.train, images, labels, jnp.asarray(indices)))
    record = diagnostics_record(found, step=int(run.train.step), epoch=epoch)
    append_metrics(workdir / "metrics.jsonl", [record])
    return run.replace(train=run.train.replace(flips=jax.tree.map(jnp.zeros_like, run.train.flips)))


def _end_epoch(workdir, programs, run, validation: Split, epoch, rows, seconds) -> RunState:
    """Evaluate on the validation split, write the record, remember the best variables."""
    found = programs.evaluate(
        run.train.params, run.train.model_state, jnp.asarray(validation.images), jnp.asarray(validation.labels)
    )
    record = {
        "kind": "evaluation",
        "step": int(run.train.step),
        "epoch": epoch,
        "validation_loss": float(found["loss"]),
        "validation_accuracy": float(found["accuracy"]),
        "train_loss": float(np.mean([r["loss"] for r in rows])),
        "train_accuracy": float(np.mean([r["accuracy"] for r in rows])),
        # The first call of a length compiles.
        "step_time_ms": 1e3 * float(np.median(seconds[1:] or seconds)),
        **{name: float(value) for name, value in programs.bounds(run.train.params).items()},
    }
    append_metrics(workdir / "metrics.jsonl", [record])
    if record["validation_accuracy"] <= float(run.best.accuracy):
        return run
    best = Best(run.train.params, run.train.model_state, found["accuracy"], jnp.asarray(epoch, jnp.int32))
    return run.replace(best=jax.tree.map(jnp.copy, best))


def _finish(config: Config, workdir: Path, programs: Programs, run: RunState, dataset: Dataset) -> dict[str, Any]:
    """Evaluate on the test split, once for the best variables and once for the last; write result.json."""
    images, labels = jnp.asarray(dataset.test.images), jnp.asarray(dataset.test.labels)

    def test_accuracy(variables):
        return float(programs.evaluate(variables.params, variables.model_state, images, labels)["accuracy"])

    records = list(read_metrics(workdir / "metrics.jsonl"))
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    steps = [r for r in records if r["kind"] == "train"]
    columns = ("epoch", "validation_accuracy", "validation_loss", "train_loss", "train_accuracy")
    last = evaluations[-1]
    result = {
        "seed": config.seed,
        "epochs": config.epochs,
        "best_epoch": int(run.best.epoch),
        "validation_accuracy_best": float(run.best.accuracy),
        "test_accuracy_best": test_accuracy(run.best),
        "test_accuracy_last": test_accuracy(run.train),
        "train_loss_last": last["train_loss"],
        "step_time_ms": float(np.median([r["step_time_ms"] for r in evaluations[1:] or evaluations])),
        "max_abs_latent": last["max_abs_latent"],
        "share_on_bounds": last["share_on_bounds"],
        "curve": {name: [r[name] for r in evaluations] for name in columns},
        "gamma": None,
    }
    if "gamma" in steps[0]:
        result["gamma"] = {"step": [r["step"] for r in steps], "value": [r["gamma"] for r in steps]}
        result["search_iterations_mean"] = float(np.mean([r["search_iterations"] for r in steps]))
    write_file(workdir / "result.json", json.dumps(result))
    return result


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
    if data_dir is not None:
        config = replace(config, data=replace(config.data, data_dir=data_dir))
    dataset = load_data(config)
    programs = programs_of(config, dataset)
    restored = restore_checkpoint(workdir / "checkpoints", state_shapes(programs))
    if restored is None:
        raise UsageError(f"`workdir` (={workdir}) holds no checkpoint yet; train it first: python scripts/train.py")
    variables = restored.state.best if which == "best" else restored.state.train
    chosen: Split = getattr(dataset, split)
    found = programs.evaluate(
        variables.params, variables.model_state, jnp.asarray(chosen.images), jnp.asarray(chosen.labels)
    )
    numbers = {name: float(value) for name, value in found.items()}
    return numbers | {"examples": len(chosen.labels), "step": int(restored.state.train.step)}


def _save(config: Config, workdir: Path, run: RunState) -> None:
    metadata = {"config": to_dict(config), "best_validation_accuracy": float(run.best.accuracy)}
    save_checkpoint(workdir / "checkpoints", int(run.train.step), run, metadata=metadata)


def _saved_text(run: RunState) -> str:
    return f"saved at step {int(run.train.step)}; the same command resumes there"


def read_config(workdir: Path) -> Config:
    """The config of the run in `workdir`.

    Raises:
      UsageError: if there is none, or it has keys that this version does not know.
      RunError: if the file is damaged.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise UsageError(f"`workdir` (={workdir}) holds no run: there is no {path}; name the folder of a run")
    try:
        return from_dict(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError):
        raise RunError(
            f"{path} is damaged: it holds no config; put it back, or remove {workdir} to start anew"
        ) from None


def claim_workdir(config: Config, workdir: Path) -> None:
    """Write the resolved config into `workdir`, made if missing.

    Raises:
      UsageError: if it already holds a run of another config; names the first key that differs.
      RunError: if it cannot be written.
    """
    path = workdir / "config.json"
    if path.exists():
        old, new = flatten(to_dict(read_config(workdir))), flatten(to_dict(config))
        differing = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
        if differing:
            key = differing[0]
            raise UsageError(
                f"`{key}` is {new.get(key)!r} now, but {workdir} holds a run with {old.get(key)!r}; "
                "choose another `--workdir`, or remove that one"
            )
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {workdir} ({error.strerror}); choose another `--workdir`") from None
    write_file(path, json.dumps(to_dict(config), indent=1))


@contextmanager
def interrupts() -> Iterator:
    """Turn the first Ctrl-C into a flag that the loop reads; the second one acts as usual."""
    asked = False

    def ask(signum, frame):
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        previous = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread, which alone receives signals
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, previous)

"""The runs that train as one program, each with its own folder: what is recorded, saved and resumed of each.

One run has its state as it is; the states of several are stacked, with a leading axis.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.data import Dataset, ImageStream
from bnn_jax.errors import RunError, UsageError
from bnn_jax.training.callbacks import Callback
from bnn_jax.training.config import Config
from bnn_jax.training.data_record import record_data, warn_if_changed
from bnn_jax.training.devices import on_first_process, to_host
from bnn_jax.training.experiment import OPTIMIZER_NUMBERS
from bnn_jax.training.metrics import append_metrics, read_metrics, unpack_log, write_file
from bnn_jax.training.programs import program_key
from bnn_jax.training.run_folder import (
    check_workdir,
    claim_workdir,
    finished_result,
    has_begun,
    locked,
    move_aside,
    restore_run,
    save_run,
    write_result,
)
from bnn_jax.training.state import RunState, TrainState


class MovedAsideWarning(UserWarning):
    """A run made room for another one; the text names where it is now."""


class Diverged(RunError):
    """A number of a run is not finite any more, or its loss beyond any sense."""


@dataclass
class Member:
    """A run on the host.

    Attributes:
      config, workdir: its own.
      stage: what its folder and checkpoints keep of the stage that the run is, or None.
      callbacks: that are told of it.
      rows: records of the steps of the epoch under way.
      evaluation: record of the last epoch.
      diverged: why it records, saves and results in nothing more, or None.
      result: what it ended with, None before.
    """

    config: Config
    workdir: Path
    stage: dict[str, Any] | None = None
    callbacks: Sequence[Callback] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    diverged: Diverged | None = None
    result: dict[str, Any] | None = None

    def record(self, records: list[dict[str, Any]]) -> None:
        """Append records to `metrics.jsonl`, and tell the callbacks of them."""
        self.rows += [record for record in records if record["kind"] == "train"]
        on_first_process(partial(append_metrics, self.workdir / "metrics.jsonl", records))
        for callback in self.callbacks:
            for record in records:
                callback.on_record(record)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tell the callbacks that the run starts, or goes on, and that it ends, however it does."""
        with ExitStack() as ends:
            for callback in self.callbacks:
                callback.on_start(self.config, self.workdir)
                ends.callback(lambda callback=callback: callback.on_end(self.result))
            yield

    def diverge(self, became: str, *, step: int, epoch: int, where: str | None) -> None:
        """Keep why it goes on no further: what became of which number, at what step, and where in the network first."""
        self.diverged = Diverged(
            f"{became} at step {step} (epoch {epoch}) of {self.workdir}{f', first in {where}' if where else ''}; "
            f"lower `optim.learning_rate` (={self.config.optim.learning_rate}); the last good checkpoint is kept"
        )

    def begin_epoch(self, epoch: int, *, midway: bool) -> None:
        """Forget the rows of the epoch before; of an epoch that was left midway the log has the first ones."""
        self.rows = on_first_process(partial(_steps_of, self.workdir, epoch)) if midway else []


def _steps_of(workdir: Path, epoch: int) -> list[dict[str, Any]]:
    records = read_metrics(workdir / "metrics.jsonl")
    return [record for record in records if record["kind"] == "train" and record["epoch"] == epoch]


def raise_if_all_diverged(members: Sequence[Member]) -> None:
    """Raise what Diverged of the last member says, if every member has."""
    if all(member.diverged for member in members):
        raise members[-1].diverged


def stack(trees: Sequence[Any]) -> Any:
    """Stack the trees of several members along a leading axis; leave that of a single one as it is."""
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Any, members: int) -> list[Any]:
    """Return the tree of each member."""
    return [tree] if members == 1 else [jax.tree.map(lambda leaf, n=n: leaf[n, ...], tree) for n in range(members)]


def steps_done(state: TrainState) -> int:
    """Count the training steps behind a state, the same for all members."""
    return int(np.ravel(state.step)[0])


def why_alone(config: Config) -> str | None:
    """Tell in words what in a config cannot be mapped over several runs; None if all of it can."""
    if config.diagnostics.every_steps:
        return f"`diagnostics.every_steps` (={config.diagnostics.every_steps})"
    if config.data.stream:
        return "`data.stream` (=True)"
    if config.distillation.losses:
        return f"`distillation.losses` (={', '.join(config.distillation.losses)})"
    return None


def check_together(configs: Sequence[Config]) -> None:
    """Raise UsageError unless the configs are of one program that can be mapped over them."""
    for config in configs:
        if len(configs) > 1 and (reason := why_alone(config)) is not None:
            raise UsageError(f"{reason} cannot be mapped over several runs; train them one after another")
        if program_key(config) != program_key(configs[0]):
            numbers = ", ".join(f"`optim.{name}`" for name in OPTIMIZER_NUMBERS)
            raise UsageError(
                f"`configs` must differ only in `seed`, {numbers} and `regularizer_strength` to be one program; train "
                "the others apart"
            )


def finished_results(members: Sequence[Member], *, extend: bool = False) -> list[dict[str, Any]] | None:
    """Return the results if all runs are finished, else None.

    Args:
      extend: as :func:`bnn_jax.training.run_folder.check_workdir` takes it.

    Raises:
      UsageError: if a folder holds a run of another config.
    """
    for member in members:
        check_workdir(member.config, member.workdir, extend=extend)
    results = [finished_result(member.config, member.workdir) for member in members]
    if None in results:
        return None
    for member in members:
        claim_workdir(member.config, member.workdir, stage=member.stage)  # Its files may have been lost.
        warn_if_changed(member.workdir, member.config.data)
    return results


def claim(
    members: Sequence[Member],
    locks: ExitStack,
    dataset: Dataset | ImageStream,
    *,
    overwrite: bool = False,
    extend: bool = False,
) -> None:
    """Make the folders, lock them until `locks` end, and write into each whose it is, and on what data.

    Args:
      overwrite: move a run that has begun there aside, with a warning that names where.
      extend: as :func:`bnn_jax.training.run_folder.check_workdir` takes it.

    Raises:
      UsageError: if another process trains in one; if one holds a run of another config, or of other classes.
      RunError: if one cannot be written.
    """
    for member in members:
        if overwrite and has_begun(member.workdir):
            with locked(member.workdir):
                aside = move_aside(member.workdir)
            warnings.warn(f"the run in {member.workdir} is moved to {aside}", MovedAsideWarning, stacklevel=2)
        locks.enter_context(locked(member.workdir))
        claim_workdir(member.config, member.workdir, stage=member.stage, extend=extend)
        record_data(member.workdir, member.config.data, dataset)


def resume(members: Sequence[Member], starts: Sequence[RunState]) -> list[RunState]:
    """Restore the newest good checkpoints and their logs; where there is none, take the start and an empty log.

    Raises:
      UsageError: if the checkpoints of several members are of different steps, or of states of another kind.
      RunError: if there are checkpoints, but none can be restored.
    """
    found = [
        restore_run(member.config, member.workdir, start, quarantine=True) for member, start in zip(members, starts)
    ]
    steps = [0 if restored is None else restored.step for restored in found]
    if len(set(steps)) > 1:
        each = ", ".join(f"{member.workdir} at step {step}" for member, step in zip(members, steps))
        raise UsageError(f"runs that were saved at different steps cannot go on together ({each}); start them apart")
    for member, restored in zip(members, found):
        log = "" if restored is None else unpack_log(restored.metadata["log"])
        write_file(member.workdir / "metrics.jsonl", log)
    return [start if restored is None else restored.state for start, restored in zip(starts, found)]


def save(members: Sequence[Member], run: RunState) -> None:
    """Save each run that has not diverged.  All processes call this together.

    Raises:
      RunError: if the disk is full; the last good checkpoint is kept.
    """
    for member, own in zip(members, unstack(run if len(members) == 1 else to_host(run), len(members))):
        if member.diverged is None:
            save_run(member.config, member.workdir, own, stage=member.stage)


def write_results(
    members: Sequence[Member], run: RunState, tested: dict[str, np.ndarray]
) -> list[dict[str, Any] | Diverged]:
    """Write, and return, the `result.json` of each run; for one that diverged, why.

    Args:
      tested: accuracies on the test split by their names in `result.json`.
    """
    results = []
    for member, own, found in zip(members, unstack(run, len(members)), unstack(tested, len(members))):
        tested_here = {name: float(value) for name, value in found.items()}
        write = partial(write_result, member.config, member.workdir, own, tested_here)
        member.result = on_first_process(write) if member.diverged is None else None
        results.append(member.result if member.diverged is None else member.diverged)
    return results

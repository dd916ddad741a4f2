"""Many runs, each in its own folder: one after another, one process a core, or mapped together on the device."""

import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.errors import JaxRuntimeError

from bnn_jax.data import Dataset, ImageStream
from bnn_jax.data.sources import IN_MEMORY
from bnn_jax.errors import RunError, UsageError, unknown_name
from bnn_jax.paths import local_path
from bnn_jax.sweeps.processes import run_in_processes
from bnn_jax.sweeps.throughput import choose_execution
from bnn_jax.training.checkpoint import checkpoint_steps
from bnn_jax.training.config import Config, DataConfig
from bnn_jax.training.data_record import warn_if_changed
from bnn_jax.training.initial import with_start
from bnn_jax.training.input_pipeline import load_data
from bnn_jax.training.loop import train, train_together
from bnn_jax.training.members import Diverged, why_alone
from bnn_jax.training.metrics import curve_of, read_metrics
from bnn_jax.training.programs import image_info, program_key
from bnn_jax.training.progress import OnProgress, progress_display
from bnn_jax.training.run_folder import check_workdir, finished_result, has_begun, read_checksummed, write_checksummed
from bnn_jax.training.step_size import StepSizeWarning
from bnn_jax.training.validation import validate


class Run(NamedTuple):
    """One run of a sweep: what the user sees it called, its config, its folder."""

    title: str
    config: Config
    workdir: Path


Datasets = dict[DataConfig, Dataset | ImageStream]
"""Those that are loaded."""

LOADED_BY = (
    "name",
    "data_dir",
    "validation_examples",
    "split_seed",
    "stream",
    "preprocessing",
    "image_size",
    "tokens",
)
"""The settings of data that decide what is loaded; the others are of what is done to a batch."""


def run_all(
    runs: Sequence[Run],
    *,
    execution: str = "auto",
    processes: int | None = None,
    group_size: int | None = None,
    datasets: Datasets | None = None,
    tell: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train `runs`; those that are finished, or diverged, are not run again.

    * sequential: one after another; runs of one program compile it once.
    * processes: one after another in each of several processes, which share the cores out; for the CPU.  On two cores
      they took 0.8 of the time of one process: 4 seeds of digits, 20 epochs, 10.1 to 10.8 s for 12.1 to 12.6 s; 2 seeds
      of CIFAR-10 with ResNet-20, width 8, 39.3 s for 49.7 s.
    * vmapped: runs that differ only in seed, learning rate, momentum, weight decays, clipping and strength of the
      regularizer are one program, see :func:`bnn_jax.training.loop.train_together`; a group that does not fit in the
      device's memory is halved.
    * auto: what :func:`bnn_jax.sweeps.throughput.choose_execution` measures for the largest such group.

    Ctrl-C and SIGTERM save what is under way; the same call goes on there.

    Args:
      runs: their configs are validated first.
      execution: one of the four.
      processes: at most so many at a time; None takes one for each core.
      group_size: at most so many runs in a program; None sets no limit.
      datasets: that are loaded already, by the `data` of the configs, to which those that are loaded here are added.
      tell: shows what "auto" chose, and the validation accuracy of each run when it has ended.

    Returns:
      The result of each, see :func:`bnn_jax.training.loop.train`; a diverged run has a sentence under "diverged" and
      None in place of accuracies.

    Raises:
      UsageError: for a value out of range, a config that cannot run or a folder that holds another run.
      RunError: if the disk is full.
    """
    for argument, value in (("processes", processes), ("group_size", group_size)):
        if value is not None and value < 1:
            raise UsageError(f"`{argument}` (={value}) must be at least 1; leave it out for as many as there can be")
    if execution not in ("auto", *RUNNERS):
        raise unknown_name("execution", execution, ("auto", *RUNNERS))
    configs = [with_start(validate(run.config), local_path("workdir", run.workdir)) for run in runs]
    runs = [run._replace(config=own, workdir=local_path("workdir", run.workdir)) for run, own in zip(runs, configs)]
    datasets = {} if datasets is None else datasets
    missing = [run for run in runs if recorded_result(run) is None]
    for run in (run for run in runs if run not in missing):
        warn_if_changed(run.workdir, run.config.data)
    if missing:
        if execution == "auto":
            execution, why = _choose(missing, group_size, datasets)
            tell(f"{len(missing)} runs, {execution}: {why}")
        sizes = {"processes": processes, "group_size": group_size}
        RUNNERS[execution](missing, datasets, on_finished=_result_teller(len(missing), tell), **sizes)
    return [recorded_result(run) for run in runs]


def _result_teller(count: int, tell: Callable[[str], None]) -> Callable[[Run], None]:
    numbers = itertools.count(1)

    def told(run: Run) -> None:
        result = recorded_result(run)
        accuracy = result["validation_accuracy_best"]
        found = "diverged" if accuracy is None else f"validation accuracy {100 * accuracy:.2f} %, at its best"
        tell(f"{run.title}: {found} ({next(numbers)} of {count} runs)")

    return told


def recorded_result(run: Run) -> dict[str, Any] | None:
    """Read what a run that is finished, or diverged, left in its folder; None for another.

    Raises:
      UsageError: if the folder holds a run of another config.
    """
    if not has_begun(run.workdir):
        return None
    check_workdir(run.config, run.workdir)
    found = read_checksummed(run.workdir / "diverged.json") or {}
    return found if found.get("epochs") == run.config.epochs else finished_result(run.config, run.workdir)


def train_one(run: Run, datasets: Datasets, on_progress: OnProgress) -> None:
    """Train a run; record one that diverges as such.  What it warns of its step size, the report of the sweep says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StepSizeWarning)
            train(run.config, run.workdir, data=dataset_of(run.config.data, datasets), on_progress=on_progress)
    except Diverged as error:
        _record_diverged(run, str(error))


def _record_diverged(run: Run, sentence: str) -> None:
    numbers = ("validation_accuracy_best", "test_accuracy_best", "test_accuracy_last", "train_loss_last")
    others = ("step_time_ms", "best_epoch", "max_abs_latent", "share_on_bounds", "gamma")
    result = {"seed": run.config.seed, "epochs": run.config.epochs, "diverged": sentence}
    result |= {"curve": curve_of(read_metrics(run.workdir / "metrics.jsonl"))}
    write_checksummed(run.workdir / "diverged.json", result | dict.fromkeys((*numbers, *others)))


def dataset_of(data: DataConfig, datasets: Datasets) -> Dataset | ImageStream:
    """The set of these settings; it is loaded, and added to those that are, if none of them is the same one."""

    def loaded_by(settings):
        return [getattr(settings, name) for name in LOADED_BY]

    if data not in datasets:
        same = [found for other, found in datasets.items() if loaded_by(other) == loaded_by(data)]
        datasets[data] = same[0] if same else load_data(data)
    return datasets[data]


def _run_sequentially(runs: list[Run], datasets: Datasets, *, on_finished: Callable[[Run], None], **_) -> None:
    for run in runs:
        with progress_display(run.title) as on_progress:
            train_one(run, datasets, on_progress)
        on_finished(run)


def _run_in_processes(
    runs: list[Run], datasets: Datasets, *, processes: int | None, on_finished: Callable[[Run], None], **_
) -> None:
    if any(IN_MEMORY.search(run.config.data.name) for run in runs):
        raise UsageError(
            "`execution` (='processes') is for data on disk, which each process reads; save these as an .npz file and "
            "name that, or choose sequential or vmapped"
        )
    with progress_display(f"{len(runs)} runs") as on_progress:
        run_in_processes(runs, processes=processes, on_progress=on_progress, on_finished=on_finished)


def _run_vmapped(
    runs: list[Run], datasets: Datasets, *, group_size: int | None, on_finished: Callable[[Run], None], **_
) -> None:
    for run in runs:
        if (reason := why_alone(run.config)) is not None:
            raise UsageError(f"`execution` (='vmapped') does not go with {reason}; choose sequential or processes")
    for group in _groups(runs):
        parts = -(-len(group) // (group_size or len(group)))
        for part in range(parts):
            _train_group(group[part::parts], datasets)
            for run in group[part::parts]:
                on_finished(run)


def _train_group(group: list[Run], datasets: Datasets) -> None:
    title = group[0].title if len(group) == 1 else f"{group[0].title} and {len(group) - 1} more"
    found = _trained_together(group, title, datasets)
    if found is None:  # Only here has the error let go of what was made for the whole group.
        if len(group) == 1:
            raise RunError(f"{title} does not fit in the memory of the device; lower `batch_size`")
        half = len(group) // 2
        for part in (group[:half], group[half:]):
            _train_group(part, datasets)
        return
    for run, result in zip(group, found, strict=True):
        if isinstance(result, Diverged):
            _record_diverged(run, str(result))


def _trained_together(group: list[Run], title: str, datasets: Datasets) -> list[dict[str, Any] | Diverged] | None:
    """What :func:`bnn_jax.training.loop.train_together` returns; None if that does not fit in memory."""
    configs, workdirs = [run.config for run in group], [run.workdir for run in group]
    try:
        with progress_display(title) as on_progress:
            return train_together(
                configs, workdirs, data=dataset_of(configs[0].data, datasets), on_progress=on_progress
            )
    except JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _groups(runs: list[Run]) -> list[list[Run]]:
    """Group the runs of one program that were saved at the same step."""
    groups: dict[tuple[Config, int], list[Run]] = {}
    for run in runs:
        folder = run.workdir / "checkpoints"
        steps = checkpoint_steps(folder) if folder.is_dir() else []
        groups.setdefault((program_key(run.config), max(steps, default=0)), []).append(run)
    return list(groups.values())


def _choose(runs: list[Run], group_size: int | None, datasets: Datasets) -> tuple[str, str]:
    reason = next((reason for run in runs if (reason := why_alone(run.config)) is not None), None)
    if reason is not None:
        return "sequential", f"{reason} cannot be mapped"
    group = max(_groups(runs), key=len)
    config = group[0].config
    info = image_info(dataset_of(config.data, datasets))
    return choose_execution(config, info, members=min(len(group), group_size or len(group)))


RUNNERS = {"sequential": _run_sequentially, "processes": _run_in_processes, "vmapped": _run_vmapped}
"""What each `execution` does; "auto" chooses between sequential and vmapped."""

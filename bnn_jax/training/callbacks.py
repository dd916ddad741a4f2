"""What is told of a run while it trains: to TensorBoard, a table, Weights & Biases, or what a user brings."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bnn_jax.checks import require
from bnn_jax.errors import UsageError
from bnn_jax.extras import import_extra
from bnn_jax.paths import local_path
from bnn_jax.training.config import Config, flatten, to_dict
from bnn_jax.training.metrics import read_metrics, write_file

Record = dict[str, Any]
"""A line of `metrics.jsonl`: "kind" (train, evaluation or diagnostics), "step", "epoch", and numbers by their names."""


class Callback:
    """A listener that does nothing; one of your own overrides what it wants to hear.

    What a method raises ends the run, which resumes from its last checkpoint.  Where a run has several processes the
    first one's are called.
    """

    def on_start(self, config: Config, workdir: Path) -> None:
        """Hear that a run starts, or goes on: `metrics.jsonl` in its folder holds the records so far."""

    def on_record(self, record: Record) -> None:
        """Hear a record that was just appended to `metrics.jsonl`; those of the steps of a call come together."""

    def on_end(self, result: dict[str, Any] | None) -> None:
        """Hear the result of the run; None where it stopped before its end."""


def check_callbacks(callbacks: Any) -> None:
    """Refuse what is no list of callbacks.

    Raises:
      UsageError: for a callback by itself, or a class of one.
    """
    several = isinstance(callbacks, Sequence) and all(isinstance(one, Callback) for one in callbacks)
    require("callbacks", callbacks, several, "must be a list of callbacks", "as [CSVLogger()]", error=UsageError)


class CSVLogger(Callback):
    """A table with a line an epoch: losses, accuracies, time of a step.

    Args:
      path: of the file; None is `epochs.csv` in the folder of the run.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else local_path("path", path)

    def on_start(self, config: Config, workdir: Path) -> None:
        self._file = workdir / "epochs.csv" if self.path is None else self.path
        self._rows = [record for record in read_metrics(workdir / "metrics.jsonl") if record["kind"] == "evaluation"]

    def on_record(self, record: Record) -> None:
        if record["kind"] == "evaluation":
            self._rows.append(record)
            text = io.StringIO()
            names = [name for name in dict.fromkeys(name for row in self._rows for name in row) if name != "kind"]
            writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows)
            write_file(self._file, text.getvalue())


class TensorBoard(Callback):
    """Event files for TensorBoard: every number of every record, as `train/loss` or `evaluation/validation_accuracy`.

    Where a run goes on from a checkpoint, TensorBoard leaves out what was written of the steps after it.

    Args:
      folder: for the files; None is `tensorboard` in the folder of the run.

    Raises:
      UsageError: if tensorboardX is not installed.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = None if folder is None else local_path("folder", folder)
        self._tensorboard = import_extra("tensorboardX", "the callback TensorBoard")

    def on_start(self, config: Config, workdir: Path) -> None:
        steps = max((record["step"] for record in read_metrics(workdir / "metrics.jsonl")), default=0)
        folder = workdir / "tensorboard" if self.folder is None else self.folder
        # The names of files have the second of their start alone: two parts of a short run would have one.
        begin = {"purge_step": steps + 1, "filename_suffix": f".{steps + 1}"} if steps else {}
        self._writer = self._tensorboard.SummaryWriter(str(folder), **begin)

    def on_record(self, record: Record) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def on_end(self, result: dict[str, Any] | None) -> None:
        self._writer.close()


class WandB(Callback):
    """A run of Weights & Biases with every number of every record, the config and the result.

    Args:
      **init: of `wandb.init`, as project="binary"; with id="mine", resume="allow" a run that goes on stays one.

    Raises:
      UsageError: if wandb is not installed.
    """

    def __init__(self, **init: Any):
        self.init, self._wandb = init, import_extra("wandb", "the callback WandB")

    def on_start(self, config: Config, workdir: Path) -> None:
        self._run = self._wandb.init(
            **{"name": config.name, "dir": str(workdir), "config": to_dict(config)} | self.init
        )

    def on_record(self, record: Record) -> None:
        self._run.log({f"{record['kind']}/{name}": n for name, n in _numbers(record).items()}, step=record["step"])

    def on_end(self, result: dict[str, Any] | None) -> None:
        self._run.summary.update(_numbers(result or {}))
        self._run.finish(exit_code=0 if result is not None else 1)


LOGS: dict[str, Callable[[], Callback]] = {"csv": CSVLogger, "tensorboard": TensorBoard, "wandb": WandB}
"""Callbacks by the names that `scripts/train.py --log` takes."""


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record by their dotted names."""
    return {
        name: value
        for name, value in flatten(record).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }

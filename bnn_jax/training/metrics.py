"""Metrics as JSON lines: one line a training step, one an evaluation, one a record of diagnostics."""

import base64
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bnn_jax.errors import RunError
from bnn_jax.files import write_atomically

LARGEST_LOSS = 2.0**24
"""Of a batch.  Beyond it float32 does not tell a margin of 1 from none: a loss that is finite there means nothing.

A network that has learned nothing has a cross-entropy of log C and a hinge loss of 1; without normalization before the
last layer both can start at thousands."""


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Read the records of a file; skip a last line that an interrupted write left incomplete."""
    if not path.exists():
        return
    with path.open() as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def write_file(path: Path, text: str) -> None:
    """Replace a file of a run in one step.

    Raises:
      RunError: if the disk is full or the folder cannot be written; the old file is kept.
    """
    try:
        write_atomically(path, text)
    except OSError as error:
        raise RunError(f"cannot write {path} ({error.strerror}); make room and start again to resume") from None


def pack_log(path: Path) -> str:
    """Compress a file of records into text, some five times smaller, that a checkpoint keeps."""
    return base64.b64encode(zlib.compress(path.read_bytes())).decode()


def unpack_log(packed: str) -> str:
    """Return the lines that :func:`pack_log` took."""
    return zlib.decompress(base64.b64decode(packed)).decode()


def append_metrics(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append records, a line each.

    Raises:
      RunError: if the file cannot be written.
    """
    try:
        with path.open("a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))
    except OSError as error:
        raise RunError(
            f"cannot write metrics to {path} ({error.strerror}); make room and start again to resume"
        ) from None


def step_records(stacked: dict[str, np.ndarray], *, first_step: int, epoch: int) -> list[dict[str, Any]]:
    """Make a record of each of the steps whose metrics are stacked."""
    names = sorted(stacked)
    columns = zip(*(stacked[name].tolist() for name in names))
    return [
        {"kind": "train", "step": first_step + i, "epoch": epoch} | dict(zip(names, values))
        for i, values in enumerate(columns)
    ]


def diagnostics_record(found: dict[str, Any], *, step: int, epoch: int) -> dict[str, Any]:
    """Make the record of what `bnn_jax.training.diagnostics.diagnose` found; what is not finite becomes null."""

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        values = np.asarray(value).tolist()
        return None if isinstance(values, float) and not math.isfinite(values) else values

    return {"kind": "diagnostics", "step": step, "epoch": epoch} | plain(found)


def first_diverged(records: list[dict[str, Any]]) -> tuple[int, str] | None:
    """Find the first record of a run that diverged.

    That is one with a number that is not finite, a loss above :data:`LARGEST_LOSS`, or an update that the optimizer
    refused because it was not finite.

    Returns:
      How many records are before it, and what became of which number, in words; None if there is none.

    >>> first_diverged([{"step": 7, "loss": 2.3}, {"step": 8, "loss": float("nan")}])
    (1, '`loss` became nan')
    """
    for number, record in enumerate(records):
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                return number, f"`{name}` became {value}"
            if name in ("loss", "objective") and value > LARGEST_LOSS:
                return number, f"`{name}` became {value:.2g} (above 2^24)"
            if name == "refused" and value > 0:
                return number, "`refused` became 1 (an update that is not finite was not made)"
    return None


def curve_of(records: Iterable[dict[str, Any]]) -> dict[str, list[Any]] | None:
    """The numbers of a run over its epochs, a list each; None if it has finished none."""
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    columns = ("epoch", "validation_accuracy", "validation_loss", "train_loss", "train_accuracy")
    return {name: [record[name] for record in evaluations] for name in columns} if evaluations else None


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarize a run's records for its result: curves over epochs, gamma over steps, the last of each.

    Where diagnostics were recorded, `flips` and `never_flipped` over all layers are those of the last record.
    """
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    steps = [r for r in records if r["kind"] == "train"]
    diagnostics = [r["total"] for r in records if r["kind"] == "diagnostics"]
    last = evaluations[-1]
    summary = {
        "train_loss_last": last["train_loss"],
        "step_time_ms": float(np.median([r["step_time_ms"] for r in evaluations[1:] or evaluations])),
        "max_abs_latent": last["max_abs_latent"],
        "share_on_bounds": last["share_on_bounds"],
        "curve": curve_of(records),
        "gamma": None,
    }
    if diagnostics:
        summary |= {name: diagnostics[-1].get(name) for name in ("flips", "never_flipped")}
    if "gamma" in steps[0]:
        summary["gamma"] = {"step": [r["step"] for r in steps], "value": [r["gamma"] for r in steps]}
        summary["search_iterations_mean"] = float(np.mean([r["search_iterations"] for r in steps]))
    return summary

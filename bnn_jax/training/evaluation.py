"""Evaluate the checkpoint of a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bnn_jax.checks import require
from bnn_jax.errors import RunError, UsageError
from bnn_jax.paths import local_path
from bnn_jax.training.config import Config
from bnn_jax.training.data_record import data_of_run
from bnn_jax.training.input_pipeline import make_input_pipeline
from bnn_jax.training.programs import programs_of, state_shapes
from bnn_jax.training.run_folder import read_config, restore_run
from bnn_jax.training.state import WHICH

SPLITS = ("train", "validation", "test")
"""Of a data set."""


def evaluate_run(
    workdir: str | Path,
    *,
    split: str = "test",
    which: str = "best",
    data_dir: str | None = None,
    data: Any | None = None,
    config: Config | None = None,
) -> dict[str, Any]:
    """Loss and accuracy of a run's newest good checkpoint on one split.

    Args:
      workdir: folder of the run, finished or not.
      split: "train" (not augmented), "validation" or "test".
      which: "best", the variables of the best validation epoch, or "last", those of the checkpoint's step.
      data_dir: where the data set lies now; None takes the run's own.
      data: the arrays that the run was given, as :func:`bnn_jax.training.loop.train` took them.
      config: of the run, as this process has it; None reads it, which cannot have what no name finds again.

    Returns:
      What :func:`bnn_jax.training.epoch.evaluate` finds, and the `step` of the checkpoint.

    Raises:
      UsageError: for another `split` or `which`; if `workdir` holds no run, or no checkpoint yet; for other data than
        the run's own.
      RunError: if its checkpoints, or the logits, are not finite; names the layer.
    """
    require("split", split, split in SPLITS, f"must be one of {', '.join(SPLITS)}", error=UsageError)
    require("which", which, which in WHICH, "must be best or last", error=UsageError)
    workdir = local_path("workdir", workdir)
    config = read_config(workdir) if config is None else config
    if data_dir is not None:
        config = replace(config, data=replace(config.data, data_dir=data_dir))
    dataset = data_of_run(workdir, config, data)
    programs = programs_of(config, dataset)
    restored = restore_run(config, workdir, state_shapes(programs))
    if restored is None:
        raise UsageError(f"`workdir` (={workdir}) holds no checkpoint yet; train it first: bnn-jax train")
    variables = restored.state.best if which == "best" else restored.state.train
    pipeline = make_input_pipeline(config, programs, dataset)
    found = pipeline.evaluate(*variables.evaluated, split)
    if not np.isfinite(found["accuracy"]):
        where = pipeline.first_non_finite_output(*variables.evaluated, split)
        raise RunError(
            f"`workdir` (={workdir}) holds a network whose logits are not finite on the {split} split"
            f"{f', first in {where}' if where else ''}; train again with a lower `optim.learning_rate`"
        )
    numbers = {name: float(value) for name, value in found.items() if name != "examples"}
    return {**numbers, "examples": int(found["examples"]), "step": int(restored.state.train.step)}

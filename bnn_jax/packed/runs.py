"""The packed network of a training run."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn

from bnn_jax.data import Dataset, ImageStream
from bnn_jax.errors import UsageError
from bnn_jax.packed.freezing import freeze
from bnn_jax.paths import local_path
from bnn_jax.stages.teachers import load_network
from bnn_jax.training.config import Config, ModelConfig
from bnn_jax.training.data_record import data_of_run
from bnn_jax.training.experiment import make_model
from bnn_jax.training.run_folder import read_config


class FrozenRun(NamedTuple):
    """A run and its network, trained and packed."""

    config: Config
    dataset: Dataset | ImageStream
    settings: ModelConfig
    model: nn.Module
    variables: dict[str, Any]
    packed: dict[str, Any]


def freeze_run(
    workdir: str | Path,
    *,
    which: Literal["best", "last"] = "best",
    data_dir: str | None = None,
    data: Any | None = None,
    config: Config | None = None,
) -> FrozenRun:
    """Load a run's network and freeze it.

    Args:
      workdir: folder of the run, finished or not.
      which: the variables of the best validation epoch, or of the newest checkpoint.
      data_dir: where the data set lies now; None is where the run found it.
      data: the arrays that the run was given, as :func:`bnn_jax.training.loop.train` took them.
      config: of the run, as this process has it; None reads it, which cannot have what no name finds again.

    Raises:
      UsageError: if there is no run or checkpoint, or the network cannot be packed.
    """
    workdir = local_path("workdir", workdir)
    config = read_config(workdir) if config is None else config
    if data_dir is not None:
        config = replace(config, data=replace(config.data, data_dir=data_dir))
    dataset = data_of_run(workdir, config, data)
    settings, variables = load_network(workdir, dataset, which=which, config=config)
    model = make_model(settings, num_classes=dataset.num_classes)
    try:
        packed = freeze(model, variables, dataset.image_shape)
    except ValueError as error:
        raise UsageError(f"`workdir` (={workdir}) holds a network that cannot be packed: {error}") from None
    return FrozenRun(config, dataset, settings, model, variables, packed)

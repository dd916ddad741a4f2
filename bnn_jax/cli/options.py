"""Options that several scripts have, as dataclasses for tyro."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from bnn_jax.training.config import Settings


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """A config file with overrides, and where to write."""

    settings: Settings
    config: Path = Path("configs/digits_xnor.py")
    """Python file with get_config()."""
    workdir: Path | None = None
    """Folder to write into; by default one in runs/, named after what runs."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(ConfigOptions):
    """On what one run at a time is trained, and how images are read."""

    devices: int | None = None
    """To divide each batch among; all by default."""
    workers: int = 0
    """Processes that read images from disk, where the config has data.stream; 0 takes threads."""
    strict: bool = False
    """Refuse corrupt images of a stream, which are else left out with a warning."""


@dataclass(frozen=True, kw_only=True)
class SweepOptions(ConfigOptions):
    """How many runs are trained."""

    execution: Literal["auto", "sequential", "processes", "vmapped"] = "auto"
    """One run after another, one process a core, or mapped together on the device; auto measures, once, where it may
    pay."""
    jobs: int | None = None
    """Processes at a time; None takes one for each core."""


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions(SweepOptions):
    """Rows that are trained with the same seeds and tuning budget."""

    seeds: tuple[int, ...] = (0, 1, 2)
    tune: bool = False
    """Choose each learning rate on the validation split, the same number of trials for each row."""


@dataclass(frozen=True, kw_only=True)
class TrainedOptions:
    """A trained network and the images to run it on."""

    workdir: tyro.conf.Positional[Path]
    """Folder of a run, finished or not."""
    split: Literal["train", "validation", "test"] = "test"
    """Of the data set."""
    which: Literal["best", "last"] = "best"
    """The variables of the best validation epoch, or of the newest checkpoint."""
    data_dir: str | None = None
    """Where the data set lies now, if not where the run found it."""

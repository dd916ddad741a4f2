"""What a run starts from where its config says `init_from`: weights of a file, or of another run."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bnn_jax.checks import check_options, require
from bnn_jax.convert import from_arrays, load_weights
from bnn_jax.data import Dataset, ImageStream
from bnn_jax.errors import RunError, UsageError
from bnn_jax.paths import local_path
from bnn_jax.training.checkpoint import checkpoint_steps
from bnn_jax.training.config import Config
from bnn_jax.training.experiment import make_model
from bnn_jax.training.manifest import Damaged, read_leaves, read_manifest
from bnn_jax.training.run_folder import recorded
from bnn_jax.training.state import WHICH


def with_start(config: Config, workdir: Path | None = None) -> Config:
    """The config with the hash of what it starts from, so that the run goes on with the same alone.

    Where that is not there any more it is that of the run in `workdir`, if this one was begun from it.

    Raises:
      UsageError: if it is not there, or there are options without it.
      RunError: if it cannot be read.
    """
    if config.init_from is None:
        lone = not config.init_options and config.init_sha256 is None
        require("init_options", dict(config.init_options), lone, "is for `init_from`; give that too", error=UsageError)
        return config
    path = local_path("init_from", config.init_from)
    if path.is_dir():
        digest = hashlib.sha256()
        for name, array in sorted(variables_of_run(path, config.init_options.get("which", "best")).items()):
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + np.ascontiguousarray(array).tobytes())
        return replace(config, init_sha256=digest.hexdigest())
    try:
        return replace(config, init_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    except FileNotFoundError:
        begun = [] if workdir is None else recorded(workdir, "config")
        kept = [own["init_sha256"] for own in begun if own.get("init_from") == config.init_from]
        if kept:
            return replace(config, init_sha256=kept[0])
        raise UsageError(f"`init_from` (={path}) is not there; give a file of weights or the folder of a run") from None
    except OSError as error:
        raise RunError(f"cannot read {path} ({error.strerror}); make it readable") from None


def check_not_own(init_from: str | None, workdir: Path) -> None:
    """Refuse a run that would start from its own folder: what it starts from would change while it trains.

    Raises:
      UsageError: for one.
    """
    if init_from is not None:
        start, own = local_path("init_from", init_from).resolve(), workdir.resolve()
        rule = "lies in the run's own folder; give another `--workdir`"
        require("init_from", init_from, own not in (start, *start.parents), rule, error=UsageError)


def start_of(config: Config, dataset: Dataset | ImageStream) -> dict[str, Any] | None:
    """The variables that a run of `config` starts from; None for random ones.

    Raises:
      UsageError: listing what is missing, unknown or of another shape.
    """
    if config.init_from is None:
        return None
    path, options = local_path("init_from", config.init_from), dict(config.init_options)
    options |= {name: (value,) for name in ("fresh", "ignored") if isinstance(value := options.get(name), str)}
    model = make_model(config.model, num_classes=dataset.num_classes)
    try:
        if not path.is_dir():
            return load_weights(path, model, dataset.image_shape, **options)
        which = options.pop("which", "best")
        check_options("init_options", from_arrays, options)
        return from_arrays(variables_of_run(path, which), model, dataset.image_shape, **options)
    except UsageError as error:
        raise UsageError(f"`init_from` (={path}) does not start this run: {error}") from None


def variables_of_run(folder: Path, which: Literal["best", "last"] = "best") -> dict[str, np.ndarray]:
    """The variables in the newest checkpoint of a run, of whatever network: name, as params/conv1/kernel -> array.

    Args:
      folder: of the run.
      which: those of the best validation epoch, or the newest.

    Raises:
      UsageError: if there is no checkpoint, or another word as `which`, which is `init_options.which` of a config.
      RunError: if it does not verify.
    """
    require("init_options.which", which, which in WHICH, "must be best or last", error=UsageError)
    checkpoints = folder.absolute() / "checkpoints"
    steps = checkpoint_steps(checkpoints)
    if not steps:
        raise UsageError(f"`init_from` (={folder}) holds no checkpoint of a run; train it first")
    try:
        leaves = read_leaves(checkpoints, steps[-1], read_manifest(checkpoints, steps[-1]), finite=True)
    except Damaged as damage:
        raise RunError(f"checkpoint {steps[-1]} of {folder} does not verify: {damage}; resume that run first") from None
    heads = ("best.params.", "best.model_state.")
    if which == "last":
        heads = ("train.params.", "train.model_state.", "train.average.")
    found = {}
    for head in heads:
        collection = "params/" if head.endswith(".params.") else ""
        own = {name.removeprefix(head): array for name, array in leaves.items() if name.startswith(head)}
        found |= {collection + name.replace(".", "/"): array for name, array in own.items()}
    return found

"""What a run was trained on, in its `data.json`: sizes, names of the classes, and a hash by which others show."""

import warnings
from pathlib import Path
from typing import Any

from bnn_jax.data import Dataset, ImageStream
from bnn_jax.errors import UsageError
from bnn_jax.paths import local_path
from bnn_jax.training.config import Config, DataConfig
from bnn_jax.training.input_pipeline import load_data, with_data
from bnn_jax.training.run_folder import has_begun, read_checksummed, write_checksummed

FILE = "data.json"

KIND = {name: f"`{name}`" for name in ("shape", "num_classes", "class_names")} | {"train": "training examples"}
"""What must stay as it was when a run was begun -> what messages call it; an epoch has steps by the last."""


class ChangedDataWarning(UserWarning):
    """The data of a run are not those with which it was begun; the text names its folder."""


def describe_dataset(dataset: Dataset | ImageStream) -> dict[str, Any]:
    """What a report says of a data set: name, note, sizes of images and splits."""
    sizes = {name: len(getattr(dataset, name)) for name in ("train", "validation", "test")}
    images = {"shape": list(dataset.image_shape), "num_classes": dataset.num_classes}
    return {"name": dataset.name, "note": dataset.note, **images, **sizes}


def data_of_run(workdir: Path, config: Config, data: Any | None) -> Dataset | ImageStream:
    """The data of a run that has begun: loaded, or those that it was given.

    Raises:
      UsageError: for other data than the run's own.

    Warns:
      ChangedDataWarning: if what its config names has other images or labels now.
    """
    named, dataset = with_data(config, data)
    if named.data.name != config.data.name:
        raise UsageError(f"`data` is {named.data.name!r}, but the run was trained on {config.data.name!r}; give that")
    dataset = load_data(named.data) if dataset is None else dataset
    _warn_if_other(workdir, config.data, dataset)
    return dataset


def record_data(workdir: Path, data: DataConfig, dataset: Dataset | ImageStream) -> None:
    """Write what the run in `workdir` is trained on; of one that has begun, see that it goes on with the same.

    Raises:
      UsageError: if it has begun with images or classes of another kind.
      RunError: if it cannot be written.

    Warns:
      ChangedDataWarning: if it has begun with other images or labels of that kind.
    """
    described = describe_dataset(dataset)
    described["class_names"] = None if dataset.class_names is None else list(dataset.class_names)
    described["arrays"] = dataset.digest
    described["file"] = _size_and_time(data)
    before = (_recorded(workdir) if has_begun(workdir) else None) or described
    for key, name in KIND.items():
        if described[key] != before[key] and None not in (described[key], before[key]):
            raise UsageError(
                f"the data of {workdir} have the {name} {described[key]} now, but had {before[key]} when the run was "
                "begun; give those, or choose another `--workdir`"
            )
    if before["arrays"] not in (None, described["arrays"]):
        _warn(workdir, data)
        described = before
    write_checksummed(workdir / FILE, described)


def warn_if_changed(workdir: Path, data: DataConfig) -> None:
    """Warn where a finished run was trained on a file that has since been written with other contents."""
    recorded, file = _recorded(workdir), _size_and_time(data)
    if recorded is not None and file not in (None, recorded["file"]):
        _warn_if_other(workdir, data, load_data(data))


def _warn_if_other(workdir: Path, data: DataConfig, dataset: Dataset | ImageStream) -> None:
    recorded = _recorded(workdir)
    if recorded is not None and recorded["arrays"] not in (None, dataset.digest):
        _warn(workdir, data)


def _recorded(workdir: Path) -> dict[str, Any] | None:
    """What :func:`record_data` wrote; None if there is nothing, or what an earlier version wrote, without digests."""
    recorded = read_checksummed(workdir / FILE)
    return recorded if recorded is not None and {"arrays", "file", "class_names"} <= recorded.keys() else None


def _size_and_time(data: DataConfig) -> list[int] | None:
    """Of a set in one file, if it is there."""
    path = local_path("data.name", data.name)
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None


def _warn(workdir: Path, data: DataConfig) -> None:
    warnings.warn(
        f"the images or labels of `data.name` (={data.name!r}) are not those with which the run in {workdir} was "
        "begun; give those, or train anew with `--overwrite`",
        ChangedDataWarning,
        stacklevel=3,
    )

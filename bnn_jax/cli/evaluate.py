"""Evaluate a run or a file: bnn-jax evaluate runs/mine --split test --which best

A file of bnn-jax export takes the place of the run, bnn-jax evaluate model.bnn.safetensors; zoo:NAME is that of a
network of `bnn-jax list pretrained`.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import tyro

from bnn_jax.cli.options import TrainedOptions, parse_options, refuse_unread
from bnn_jax.compilation import use_compilation_cache
from bnn_jax.data import Dataset, ImageStream, Split, in_batches
from bnn_jax.errors import UsageError
from bnn_jax.packed import load
from bnn_jax.training.config import DataConfig
from bnn_jax.training.epoch import EVALUATION_BATCH
from bnn_jax.training.evaluation import evaluate_run
from bnn_jax.training.input_pipeline import load_data
from bnn_jax.zoo import PRETRAINED, file_of

ZOO = "zoo:"
"""What the name of a pretrained network is told by."""


@dataclass(frozen=True, kw_only=True)
class Arguments(TrainedOptions):
    workdir: tyro.conf.Positional[Path]
    """Folder of a run, finished or not, a file of bnn-jax export, or zoo:NAME."""
    data: str | None = None
    """The data set for a file, if not the one that it names."""
    model: str | None = None
    """package.module:Name of the network of a file that does not name one which can be imported."""


def evaluate_trained(arguments: Arguments) -> str:
    """What the run's checkpoint reaches."""
    if arguments.data is not None:
        raise UsageError(
            f"`data` (={arguments.data!r}) is for a file; a run is evaluated on its own data, leave it out"
        )
    refuse_unread(arguments, ("model",), "is for a file; a run names its network")
    options = {"split": arguments.split, "which": arguments.which, "data_dir": arguments.data_dir}
    try:
        found = evaluate_run(arguments.workdir, **options)
    except UsageError:
        if arguments.workdir.exists():
            raise
        named = str(arguments.workdir)
        others = "bnn-jax list pretrained names those of the zoo"
        hint = f"did you mean {ZOO}{named}?" if named in PRETRAINED else others
        kinds = f"is no folder of a run, no file of bnn-jax export and no {ZOO}NAME"
        raise UsageError(f"`workdir` (={named}) {kinds}; {hint}") from None
    top5 = f", top-5 {100 * found['top5_accuracy']:.2f} %" if "top5_accuracy" in found else ""
    top5 += f", perplexity {found['perplexity']:.4f}" if "perplexity" in found else ""
    numbers = (
        f"accuracy {100 * found['accuracy']:.2f} %{top5}, loss {found['loss']:.4f} on {found['examples']} examples"
    )
    return f"{arguments.split}: {numbers} ({arguments.which}, step {found['step']})"


def _data_of(recorded: Any) -> dict[str, Any]:
    """What a file says of its data that is a setting: those of a run, or a name; whoever saves it may write others."""
    recorded = {"name": recorded} if isinstance(recorded, str) else recorded
    known = [field.name for field in fields(DataConfig)]
    return {name: recorded[name] for name in known if name in recorded} if isinstance(recorded, dict) else {}


def _load_other(name: str, recorded: dict[str, Any], data_dir: str | None) -> Dataset | ImageStream:
    """Load another set than the one that a file names.

    Of that one's settings hold the bytes of an example for a text, and the preprocessing for files of images.  It is
    divided as that one where it can be, so that one which was moved has the same splits.
    """
    is_text = name == "text" or name.endswith(".txt")
    of_files = not is_text and name != "digits" and not name.endswith(".npz")
    kept = ("tokens",) if is_text else ("preprocessing", "image_size", "stream") if of_files else ()

    def loaded(*names):
        return load_data(DataConfig(name, data_dir, **{key: recorded[key] for key in names if key in recorded}))

    try:
        return loaded(*kept, "validation_examples", "split_seed")
    except UsageError:
        return loaded(*kept)


def evaluate_file(arguments: Arguments) -> str:
    """What the packed network of a file reaches."""
    refuse_unread(arguments, ("which",), "is for a run; a file holds one network")
    network = load(arguments.workdir, model=arguments.model)
    data = _data_of(network.metadata["tested"].get("data"))
    if arguments.data is None and "name" not in data:
        raise UsageError(f"`data` must name a data set, for {arguments.workdir} names none; as --data cifar10")
    if arguments.data is None:
        dataset = load_data(DataConfig(**data | {"data_dir": arguments.data_dir}))
    else:
        dataset = _load_other(arguments.data, data, arguments.data_dir)
    given = (dataset.image_shape, dataset.num_classes)
    wanted = (network.metadata["image_shape"], network.metadata["num_classes"])
    if given != wanted:
        raise UsageError(
            f"`data` (={dataset.name!r}) has images of shape {given[0]} in {given[1]} classes, but {arguments.workdir} "
            f"takes images of shape {wanted[0]} in {wanted[1]}; choose another `--data`"
        )
    split = getattr(dataset, arguments.split)
    accuracy, examples = network.accuracy(in_batches(split, EVALUATION_BATCH))
    numbers = f"accuracy {100 * accuracy:.2f} %"
    if isinstance(split, Split) and split.labels.ndim > 1:
        numbers += f", perplexity {network.perplexity(in_batches(split, EVALUATION_BATCH)):.4f}"
    return f"{arguments.split}: {numbers} on {examples} examples (packed)"


def main() -> None:
    arguments = parse_options(Arguments, __doc__)
    use_compilation_cache()
    if (named := str(arguments.workdir)).startswith(ZOO):
        arguments = replace(arguments, workdir=file_of(named.removeprefix(ZOO)))
    is_run = arguments.workdir.suffix != ".safetensors" and not arguments.workdir.is_file()
    print(evaluate_trained(arguments) if is_run else evaluate_file(arguments))

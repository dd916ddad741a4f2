"""Pack a run into one file: bnn-jax export runs/mine -o model.bnn.safetensors

The file holds the weights as bits, batch norms as thresholds where they can be, the rest in full precision, and what
`bnn_jax.packed.load` needs to run it.  The accuracy that it states is that of the packed network.  By its ending, or
--to, another form is written instead: FILE.npz holds the -1/+1 weights, scales and thresholds as NumPy arrays and the
steps that compute with them (docs/numpy_inference.py), FILE.h the same as constants of C; FILE.tflite is for the Larq
Compute Engine, FILE.stablehlo for `jax.export.deserialize`: for cpu, cuda and tpu, and every batch size.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from bnn_jax.analysis.accounting import account_model
from bnn_jax.cli.options import TrainedOptions, parse_options
from bnn_jax.compilation import use_compilation_cache
from bnn_jax.data import in_batches
from bnn_jax.errors import RunError, UsageError
from bnn_jax.files import write_atomically
from bnn_jax.packed import PackedModel, save, to_stablehlo, write_header, write_npz, write_tflite
from bnn_jax.packed.artifact import rounded
from bnn_jax.packed.runs import freeze_run
from bnn_jax.paths import require_ending, require_writable
from bnn_jax.training.config import DataConfig
from bnn_jax.training.epoch import EVALUATION_BATCH

ENDINGS = {
    "safetensors": ".bnn.safetensors",
    "npz": ".npz",
    "header": ".h",
    "tflite": ".tflite",
    "stablehlo": ".stablehlo",
}
"""The forms and the endings of their files."""


@dataclass(frozen=True, kw_only=True)
class Arguments(TrainedOptions):
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The file to write; its ending says the form.  None is model with the ending of --to, model.bnn.safetensors."""
    to: Literal["safetensors", "npz", "header", "tflite", "stablehlo"] | None = None
    """The form, where the ending of the file does not say it."""
    float16: bool = False
    """Keep what stays real in half of the bytes."""


def pack(arguments: Arguments) -> tuple[PackedModel, dict[str, Any]]:
    """The packed network of a run, with what describes it in the file, and its trained variables."""
    config, dataset, settings, model, variables, packed = freeze_run(
        arguments.workdir, which=arguments.which, data_dir=arguments.data_dir
    )
    shape, num_classes = dataset.image_shape, dataset.num_classes
    described = {"image_shape": shape, "mean": dataset.mean, "std": dataset.std}
    network = PackedModel(model, rounded(packed) if arguments.float16 else packed, described)
    accuracy, examples = network.accuracy(in_batches(getattr(dataset, arguments.split), EVALUATION_BATCH))
    described |= {
        "model": vars(settings),
        "num_classes": num_classes,
        "accounting": account_summary(model, shape),
        "tested": {
            "accuracy": accuracy,
            "examples": examples,
            "split": arguments.split,
            "which": arguments.which,
            "data": data_settings(config.data),
        },
    }
    return replace(network, metadata=described), variables


def account_summary(model: Any, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Storage and operations for one image, everything counted."""
    counted = account_model(model, image_shape)
    weights = {str(bits): count for bits, count in counted.quantized_weights.items()}
    weights["32"] = counted.full_precision_weights
    return {
        "weights_by_bits": weights,
        "payload_bytes": counted.payload_bytes(),
        "macs": counted.macs().total,
        "flops": counted.flops(),
    }


def data_settings(data: DataConfig) -> dict[str, Any]:
    """What decides the images of a split, wherever they lie."""
    deciding = ("name", "validation_examples", "split_seed", "stream", "preprocessing", "image_size", "tokens")
    return {name: getattr(data, name) for name in deciding}


def form_and_file(to: str | None, output: Path | None) -> tuple[str, Path]:
    """The form that --to or the ending of the file says, and the file.

    Raises:
      UsageError: for another ending.

    >>> form_and_file("header", None)[0], form_and_file(None, Path("net.npz"))[0], form_and_file(None, Path("net"))[0]
    ('header', 'npz', 'safetensors')
    """
    output = Path(f"model{ENDINGS[to or 'safetensors']}") if output is None else output
    require_ending("output", output, *(ENDINGS.values() if to is None else [ENDINGS[to]]))
    forms = {Path(ending).suffix or ending: form for form, ending in ENDINGS.items()}
    return to or forms.get(output.suffix.lower(), "safetensors"), output


def write(form: str, output: Path, network: PackedModel, variables: Any, half: bool) -> str:
    """Write the file; returns what is to be said of it."""
    if form == "tflite":
        write_tflite(output, network.model, variables, network.metadata["image_shape"])
        return "takes normalized float32 images one by one"
    if form == "stablehlo":
        write_atomically(output, to_stablehlo(network))
        return "takes uint8 images"
    if form == "npz":
        write_npz(output, network)
        return "arrays and steps, for docs/numpy_inference.py"
    if form == "header":
        write_header(output, network)
        return "constants of C"
    header, _ = save(output, network, float16=half)
    return f"of them {header:,} of header"


def main() -> None:
    arguments = parse_options(Arguments, __doc__)
    use_compilation_cache()
    form, output = form_and_file(arguments.to, arguments.output)
    if arguments.float16 and form != "safetensors":
        ending = ENDINGS[form]
        raise UsageError(f"`float16` (=True) is not for {ending} files; leave it out, or name another ending")
    require_writable("output", output)
    network, variables = pack(arguments)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        said = write(form, output, network, variables, arguments.float16)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"`output` (={output}) cannot be written: {error}") from None
    except OSError as error:
        raise RunError(f"cannot write {output} ({error.strerror}); make room, or choose another `--output`") from None
    joint = "," if form == "safetensors" else ";"
    print(f"{output}: {output.stat().st_size:,} bytes{joint} {said}")
    trained = (variables["params"], variables.get("batch_stats", {}))
    float32_bytes, size = 4 * sum(leaf.size for leaf in jax.tree.leaves(trained)), output.stat().st_size
    print(f"in float32: {float32_bytes:,} bytes, {float32_bytes / size:.1f} times as many")
    tested = network.metadata["tested"]
    print(f"{tested['split']}: accuracy {100 * tested['accuracy']:.2f} % on {tested['examples']} examples ", end="")
    print(f"({tested['which']}, packed)")

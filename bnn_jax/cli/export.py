"""Pack a run into one file: bnn-jax export runs/mine -o model.bnn.safetensors

The file holds the weights as bits, batch norms as thresholds where they can be, the rest in full precision, and what
`bnn_jax.packed.load` needs to run it.  The accuracy that it states is that of the packed network.  By its ending,
FILE.tflite is for the Larq Compute Engine instead, and FILE.stablehlo for `jax.export.deserialize`: for cpu, cuda and
tpu, and every batch size.  Another ending is refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from bnn_jax.analysis.accounting import account_model
from bnn_jax.cli.options import TrainedOptions, parse_options
from bnn_jax.data import in_batches
from bnn_jax.errors import UsageError
from bnn_jax.files import write_atomically
from bnn_jax.packed import PackedModel, save, to_stablehlo, write_tflite
from bnn_jax.packed.artifact import rounded
from bnn_jax.packed.runs import freeze_run
from bnn_jax.paths import require_ending
from bnn_jax.training.config import DataConfig
from bnn_jax.training.epoch import EVALUATION_BATCH
from bnn_jax.training.programs import use_compilation_cache


@dataclass(frozen=True, kw_only=True)
class Arguments(TrainedOptions):
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("model.bnn.safetensors")
    """The file to write; its ending says the format."""
    float16: bool = False
    """Keep what stays real in half of the bytes."""


def pack(arguments: Arguments) -> tuple[PackedModel, dict[str, Any], dict[str, Any]]:
    """The packed network of a run, what describes it in the file, and its trained variables."""
    config, dataset, settings, model, variables, packed = freeze_run(
        arguments.workdir, which=arguments.which, data_dir=arguments.data_dir
    )
    shape, num_classes = dataset.image_shape, dataset.num_classes
    described = {"image_shape": shape, "mean": dataset.mean, "std": dataset.std}
    network = PackedModel(model, rounded(packed) if arguments.float16 else packed, described)
    accuracy, examples = network.accuracy(in_batches(getattr(dataset, arguments.split), EVALUATION_BATCH))
    described |= {
        "settings": vars(settings),
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
    return network, described, variables


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
    deciding = ("name", "validation_examples", "split_seed", "stream", "preprocessing", "image_size")
    return {name: getattr(data, name) for name in deciding}


def main() -> None:
    arguments = parse_options(Arguments, __doc__)
    use_compilation_cache()
    output, ending = arguments.output, arguments.output.suffix.lower()
    require_ending("output", output, ".bnn.safetensors", ".tflite", ".stablehlo")
    if arguments.float16 and ending in (".tflite", ".stablehlo"):
        raise UsageError(f"`float16` (=True) is not for {ending} files; leave it out, or name another ending")
    network, described, variables = pack(arguments)
    if ending == ".tflite":
        write_tflite(output, network.model, variables, described["image_shape"])
        print(f"{output}: {output.stat().st_size:,} bytes; takes normalized float32 images one by one")
    elif ending == ".stablehlo":
        write_atomically(output, to_stablehlo(network))
        print(f"{output}: {output.stat().st_size:,} bytes; takes uint8 images")
    else:
        header, tensors = save(output, variables=network.variables, float16=arguments.float16, **described)
        print(f"{output}: {header + tensors:,} bytes, of them {header:,} of header")
    trained = (variables["params"], variables.get("batch_stats", {}))
    float32_bytes, size = 4 * sum(leaf.size for leaf in jax.tree.leaves(trained)), output.stat().st_size
    print(f"in float32: {float32_bytes:,} bytes, {float32_bytes / size:.1f} times as many")
    tested = described["tested"]
    print(f"{tested['split']}: accuracy {100 * tested['accuracy']:.2f} % on {tested['examples']} examples ", end="")
    print(f"({tested['which']}, packed)")

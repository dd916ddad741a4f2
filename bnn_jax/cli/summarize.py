"""Size and operations of a network: bnn-jax summarize resnet20 --image-size 32 --classes 10

--diagram paths.png draws where its gradients can pass.
--table igp prints Table 1 of Zhu et al., Improving Gradient Paths for Binary Convolutional Neural Networks, each figure
beside the one counted here; --table zoo prints the sizes of all networks, in some minutes.
Nothing is run: the network is traced for one image.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bnn_jax.analysis.account_table import print_account
from bnn_jax.analysis.accounting import EVERYTHING, Convention, account_model, as_dict, network_named
from bnn_jax.analysis.path_diagram import draw_gradient_paths
from bnn_jax.analysis.published_sizes import TABLE, print_sizes
from bnn_jax.analysis.tables import Tables
from bnn_jax.analysis.zoo_sizes import print_zoo_sizes
from bnn_jax.checks import require
from bnn_jax.cli.options import TableOptions, parse_options, refuse_unread, write_output
from bnn_jax.data.text import BYTES
from bnn_jax.errors import UsageError, renamed
from bnn_jax.models.build import settings_taken
from bnn_jax.paths import require_ending, require_writable
from bnn_jax.training.options import Options

LARGE_IMAGES = 64
SETTINGS = ("width", "input_scaling", "input_quantizer", "input_quantizer_options")
SETTINGS += ("kernel_quantizer", "kernel_quantizer_options", "quantizers")


@dataclass(frozen=True)
class Arguments(TableOptions):
    model: tyro.conf.Positional[str | None] = None
    """A network of `bnn-jax list models`."""
    table: Literal["igp", "zoo"] | None = None
    """A published table instead of a network, or all networks."""
    width: int | None = None
    """Of the network's own unit, most often the filters of its first stage; None takes the published width."""
    image_size: int = 32
    """Height and width of the image."""
    channels: int = 3
    """Of the image."""
    tokens: int | None = None
    """Of a text in the image's place, for a network of texts, as bitnet_lm."""
    classes: int | None = None
    """None takes 10, 1000 for images from 64x64 on, and 256 for texts."""
    stem: Literal["cifar", "imagenet"] | None = None
    """None takes that of the image size, for a network that has stems."""
    input_quantizer: str | None = None
    """Of the activations; None takes the published one, full_precision turns quantization off."""
    input_quantizer_options: Options = field(default_factory=dict)
    """Of the input quantizer, as: bits 2"""
    kernel_quantizer: str | None = None
    """Of the weights; None takes the published one, full_precision turns quantization off."""
    kernel_quantizer_options: Options = field(default_factory=dict)
    """Of the kernel quantizer, as: bits 2"""
    quantizers: Options = field(default_factory=dict)
    """Of single layers, as: stage3_* real head 8-bit"""
    input_scaling: bool = False
    """XNOR-Net's map K."""
    options: Options = field(default_factory=dict)
    """What else this network's constructor takes, as: extra_layers 1"""
    counted: Annotated[Convention, tyro.conf.arg(name="")] = EVERYTHING
    json: Path | None = None
    """File for all the numbers."""
    diagram: Path | None = None
    """PNG file for a picture of the gradient paths: binary convolutions with their costs, shortcuts, joins."""


def network_of(arguments: Arguments) -> Any:
    """The network that the command line names."""
    large = arguments.image_size >= LARGE_IMAGES
    options, taken = dict(arguments.options), settings_taken(arguments.model, argument="model")
    if arguments.stem is not None:
        for holds, rule in (
            (taken is None or "stem" in taken, f"is not an option of {arguments.model}; leave it out"),
            (
                options.setdefault("stem", arguments.stem) == arguments.stem,
                f"is another than the stem of `options`, {options['stem']}; leave one out",
            ),
        ):
            require("stem", arguments.stem, holds, rule, error=UsageError)
    elif "stem" in (taken or ()):
        options.setdefault("stem", "imagenet" if large else "cifar")
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    classes = arguments.classes or (BYTES if arguments.tokens else 1000 if large else 10)
    return network_named(arguments.model, num_classes=classes, options=options, **settings)


def summarize_table(arguments: Arguments, tables: Tables) -> dict[str, Any]:
    """Print a published table, or that of all networks; returns it as plain JSON values."""
    rows = print_zoo_sizes(tables) if arguments.table == "zoo" else print_sizes(TABLE, tables)
    return {"table": arguments.table, "rows": rows}


def summarize_network(arguments: Arguments, tables: Tables) -> dict[str, Any]:
    """Print the account of a network and draw its gradient paths, if asked to; returns the account."""
    side, tokens = arguments.image_size, arguments.tokens
    shape = (tokens, 1, 1) if tokens else (side, side, arguments.channels)
    try:
        network = network_of(arguments)
        account = account_model(network, shape)
    except UsageError as error:
        typed = {f"model.{field.name}": field.name for field in fields(arguments)}
        raise UsageError(renamed(str(error), typed)) from None
    except (ValueError, TypeError) as error:
        raise UsageError(f"the network cannot be built: {error}") from None
    print_account(f"{arguments.model}, one image of {'x'.join(map(str, shape))}", account, arguments.counted, tables)
    if arguments.diagram:
        print(draw_gradient_paths(network, (1, *shape), arguments.diagram, train=False))
    return {"model": arguments.model} | as_dict(account, arguments.counted)


def main() -> None:
    arguments = parse_options(Arguments, __doc__)
    for name, ending in (("json", ".json"), ("diagram", ".png")):
        if path := getattr(arguments, name):
            require_ending(name, path, ending)
            require_writable(name, path)
    for name in ("image_size", "channels", "tokens", "classes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"`{name}` (={value}) must be at least 1")
    if arguments.model is None and arguments.table is None:
        raise UsageError("name a network, as `bnn-jax summarize resnet20`, or a `--table`")
    if arguments.model is not None and arguments.table is not None:
        raise UsageError(
            f"`model` (={arguments.model!r}) and `--table` (={arguments.table!r}) cannot go together; "
            "name a network or a table"
        )
    if arguments.tokens:
        refuse_unread(arguments, ("image_size", "channels"), "is for images, not for `--tokens`")
    if arguments.table:
        others, purpose = ("model", "table", "json", "format", "counted"), "is for a network, not for a `--table`"
        refuse_unread(arguments, (field.name for field in fields(Arguments) if field.name not in others), purpose)
        for name, value in arguments.counted._asdict().items():
            if value != getattr(EVERYTHING, name):
                raise UsageError(f"`--no-{name.replace('_', '-')}` {purpose}; leave it out")
    with arguments.tables() as tables:
        record = (summarize_table if arguments.table else summarize_network)(arguments, tables)
    if arguments.json:
        write_output("json", arguments.json, json.dumps(record, indent=1))

"""Continue a text by a language model: bnn-jax sample runs/text_bitnet --prompt "The " --count 200

A file of bnn-jax export takes the place of the run.  The packed network draws the bytes, one after another.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import tyro

from bnn_jax.cli.options import parse_options, refuse_unread
from bnn_jax.compilation import use_compilation_cache
from bnn_jax.data import text_of, tokens_of
from bnn_jax.errors import UsageError
from bnn_jax.models import sample
from bnn_jax.models.bitnet import BitNetLM
from bnn_jax.packed import load
from bnn_jax.packed.runs import freeze_run


@dataclass(frozen=True, kw_only=True)
class Arguments:
    workdir: tyro.conf.Positional[Path]
    """Folder of a run, finished or not, or a file of bnn-jax export."""
    prompt: str = "The "
    """What the text begins with."""
    count: int = 200
    """Bytes to draw."""
    temperature: float = 0.8
    """By which logits are divided; 0 takes the most likely byte."""
    seed: int = 0
    """Of what is drawn."""
    which: Literal["best", "last"] = "best"
    """The variables of a run's best validation epoch, or of its newest checkpoint."""


def continued(arguments: Arguments) -> str:
    """The prompt and what follows.

    Raises:
      UsageError: if the network is none of texts, or an option is out of range.
    """
    if arguments.workdir.is_file():
        refuse_unread(arguments, ("which",), "is for a run; a file holds one network")
        network = load(arguments.workdir)
        model, variables = network.model, network.variables
    else:
        run = freeze_run(arguments.workdir, which=arguments.which)
        model, variables = run.model, run.packed
    if not isinstance(model, BitNetLM):
        raise UsageError(
            f"`workdir` (={arguments.workdir}) holds a {type(model).__name__}, which is no language model; train one: "
            "bnn-jax train --config text_bitnet"
        )
    drawing = {"temperature": arguments.temperature, "key": jax.random.key(arguments.seed)}
    try:
        tokens = sample(model, variables, tokens_of(arguments.prompt), arguments.count, **drawing)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return arguments.prompt + text_of(tokens[0])


def main() -> None:
    arguments = parse_options(Arguments, __doc__)
    use_compilation_cache()
    print(continued(arguments))

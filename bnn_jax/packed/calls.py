"""What a layer is called with, as an interceptor of Flax sees it."""

from collections.abc import Mapping, Sequence
from typing import Any


def input_of(arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """The first argument, also where it was given by its name, x."""
    return arguments[0] if arguments else options["x"]

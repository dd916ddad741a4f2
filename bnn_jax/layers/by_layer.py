"""Quantizers of single layers of a network, chosen by patterns of their names."""

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from bnn_jax.checks import look_up, require
from bnn_jax.layers.arguments import QUANTIZERS
from bnn_jax.quantizers import Quantized, Quantizer, make_quantizer

REAL = Quantizer(apply=lambda x: Quantized(x, jnp.ones((), x.dtype)), code_set=())
"""Inputs that stay real in a network built for quantized ones: its layers apply the activation themselves."""

CHOICES: dict[str, dict[str, Any]] = {
    "real": {"input_quantizer": None, "kernel_quantizer": None, "gradient_quantizer": None},
    "binary": {"input_quantizer": "ste_sign", "kernel_quantizer": "xnor"},
    "8-bit": {"input_quantizer": "bitnet", "kernel_quantizer": partial(QUANTIZERS["kernel_quantizer"]["wrpn"], bits=8)},
}
"""name -> the quantizers of a layer."""


class LayerQuantizers(Mapping):
    """A network's quantizers as keyword arguments of a layer, and those of the layers whose names match patterns.

    Attributes:
      given: the patterns as they were given.
      own: argument of a layer -> the network's quantizer.
      patterns: shell-style pattern -> argument of a layer -> quantizer.
      activation: what stands before a quantized layer's inputs where they stay real.
      around_input: what the network makes of the input quantizer that a pattern gives such a layer.
    """

    def __init__(self, own: Mapping[str, Any], patterns: Mapping[str, Any]):
        require("quantizers", patterns, isinstance(patterns, Mapping), "must be a mapping of patterns", FORMS)
        self.given, self.own = dict(patterns), dict(own)
        self.patterns = {pattern: _settings(pattern, choice) for pattern, choice in patterns.items()}
        self.activation: Callable[[Array], Array] = lambda x: x
        self.around_input: Callable[[Quantizer], Quantizer] = lambda quantizer: quantizer
        if self.patterns and own["input_quantizer"] is None:
            self.own["input_quantizer"] = REAL

    def __getitem__(self, argument: str) -> Any:
        return self.own[argument]

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, LayerQuantizers) and (self.own, self.given) == (other.own, other.given)

    def __hash__(self) -> int:
        return hash((*self.own, *self.given))

    def __or__(self, others: Mapping[str, Any]) -> dict[str, Any]:
        return self.own | dict(others)

    def of(self, path: tuple[str, ...]) -> dict[str, Any]:
        """The quantizers by the first pattern that matches the layer at `path`, or a module that it is in."""
        names = ["/".join(path[:depth]) for depth in range(1, len(path) + 1)]
        matching = (choice for pattern, choice in self.patterns.items() if any(fnmatchcase(n, pattern) for n in names))
        return next(matching, {})

    def require_matches(self, paths: Mapping[str, Any]) -> None:
        """Refuse a pattern that matches none of the layers at these paths.

        Raises:
          ValueError: naming the layers.
        """
        for pattern in self.patterns:
            names = ("/".join(p.split("/")[:depth]) for p in paths for depth in range(1, p.count("/") + 2))
            matches = any(fnmatchcase(name, pattern) for name in names)
            require("quantizers", pattern, matches, "matches no layer", f"the layers are {', '.join(paths)}")


FORMS = f"to each a name of {', '.join(CHOICES)}, a pair (input_quantizer, kernel_quantizer) or a dict of arguments"


def _settings(pattern: str, choice: Any) -> dict[str, Any]:
    """The quantizers by argument that a name in CHOICES, a pair or a mapping stands for; None is "real"."""
    argument = f"quantizers[{pattern!r}]"
    choice = look_up(argument, "real" if choice is None else choice, CHOICES)
    if isinstance(choice, tuple | list) and len(choice) == 2:
        choice = dict(zip(("input_quantizer", "kernel_quantizer"), choice))
    known = isinstance(choice, Mapping) and choice.keys() <= QUANTIZERS.keys()
    require(argument, choice, known, f"must be a name of {', '.join(CHOICES)}, a pair or a dict of arguments")
    return {kind: make_quantizer(QUANTIZERS[kind], given, argument=argument) for kind, given in choice.items()}


def quantizers_of(parent: nn.Module, name: str) -> dict[str, Any]:
    """What the network around a module chooses, by patterns, for the layer that will have that `name` in the module."""
    network = _network_around(parent)
    return {} if network is None else network.quantizers.of((*parent.path, name)[len(network.path) :])


def _network_around(module: Any) -> Any:
    """The outermost module with the quantizers of a network, from a module on outwards."""
    network = None
    while isinstance(module, nn.Module):
        if isinstance(getattr(module, "quantizers", None), LayerQuantizers):
            network = module
        module = module.parent
    return network


def take_quantizers(layer: nn.Module) -> None:
    """Give a layer what the network around it chooses: its `execution`, and quantizers by patterns.

    See :class:`LayerQuantizers`.
    """
    network = _network_around(layer.parent)
    if network is None or layer.scope is None:
        return
    if hasattr(layer, "execution") and layer.execution is None:
        object.__setattr__(layer, "execution", network.execution)
    quantizers = network.quantizers
    if not quantizers.patterns:
        return
    own = {kind: getattr(layer, kind) for kind in QUANTIZERS}
    by_pattern = quantizers.of(layer.path[len(network.path) :])
    chosen = own | by_pattern
    if own["input_quantizer"] is not None and chosen["input_quantizer"] in (None, REAL):
        chosen |= {"input_quantizer": None, "real_activation": lambda x: quantizers.activation(x)}
        for_codes = {"input_scaling": False, "pad_value": 0}
        chosen |= {argument: value for argument, value in for_codes.items() if hasattr(layer, argument)}
    elif own["input_quantizer"] is not None and "input_quantizer" in by_pattern:
        chosen["input_quantizer"] = quantizers.around_input(chosen["input_quantizer"])
    for argument, value in chosen.items():
        object.__setattr__(layer, argument, value)

"""build_model: a network of the table from names, numbers and options, as a config or a file states them."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from bnn_jax.checks import look_up, require
from bnn_jax.errors import UsageError, unknown_name
from bnn_jax.layers.arguments import QUANTIZERS
from bnn_jax.models import MODELS, ModelEntry
from bnn_jax.names import last_part, name_of
from bnn_jax.outputs import init_network
from bnn_jax.quantizers import has_option, make_quantizer
from bnn_jax.types import LATENT_KERNEL

LARGEST = {"width": 2**16, "num_classes": 2**20, "image_shape": 2**10, "options": 2**9, "bases": 16, "bits": 12}
"""Bounds of what decides how long a network takes to trace, see :func:`check_extent`."""


NetworkLike: TypeAlias = str | ModelEntry | nn.Module | Callable[..., nn.Module]
"""What stands for a network: a name in MODELS or ``package.module:Name``, an entry as there, a Flax module, its class,
a function that makes one."""


def entry_of(network: NetworkLike, *, argument: str = "name") -> ModelEntry:
    """The entry of a network: that of a name in MODELS, or a new one, whose quantizers are its own matter.

    Raises:
      UsageError: for a name that is not in MODELS, the nearest is named, or cannot be imported; for what is no network.
    """
    found = look_up(argument, network, MODELS)
    if isinstance(found, ModelEntry):
        return found
    rule = "must be a name, a module of flax.linen, its class or a function that makes one"
    holds = issubclass(found, nn.Module) if isinstance(found, type) else callable(found)
    require(argument, last_part(network), holds, rule, "nnx has `flax.nnx.bridge.ToLinen`", error=UsageError)
    return ModelEntry(found, None, None)


def settings_taken(network: NetworkLike, *, argument: str = "name") -> Collection[str] | None:
    """The names of the settings that what makes a network takes; none if it is made; None if it takes any.

    >>> sorted(settings_taken("lenet") - settings_taken("mnist_mlp"))
    ['extra_layers', 'input_scaling', 'kernel_size']
    """
    constructor = entry_of(network, argument=argument).constructor
    if isinstance(constructor, nn.Module):
        return set()
    try:
        taken = inspect.signature(constructor).parameters
    except ValueError:  # Some of Python's own say nothing of their arguments.
        return None
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    return None if takes_any else taken.keys() - {"parent"}


def quantizer_settings(name: NetworkLike, **given: Any) -> dict[str, Any]:
    """The quantizers of a network by their names: those given, else those it was published with.

    Options that are given go before the published ones.  A network out of the table has None where none is given: its
    own.

    Args:
      name: of the network, or what :func:`entry_of` takes else.
      **given: `input_quantizer`, `kernel_quantizer`, `gradient_quantizer`, where None is the published one, and their
        `input_quantizer_options`, `kernel_quantizer_options`, `gradient_quantizer_options`.

    Returns:
      All six, as keyword arguments of :func:`build_model`.

    Raises:
      UsageError: for another argument; the nearest is named.

    >>> print(quantizer_settings("tbn_resnet18", kernel_quantizer="xnor", input_quantizer_options={"threshold": 0.5}))
    {'input_quantizer': 'tbn', 'input_quantizer_options': {'threshold': 0.5},
     'kernel_quantizer': 'xnor', 'kernel_quantizer_options': {},
     'gradient_quantizer': None, 'gradient_quantizer_options': {}}
    """
    published, settings = entry_of(name)._asdict(), {}
    for kind in QUANTIZERS:
        quantizer, options = given.pop(kind, None), given.pop(f"{kind}_options", {})
        if quantizer is None:
            quantizer, options = published[kind], {**published[f"{kind}_options"], **options}
        settings |= {kind: quantizer, f"{kind}_options": dict(options)}
    if given:
        raise unknown_name("setting", next(iter(given)), settings)
    return settings


def build_model(
    name: NetworkLike,
    *,
    num_classes: int,
    width: int | None = None,
    input_scaling: bool = False,
    options: Mapping[str, Any] = {},
    steps_per_epoch: int | None = None,
    quantizers: Mapping[str, Any] = {},
    **of_network: Any,
) -> nn.Module:
    """A network from names, numbers and options.

    Args:
      name: of the network, or what stands for it else.  A class or function gets of the following arguments those that
        are given, and `num_classes` if it takes it; a module is taken as it is.
      num_classes: of the logits.
      width: of the network's own unit; None takes the published width.
      input_scaling: XNOR-Net's map K.
      options: what else the network's constructor takes; a single value stands for a tuple of one.
      steps_per_epoch: for quantizers with the option `period_steps`, which do something once an epoch; in training.
      quantizers: of single layers by patterns of their names, see :class:`bnn_jax.models.network.Network`.
      **of_network: `input_quantizer`, `kernel_quantizer`, `gradient_quantizer`, by their names in the tables or as
        :func:`bnn_jax.quantizers.make_quantizer` takes them else, and their `input_quantizer_options`,
        `kernel_quantizer_options`, `gradient_quantizer_options`; see :func:`quantizer_settings`.

    Raises:
      ValueError: for a name that is not in a table (the nearest is named), or a value that the network or a quantizer
        refuses.
      TypeError: for an option that the network does not have.

    >>> model = build_model("lenet", num_classes=10, width=4, options={"extra_layers": 1})
    >>> model.width, model.extra_layers, model.input_quantizer, model.kernel_quantizer.code_set
    (4, 1, None, (-1, 1))
    >>> build_model("bireal_resnet20", num_classes=10, options={"stage_sizes": 2}).stage_sizes
    (2,)
    """
    constructor, settings = entry_of(name).constructor, quantizer_settings(name, **of_network)
    given: dict[str, Any] = {} if width is None else {"width": width}
    given |= {"input_scaling": True} if input_scaling else {}
    given |= {"quantizers": quantizers} if quantizers else {}
    for kind, table in QUANTIZERS.items():
        quantizer, own = settings[kind], settings[f"{kind}_options"]
        if steps_per_epoch is not None and has_option(table, quantizer, "period_steps", argument=kind):
            own = {"period_steps": steps_per_epoch} | own
        made = make_quantizer(table, quantizer, argument=kind, **own)
        given |= {} if quantizer is None else {kind: made}
    if isinstance(constructor, nn.Module):
        for setting, value in (given | dict(options)).items():
            require(setting, value, False, f"is for what makes a network; this {type(constructor).__name__} is made")
        return constructor
    taken, parameters = settings_taken(name), inspect.signature(constructor).parameters
    given |= {"num_classes": num_classes} if taken is None or "num_classes" in taken else {}
    needed = {kind for kind in QUANTIZERS if kind in parameters and parameters[kind].default is inspect.Parameter.empty}
    given = dict.fromkeys(needed - given.keys()) | given
    for option, value in options.items():
        usual = parameters.get(option)
        several = usual is not None and isinstance(usual.default, tuple) and not isinstance(value, tuple | list)
        given[option] = (value,) if several else value
    network = constructor(**given)
    if not isinstance(network, nn.Module):
        kind, advice = type(network).__name__, "wrap one of nnx with `flax.nnx.bridge.ToLinen`"
        raise TypeError(f"`name` (={last_part(name)}) must make a module of flax.linen, but makes a {kind}; {advice}")
    return network


def settings_of(model: nn.Module) -> dict[str, Any] | None:
    """The settings by which :func:`build_model` makes a module equal to a given one; None if its fields are not plain.

    >>> from bnn_jax.models import LeNet
    >>> settings_of(LeNet(10, width=4)), settings_of(LeNet(10, kernel_quantizer="xnor"))
    ({'name': 'bnn_jax.models:LeNet', 'options': {'width': 4}}, None)
    """
    name, own = name_of(type(model)), {"parent", "name", "num_classes", "quantizers"}
    options = {f.name: getattr(model, f.name) for f in fields(model) if f.init and f.name not in own}
    given = {option: value for option, value in options.items() if getattr(type(model), option, ...) is not value}
    plain = all(value is None or type(value) in (bool, int, float, str, tuple) for value in given.values())
    patterns = getattr(getattr(model, "quantizers", None), "given", {})
    plain = plain and all(isinstance(choice, str | None) for choice in patterns.values())
    settings = {"options": given} | ({"quantizers": patterns} if patterns else {})
    num_classes = getattr(model, "num_classes", 1)
    if name is None or not plain or build_model(name, num_classes=num_classes, **settings) != model:
        return None
    return {"name": name, **settings}


def latent_weights(model: nn.Module, image_shape: Sequence[int]) -> int:
    """How many latent weights a network has; found by tracing, no array is made.

    >>> latent_weights(build_model("mnist_mlp", num_classes=10, width=8), (4, 4, 1))
    336
    """
    key, images = jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    _, variables = jax.eval_shape(partial(init_network, model), key, images)
    found = flatten_dict(variables["params"])
    return sum(leaf.size for path, leaf in found.items() if path[-1] == LATENT_KERNEL)


def check_extent(
    *,
    num_classes: int,
    image_shape: Sequence[int],
    width: int | None = None,
    options: Mapping[str, Any] = {},
    input_quantizer_options: Mapping[str, Any] = {},
    kernel_quantizer_options: Mapping[str, Any] = {},
    gradient_quantizer_options: Mapping[str, Any] = {},
    **others: Any,
) -> None:
    """Refuse settings of a network that would take hours to trace, for those that come from a stranger.

    No known network is near these bounds.  Of `options` the sum of all whole numbers is bounded, as layers and blocks
    are counted there.

    Args: as those of :func:`build_model`, and the shape of an image.

    Raises:
      ValueError: for a number above its bound.

    >>> check_extent(num_classes=10, image_shape=(32, 32, 3), options={"stage_sizes": (3, 10**9)})
    Traceback (most recent call last):
    ValueError: `options` (=1000000003) must be at most 512
    """
    counts = [n for v in options.values() for n in (v if isinstance(v, Sequence) else [v]) if isinstance(n, int)]
    numbers = [("num_classes", num_classes), ("width", width or 1), *(("image_shape", side) for side in image_shape)]
    numbers += [("options", sum(map(abs, counts)))]
    for quantizer_options in (input_quantizer_options, kernel_quantizer_options, gradient_quantizer_options):
        numbers += [item for item in quantizer_options.items() if item[0] in LARGEST]
    for name, number in numbers:
        if number > LARGEST[name]:
            raise ValueError(f"`{name}` (={number}) must be at most {LARGEST[name]}")

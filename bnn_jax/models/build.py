"""build_model: a network of the table from names, numbers and options, as a config or a file states them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from bnn_jax.errors import unknown_name
from bnn_jax.layers.arguments import QUANTIZERS
from bnn_jax.models import MODELS, ModelEntry
from bnn_jax.outputs import init_network
from bnn_jax.quantizers import has_option, make_quantizer
from bnn_jax.types import LATENT_KERNEL

LARGEST = {"width": 2**16, "num_classes": 2**20, "image_shape": 2**10, "options": 2**9, "bases": 16, "bits": 12}
"""Bounds of what decides how long a network takes to trace, see :func:`check_extent`."""


def entry_of(network: str | ModelEntry | Callable[..., nn.Module]) -> ModelEntry:
    """The entry of a network: that of a name in MODELS, or a new one, in full precision, for what makes a network.

    Raises:
      UsageError: for a name that is not in MODELS; the nearest is named.
    """
    if isinstance(network, str):
        if network not in MODELS:
            raise unknown_name("name", network, MODELS)
        return MODELS[network]
    return network if isinstance(network, ModelEntry) else ModelEntry(network)


def quantizer_settings(name: str | ModelEntry | Callable[..., nn.Module], **given: Any) -> dict[str, Any]:
    """The quantizers of a network by their names: those given, else those it was published with.

    Options that are given go before the published ones.

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
    name: str | ModelEntry | Callable[..., nn.Module],
    *,
    num_classes: int,
    width: int | None = None,
    input_scaling: bool = False,
    options: Mapping[str, Any] = {},
    steps_per_epoch: int | None = None,
    **quantizers: Any,
) -> nn.Module:
    """A network from names, numbers and options.

    Args:
      name: in MODELS; or an entry as there, or what makes the network: a module's class or a function with the
        arguments `num_classes`, `input_quantizer` and `kernel_quantizer`.
      num_classes: of the logits.
      width: of the network's own unit; None takes the published width.
      input_scaling: XNOR-Net's map K.
      options: what else the network's constructor takes; a single value stands for a tuple of one.
      steps_per_epoch: for quantizers with the option `period_steps`, which do something once an epoch; in training.
      **quantizers: `input_quantizer`, `kernel_quantizer`, `gradient_quantizer`, by their names in the tables or as
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
    constructor, settings = entry_of(name).constructor, quantizer_settings(name, **quantizers)
    made = {}
    for kind, table in QUANTIZERS.items():
        quantizer, given = settings[kind], settings[f"{kind}_options"]
        if steps_per_epoch is not None and has_option(table, quantizer, "period_steps", argument=kind):
            given = {"period_steps": steps_per_epoch} | given
        made[kind] = make_quantizer(table, quantizer, argument=kind, **given)
    taken = inspect.signature(constructor).parameters
    if made["gradient_quantizer"] is None and "gradient_quantizer" not in taken:
        del made["gradient_quantizer"]
    several = {option for option in options if option in taken and isinstance(taken[option].default, tuple)}
    options = {
        option: (value,) if option in several and not isinstance(value, tuple | list) else value
        for option, value in options.items()
    }
    return constructor(
        num_classes=num_classes,
        **made,
        **({} if width is None else {"width": width}),
        **({"input_scaling": True} if input_scaling else {}),
        **options,
    )


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

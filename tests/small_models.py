"""Small instances of every network of the catalogue, with their published quantizers, for tests to compile."""

import inspect
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from bnn_jax.models import MODELS
from bnn_jax.training.config import ModelConfig
from bnn_jax.training.validation import with_published_quantizers

# What makes a network small enough to compile in a test; networks that differ in size alone are the same then.
SHRUNK = {
    "stage_sizes": (1, 1),
    "stem": "cifar",
    "stem_width": 8,
    "columns": (2, 2),
    "depths": (2, 2),
    "num_cells": 3,
    "dense_layers": 1,
    "hidden_layers": 1,
    "zero_scale": False,
    "gate_reduction": 1,
    "depth": 1,
    "heads": 2,
}
REDUCTION = {"stage_sizes": (1, 1), "reduction": (2.0,), "rounding": 1}
# The published reduction cell of BNAS-A for CIFAR-10 multiplies all that its second input feeds by zero.
UNREAD = {
    "bnas_a": [
        f"['cell{number}']['input1']{leaf}"
        for number in (2, 3)
        for leaf in ("['conv']['latent_kernel']", "['norm']['bias']", "['norm']['scale']")
    ]
}
WIDTHS = {"binaryduo_vgg7": 3, "alexnet_xnor": 6, "alexnet_dorefa": 6, "binary_alexnet": 2, "meliusnet22": 16}
WIDTHS |= {"bireal50": 16, "pokebnn": 16}
SIDES = {
    "alexnet_xnor": 63,
    "alexnet_dorefa": 44,
    "binary_alexnet": 57,
    "binaryduo_vgg7": 32,
    "lenet": 16,
    "bnn_plus_alexnet": 16,
}

TEXTS = {"bitnet_lm": (6, 1, 1)}
"""Networks of texts, and the shape of their images, whose values are tokens."""


def image_shape(name: str, side: int = 16) -> tuple[int, int, int]:
    """Of the images that a small network takes, of a side where it takes any."""
    return TEXTS.get(name) or (SIDES.get(name, side),) * 2 + (3,)


def small(name: str, **quantizers: Any) -> ModelConfig:
    """A small instance of the network `name`, with its published quantizers where no others are given."""
    taken = inspect.signature(MODELS[name].constructor).parameters
    options = {option: value for option, value in SHRUNK.items() if option in taken}
    if "rounding" in taken:
        options |= REDUCTION
    if name.startswith("bnas"):
        options.pop("stage_sizes", None)
    options |= {"stage_sizes": (2, 2)} if name.startswith("ebireal") else {}
    options |= {"reduction": 2} if name == "real_to_binary_resnet18" else {}
    return with_published_quantizers(ModelConfig(name, width=WIDTHS.get(name, 4), options=options, **quantizers))


def instance(name: str) -> str:
    """What decides the small network: names with the same text are the same network."""
    settings, constructor = small(name), MODELS[name].constructor
    fixed = {} if not isinstance(constructor, partial) else constructor.keywords
    fixed = {option: value for option, value in fixed.items() if option not in (*settings.options, "width")}
    function = constructor.func if isinstance(constructor, partial) else constructor
    return str((function, fixed, replace(settings, name="")))


INSTANCES = {instance(name): name for name in reversed(MODELS)}

LARGE = ("alexnet_dorefa", "alexnet_xnor", "bnas_a", "bnas_e")
"""Slow to compile; their own tests have a short version."""

SHORT = ("bireal18", "lenet", "mnist_mlp", "binary_densenet28", "reactnet18", "resnet6", "tbn_resnet18", "vgg_small")
"""Networks of the main families, which make test compiles; make test-full compiles all."""


def compiled(names: Iterable[str], **marks: Any) -> list[Any]:
    """Parameters of a test that compiles networks: those that are not SHORT take long together; `marks` by name."""
    long = {name: pytest.mark.full for name in names if name not in SHORT}
    return [pytest.param(name, marks=(long | marks).get(name, ())) for name in names]

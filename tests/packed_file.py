"""A small packed network, the texts that describe it, and the script that damages its file."""

import importlib.util
import sys
from pathlib import Path

from bnn_jax.models.build import build_model
from bnn_jax.packed import PackedModel

SETTINGS = {"name": "mnist_mlp", "width": 8, "kernel_quantizer": "xnor", "options": {"hidden_layers": 2}}
SHAPE = (6, 6, 2)
DESCRIBED = {"num_classes": 4, "image_shape": SHAPE, "mean": (100.5, 90.25), "std": (60.0, 55.5)}


def packed_of(variables, settings=SETTINGS, **described):
    """The small network with these packed variables, described by settings and what else its file has."""
    return PackedModel(build_model(num_classes=4, **SETTINGS), variables, {**DESCRIBED, "model": settings, **described})


TESTED = {"accuracy": 0.75, "split": "test", "data": {"name": "digits"}}


def load_script(name):
    specification = importlib.util.spec_from_file_location(name, Path(__file__).parent / "fuzz" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    # A dataclass looks its module up by name.
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


script = load_script("fuzz_artifact")

"""Packed bits: kernels on words of 32 bits, networks frozen to them, the file in which they travel.

`freeze` turns a network's variables into packed ones, with which the same Flax module runs on bits; `save` and `load`
write and read them.  The names are imported when they are used: the layers, from which `freeze` is built, themselves
use the kernels of this folder.
"""

from importlib import import_module

_HOMES = {
    "freeze": "freezing",
    "packed_structure": "freezing",
    "verify": "verification",
    "PackedModel": "artifact",
    "load": "artifact",
    "save": "artifact",
    "to_stablehlo": "stablehlo",
    "write_tflite": "tflite.model",
}

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

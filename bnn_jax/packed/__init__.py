"""Networks on bits: freezing, verification, the file in which they travel, and other forms of it.

`freeze` turns a network's variables into packed ones, with which the same Flax module runs on bits; `save` and `load`
write and read them.  What needs a training run, `bnn_jax.packed.runs`, is imported apart, so that `load` stays light.
"""

from bnn_jax.packed.artifact import load, save
from bnn_jax.packed.c_header import write_header
from bnn_jax.packed.freezing import freeze, packed_structure
from bnn_jax.packed.latent import latent_variables
from bnn_jax.packed.model import PackedModel
from bnn_jax.packed.named_arrays import arrays, write_npz
from bnn_jax.packed.paths import paths_of, take_path
from bnn_jax.packed.stablehlo import to_stablehlo
from bnn_jax.packed.tflite.model import write_tflite
from bnn_jax.packed.verification import verify

__all__ = [
    "PackedModel",
    "arrays",
    "freeze",
    "latent_variables",
    "load",
    "packed_structure",
    "paths_of",
    "save",
    "take_path",
    "to_stablehlo",
    "verify",
    "write_header",
    "write_npz",
    "write_tflite",
]

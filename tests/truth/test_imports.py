"""The package imports, loads a packed network and reads .npz data where only its core dependencies are installed."""

import subprocess
import sys

ABSENT = """
resource fcntl termios grp pwd grain array_record tensorflow tensorflow_datasets importlib_resources matplotlib PIL
sklearn safetensors flatbuffers pandas torch
"""
"""What only POSIX has, and packages for one purpose each."""

PROGRAM = """
import sys

absent = {absent!r}.split()
sys.modules.update(dict.fromkeys(absent))  # As if they were not installed: importing one raises ImportError.

import importlib, pkgutil
import jax, numpy as np
import bnn_jax
from bnn_jax.models.build import build_model
from bnn_jax.packed import PackedModel, load, packed_structure, save

names = [module.name for module in pkgutil.walk_packages(bnn_jax.__path__, "bnn_jax.")]
names.remove("bnn_jax.benchmarks.torch_peer")  # It is written in PyTorch, and imported when that is there.
for name in names:
    importlib.import_module(name)

settings = {{"name": "mnist_mlp", "width": 8, "kernel_quantizer": "xnor", "options": {{"hidden_layers": 2}}}}
described = {{"num_classes": 4, "image_shape": (6, 6, 2), "mean": (100.0, 90.0), "std": (60.0, 50.0)}}
model = build_model(num_classes=4, **settings)
structure = packed_structure(model, (6, 6, 2))
zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), structure)
save("m.bnn.safetensors", PackedModel(model, zeros, described | {{"model": settings}}))
network = load("m.bnn.safetensors")

images, labels = np.arange(240, dtype=np.uint8).reshape(20, 2, 2, 3), np.arange(20) % 2
np.savez("mine.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
dataset = bnn_jax.load_dataset("mine.npz")

bnn_jax.data.tfds_records._allow_open_files(10)
assert not any(sys.modules.get(name) for name in absent)
print(len(names) > 100, network.metadata["image_shape"], dataset.image_shape)
"""


def test_nothing_beside_the_core_is_imported_before_it_is_used(tmp_path, subprocess_env):
    code = PROGRAM.format(absent=ABSENT)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=subprocess_env, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "True (6, 6, 2) (2, 2, 3)\n", done.stderr

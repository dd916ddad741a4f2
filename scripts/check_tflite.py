"""Run .tflite files in the Larq Compute Engine's interpreter:

    lce/bin/python scripts/check_tflite.py m.tflite m.npz

The Python that runs this needs the packages larq-compute-engine, flatbuffers,
tqdm and numpy, but neither TensorFlow nor this project; the interpreter's wheel
for Python 3.11 wants numpy 1, hence an environment of its own.  The .npz file
holds `images` (count, height, width, channels), normalized, and `logits`
(count, classes), the network's own:

    network = model.apply(variables, images, train=False)
    logits = bnn_jax.outputs.logits_of(network)
    numpy.savez("m.npz", images=images, logits=logits)
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np


def interpreter_class() -> type:
    """The interpreter, past its package's own __init__, which imports TensorFlow for the converter."""
    name = "larq_compute_engine"
    found = importlib.util.find_spec(name)
    if found is None:
        sys.exit(f"error: {sys.executable} has no package larq_compute_engine; pip install larq-compute-engine")
    package = ModuleType(name)
    package.__path__ = list(found.submodule_search_locations)
    sys.modules[name] = package
    from larq_compute_engine.tflite.python.interpreter import Interpreter

    return Interpreter


def existing_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file of this machine")
    return Path(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=existing_file, help="pairs of a .tflite and an .npz file")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of a logit, as a share of the largest one")
    arguments = parser.parse_args()
    suffixes = [path.suffix for path in arguments.files]
    if suffixes != [".tflite", ".npz"] * (len(suffixes) // 2):
        parser.error("the files must be pairs of a .tflite and an .npz file")
    interpreter, failed = interpreter_class(), False
    for network, expected in zip(arguments.files[::2], arguments.files[1::2]):
        with np.load(expected) as arrays:
            images, logits = arrays["images"].astype(np.float32), arrays["logits"]
        found = interpreter(network.read_bytes()).predict(images)
        if not len(images) or found.shape != logits.shape:
            sys.exit(f"error: {expected}: `logits` must have the shape {found.shape}, a row for each of some images")
        difference, largest = float(np.abs(found - logits).max()), float(np.abs(logits).max())
        agree = int((found.argmax(-1) == logits.argmax(-1)).sum())
        print(f"{network.name}: largest difference {difference:.2g} of logits up to {largest:.3g}, ", end="")
        print(f"{agree} of {len(logits)} predictions agree")
        failed |= agree < len(logits) or not difference <= arguments.tolerance * largest
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

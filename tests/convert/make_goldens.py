"""Writes goldens/*.npz: state dicts of PyTorch modules of published layouts, and their logits.

python tests/convert/make_goldens.py   (needs PyTorch; the tests do not)
"""

from pathlib import Path

import numpy as np
from torch_modules import MODULES, logits_of, seeded

FOLDER = Path(__file__).parent / "goldens"


def images_of(count: int = 3, side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, side, side, 3)).astype(np.float32)


if __name__ == "__main__":
    for name in MODULES:
        module = seeded(name)
        state = {key: tensor.numpy() for key, tensor in module.state_dict().items()}
        np.savez_compressed(FOLDER / f"{name}.npz", logits=logits_of(module, images_of()), **state)

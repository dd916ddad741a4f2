"""Writes goldens/binarynet.h5 and .weights.h5: a network as larq's BinaryNet, by Keras, and goldens/binarynet.npz.

KERAS_BACKEND=jax python tests/convert/make_keras_goldens.py   (needs Keras 3; the tests do not)

The layers have the names and the arithmetic of larq's: Hubara et al., Binarized Neural Networks, 2016.
"""

import tempfile
from pathlib import Path

import h5py
import keras
import numpy as np
from keras import layers, ops

FOLDER = Path(__file__).parent / "goldens"


def sign(x):
    return ops.where(x < 0, -1.0, 1.0)


class QuantConv2D(layers.Conv2D):
    first = False

    def call(self, x):
        return ops.conv(x if self.first else sign(x), sign(self.kernel), padding="same")


class QuantDense(layers.Dense):
    def call(self, x):
        return ops.matmul(sign(x), sign(self.kernel))


def binarynet():
    norm = lambda: layers.BatchNormalization(scale=False)
    first = QuantConv2D(4, 3, padding="same", use_bias=False)
    first.first = True
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            *(first, layers.MaxPool2D(2), norm()),
            *(QuantConv2D(8, 3, padding="same", use_bias=False), layers.MaxPool2D(2), layers.BatchNormalization()),
            *(layers.Flatten(), QuantDense(32, use_bias=False), norm(), QuantDense(7, use_bias=False)),
            layers.BatchNormalization(scale=False, center=False, epsilon=2e-3),
        ]
    )


def repack(source, target):
    """Copy an HDF5 file with everything in it in less space: old versions' groups have room for more."""
    with h5py.File(source) as old, h5py.File(target, "w", libver="latest") as new:
        new.attrs.update(old.attrs)

        def copy(name, item):
            is_group = isinstance(item, h5py.Group)
            made = new.create_group(name) if is_group else new.create_dataset(name, data=item[()])
            made.attrs.update(item.attrs)

        old.visititems(copy)


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    model, rng = binarynet(), np.random.default_rng(0)
    for variable in model.weights:
        low, high = {"moving_variance": (0.1, 2), "gamma": (0.5, 1.5)}.get(variable.name, (-1, 1))
        variable.assign(rng.uniform(low, high, variable.shape).round(2))
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    np.savez(FOLDER / "binarynet.npz", logits=np.asarray(model(images, training=False)))
    for name, save in (("binarynet.h5", model.save), ("binarynet.weights.h5", model.save_weights)):
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder, name))
            repack(Path(folder, name), FOLDER / name)

"""Writes goldens/binarynet.h5, quicknet.weights.h5 and bireal_same.weights.h5: networks as larq's, and their logits.

KERAS_BACKEND=jax python tests/convert/make_keras_goldens.py   (needs Keras 3; the tests do not)

The layers have the names and the arithmetic of larq's: Hubara et al., Binarized Neural Networks, 2016; Bannink et al.,
Larq Compute Engine, 2021.
"""

import tempfile
from functools import partial
from pathlib import Path

import h5py
import keras
import numpy as np
from keras import layers, ops

FOLDER = Path(__file__).parent / "goldens"


def sign(x):
    return ops.where(x < 0, -1.0, 1.0)


class QuantConv2D(layers.Conv2D):
    binary_inputs, binary_kernel, magnitude, pad = True, True, False, 0

    def call(self, x):
        kernel = sign(self.kernel) if self.binary_kernel else self.kernel
        if self.magnitude:
            kernel = ops.mean(ops.abs(self.kernel), (0, 1, 2)) * kernel
        x = sign(x) if self.binary_inputs else x
        if self.pad:
            x = ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=self.pad)
        return self.activation(ops.conv(x, kernel, self.strides, padding="valid" if self.pad else "same"))


class QuantDepthwiseConv2D(layers.DepthwiseConv2D):
    """A depthwise layer of larq's without quantizers."""


class QuantDense(layers.Dense):
    def call(self, x):
        return ops.matmul(sign(x), sign(self.kernel)) if not self.use_bias else super().call(x)


def binarynet():
    norm = lambda: layers.BatchNormalization(scale=False)
    first = QuantConv2D(4, 3, padding="same", use_bias=False)
    first.binary_inputs = False
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            *(first, layers.MaxPool2D(2), norm()),
            *(QuantConv2D(8, 3, padding="same", use_bias=False), layers.MaxPool2D(2), layers.BatchNormalization()),
            *(layers.Flatten(), QuantDense(32, use_bias=False), norm(), QuantDense(7, use_bias=False)),
            layers.BatchNormalization(scale=False, center=False, epsilon=2e-3),
        ]
    )


def quicknet():
    def conv(*arguments, binary=False, **options):
        layer = QuantConv2D(*arguments, padding="same", use_bias=False, **options)
        layer.binary_inputs, layer.binary_kernel, layer.pad = binary, binary, int(binary)
        return layer

    norm = partial(layers.BatchNormalization, epsilon=1e-5)
    x = images = keras.Input((16, 16, 3))
    x = ops.relu(layers.BatchNormalization()(conv(2, 3, strides=2)(x)))
    x = QuantDepthwiseConv2D(3, strides=2, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization(scale=False, center=False)(x)
    x = layers.BatchNormalization()(conv(8, 1)(x))
    x = x + norm()(conv(8, 3, binary=True, activation="relu")(x))
    x = layers.MaxPool2D(2, strides=1)(ops.relu(x))
    blur = np.outer([1, 2, 1], [1, 2, 1]).reshape(3, 3, 1, 1) / 16
    blurred = layers.DepthwiseConv2D(3, strides=2, padding="same", use_bias=False, trainable=False)
    x = blurred(x)
    blurred.set_weights([np.repeat(blur, 8, 2)])
    x = norm()(conv(16, 1)(x))
    x = x + norm()(conv(16, 3, binary=True, activation="relu")(x))
    return keras.Model(images, QuantDense(7)(ops.mean(ops.relu(x), (1, 2))))


def bireal():
    def unit(x, filters, stride):
        shortcut = x
        if x.shape[-1] != filters:
            shortcut = layers.AvgPool2D(2, strides=2, padding="same")(shortcut)
            shortcut = layers.Conv2D(filters, 1, use_bias=False)(shortcut)
            shortcut = layers.BatchNormalization()(shortcut)
        conv = QuantConv2D(filters, 3, strides=stride, padding="same", use_bias=False)
        conv.magnitude = True
        return layers.add([layers.BatchNormalization()(conv(x)), shortcut])

    images = keras.Input((32, 32, 3))
    x = layers.Conv2D(2, 7, strides=2, padding="same", use_bias=False)(images)
    x = layers.MaxPool2D(3, strides=2, padding="same")(layers.BatchNormalization()(x))
    for filters, stride in ((2, 1), (4, 2), (4, 1)):
        x = unit(x, filters, stride)
    return keras.Model(images, layers.Dense(7)(ops.mean(x, (1, 2))))


def randomize(model):
    rng = np.random.default_rng(0)
    for variable in model.trainable_weights + [w for w in model.weights if "moving" in w.name]:
        low, high = {"moving_variance": (0.1, 2), "gamma": (0.5, 1.5)}.get(variable.name, (-1, 1))
        variable.assign(rng.uniform(low, high, variable.shape).round(2))


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
    for file, build in (
        ("binarynet.h5", binarynet),
        ("quicknet.weights.h5", quicknet),
        ("bireal_same.weights.h5", bireal),
    ):
        keras.backend.clear_session()  # Layers are counted from 0 again.
        model = build()
        randomize(model)
        images = np.random.default_rng(0).normal(size=(3, *model.input_shape[1:])).astype(np.float32)
        np.savez(FOLDER / f"{file.partition('.')[0]}.npz", logits=np.asarray(model(images, training=False)))
        with tempfile.TemporaryDirectory() as folder:
            (model.save_weights if "weights" in file else model.save)(Path(folder, file))
            repack(Path(folder, file), FOLDER / file)

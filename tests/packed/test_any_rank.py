"""Networks on signals, images and volumes, grouped, depthwise and transposed: frozen, verified, accounted, exported."""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_checks import initialized

from bnn_jax.analysis.accounting import account_model
from bnn_jax.layers import BatchNorm, BinaryConv, BinaryConvTranspose, BinaryDense
from bnn_jax.packed import PackedModel, freeze, load, paths_of, save, take_path, to_stablehlo, verify, write_tflite

CLASSES = 5


class OfRank(nn.Module):
    """A stem, a grouped convolution whose normalization becomes thresholds, a depthwise, a transposed one, a head."""

    rank: int
    channels: int = 32

    @nn.compact
    def __call__(self, images, *, train=False, progress=1.0):
        phase = {"train": train, "progress": progress}
        size = {"kernel_size": (3,) * self.rank}
        conv = partial(BinaryConv, self.channels, input_quantizer="ste_sign", kernel_quantizer="xnor", **size)
        norm = lambda name: BatchNorm(name=name)
        x = norm("norm0")(BinaryConv(self.channels, name="stem", **size)(images), train=train)
        x = norm("norm1")(conv(feature_group_count=2, name="grouped")(x, **phase), train=train)
        x = norm("norm2")(conv(strides=2, pad_value=1, name="strided")(x, **phase), train=train)
        x = norm("norm3")(conv(feature_group_count=self.channels, name="depthwise")(x, **phase), train=train)
        up = BinaryConvTranspose(8, strides=2, input_quantizer="ste_sign", kernel_quantizer="xnor", name="up", **size)
        x = norm("norm4")(up(x, **phase), train=train)
        return BinaryDense(CLASSES, name="head", use_bias=True)(x.mean(tuple(range(1, self.rank + 1))))


class Frozen(NamedTuple):
    """A network, trained and frozen, and uint8 images for it."""

    model: nn.Module
    variables: dict
    packed: dict
    images: np.ndarray

    @property
    def normalized(self):
        return jnp.asarray(self.images, jnp.float32) / 128 - 1

    @property
    def exported(self):
        shape = self.images.shape[1:]
        metadata = {"image_shape": shape, "mean": (128.0,) * shape[-1], "std": (128.0,) * shape[-1]}
        return PackedModel(self.model, self.packed, metadata)


@pytest.fixture(
    scope="module", params=[1, pytest.param(2, marks=pytest.mark.full), pytest.param(3, marks=pytest.mark.full)]
)
def frozen(request):
    shape = (*(7, 6, 5)[-request.param :], 2)
    model = OfRank(request.param)
    variables = initialized(model, shape)
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    return Frozen(model, variables, freeze(model, variables, shape), images)


def test_the_packed_network_is_the_trained_one_on_either_path(frozen):
    layers = frozen.packed["packed"]
    assert {"threshold"} == layers["norm1"].keys() == layers["norm2"].keys() == layers["norm3"].keys()
    paths = {"grouped": "bits", "strided": "bits", "depthwise": "float32", "up": "bits"}
    for path in (None, "bits", "float32")[: frozen.model.rank]:
        found = verify(frozen.model, frozen.variables, take_path(frozen.packed, path), [frozen.normalized])
        assert found.passed
        taken = {name: layer.path for name, layer in found.layers.items()}
        assert taken == (paths if path is None else dict.fromkeys(paths, path))
        assert all(layer.integers for layer in found.layers.values())


def test_another_path_is_refused(frozen):
    with pytest.raises(ValueError, match=r"^`path` \(='fast'\) must be one of bits, float32 or None"):
        take_path(frozen.packed, "fast")
    assert paths_of(frozen.model, take_path(frozen.packed, "bits"), frozen.images.shape[1:])["depthwise"] == "bits"


def test_it_is_counted_as_it_computes(frozen):
    *spatial, channels = frozen.images.shape[1:]
    layers = account_model(frozen.model, frozen.images.shape[1:]).layers
    counted = {layer.name.split("/")[0]: layer for layer in layers}
    pixels, halved, taps, c = np.prod(spatial), np.prod([-(-n // 2) for n in spatial]), 3 ** len(spatial), 32
    doubled = np.prod([2 * -(-n // 2) for n in spatial])
    weights = {"stem": taps * channels * c, "grouped": taps * 16 * c, "strided": taps * c * c, "depthwise": taps * c}
    weights |= {"up": taps * c * 8, "head": 8 * CLASSES}
    assert {name: layer.weights for name, layer in counted.items()} == weights
    outputs = {"stem": pixels, "grouped": pixels, "strided": halved, "depthwise": halved, "up": doubled, "head": 1}
    assert {name: layer.macs.total for name, layer in counted.items()} == {n: weights[n] * outputs[n] for n in weights}
    binary = weights.keys() - {"stem", "head"}
    assert all(counted[name].macs.binary and counted[name].weight_bits == 1 for name in binary)
    fan_in = {name: weights[name] // counted[name].shape[-1] for name in binary}
    assert all(counted[name].words == -(-fan_in[name] // 32) * counted[name].shape[-1] for name in binary)


@pytest.mark.full
def test_it_is_saved_in_the_bytes_that_are_counted_and_loaded(frozen, tmp_path):
    _, tensors = save(tmp_path / "net", frozen.exported)
    assert tensors == account_model(frozen.model, frozen.images.shape[1:]).payload_bytes()
    loaded = load(tmp_path / "net", model=frozen.model)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), loaded.variables, frozen.packed)
    assert all(jax.tree.leaves(same))


@pytest.mark.full
def test_it_is_exported_to_stablehlo_and_not_to_tflite(frozen, tmp_path):
    called = jax.export.deserialize(to_stablehlo(frozen.exported)).call
    np.testing.assert_array_equal(called(frozen.images), frozen.exported.logits(frozen.images))
    with pytest.raises(ValueError, match=r"of other layouts than NHWC|with groups|must be \(height, width, channels\)"):
        write_tflite(tmp_path / "net.tflite", frozen.model, frozen.variables, frozen.images.shape[1:])

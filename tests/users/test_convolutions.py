"""Convolutions of other ranks and in groups, and single layers of a network, as one uses them on digits."""

import flax.linen as nn
import numpy as np
import pytest

import bnn_jax
from bnn_jax import BinaryConv
from bnn_jax.analysis.accounting import account_model
from bnn_jax.layers import BinaryConvTranspose
from bnn_jax.packed import load, paths_of, save, verify
from bnn_jax.training.config import Config, ModelConfig, OptimConfig

ADAM = OptimConfig("adam", learning_rate=0.01)
BINARY = {"input_quantizer": "ste_sign", "kernel_quantizer": "xnor"}


class Separable(nn.Module):
    """Depthwise and pointwise, up again, then rows as a signal of one axis."""

    num_classes: int = 10
    width: int = 32

    @nn.compact
    def __call__(self, x):
        x = nn.GroupNorm(4)(BinaryConv(self.width, kernel_size=3)(x))
        x = nn.GroupNorm(4)(BinaryConv(self.width, 3, 2, feature_group_count=self.width, name="depth", **BINARY)(x))
        x = nn.GroupNorm(4)(BinaryConv(self.width, 1, feature_group_count=2, name="points", **BINARY)(x))
        x = nn.GroupNorm(4)(BinaryConvTranspose(8, 3, 2, name="up", **BINARY)(x))
        signal = x.reshape(*x.shape[:2], -1)
        signal = BinaryConv(self.width, (3,), padding="CAUSAL", name="rows", **BINARY)(signal)
        return nn.Dense(self.num_classes)(nn.relu(nn.GroupNorm(4)(signal)).mean(1))


@pytest.mark.full
def test_a_separable_network_trains_packs_and_travels(tmp_path):
    config = Config(
        "separable", epochs=3, batch_size=64, loss="cross_entropy", model=ModelConfig(Separable), optim=ADAM
    )
    run = bnn_jax.train(config, tmp_path / "run")
    assert run.result["test_accuracy_best"] > 0.5
    packed, images = run.freeze(), run.dataset.test.images
    np.testing.assert_array_equal(packed.predict(images), run.predict(images))
    paths = paths_of(run.model, packed.variables, run.dataset.image_shape)
    assert paths == {"depth": "float32", "points": "bits", "up": "bits", "rows": "bits"}
    save(tmp_path / "digits", packed)
    again = load(tmp_path / "digits", model=Separable())
    np.testing.assert_array_equal(again.predict(images), run.predict(images))


@pytest.mark.full
def test_one_stage_real_and_the_head_of_eight_bits(tmp_path):
    model = ModelConfig("resnet6", width=8, quantizers={"stage1_*": "real", "head": "8-bit"})
    config = Config("mixed", epochs=1, batch_size=64, loss="cross_entropy", model=model, optim=ADAM)
    run = bnn_jax.train(config, tmp_path / "run")
    packed, shape = run.freeze(), run.dataset.image_shape
    images = (run.dataset.test.images - np.float32(run.dataset.mean)) / np.float32(run.dataset.std)
    found = verify(run.model, run.variables, packed.variables, [images])
    assert found.passed and {name.split("/")[0] for name in found.layers} == {"stage2_block1", "head"}
    bits = {layer.name.split("/")[0]: layer.weight_bits for layer in account_model(run.model, shape).layers}
    assert bits["stage1_block1"] == 32 and bits["stage2_block1"] == 1 and bits["head"] == 8

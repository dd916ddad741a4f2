"""A packed network as StableHLO: one file for every batch size and three platforms."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax.models.build import build_model
from bnn_jax.packed import PackedModel, freeze
from bnn_jax.packed.stablehlo import PLATFORMS, to_stablehlo

SHAPE = (8, 8, 3)


@pytest.fixture(scope="module")
def network():
    model = build_model("bnn_convnet", num_classes=5, width=8, options={"stage_sizes": (1, 1), "dense_layers": 1})
    variables = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False))()
    metadata = {"image_shape": SHAPE, "mean": (120.0,) * 3, "std": (60.0,) * 3}
    return PackedModel(model, freeze(model, variables, SHAPE), metadata)


@pytest.mark.full
def test_one_file_serves_every_batch_size_and_platform(network):
    exported = jax.export.deserialize(bytearray(to_stablehlo(network)))
    assert exported.platforms == PLATFORMS
    rng = np.random.default_rng(0)
    for batch in (1, 5):
        images = rng.integers(0, 256, (batch, *SHAPE), dtype=np.uint8)
        np.testing.assert_array_equal(exported.call(images), network.logits(images))


def test_a_platform_is_one_that_there_is(network):
    assert jax.export.deserialize(bytearray(to_stablehlo(network, platforms="cpu"))).platforms == ("cpu",)
    for given in (("gpu3",), ()):
        words = re.escape(f"`platforms` (={given}) must be among cpu, cuda, tpu, rocm; as ('cpu',)")
        with pytest.raises(ValueError, match=f"^{words}$"):
            to_stablehlo(network, platforms=given)


def test_the_code_for_matrix_units_is_in_it(network):
    """cpu counts bits; the other platforms multiply int8 or bfloat16 codes."""
    cpu, cuda = (
        jax.export.deserialize(bytearray(to_stablehlo(network, platforms=(name,)))).mlir_module()
        for name in ("cpu", "cuda")
    )
    assert "stablehlo.popcnt" in cpu and "xi8>" not in cpu
    assert "xi8>" in cuda

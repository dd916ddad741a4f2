"""The vision transformer: real blocks by patterns are those of a real network; sizes and images that cannot be."""

from functools import partial

import jax
import numpy as np
import pytest
from networks import apply, normal, random_variables

from bnn_jax.analysis.accounting import account
from bnn_jax.models.build import build_model
from bnn_jax.packed import freeze, verify

SMALL = {"num_classes": 3, "width": 8, "options": {"depth": 1, "patch_size": 2}}
REAL = {f"{kind}_quantizer": "full_precision" for kind in ("input", "kernel")}


def test_blocks_that_are_real_by_pattern_have_the_real_networks_activation():
    images = normal(2, 4, 6, 1)
    by_pattern = build_model("vit_tiny", **SMALL, quantizers={"attention1": "real", "mlp1": "real"})
    real = build_model("vit_tiny", **SMALL, **REAL)
    variables = random_variables(real, images)
    np.testing.assert_array_equal(apply(by_pattern, variables, images)[0], apply(real, variables, images)[0])


@pytest.mark.full
def test_a_block_whose_projections_are_real_is_verified_too():
    model = build_model("vit_tiny", **SMALL, quantizers={"attention1": "real"})
    images = normal(2, 4, 6, 1)
    variables = random_variables(model, images, mean=0.2)
    report = verify(model, variables, freeze(model, variables, images.shape[1:]), [images])
    assert report.passed and report.layers["attention1"].path == "float32"


@pytest.mark.full
def test_with_binary_values_every_product_of_a_block_is_binary_and_frozen_the_same():
    model = build_model("vit_tiny", **SMALL | {"options": SMALL["options"] | {"binary_values": True}})
    images = normal(2, 4, 6, 1)
    variables = random_variables(model, images, mean=0.2)
    packed = freeze(model, variables, images.shape[1:])
    report = verify(model, variables, packed, [images])
    assert report.passed and report.largest_logit_difference == 0
    assert report.layers["attention1"].integers == 2 * 2 * (6 * 6 + 6 * 4)
    counted = account(partial(model.apply, train=False), variables, images[:1])
    real = {layer.name for layer in counted.layers if layer.macs.full_precision}
    assert real == {"patches/kernel", "head/kernel"}
    assert counted.payload_bytes() == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(packed))


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"`heads` \(=3\) of ViT must divide `width` \(=8\); 2 is usual"):
        build_model("vit_tiny", num_classes=2, width=8, options={"heads": 3})
    with pytest.raises(ValueError, match=r"`images` \(of 3x9\) are too small for a ViT with `patch_size` 4"):
        build_model("vit_tiny", num_classes=2).init(jax.random.key(0), normal(1, 3, 9, 1), train=False)

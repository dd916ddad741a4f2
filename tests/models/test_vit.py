"""The vision transformer: real blocks by patterns are those of a real network; sizes and images that cannot be."""

import jax
import numpy as np
import pytest
from networks import apply, normal, random_variables

from bnn_jax.models.build import build_model

SMALL = {"num_classes": 3, "width": 8, "options": {"depth": 1, "patch_size": 2}}
REAL = {f"{kind}_quantizer": "full_precision" for kind in ("input", "kernel")}


def test_blocks_that_are_real_by_pattern_have_the_real_networks_activation():
    images = normal(2, 4, 6, 1)
    by_pattern = build_model("vit_tiny", **SMALL, quantizers={"attention1": "real", "mlp1": "real"})
    real = build_model("vit_tiny", **SMALL, **REAL)
    variables = random_variables(real, images)
    np.testing.assert_array_equal(apply(by_pattern, variables, images)[0], apply(real, variables, images)[0])


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"`heads` \(=3\) of ViT must divide `width` \(=8\); 2 is usual"):
        build_model("vit_tiny", num_classes=2, width=8, options={"heads": 3})
    with pytest.raises(ValueError, match=r"`images` \(of 3x9\) are too small for a ViT with `patch_size` 4"):
        build_model("vit_tiny", num_classes=2).init(jax.random.key(0), normal(1, 3, 9, 1), train=False)

"""What the tests of packed networks share: one program that runs the trained and the frozen network side by side."""

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp

ROUNDING = 1e-6 if "BNN_JAX_TESTS_AT_DEFAULT_FLAGS" in os.environ else 0.0
"""How much logits may differ, as a share of the largest: optimized programs may round what follows the integers."""


class Comparison(NamedTuple):
    """Codes and integers of binary layers, compared and differing; the logits' largest difference and size."""

    values: int
    differing: int
    logits: float
    largest: float

    @property
    def same(self) -> bool:
        """No code or integer differs, and no logit but by rounding."""
        return self.differing == 0 and self.logits <= ROUNDING * self.largest


def compare(model, variables, frozen, images) -> Comparison:
    """End to end: words and integers of every layer of the frozen network against those of the trained one."""

    @jax.jit
    def run(variables, frozen, images):
        trained, packed = (model.apply(v, images, train=False, mutable=["products"]) for v in (variables, frozen))
        ours, theirs = packed[1].get("products", {}), trained[1].get("products", {})
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        different = jax.tree.map(lambda a, b: (a != b).sum(), ours, theirs)
        differing = sum(jax.tree.leaves(different), jnp.zeros((), jnp.int32))
        logits = trained[0][0]
        return ours, differing, jnp.abs(packed[0][0] - logits).max(), jnp.abs(logits).max()

    products, differing, difference, largest = run(variables, frozen, images)
    values = sum(leaf.size for leaf in jax.tree.leaves(products))
    return Comparison(values, int(differing), float(difference), float(largest))

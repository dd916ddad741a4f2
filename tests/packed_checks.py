"""What the tests of packed networks share: variables, and a program that runs trained and frozen network together."""

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROUNDING = 1e-6 if "BNN_JAX_TESTS_AT_DEFAULT_FLAGS" in os.environ else 0.0
"""How much logits may differ, as a share of the largest: optimized programs may round what follows the integers."""


START = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0, "slope": 0.25, "positive_slope": 1.0}
START |= dict.fromkeys(("input_shift", "output_shift", "shift"), 0.0)
"""Name of a variable -> its value at the start; kernels are drawn."""


def initialized(model, image_shape, *, drawn: bool = True) -> dict:
    """Variables at the start; `drawn` without a program that makes them, where all are kernels or in START."""
    init = lambda images: dict(model.init(jax.random.key(0), images, train=False))
    images = jnp.zeros((1, *image_shape))
    rng, shapes = np.random.default_rng(0), jax.eval_shape(init, images)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(shapes)}
    if not drawn or names - {*START, "kernel", "latent_kernel"}:
        return jax.jit(init)(images)

    def value(path, leaf):
        start = START.get(path[-1].key)
        deviation = (leaf.size / leaf.shape[-1]) ** -0.5 if leaf.size and leaf.shape else 1.0
        values = rng.normal(0, deviation, leaf.shape) if start is None else np.full(leaf.shape, start)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)


class Comparison(NamedTuple):
    """What was compared of binary layers and differed; the logits' largest difference and size.

    `values` are codes of inputs and integers, `weights` codes of kernels; `differing` is of both.
    """

    values: int
    weights: int
    differing: int
    logits: float
    largest: float

    @property
    def same(self) -> bool:
        """Some weights are compared, no code or integer differs, and no logit but by rounding."""
        return self.weights > 0 and self.differing == 0 and self.logits <= ROUNDING * self.largest


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
    sizes = {True: 0, False: 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(products):
        sizes["weights" in jax.tree_util.keystr(path)] += leaf.size
    return Comparison(sizes[False], sizes[True], int(differing), float(difference), float(largest))

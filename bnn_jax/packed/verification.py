"""Whether a packed network is the trained one: integer by integer, bit by bit, prediction by prediction."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from bnn_jax.layers import BinaryConv, BinaryDense
from bnn_jax.layers.frozen import PRODUCTS, is_words
from bnn_jax.outputs import logits_of


class LayerReport(NamedTuple):
    """What was compared of a binary layer.

    Attributes:
      integers, differing_integers: products of codes, of the packed layer on the trained network's inputs against the
        trained layer.
      bits, differing_bits: of the words of input codes, of the packed network end to end against the trained one.
    """

    integers: int
    differing_integers: int
    bits: int
    differing_bits: int


class Verification(NamedTuple):
    """What was compared of two networks.

    Attributes:
      layers: by path, in the order of their names.
      examples: images.
      differing_predictions: images whose largest logits are not the same class's.
      largest_logit_difference: absolute; NaN if a logit is.
    """

    layers: dict[str, LayerReport]
    examples: int
    differing_predictions: int
    largest_logit_difference: float

    @property
    def passed(self) -> bool:
        """No integer, bit or prediction differs, of any image."""
        different = sum(layer.differing_integers + layer.differing_bits for layer in self.layers.values())
        return self.examples > 0 and different + self.differing_predictions == 0


def verify(
    model: nn.Module,
    variables: Mapping[str, Any],
    packed: Mapping[str, Any],
    batches: Iterable[Float[Array, "batch height width channels"]],
) -> Verification:
    """Run a trained network and its packed form on the same images and compare all that is exact.

    Logits and predictions are those of the two networks as they run; integers and bits are recorded in a second run of
    each.  For the integers each packed layer gets the inputs of the trained one, so that a difference shows in the
    layer that makes it.

    Args:
      model: of both.
      variables: trained.
      packed: what :func:`bnn_jax.packed.freeze` made of them.
      batches: normalized images, as the network takes them.
    """
    logits = jax.jit(lambda variables, images: logits_of(model.apply(variables, images, train=False)))
    compare = jax.jit(partial(_compare, model))
    totals: dict[str, np.ndarray] = {}
    examples, differing, largest = 0, 0, 0.0
    for images in batches:
        ours, theirs = logits(packed, images), logits(variables, images)
        examples += len(images)
        differing += int((ours.argmax(-1) != theirs.argmax(-1)).sum())
        largest = np.maximum(largest, float(jnp.abs(ours - theirs).max()))
        for path, counts in compare(variables, packed, images).items():
            totals[path] = totals.get(path, 0) + np.asarray(counts, np.int64)
    layers = {path: LayerReport(*counts.tolist()) for path, counts in totals.items()}
    return Verification(layers, examples, differing, float(largest))


def _compare(model: nn.Module, variables: Any, packed: Any, images: Array) -> dict[str, Array]:
    """The four counts of each layer."""
    inputs: dict[str, list[Array]] = {}

    def remember(path, x):
        inputs.setdefault(path, []).append(x)
        return x

    trained = _recorded(model, variables, images, remember)
    words = {path: [call for record in records["words"] for call in record] for path, records in trained.items()}
    calls = dict.fromkeys(inputs, 0)

    def replay(path, x):
        call = calls[path]
        calls[path] += 1
        return words[path][call] if is_words(x) else inputs[path][call]

    forced = _recorded(model, packed, images, replay)
    alone = _recorded(model, packed, images, lambda path, x: x)
    return {
        path: jnp.stack(
            [
                *_differences(trained[path]["integers"], forced[path]["integers"], lambda a, b: a != b, 1),
                *_differences(trained[path]["words"], alone[path]["words"], _differing_bits, 32),
            ]
        )
        for path in trained
    }


def _recorded(model: nn.Module, variables: Any, images: Array, pass_on: Callable[[str, Array], Array]) -> Any:
    """path of a layer -> its record of "words" and "integers", with `pass_on` deciding what each layer gets."""

    def layer(call, arguments, options, context):
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, BinaryConv | BinaryDense):
            return call(*arguments, **options)
        if module.input_quantizer is None:
            return call(*arguments, **options)
        x, *others = arguments
        return call(pass_on("/".join(module.path), x), *others, **options)

    with nn.intercept_methods(layer):
        _, recorded = model.apply(variables, images, train=False, mutable=[PRODUCTS])
    found: dict[str, dict[str, Any]] = {}
    for path, record in flatten_dict(recorded.get(PRODUCTS, {})).items():
        found.setdefault("/".join(path[:-1]), {})[path[-1]] = record
    return found


def _differences(a: Any, b: Any, differ: Callable[[Array, Array], Array], values: int) -> tuple[int, Array]:
    """How many values there are in the arrays of a, and how many differ from those of b."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return sum(values * x.size for x, _ in pairs), sum(differ(x, y).sum() for x, y in pairs)


def _differing_bits(a: Array, b: Array) -> Array:
    return jax.lax.population_count(a ^ b).astype(jnp.int32)

"""Whether a packed network is the trained one: its codes, its integers, its bits and its predictions."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.meta import unbox
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from bnn_jax.bitops.paths import AS_NUMBERS, PATHS
from bnn_jax.checks import require
from bnn_jax.finite import require_finite
from bnn_jax.layers import BinaryConv, BinaryDense
from bnn_jax.layers.frozen import NOT_A_NUMBER, PACKED, PRODUCTS, TAKEN, is_words
from bnn_jax.outputs import apply_network, network_logits
from bnn_jax.packed.calls import input_of
from bnn_jax.packed.freezing import TRAIN_AGAIN, kernels_of, parts, require_seen

# The collection of what the layers of the trained network got and packed, from which those of the packed one get it.
TRAINED = "trained"

ROUNDING = 1e-3
"""How much logits may differ, as a share of the largest: real numbers are not added up in the same order."""


class LayerReport(NamedTuple):
    """What was compared of a layer with quantized weights, or of a product of two activations on bits.

    Attributes:
      weights, differing_weights: codes of the kernel, those in the packed words against those of the latent weights;
        none of a product without a kernel.
      integers, differing_integers: products of codes, of the packed layer on the trained network's inputs against the
        trained layer; none where the inputs are real numbers.
      bits, differing_bits: of the words of input codes, of the packed network end to end against the trained one.
      path: how the packed layer multiplies, one of `bnn_jax.bitops.paths.PATHS`.
    """

    weights: int
    differing_weights: int
    integers: int
    differing_integers: int
    bits: int
    differing_bits: int
    path: str


class Verification(NamedTuple):
    """What was compared of two networks.

    Attributes:
      layers: by path, in the order of their names.
      examples: images.
      differing_predictions: images whose largest logits are not the same class's, or of which a logit is not finite.
      largest_logit_difference: absolute; NaN if a logit is.
      largest_logit: of the trained network, absolute.
    """

    layers: dict[str, LayerReport]
    examples: int
    differing_predictions: int
    largest_logit_difference: float
    largest_logit: float

    @property
    def passed(self) -> bool:
        """No code, integer, bit or prediction differs, of any image, no logit by more than rounding, and some could."""
        something = all(layer.weights + layer.integers > 0 for layer in self.layers.values())
        compared = self.examples > 0 and bool(self.layers) and something
        different = sum(sum(layer[1::2]) for layer in self.layers.values())
        rounded = self.largest_logit_difference <= ROUNDING * self.largest_logit
        return compared and rounded and different + self.differing_predictions == 0


def verify(
    model: nn.Module,
    variables: Mapping[str, Any],
    packed: Mapping[str, Any],
    batches: Iterable[Float[Array, "batch *image"]],
) -> Verification:
    """Run a trained network and its packed form on the same images and compare all that is exact.

    Logits and predictions are those of the two networks as they run; codes, integers and bits are recorded in a second
    run of each.  For the integers each packed layer gets the inputs of the trained one, so that a difference shows in
    the layer that makes it.  What is not a number, on either side, differs from all.

    Args:
      model: of both; as :func:`bnn_jax.packed.freeze` takes it.
      variables: trained.
      packed: what :func:`bnn_jax.packed.freeze` made of them.
      batches: normalized images, as the network takes them.

    Raises:
      ValueError: if a number of the variables is not finite, `packed` has no packed layer, or a layer is inside
        nn.vmap or nn.scan, so that nothing of it could be compared, the layer is named; if `batches` is one array.
    """
    variables = unbox(variables)
    require_finite("variables", variables, TRAIN_AGAIN)
    require_finite("packed", packed, "freeze the variables again")
    if not kernels_of(packed.get(PACKED, {})):
        raise ValueError("`packed` has no packed layer, so that nothing would be compared; give what `freeze` returns")
    require("batches", "one array", not hasattr(batches, "shape"), "must be an iterable of arrays", "give [images]")
    logits = jax.jit(partial(network_logits, model))
    compare = jax.jit(partial(_compare, model))
    layers: dict[str, LayerReport] = {}
    examples, differing, largest, scale = 0, 0, 0.0, 0.0
    for images in filter(len, batches):
        counts = compare(variables, packed, images)
        ours, theirs = logits(packed, images), logits(variables, images)
        same = (ours.argmax(-1) == theirs.argmax(-1)) & jnp.isfinite(ours).all(-1) & jnp.isfinite(theirs).all(-1)
        examples += len(images)
        differing += int((~same).sum())
        largest = np.maximum(largest, float(jnp.abs(ours - theirs).max()))
        scale = np.maximum(scale, float(jnp.abs(theirs).max()))
        for path, found in counts.items():
            weights, others, taken = np.split(np.asarray(found, np.int64), [2, 6])
            # The weights are the same ones in every batch.
            before = layers[path][2:6] if path in layers else (0,) * len(others)
            layers[path] = LayerReport(*weights.tolist(), *(others + before).tolist(), PATHS[taken.item()])
    return Verification(layers, examples, differing, float(largest), float(scale))


def _compare(model: nn.Module, variables: Any, packed: Any, images: Array) -> dict[str, Array]:
    """path of a layer -> the six counts of its report, and the number of the path that it takes."""
    called: list[str] = []

    def remember(module, x):
        called.append("/".join(module.path))
        module.sow(PRODUCTS, "inputs", x)
        return x

    def replay(module, x):
        inputs, words = (module.get_variable(TRAINED, name) for name in ("inputs", "words"))
        module.put_variable(TRAINED, "inputs", inputs[1:])
        # Only a layer that is called once, with one plane, gets packed words.
        return jax.tree.leaves(words)[0].reshape(x.shape) if is_words(x) else inputs[0]

    trained = _recorded(model, variables, images, remember)
    require_seen(called, trained)
    with_kernel = {path for path, record in trained.items() if "weights" in record}
    if one_sided := sorted(with_kernel ^ kernels_of(packed[PACKED]).keys()):
        raise ValueError(
            f"`packed` are not `variables`, frozen: they differ in layer {one_sided[0]!r}; freeze them again"
        )
    given = {(*parts(path), name): r.get(name, ()) for path, r in trained.items() for name in ("inputs", "words")}
    forced = _recorded(model, {**packed, TRAINED: unflatten_dict(given)}, images, replay)
    alone = _recorded(model, packed, images, lambda module, x: x)
    return {
        path: jnp.stack(
            [
                *_differences(record.get("weights", ())[:1], alone[path].get("weights", ())[:1], _differing_numbers, 1),
                *_differences(record.get("integers"), forced[path].get("integers"), _differing_numbers, 1),
                *_differences(record.get("words"), alone[path].get("words"), _differing_bits, 32),
                alone[path].get("path", (PATHS.index(AS_NUMBERS),))[0],  # of a product that takes no way of its own
            ]
        )
        for path, record in trained.items()
    }


def _recorded(model: nn.Module, variables: Any, images: Array, pass_on: Callable[[nn.Module, Array], Array]) -> Any:
    """path of a layer -> its record of "weights", "words" and "integers"; `pass_on` decides what each layer gets.

    It speaks to the layer's variables alone, so that nn.jit and nn.remat may trace the layer.
    """

    def layer(call, arguments, options, context):
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, BinaryConv | BinaryDense):
            return call(*arguments, **options)
        if module.kernel_quantizer is None:
            return call(*arguments, **options)
        x = pass_on(module, input_of(arguments, options))
        return call(x, *arguments[1:], **{name: value for name, value in options.items() if name != "x"})

    with nn.intercept_methods(layer):
        _, recorded = apply_network(model, variables, images, mutable=[PRODUCTS, TAKEN, TRAINED])
    found: dict[str, dict[str, Any]] = {}
    for collection in (PRODUCTS, TAKEN):
        for path, record in flatten_dict(recorded.get(collection, {})).items():
            found.setdefault("/".join(path[:-1]), {})[path[-1]] = record
    return found


def _differences(a: Any, b: Any, differ: Callable[[Array, Array], Array], values: int) -> tuple[int, Array]:
    """How many values there are in the arrays of a, and how many differ from those of b."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return sum(values * x.size for x, _ in pairs), sum(differ(x, y).sum() for x, y in pairs)


def _differing_numbers(a: Array, b: Array) -> Array:
    return (a != b) | (a == NOT_A_NUMBER)


def _differing_bits(a: Array, b: Array) -> Array:
    return jax.lax.population_count(a ^ b).astype(jnp.int32)

"""What the tests of networks share: quantizers, shapes by tracing, random variables, gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax.layers import BinaryConv
from bnn_jax.quantizers import ACTIVATION_QUANTIZERS, WEIGHT_QUANTIZERS

SIGNS = {"input_quantizer": ACTIVATION_QUANTIZERS["ste_sign"](), "kernel_quantizer": WEIGHT_QUANTIZERS["binary"]()}
XNOR = SIGNS | {"kernel_quantizer": WEIGHT_QUANTIZERS["xnor"]()}
BI_REAL = {
    "input_quantizer": ACTIVATION_QUANTIZERS["approx_sign"](),
    "kernel_quantizer": WEIGHT_QUANTIZERS["magnitude_aware"](),
}
REACT = BI_REAL | {"input_quantizer": ACTIVATION_QUANTIZERS["rsign"]()}
REAL = dict.fromkeys(SIGNS)


def conv_of(**quantizers) -> Callable[..., nn.Module]:
    """What a network hands its blocks to make convolutions with."""
    return partial(BinaryConv, padding=1, **quantizers)


def normal(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def shapes_of(module: nn.Module, *inputs: Any, **phase) -> dict[str, Any]:
    """Shapes of a module's variables for inputs, or for one image of a side, or of (height, width, channels)."""
    return jax.eval_shape(partial(module.init, train=False, **phase), jax.random.key(0), *_inputs(inputs))


def outputs_of(module: nn.Module, *inputs: Any, **phase) -> Any:
    """Shapes of a module's outputs."""
    init = partial(module.init_with_output, train=False, **phase)
    return jax.eval_shape(init, jax.random.key(0), *_inputs(inputs))[0]


def _inputs(inputs):
    (first, *_) = inputs
    if isinstance(first, int):
        first = (first, first, 3)
    return (jnp.zeros((1, *first)),) if isinstance(first, tuple) else inputs


def paths_of(tree: Any) -> dict[str, Any]:
    """path/of/a/leaf -> leaf."""
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def count(tree: Any, *names: str) -> int:
    """Elements of the leaves whose paths hold every name."""
    return sum(leaf.size for path, leaf in paths_of(tree).items() if set(names) <= set(path.split("/")))


def number_of(tree: Any, leaf: str) -> int:
    """How many leaves have this name."""
    return sum(path.endswith(f"/{leaf}") for path in paths_of(tree))


def of_layers(params: Any, leaf: str) -> dict[str, tuple[int, ...]]:
    """layer -> shape of its parameter of this name."""
    found = {path.rpartition("/"): value.shape for path, value in paths_of(params).items()}
    return {layer: shape for (layer, _, name), shape in found.items() if name == leaf}


def random_variables(module: nn.Module, *inputs: Any, seed: int = 0, mean: float = 0.5, **phase) -> dict[str, Any]:
    """Variables drawn at random, where those of a module's own start, zeros and ones, would hide what depends on them.

    Kernels are normal with the variance of 1/inputs, variances positive, all else normal around `mean`.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        drawn = rng.normal(size=leaf.shape)
        if path[-1].key in ("kernel", "latent_kernel"):
            drawn /= np.sqrt(leaf.size / leaf.shape[-1])
        else:
            drawn = np.abs(drawn) + 0.5 if path[-1].key == "var" else drawn + mean
        return drawn.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(module, *inputs, **phase))


def exact(tree: Any) -> Any:
    """A tree of float64 numpy arrays."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def apply(module: nn.Module, variables: Any, *inputs: Any, **phase) -> Any:
    """The outputs in evaluation, compiled."""
    return jax.jit(partial(module.apply, train=False, **phase))(variables, *inputs)


def replaced(variables: Any, pattern: Callable[[str], bool], value: float) -> Any:
    """`variables` with every parameter whose path the pattern takes set to a value."""

    def change(path, leaf):
        return jnp.full_like(leaf, value) if pattern("/".join(key.key for key in path)) else leaf

    return variables | {"params": jax.tree_util.tree_map_with_path(change, variables["params"])}


def within(variables: Any, *path: str) -> Any:
    """The variables of the module at a path."""
    for name in path:
        variables = {collection: tree[name] for collection, tree in variables.items() if name in tree}
    return variables


def largest_gradients(model: nn.Module, images: jax.Array, **phase) -> dict[str, float]:
    """path -> largest magnitude of a random network's gradient, in training; all finite."""
    variables = random_variables(model, images)
    phase = {"progress": 0.5, "mutable": ["batch_stats", "quantizer_state"], "train": True} | phase

    @jax.jit
    def gradient(params):
        def loss(params):
            (logits, _), _ = model.apply(variables | {"params": params}, images, **phase)
            return -jax.nn.log_softmax(logits)[:, 0].sum(), logits

        return jax.grad(loss, has_aux=True)(params)

    found, logits = gradient(variables["params"])
    assert np.isfinite(logits).all()
    largest = {path: float(jnp.abs(leaf).max()) for path, leaf in paths_of(found).items()}
    assert np.isfinite(list(largest.values())).all()
    return largest


def without_gradient(model: nn.Module, images: jax.Array, least: float = 1e-5) -> set[str]:
    """The parameters whose gradients are smaller than rounding makes them."""
    return {path for path, largest in largest_gradients(model, images).items() if largest < least}

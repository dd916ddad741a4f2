"""What a network costs: bits of weights."""

import jax
from jaxtyping import Array

from bnn_jax.types import LATENT_KERNEL, Params


def convolution_weight_bits(params: Params) -> int:
    """Bits of the convolution kernels of a network once it is frozen: 1 a latent weight, 32 a real one.

    Biases, scales, batch norm and dense layers are not counted.

    Args:
      params: arrays or shapes (`jax.eval_shape`); convolution kernels are the leaves `kernel` and `latent_kernel` of
        rank 4.

    >>> import jax.numpy as jnp
    >>> conv1, conv2 = jnp.ones((5, 5, 3, 6)), jnp.ones((5, 5, 6, 16))
    >>> convolution_weight_bits({"conv1": {"kernel": conv1}, "conv2": {"latent_kernel": conv2}})
    16800
    """

    def bits(path, leaf: Array) -> int:
        name = getattr(path[-1], "key", None)
        if leaf.ndim != 4 or name not in ("kernel", LATENT_KERNEL):
            return 0
        return leaf.size if name == LATENT_KERNEL else 32 * leaf.size

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(bits, params)))

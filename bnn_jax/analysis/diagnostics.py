r"""What a chosen derivative does: how far its gradient is from the slope of the loss, how often signs flip."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bnn_jax.checks import require_positive
from bnn_jax.estimators import sign
from bnn_jax.optim import is_latent
from bnn_jax.training.diagnostics import gradient_cosine, require_alike
from bnn_jax.types import Params

__all__ = ["coordinate_discrete_gradient", "flip_rate", "gradient_cosine"]


def coordinate_discrete_gradient(
    loss: Callable[[Float[Array, "..."]], Float[Array, ""]], x: Float[Array, "..."], *, step: float | Array
) -> Float[Array, "..."]:
    r"""The slope of a loss across finite steps, one coordinate at a time: CDG, the measure for a chosen gradient.

    CDG_i = (L(x + step e_i) - L(x - step e_i)) / (2 step)

    It is the exact derivative, along coordinate i, of the loss averaged over [x_i - step, x_i + step], so it has a
    meaning where L itself is a staircase.  It reads forward values alone: networks that differ in nothing but their
    estimator have one CDG.  It costs 2 x.size evaluations, one after another.  The paper's exact form could not be
    confirmed; this is a reading.

    Args:
      loss: x -> scalar, jit-compatible, the same at every call (fixed batch, no randomness).
      x: where; float array of any shape, as a real-valued kernel in front of binary activations.
      step: positive scalar, may be traced.  Rounding adds an error of about eps |L| / step.

    Returns:
      Array of x's shape and dtype.

    Raises:
      TypeError: if `x` is not a floating-point array.
      ValueError: if `step` is not positive.

    >>> coordinate_discrete_gradient(lambda x: sign(x).sum(), jnp.array([0.25, -2.0]), step=0.5)
    Array([2., 0.], dtype=float32)

    Reference: Kim et al., BinaryDuo: Reducing Gradient Mismatch in Binary Activation Network by Coupling Binary
    Activations, 2020, arXiv:2002.06517.
    """
    require_positive("step", step, "a few hundredths suit a kernel with weights of order 0.1")
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(f"`x` must be a floating-point array; got {jnp.result_type(x)}; convert it with `.astype`")
    flat = jnp.ravel(x)
    step = jnp.asarray(step, flat.dtype)

    def slope(i):
        after, before = (loss(flat.at[i].add(move).reshape(jnp.shape(x))) for move in (step, -step))
        return ((after - before) / (2 * step)).astype(flat.dtype)

    return lax.map(slope, jnp.arange(flat.size)).reshape(jnp.shape(x))


def flip_rate(before: Params, after: Params) -> Float[Array, ""]:
    r"""Share of the latent weights whose sign changed between two moments of training, as a step or an epoch apart.

    rate = #{i : sign(before_i) != sign(after_i)} / #{i},  sign(0) = +1,  over all leaves named `latent_kernel`

    A weight that flips and flips back in between does not count.  For quantizers that shift the weights before they
    take the sign, as the centred XNOR, these are the flips of the weights, not of the codes.

    Args:
      before, after: parameters of one network.

    Returns:
      float32 scalar in [0, 1].

    Raises:
      ValueError: if structures or shapes differ, or there are no latent weights.

    >>> flip_rate({"latent_kernel": jnp.array([-1.0, 0.5])}, {"latent_kernel": jnp.array([0.0, 0.25])})
    Array(0.5, dtype=float32)

    Reference: Helwegen et al., Latent Weights Do Not Exist, 2019, arXiv:1906.02107.
    """
    require_alike("before", before, "after", after)
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), jax.tree.leaves(is_latent(before)))
    pairs = [(old, new) for old, new, latent in pairs if latent]
    total = sum(old.size for old, _ in pairs)
    if total == 0:
        raise ValueError("`before` must hold latent weights, in leaves named `latent_kernel`; this network has none")
    return sum((sign(old) != sign(new)).sum() for old, new in pairs).astype(jnp.float32) / total

r"""Bop: an optimizer for weights that are binary from the start and have no latent ones behind them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from bnn_jax.checks import require
from bnn_jax.estimators import sign
from bnn_jax.optim.latent import is_latent
from bnn_jax.precision import sum_dtype
from bnn_jax.types import Params, Schedule


class BopState(NamedTuple):
    """State of :func:`bop`.

    Attributes:
      count: number of updates so far.
      momentum: m, like the weights, in float32 or wider.
      flips: how many weights the last update flipped, over all leaves.
    """

    count: Int[Array, ""]
    momentum: Params
    flips: Int[Array, ""]


def check_rate(adaptivity_rate: float | Array) -> None:
    """Refuse an adaptivity rate that is not in [0, 1]."""
    rule = "must be in [0, 1]"
    require("adaptivity_rate", adaptivity_rate, lambda g: (g >= 0) & (g <= 1), rule, "1e-4 is usual")


def bop(
    *, threshold: float | Array = 1e-6, adaptivity_rate: float | Array | Schedule = 1e-4
) -> optax.GradientTransformation:
    r"""Bop, the binary optimizer: flip a weight when its averaged gradient asks for it firmly enough.

    With gamma = adaptivity_rate, tau = threshold, m_0 = 0 and g the gradient, in each step

        m <- (1 - gamma) m + gamma g
        w <- -w  if |m| >= tau and sign(m) = sign(w),  else w

    so the update is -2w where w flips and 0 elsewhere, and the weights are exactly -1/+1.  There is no learning rate:
    tau is in units of the gradient, so it goes with the scale of the loss.  m = 0 asks for nothing and flips nothing,
    at threshold 0 either.  m is held in float32 or wider, for bfloat16 cannot represent steps of gamma = 1e-4.

    The gradient is taken at -1/+1: quantize the kernel by `binary`, with an estimator that lets it pass there, as
    ste_sign does and approx_sign does not.

    A weight that is not at -1/+1, as from a usual initialiser, lands on sign(w), sign(0) = +1, in its first update and
    can flip from the second one on: param + update reaches the near side exactly, from any |w| < 256 also in bfloat16;
    for the far side there may be no update that does.

    Args:
      threshold: tau, not negative; may be traced.
      adaptivity_rate: gamma in [0, 1], may be traced, or a schedule of it; the paper decays it as one does learning
        rates.

    Raises:
      ValueError: if `threshold` is negative or `adaptivity_rate` not in [0, 1]; on update, if `params` are missing.

    >>> optimizer = bop(threshold=0.1, adaptivity_rate=0.5)
    >>> w = jnp.array([1.0, 1.0, -1.0, -1.0])
    >>> updates, state = optimizer.update(jnp.array([0.3, 0.1, 0.3, -0.3]), optimizer.init(w), w)
    >>> optax.apply_updates(w, updates)
    Array([-1.,  1., -1.,  1.], dtype=float32)
    >>> print(state.flips)
    2

    Reference: Helwegen et al., Latent Weights Do Not Exist: Rethinking Binarized Neural Network Optimization, 2019,
    arXiv:1906.02107.
    """
    require("threshold", threshold, lambda tau: tau >= 0, "must not be negative", "1e-6 is usual")
    if not callable(adaptivity_rate):
        check_rate(adaptivity_rate)

    def init_fn(params):
        momentum = jax.tree.map(lambda w: jnp.zeros(w.shape, sum_dtype(w)), params)
        return BopState(jnp.zeros((), jnp.int32), momentum, jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError("`params` must be given to `update`: Bop changes weights by their sign")
        gamma = adaptivity_rate(state.count) if callable(adaptivity_rate) else adaptivity_rate

        def average(m, g):
            return ((1 - gamma) * m + gamma * g.astype(m.dtype)).astype(m.dtype)

        momentum = jax.tree.map(average, state.momentum, updates)
        flips = jax.tree.map(lambda m, w: _asks_to_flip(m, w, threshold), momentum, params)
        new_updates = jax.tree.map(lambda flip, w: jnp.where(flip, -2 * w, sign(w) - w), flips, params)
        flipped = sum((flip.sum(dtype=jnp.int32) for flip in jax.tree.leaves(flips)), start=jnp.zeros((), jnp.int32))
        return new_updates, BopState(optax.safe_increment(state.count), momentum, flipped)

    return optax.GradientTransformation(init_fn, update_fn)


def _asks_to_flip(m: Array, w: Array, threshold) -> Array:
    firm = (jnp.abs(m) >= threshold) & (m != 0)
    return firm & (sign(m) == sign(w).astype(m.dtype)) & (jnp.abs(w) == 1)


def bop_on_latent(
    other: optax.GradientTransformation,
    *,
    threshold: float | Array = 1e-6,
    adaptivity_rate: float | Array | Schedule = 1e-4,
) -> optax.GradientTransformationExtraArgs:
    """:func:`bop` on the weights named latent_kernel, which it makes binary, and another optimizer on the rest.

    Args:
      other: optimizer of the real parameters: biases, normalisation, first and last layer; Adam in the paper.
      threshold, adaptivity_rate: those of :func:`bop`.

    Raises:
      ValueError: as :func:`bop`.

    >>> params = {"conv": {"latent_kernel": jnp.ones(2), "bias": jnp.ones(2)}}
    >>> optimizer = bop_on_latent(optax.sgd(0.25), threshold=0.0)
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> updates["conv"]["bias"], updates["conv"]["latent_kernel"]
    (Array([-0.25, -0.25], dtype=float32), Array([-2., -2.], dtype=float32))

    Reference: Helwegen et al., Latent Weights Do Not Exist, 2019, arXiv:1906.02107.
    """

    def labels(params):
        return jax.tree.map(lambda latent: "latent" if latent else "real", is_latent(params))

    binary = bop(threshold=threshold, adaptivity_rate=adaptivity_rate)
    return optax.partition({"latent": binary, "real": other}, labels)

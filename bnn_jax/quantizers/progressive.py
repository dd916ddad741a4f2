r"""Progressive binarization: a growing random share of clipped numbers is their signs (StoMPP)."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bnn_jax.checks import require, require_floating
from bnn_jax.estimators import sign
from bnn_jax.precision import widened
from bnn_jax.quantizers.codes import Quantized
from bnn_jax.quantizers.multibit import straight_through as straight_through_to
from bnn_jax.quantizers.quantizer import Quantizer
from bnn_jax.types import Key


def partly_binary(
    x: Float[Array, "..."],
    *,
    train: bool = False,
    progress: float | Array = 1.0,
    key: Key | None = None,
    start: float | Array = 0.0,
    end: float | Array = 1.0,
    straight_through: bool = False,
) -> Quantized:
    r"""The signs of a random share of the numbers, the others clipped (StoMPP).

    With p = (progress - start) / (end - start), within [0, 1], and an m_i of 1 with probability p, else 0, anew in each
    step:

    Forward   training:  m sign(x) + (1 - m) clip(x, -1, 1), real;  evaluation:  codes = sign(x);  scale 1
    Backward  with g the gradient of the result:  dL/dx_i = g_i (1 - m_i) 1{|x_i| <= 1}, exact, without an estimator;
              with `straight_through`  (chosen)  dL/dx_i := g_i 1{|x_i| <= 1}

    That p rises linearly and that all of m are drawn anew in each step, where the paper refreshes them softly, is a
    reading.

    Args:
      x: weights or activations.
      train: training (True) or evaluation.
      progress: share of the training done, in [0, 1]; may be traced.
      key: for the draw, needed in training.
      start, end: the progress at which the first and the last are binary, in order.
      straight_through: let gradients pass the signs too.

    Raises:
      ValueError: if `start` is not below `end`, or `key` is missing in training.
      TypeError: if `x` is not a floating-point array.

    >>> x = jnp.array([-3.0, 0.5])
    >>> [partly_binary(x, train=True, progress=p, key=jax.random.key(0)).codes.tolist() for p in (0.0, 1.0)]
    [[-1.0, 0.5], [-1.0, 1.0]]

    Reference: Smith, Islam, Layerwise Progressive Freezing Enables STE-Free Training of Deep Binary Neural Networks,
    2026, arXiv:2601.22660.
    """
    require_floating("x", x)
    _check_course(start, end)
    if not train:
        return Quantized(sign(x), jnp.ones((), x.dtype))
    if key is None:
        raise ValueError("`key` (=None) must be a `jax.random.key` in training; evaluation needs none")
    wide = widened(x)
    share = jnp.clip((jnp.asarray(progress, jnp.float32) - start) / (end - start), 0, 1)
    frozen = jax.random.uniform(key, x.shape) < share
    values = jnp.where(frozen, sign(wide), jnp.clip(wide, -1, 1))
    # What is NaN is blocked by nothing: its gradient is NaN too.
    blocked = (jnp.abs(wide) > 1) | (frozen & ~jnp.isnan(wide) & (not straight_through))
    surrogate = jnp.where(blocked, lax.stop_gradient(wide), wide)
    return straight_through_to(surrogate, Quantized(values, jnp.ones((), wide.dtype)), dtype=x.dtype)


def _check_course(start, end):
    require("start, end", (start, end), lambda pair: pair[0] < pair[1], "must be in order", "0 and 1 are usual")


def progressive(*, start: float = 0.0, end: float = 1.0, straight_through: bool = False) -> Quantizer:
    """The quantizer of :func:`partly_binary`, for weights and for activations.

    Raises:
      ValueError: if `start` is not below `end`.
    """
    _check_course(start, end)
    options = {"start": start, "end": end, "straight_through": straight_through}
    return Quantizer(apply=lambda x, **given: partly_binary(x, **options, **given), wants=("train", "progress", "key"))


def clipped() -> Quantizer:
    """Before a layer's turn: clip(x, -1, 1), real in evaluation too."""
    return Quantizer(apply=lambda x: Quantized(jnp.clip(x, -1, 1), jnp.ones((), x.dtype)), code_set=())


def committed() -> Quantizer:
    """After a layer's turn: sign(x), through which no gradient passes."""
    return Quantizer(apply=lambda x: Quantized(sign(x), jnp.ones((), x.dtype)))

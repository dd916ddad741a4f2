r"""Regularizers that draw latent weights to binary values, (weights, scale) -> scalar, and their sum over a network.

They are summed, not averaged, over the weights, and added to the loss with a strength that may follow a schedule:
``loss + strength(step) * penalty(params, manhattan)``.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax.core.meta import unbox
from jax.tree_util import DictKey
from jaxtyping import Array, Float

from bnn_jax.checks import look_up, require_floating
from bnn_jax.estimators import sign
from bnn_jax.precision import widened
from bnn_jax.types import LATENT_KERNEL, Params

Regularizer: TypeAlias = Callable[[Array, Array], Array]
"""(latent weights, scale) -> scalar; the scale is a scalar or one value a feature, shape (1, ..., 1, features)."""


def _matched(w: Array, scale: float | Array) -> tuple[Array, Array]:
    """Both as arrays of w's dtype; their errors."""
    w = jnp.asarray(w)
    require_floating("w", w)
    per_feature = (1,) * (w.ndim - 1) + w.shape[-1:]
    if jnp.shape(scale) not in ((), per_feature):
        raise ValueError(
            f"`scale` must be a scalar or one value a feature, shape {per_feature}; got {jnp.shape(scale)}"
        )
    return w, jnp.asarray(scale, w.dtype)


def _magnitude(w: Array) -> Array:
    """|w| with the derivative sign(w), also at 0, where it is +1 as the weight's code is."""
    return w * jax.lax.stop_gradient(sign(w))


def manhattan(w: Float[Array, "*fan_in features"], scale: float | Float[Array, "..."] = 1.0) -> Float[Array, ""]:
    r"""R1 of BNN+: the Manhattan distance of the weights to -scale and +scale.

    Forward   R = sum |scale - |w||
    Backward  dR/dw = -s sign(w),  dR/dscale = sum s,  s = sign(scale - |w|) but 0 at |w| = scale

    At w = 0, sign(w) = +1: a descent moves the weight towards +scale.  The optimal scale is the median of |w|.  The
    paper does not say whether it sums or averages over the weights; this is the sum.

    Args:
      w: latent weights, the filter on the last axis.
      scale: alpha, a scalar or of shape (1, ..., 1, features), trainable.

    Raises:
      TypeError: if `w` is not floating-point.
      ValueError: if the shape of `scale` is another.

    >>> value, slopes = jax.value_and_grad(manhattan)(jnp.array([-1.5, -1.0, 0.0, 0.5]))
    >>> print(value, slopes)
    2.0 [-1.  0. -1. -1.]

    Reference: Darabi et al., BNN+: Improved Binary Network Training, 2018, arXiv:1812.11800.
    """
    w, scale = _matched(w, scale)
    distance = scale - _magnitude(w)
    # Not jnp.abs: its derivative at 0 is 1.
    return (distance * jax.lax.stop_gradient(jnp.sign(distance))).sum()


def euclidean(w: Float[Array, "*fan_in features"], scale: float | Float[Array, "..."] = 1.0) -> Float[Array, ""]:
    r"""R2 of BNN+: the squared Euclidean distance of the weights to -scale and +scale.

    Forward   R = sum (scale - |w|)^2
    Backward  dR/dw = -2 (scale - |w|) sign(w),  dR/dscale = 2 sum (scale - |w|)

    At w = 0, sign(w) = +1: a descent moves the weight towards +scale.  The optimal scale is the mean of |w|.  The paper
    does not say whether it sums or averages over the weights; this is the sum.

    Args: as those of :func:`manhattan`.

    Raises: as :func:`manhattan`.

    >>> value, slopes = jax.value_and_grad(euclidean)(jnp.array([-1.5, 0.0, 0.5]))
    >>> print(value, slopes)
    1.5 [-1. -2. -1.]

    Reference: Darabi et al., BNN+: Improved Binary Network Training, 2018, arXiv:1812.11800.
    """
    w, scale = _matched(w, scale)
    return ((scale - _magnitude(w)) ** 2).sum()


def tang(
    w: Float[Array, "*fan_in features"], scale: float | Float[Array, "..."] = 1.0, *, clipped: bool = False
) -> Float[Array, ""]:
    r"""The concave regularizer of Tang et al., which pushes weights away from 0; `scale` plays no part.

    Forward   R = sum 1 - w^2;  clipped: sum (1 - w^2) 1{|w| <= 1}
    Backward  dR/dw = -2 w;     clipped: -2 w 1{|w| <= 1}

    The plain form grows with |w| without end: keep the weights in a box.

    Args:
      w: latent weights.
      scale: accepted, as every regularizer does, and checked; see :func:`scaled_tang`.
      clipped: the form in which the BNN+ paper quotes it, with no push beyond +-1.

    Raises: as :func:`manhattan`.

    >>> jax.grad(tang)(jnp.array([-2.0, 0.25, 1.0]))
    Array([ 4. , -0.5, -2. ], dtype=float32)

    Reference: Tang, Hua, Wang, How to Train a Compact Binary Neural Network with High Accuracy?, AAAI 2017.
    """
    w, _ = _matched(w, scale)
    distance = 1 - w**2
    return jnp.where(jnp.abs(w) <= 1, distance, 0).sum() if clipped else distance.sum()


def scaled_tang(w: Float[Array, "*fan_in features"], scale: float | Float[Array, "..."] = 1.0) -> Float[Array, ""]:
    r"""The clipped regularizer of Tang et al. for weights with a scale.

    Forward   R = sum (scale^2 - w^2) 1{|w| <= scale}
    Backward  dR/dw = -2 w 1{|w| <= scale},  dR/dscale = 2 scale sum 1{|w| <= scale}

    The BNN+ paper prints scale - w^2, which jumps at |w| = scale unless the scale is 1; this is the continuous form.

    Args: as those of :func:`manhattan`; at a scale below 0 every weight is outside.

    Raises: as :func:`manhattan`.

    >>> jax.grad(scaled_tang, argnums=(0, 1))(jnp.array([-2.0, 0.25, 0.5]), 0.5)
    (Array([ 0. , -0.5, -1. ], dtype=float32), Array(2., dtype=float32, weak_type=True))

    Reference: Darabi et al., BNN+: Improved Binary Network Training, 2018, arXiv:1812.11800.
    """
    w, scale = _matched(w, scale)
    return jnp.where(jnp.abs(w) <= scale, scale**2 - w**2, 0).sum()


def l2(w: Float[Array, "..."], scale: float | Float[Array, "..."] = 1.0) -> Float[Array, ""]:
    r"""Sum of squares; PACT's decay of clipping levels, or the usual one of weights; `scale` plays no part.

    Forward   R = sum w^2
    Backward  dR/dw = 2 w

    Raises: as :func:`manhattan`.

    >>> print(l2(jnp.array([3.0, 4.0])))
    25.0

    Reference: Choi et al., PACT: Parameterized Clipping Activation, 2018, arXiv:1805.06085.
    """
    w, _ = _matched(w, scale)
    return (w**2).sum()


REGULARIZERS: dict[str, Regularizer] = {
    "manhattan": manhattan,
    "euclidean": euclidean,
    "tang": tang,
    "clipped_tang": partial(tang, clipped=True),
    "scaled_tang": scaled_tang,
    "l2": l2,
}


def _total(terms: list[Array]) -> Float[Array, ""]:
    return sum(map(widened, terms), start=jnp.zeros((), jnp.float32))


def penalty(params: Params, regularizer: str | Regularizer) -> Float[Array, ""]:
    r"""A regularizer summed over all latent weights of a network.

    R = sum over parameters w named `latent_kernel` of regularizer(w, scale), where the scale is the learned one of the
    same layer, its parameter `kernel_quantizer/scale`, and 1 in layers that have none.  Gradients reach both.

    Args:
      params: nested dicts of parameters.
      regularizer: a name in REGULARIZERS, or a function of weights and a scale.

    Returns:
      A float32 scalar, 0 without latent weights.

    Raises: as the regularizer.

    >>> layer = {"latent_kernel": jnp.array([[0.5], [-2.0]]), "kernel_quantizer": {"scale": jnp.array([[1.5]])}}
    >>> print(penalty({"conv": layer, "head": {"kernel": jnp.ones((2, 2))}}, "manhattan"))
    1.5

    Reference: Darabi et al., BNN+: Improved Binary Network Training, 2018, arXiv:1812.11800.
    """
    regularizer = look_up("regularizer", regularizer, REGULARIZERS)
    leaves = dict(jax.tree_util.tree_leaves_with_path(unbox(params)))

    def scale_of(path):
        return leaves.get((*path[:-1], DictKey("kernel_quantizer"), DictKey("scale")), 1.0)

    latent = {path: w for path, w in leaves.items() if path[-1:] == (DictKey(LATENT_KERNEL),)}
    return _total([regularizer(w, scale_of(path)) for path, w in latent.items()])


def clipping_penalty(params: Params) -> Float[Array, ""]:
    r"""PACT's decay: :func:`l2` summed over the learned clipping levels of the activations.

    R = sum over parameters `input_quantizer/clipping_level` of alpha^2, so dR/dalpha = 2 alpha

    Args:
      params: nested dicts of parameters.

    Returns:
      A float32 scalar, 0 without such levels.

    >>> print(clipping_penalty({"conv": {"input_quantizer": {"clipping_level": jnp.array(8.0)}}}))
    64.0

    Reference: Choi et al., PACT: Parameterized Clipping Activation, 2018, arXiv:1805.06085.
    """
    suffix = (DictKey("input_quantizer"), DictKey("clipping_level"))
    leaves = jax.tree_util.tree_leaves_with_path(unbox(params))
    return _total([l2(level) for path, level in leaves if path[-2:] == suffix])

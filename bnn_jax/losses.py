r"""Losses: (logits, labels) -> one value for each example."""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from bnn_jax.types import Labels, Logits, LossFunction


def cross_entropy(logits: Logits, labels: Labels) -> Float[Array, "batch"]:
    r"""Softmax cross-entropy.

    L_i = log sum_c exp(f_ic) - f_iy

    >>> cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([1]))
    Array([0.6931472], dtype=float32)
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def label_smoothed_cross_entropy(logits: Logits, labels: Labels, *, smoothing: float = 0.1) -> Float[Array, "batch"]:
    r"""Softmax cross-entropy to labels of which a share is spread over all classes.

    L_i = -sum_c q_ic log p_ic,  q_ic = (1 - s) 1{c = y} + s / C,  p = softmax(f)

    Args:
      smoothing: s, in [0, 1).

    Raises:
      ValueError: for another `smoothing`.

    >>> label_smoothed_cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([1]))
    Array([0.6931472], dtype=float32)

    Reference: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2016, arXiv:1512.00567.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"`smoothing` (={smoothing}) must be in [0, 1); 0.1 is usual")
    one_hot = jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)
    wanted = (1 - smoothing) * one_hot + smoothing / logits.shape[1]
    return -(wanted * jax.nn.log_softmax(logits)).sum(axis=1)


def augmented_margins(logits: Logits, labels: Labels) -> Logits:
    """b_ic = f_ic - f_iy + 1{c != y}: the linear pieces of the multi-class hinge loss; 0 at the true label."""
    of_label = jnp.take_along_axis(logits, labels[:, None], axis=1)
    return logits - of_label + 1.0 - jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)


def multiclass_hinge(logits: Logits, labels: Labels) -> Float[Array, "batch"]:
    r"""Multi-class hinge loss of Crammer and Singer (the "SVM loss").

    Forward   L_i = max_c b_ic,  b_ic = f_ic - f_iy + 1{c != y};  L_i >= 0
    Backward  the subgradient of one maximiser c*: e_c* - e_y

    >>> multiclass_hinge(jnp.array([[2.0, 1.5, 0.0]]), jnp.array([0]))
    Array([0.5], dtype=float32)

    Reference: Crammer and Singer, On the Algorithmic Implementation of Multiclass Kernel-based Vector Machines, 2001.
    """
    margins = augmented_margins(logits, labels)
    active = lax.stop_gradient(margins.argmax(axis=1))
    return jnp.take_along_axis(margins, active[:, None], axis=1)[:, 0]


def smoothed_multiclass_hinge(logits: Logits, labels: Labels) -> Float[Array, "batch"]:
    r"""Multi-class hinge loss along a smoothed dual direction, for Deep Frank-Wolfe.

    Forward   L_i = sum_c xi_ic b_ic with xi_i = softmax(f_i), b as in :func:`multiclass_hinge`; where that sum is
              negative, xi_i is the vertex of the maximiser, and L_i the hinge loss itself
    Backward  xi_i - e_y: xi is held constant

    The softmax gives every class a share of the gradient; the vertex keeps the direction one of ascent in the dual.

    >>> smoothed_multiclass_hinge(jnp.array([[0.0, 0.0]]), jnp.array([0]))
    Array([0.5], dtype=float32)

    Reference: Berrada, Zisserman, Kumar, Deep Frank-Wolfe for Neural Network Optimization, 2019, arXiv:1811.07591.
    """
    margins = augmented_margins(logits, labels)
    smoothed = (lax.stop_gradient(jax.nn.softmax(logits)) * margins).sum(axis=1)
    return jnp.where(lax.stop_gradient(smoothed) < 0, multiclass_hinge(logits, labels), smoothed)


LOSSES: dict[str, LossFunction] = {
    "cross_entropy": cross_entropy,
    "label_smoothed_cross_entropy": label_smoothed_cross_entropy,
    "multiclass_hinge": multiclass_hinge,
    "smoothed_multiclass_hinge": smoothed_multiclass_hinge,
}

PIECEWISE_LINEAR = ("multiclass_hinge", "smoothed_multiclass_hinge")
"""The losses for which Deep Frank-Wolfe's step size is exact."""

r"""Losses: (logits, labels) -> one value for each example.

Logits are floating-point (batch, classes), labels integers (batch,) from 0 to classes - 1.  Arrays of another dtype or
shape are refused, and so are labels out of range; where they are traced, and cannot be, the loss of such an example and
its gradient are NaN, which ends a training.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Integer

from bnn_jax.checks import check_arrays, check_options, look_up, require, require_positive
from bnn_jax.errors import UsageError
from bnn_jax.types import BatchLabels, BatchLogits, Labels, Logits, LossFunction

Function = TypeVar("Function", bound=Callable)


def _of_examples(loss: Function) -> Function:
    """Let a function of logits and labels refuse what they cannot be, and return NaN for traced labels out of range."""

    @check_arrays
    @wraps(loss)
    def checked(logits, labels, **options):
        classes = logits.shape[1]
        labels = labels if isinstance(labels, jax.core.Tracer) else np.asarray(labels)
        inside = (labels >= 0) & (labels <= min(classes - 1, jnp.iinfo(labels.dtype).max))
        if isinstance(labels, np.ndarray):
            wrong = next(iter(labels[~inside]), None)
            rule = f"must be from 0 to {classes - 1}, one of the {classes} columns of `logits`"
            require("labels", wrong, wrong is None, rule, "subtract 1 from labels that count from 1")
        values = loss(logits, jnp.asarray(labels, jnp.int32), **options)
        # A factor, not a choice: what is not chosen gets the gradient 0.
        factor = jnp.where(inside, jnp.ones((), values.dtype), jnp.full((), jnp.nan, values.dtype))
        return values * factor.reshape((-1,) + (1,) * (values.ndim - 1))

    return checked


@_of_examples
def cross_entropy(logits: Logits, labels: Labels) -> Float[Array, "batch"]:
    r"""Softmax cross-entropy.

    L_i = log sum_c exp(f_ic) - f_iy

    >>> cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([1]))
    Array([0.6931472], dtype=float32)

    Reference: Bridle, Probabilistic Interpretation of Feedforward Classification Network Outputs, 1990.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


@_of_examples
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
    require("smoothing", smoothing, lambda s: (s >= 0) & (s < 1), "must be in [0, 1)", "0.1 is usual")
    one_hot = jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)
    wanted = (1 - smoothing) * one_hot + smoothing / logits.shape[1]
    return -(wanted * jax.nn.log_softmax(logits)).sum(axis=1)


@_of_examples
def augmented_margins(logits: Logits, labels: Labels) -> Logits:
    """b_ic = f_ic - f_iy + 1{c != y}: the linear pieces of the multi-class hinge loss; 0 at the true label."""
    of_label = jnp.take_along_axis(logits, labels[:, None], axis=1)
    return logits - of_label + 1.0 - jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)


@_of_examples
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


@_of_examples
def smoothed_multiclass_hinge(logits: Logits, labels: Labels, *, temperature: float = 1.0) -> Float[Array, "batch"]:
    r"""Multi-class hinge loss along a smoothed dual direction, for Deep Frank-Wolfe.

    Forward   L_i = sum_c xi_ic b_ic with xi_i = softmax(f_i / T), b as in :func:`multiclass_hinge`; where that sum is
              negative, xi_i is the vertex of the maximiser, and L_i the hinge loss itself
    Backward  xi_i - e_y: xi is held constant

    The softmax gives every class a share of the gradient; the vertex keeps the direction one of ascent in the dual.

    Args:
      temperature: T > 0, the paper's is 1; the higher, the more equal are the shares.

    Raises:
      ValueError: for another `temperature`.

    >>> smoothed_multiclass_hinge(jnp.array([[0.0, 0.0]]), jnp.array([0]))
    Array([0.5], dtype=float32)

    Reference: Berrada, Zisserman, Kumar, Deep Frank-Wolfe for Neural Network Optimization, 2019, arXiv:1811.07591.
    """
    require_positive("temperature", temperature, "1 is usual")
    margins = augmented_margins(logits, labels)
    smoothed = (lax.stop_gradient(jax.nn.softmax(logits / temperature)) * margins).sum(axis=1)
    return jnp.where(lax.stop_gradient(smoothed) < 0, multiclass_hinge(logits, labels), smoothed)


def rows_of(logits: BatchLogits, labels: BatchLabels) -> tuple[Float[Array, "rows classes"], Integer[Array, "rows"]]:
    """A row of logits for each label, as losses take them: of tokens (batch, tokens, classes) each is an example.

    >>> logits, labels = rows_of(jnp.zeros((2, 3, 5)), jnp.zeros((2, 3), jnp.int32))
    >>> logits.shape, labels.shape
    ((6, 5), (6,))
    """
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)


class Loss(NamedTuple):
    """A loss as a training step uses it.

    Attributes:
      apply: (logits, labels, **options) -> one loss for each example; what is differentiated.
      piecewise_linear: whether Deep Frank-Wolfe's step size is exact for it.
      monitored: (logits, labels) -> the loss that is reported; None reports the loss itself.
    """

    apply: Callable[..., Float[Array, "batch"]]
    piecewise_linear: bool = False
    monitored: LossFunction | None = None


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(cross_entropy),
    "label_smoothed_cross_entropy": Loss(label_smoothed_cross_entropy),
    "multiclass_hinge": Loss(multiclass_hinge, piecewise_linear=True),
    "smoothed_multiclass_hinge": Loss(smoothed_multiclass_hinge, piecewise_linear=True, monitored=multiclass_hinge),
}


def as_loss(loss: str | Loss | LossFunction, *, argument: str = "loss") -> Loss:
    """The record of a loss; a function of the table has the table's, any other is not piecewise linear.

    Raises:
      UsageError: for a name that is not known, the nearest is named, or cannot be imported; for what is no function.

    >>> as_loss(multiclass_hinge).piecewise_linear, as_loss(lambda logits, labels: logits[:, 0]).piecewise_linear
    (True, False)
    """
    found = look_up(argument, loss, LOSSES)
    if isinstance(found, Loss):
        return found
    require(
        argument,
        loss,
        callable(found),
        "must be a name, a Loss or a function (logits, labels) -> losses",
        error=UsageError,
    )
    return next((record for record in LOSSES.values() if record.apply is found), Loss(found))


def make_loss(loss: str | Loss | LossFunction, **options: Any) -> Loss:
    """A loss of the table with its options set.

    Args:
      loss: name in LOSSES, a :class:`Loss`, or a function (logits, labels) -> one loss for each example.
      **options: keyword arguments of its function.

    Returns:
      The record; its `apply` and `monitored` take logits and labels alone.

    Raises:
      ValueError: for a name or an option that is not known (the nearest is named), or a value out of range.

    >>> make_loss("label_smoothed_cross_entropy", smoothing=0.0).apply(jnp.array([[0.0, 0.0]]), jnp.array([1]))
    Array([0.6931472], dtype=float32)
    """
    found = as_loss(loss)
    check_options("options", found.apply, options)
    apply = partial(found.apply, **options) if options else found.apply
    if options and found in LOSSES.values():  # to refuse bad ones here, not in the first step
        jax.eval_shape(apply, jax.ShapeDtypeStruct((1, 2), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32))
    return found._replace(apply=apply, monitored=found.monitored or apply)


def check_loss(loss: Loss, num_classes: int, *, named: Any) -> None:
    """Refuse a loss that does not give each example a loss of its own: its mean would be that of other things.

    Args:
      loss: as :func:`make_loss` returns it.
      num_classes: of the logits.
      named: what the user gave, for the error.

    Raises:
      UsageError: for one whose result has another shape, or that cannot be computed.
    """
    batch = num_classes + 1
    logits, labels = jax.ShapeDtypeStruct((batch, num_classes), jnp.float32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    for function in (loss.apply, loss.monitored):
        try:
            found = jax.eval_shape(function, logits, labels)
        except (ValueError, TypeError) as error:
            raise UsageError(f"`loss` (={named}) cannot be computed: {error}") from error
        shape = getattr(found, "shape", None)
        if shape != (batch,):
            what = type(found).__name__ if shape is None else f"shape {shape}"
            raise UsageError(
                f"`loss` (={named}) must return one loss for each example, shape ({batch},) for {batch}; it returns "
                f"{what}: leave means and sums to the training step"
            )

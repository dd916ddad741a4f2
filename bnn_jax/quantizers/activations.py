r"""Activation quantizers with a threshold of their own, learned or fixed, and those of codes 0/1 and 0/1/2."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import require, require_floating, require_positive
from bnn_jax.estimators import ESTIMATORS, EstimatorLike, approx_sign, coupled_ternary, make_estimator
from bnn_jax.estimators.levels import ramped_step
from bnn_jax.quantizers.binary import binary
from bnn_jax.quantizers.codes import Quantized
from bnn_jax.quantizers.quantizer import Quantizer, with_input_estimator
from bnn_jax.types import EstimatorFunction

_half_step = make_estimator(lambda x: jnp.where(x < 0.5, 0, 1), lambda x: (x >= 0) & (x <= 1))


def shifted_sign(
    x: Float[Array, "..."], shift: float | Float[Array, "..."], *, estimator: EstimatorFunction = approx_sign
) -> Quantized:
    r"""Sign above a shifted threshold: codes -1/+1, scale 1.

    Forward   codes = sign(x - shift)
    Backward  with g the gradient of the codes and e' that of the estimator, by default max(0, 2 - 2|x - shift|):
              (chosen)  dL/dx := g e'(x - shift),  dL/dshift := -sum g e'(x - shift)

    Args:
      x: activations, the channels on the last axis.
      shift: a scalar, or one value a channel in the shape (1, ..., 1, channels).
      estimator: gives e'.

    Raises:
      TypeError: if `x` is not a floating-point array.

    >>> shifted_sign(jnp.array([[0.2, 0.2]]), shift=jnp.array([[0.1, 0.3]])).codes
    Array([[ 1., -1.]], dtype=float32)

    Reference: Liu et al., ReActNet, 2020, arXiv:2003.03488.
    """
    require_floating("x", x)
    return binary(x - shift, estimator=estimator)


def rsign(estimator: EstimatorLike = "approx_sign", **options: Any) -> Quantizer:
    r"""RSign of ReActNet: the quantizer of :func:`shifted_sign`; it owns `shift`, a value a channel, 0 at the start.

    Args:
      estimator: its name, record or function.
      **options: of the estimator, and `trainable`, as :func:`with_estimator` takes them.

    Reference: Liu et al., ReActNet, 2020, arXiv:2003.03488.
    """
    return with_input_estimator(
        shifted_sign, estimator, init=lambda key, x: {"shift": jnp.zeros(_per_channel(x), x.dtype)}, **options
    )


def unbalanced(*, threshold: float = 0.5, estimator: EstimatorLike = "ste_sign", **options: Any) -> Quantizer:
    r"""Sign above a fixed threshold, which leaves fewer activations at +1 than at -1.

    Forward   codes = sign(x - threshold), scale 1
    Backward  that of the estimator at x - threshold, by default 1{|x - threshold| <= 1}

    The paper's value could not be confirmed; 0.5 is this package's choice, by which 31 % of standard normal activations
    are +1.  It is not trained: the bias of a normalization before it can learn to undo it, so that what it sets is
    where training starts.

    Args:
      threshold: of either sign; may be traced.
      estimator: its name, record or function.
      **options: of the estimator, and `trainable`, as :func:`with_estimator` takes them.

    >>> unbalanced().apply(jnp.array([0.0, 0.4, 0.5])).codes
    Array([-1., -1.,  1.], dtype=float32)

    Reference: Kim et al., Improving Accuracy of Binary Neural Networks using Unbalanced Activation Distribution, CVPR
    2021, arXiv:2012.00938.
    """
    plain = with_input_estimator(binary, estimator, **options)
    return plain._replace(apply=lambda x, **given: plain.apply(x - jnp.asarray(threshold, x.dtype), **given))


def sparse_step(
    x: Float[Array, "..."],
    *,
    threshold: float | Float[Array, "..."],
    width: float | Float[Array, "..."],
    rho: float | Array = 0.3,
) -> Quantized:
    r"""Step with a learned threshold and ramp (Si-BNN): codes 0/1, scale 1.

    Forward   codes = 1 if x > threshold else 0
    Backward  (chosen)  with D = width, on -rho D < x - threshold < D and 0 elsewhere:
              dcodes/dx := 1 / D,  dcodes/dD := -(x - threshold) / D^2,  dcodes/dthreshold := -1 / D

    Args:
      x: activations, the channels on the last axis.
      threshold: a scalar, or one value a channel in the shape (1, ..., 1, channels).
      width: D, likewise; positive.  One of an array that training drives to 0 or below has no ramp and stays.
      rho: the ramp below the threshold as a fraction of D.

    Raises:
      ValueError: if `width` is a number that is not positive, `rho` is negative, or one does not broadcast to x.
      TypeError: if `x` is not a floating-point array.

    >>> sparse_step(jnp.array([-1.0, 0.0, 0.5]), threshold=0.0, width=1.0).codes
    Array([0., 0., 1.], dtype=float32)

    Reference: Wang et al., Sparsity-Inducing Binarized Neural Networks, AAAI 2020.
    """
    if not isinstance(width, jax.Array):
        require_positive("width", width, "1.0 is usual")
    require("rho", rho, lambda r: r >= 0, "must be at least 0", "0.3 is usual")
    return Quantized(ramped_step(x, width=width, threshold=threshold, rho=rho), jnp.ones((), x.dtype))


def sparse(*, rho: float = 0.3) -> Quantizer:
    r"""The quantizer of :func:`sparse_step`; it owns `threshold` and `width`, a value a channel, 0 and 1 at the start.

    The authors' program learns the slope 1 / width instead; value and gradient by x are the same.

    Raises:
      ValueError: if `rho` is negative.

    Reference: Wang et al., Sparsity-Inducing Binarized Neural Networks, AAAI 2020.
    """
    require("rho", rho, lambda r: r >= 0, "must be at least 0", "0.3 is usual")

    def init(key, x):
        return {"threshold": jnp.zeros(_per_channel(x), x.dtype), "width": jnp.ones(_per_channel(x), x.dtype)}

    apply = lambda x, **parameters: sparse_step(x, rho=rho, **parameters)
    return Quantizer(apply=apply, init=init, code_set=ESTIMATORS["heaviside"].code_set)


def coupled(x: Float[Array, "..."]) -> Quantized:
    r"""Two coupled binary neurons (BinaryDuo, first stage): codes 0/1/2, scale 1/2.

    Forward   codes / 2 = round(2 clip(x, 0, 1)) / 2: 0, 1/2 or 1, with the thresholds 0.25 and 0.75
    Backward  (chosen)  d(codes / 2)/dx := 1{0 <= x <= 1}

    >>> coupled(jnp.array([0.0, 0.5, 0.75])).codes
    Array([0., 1., 2.], dtype=float32)

    Reference: Kim et al., BinaryDuo, 2020, arXiv:2002.06517.
    """
    return Quantized(coupled_ternary(x), jnp.full((), 0.5, x.dtype))


def decoupled(x: Float[Array, "..."]) -> Quantized:
    r"""One binary neuron of the two (BinaryDuo, second stage): codes 0/1, scale 1.

    Forward   codes = 1{x >= 1/2}
    Backward  (chosen)  dcodes/dx := 1{0 <= x <= 1}

    >>> decoupled(jnp.array([0.0, 0.5, 0.75])).codes
    Array([0., 1., 1.], dtype=float32)

    Reference: Kim et al., BinaryDuo, 2020, arXiv:2002.06517.
    """
    return Quantized(_half_step(x), jnp.ones((), x.dtype))


def decouple(
    per_feature: Any, norm_bias: Float[Array, "features"], next_kernel: Float[Array, "*spatial features outputs"]
) -> tuple[Any, Float[Array, "pairs"], Float[Array, "*spatial pairs outputs"]]:
    r"""Turn coupled neurons into independent binary ones: the switch of BinaryDuo from its first to its second stage.

    For F neurons with :func:`coupled` between a normalization and the next layer:

        coupled(z) * W  =  decoupled([z - 1/4, z + 1/4]) * [W / 2, W / 2],  z the output of the normalization

    The two sides are equal to the bit where z +- 1/4 is not rounded across a threshold.  A quantized next layer needs a
    scale in proportion to its kernel, as the mean |w| of the layer or of the filter; a learned scale has to be halved
    as well.

    Args:
      per_feature: whatever else has the F features on its last axis, an array or a tree of arrays: the kernel before
        the normalization, its mean, variance and scale.
      norm_bias: bias of the normalization.
      next_kernel: W, HWIO or (features, outputs); behind a flattening, reshape it to (height, width, features, outputs)
        first.

    Returns:
      The three with 2F features: `per_feature` twice, the bias -1/4 and +1/4, half the kernel twice.

    Raises:
      ValueError: if the number of features is not the same everywhere.

    >>> decouple(jnp.array([3.0]), jnp.array([0.5]), jnp.array([[1.0, -2.0]]))[1:]
    (Array([0.25, 0.75], dtype=float32), Array([[ 0.5, -1. ],
           [ 0.5, -1. ]], dtype=float32))

    Reference: Kim et al., BinaryDuo, 2020, arXiv:2002.06517.
    """
    features = norm_bias.shape[-1]
    for name, found in [("next_kernel", next_kernel.shape[-2])] + [
        ("per_feature", leaf.shape[-1]) for leaf in jax.tree.leaves(per_feature)
    ]:
        if found != features:
            raise ValueError(f"`{name}` (with {found} features) must have the {features} features of `norm_bias`")
    return (
        jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf], -1), per_feature),
        jnp.concatenate([norm_bias - 0.25, norm_bias + 0.25], -1),
        jnp.concatenate([next_kernel / 2, next_kernel / 2], -2),
    )


def _per_channel(x):
    return (1,) * (x.ndim - 1) + x.shape[-1:]

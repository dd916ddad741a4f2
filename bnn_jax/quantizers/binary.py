r"""Binary quantizers: codes -1/+1 of the latent weights' own sign, with the scales and gradients of the field."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import require, require_floating, require_positive
from bnn_jax.estimators import identity_sign, sign, ste_sign
from bnn_jax.finite import keep_nan
from bnn_jax.quantizers.codes import Quantized
from bnn_jax.quantizers.quantizer import Quantizer
from bnn_jax.types import EstimatorFunction, Key


def binary(x: Float[Array, "..."], *, estimator: EstimatorFunction = ste_sign) -> Quantized:
    r"""Plain sign: codes sign(x), scale 1; for activations and for weights without a scale.

    Forward   codes = sign(x)
    Backward  that of `estimator`

    >>> binary(jnp.array([-0.3, 0.0])).codes
    Array([-1.,  1.], dtype=float32)

    Reference: Hubara et al., Binarized Neural Networks, 2016, arXiv:1602.02830.
    """
    return Quantized(estimator(x), jnp.ones((), x.dtype))


def mean_magnitude(w: Float[Array, "*fan_in features"]) -> Float[Array, "*ones features"]:
    r"""||w_f||_1 / n of each filter, of shape (1, ..., 1, features); at w = 0 its derivative is sign(0)/n = 1/n.

    >>> mean_magnitude(jnp.array([[-0.5, 1.0], [1.5, 0.0]]))
    Array([[1. , 0.5]], dtype=float32)
    """
    magnitude = w * jax.lax.stop_gradient(sign(w))
    return magnitude.mean(axis=tuple(range(w.ndim - 1)), keepdims=True)


@jax.custom_vjp
def without_scale(codes: Float[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""`codes`, with the factor `scale` taken out of their gradient.

    Forward   codes
    Backward  (chosen)  dL/dcodes := dL/dresult / scale, and dL/dresult where scale = 0;  dL/dscale := 0

    A layer multiplies by the scale after the codes, so their gradient arrives with it as a factor.  Where the scale is
    0 no gradient arrives.

    >>> jax.grad(lambda codes: (3.0 * without_scale(codes, jnp.float32(3.0))).sum())(jnp.ones(2))
    Array([1., 1.], dtype=float32)
    """
    return codes


def _without_scale_backward(scale, cotangent):
    return cotangent / jnp.where(scale == 0, 1, scale), jnp.zeros_like(scale)


without_scale.defvjp(lambda codes, scale: (codes, scale), _without_scale_backward)


@jax.custom_vjp
def _centred_as_released(w: Float[Array, "*spatial inputs features"]) -> Float[Array, "*spatial inputs features"]:
    return jnp.clip(w - w.mean(axis=-2, keepdims=True), -1, 1)


def _centred_as_released_backward(_, cotangent):
    *spatial, inputs, _ = cotangent.shape
    return (cotangent * (math.prod(spatial) * (inputs - 1)),)


_centred_as_released.defvjp(lambda w: (_centred_as_released(w), None), _centred_as_released_backward)


def xnor(
    w: Float[Array, "*fan_in features"],
    *,
    estimator: EstimatorFunction = ste_sign,
    center: bool = False,
    gradient: Literal["exact", "diagonal"] = "exact",
    as_released: bool = False,
) -> Quantized:
    r"""Sign with one scale a filter, the least-squares optimal one (BWN and XNOR-Net).

    Forward   codes = sign(w),  scale_f = alpha_f = ||w_f||_1 / n = argmin_a ||w_f - a sign(w_f)||^2
    Backward  exact under the estimator: with g the gradient of alpha_f sign(w_f) and e' the estimator's derivative,
              dL/dw_i = alpha_f g_i e'(w_i) + (sign(w_i) / n) sum_j g_j sign(w_j)
              or diagonal, the paper's form, which keeps j = i of the sum:  dL/dw_i = g_i (alpha_f e'(w_i) + 1/n)
    Centred   w_c = w - mean of w over the C_in input channels takes the place of w; with d the gradient to w_c, by the
              formulas above, exact:  dL/dw = d - mean of d over the input channels
    Released  w_c = clip(w - mean of w over the input channels, -1, 1), before alpha;
              (chosen)  dL/dw := n (1 - 1/C_in) d, with the mean of d left in, and for clipped weights too

    `as_released` is what the authors' programs do.  Its factor n belongs to their rates of SGD; Adam does not see it.

    Args:
      w: latent weights, the filter on the last axis: HWIO kernels or (inputs, features) matrices; n is the fan-in.
      estimator: gives e', by default 1{|w| <= 1}.
      center: subtract the mean over the input channels, for each filter and spatial position.
      gradient: "exact" or "diagonal".
      as_released: the clip and the gradient of the programs: with "exact" of BNAS and of XNOR-Net in PyTorch, with
        "diagonal" of XNOR-Net's own in Torch, but for e' there, which is 0 at |w| = 1 too.

    Returns:
      codes of w's shape; scale of shape (1, ..., 1, features).

    Raises:
      ValueError: for another `gradient`, `center` of fewer than two input channels, or `as_released` without `center`.
      TypeError: if `w` is not a floating-point array.

    >>> xnor(jnp.array([[-0.5, 1.0], [1.5, 0.0]]))
    Quantized(codes=Array([[-1.,  1.],
           [ 1.,  1.]], dtype=float32), scale=Array([[1. , 0.5]], dtype=float32))

    Reference: Rastegari et al., XNOR-Net, 2016, arXiv:1603.05279; allenai/XNOR-Net, jiecaoyu/XNOR-Net-PyTorch.
    """
    require_floating("w", w)
    known = gradient in ("exact", "diagonal")
    require("gradient", gradient, known, "must be 'exact' or 'diagonal'", "'exact' is the default")
    require("as_released", as_released, center or not as_released, "needs `center=True`; the authors' programs centre")
    if center:
        rule = f"needs weights of two input channels at least, for one is its own mean; got shape {w.shape}"
        require("center", center, w.ndim > 1 and w.shape[-2] > 1, rule, "leave it out, or keep that layer real")
        w = _centred_as_released(w) if as_released else w - w.mean(axis=-2, keepdims=True)
    alpha = mean_magnitude(w)
    if gradient == "exact":
        return Quantized(estimator(w), alpha)
    alpha = jax.lax.stop_gradient(alpha)
    fan_in = w.size // w.shape[-1]
    zero = without_scale(w - jax.lax.stop_gradient(w), alpha * fan_in)
    return Quantized(estimator(w) + zero, alpha)


def magnitude_aware(
    w: Float[Array, "*fan_in features"], *, estimator: EstimatorFunction = ste_sign, scaled_gradient: bool = False
) -> Quantized:
    r"""Sign with the mean magnitude of each filter as a scale that the backward pass leaves out (Bi-Real, ReActNet).

    Forward   codes = sign(w),  scale_f = alpha_f = ||w_f||_1 / n
    Backward  (chosen)  with g the gradient of alpha_f sign(w_f) and e' the estimator's derivative:
              dL/dw_i := g_i e'(w_i), or alpha_f g_i e'(w_i) with `scaled_gradient`, as larq has it; alpha_f is constant

    Args:
      w: latent weights, the filter on the last axis.
      estimator: gives e', by default 1{|w| <= 1}, the derivative of clip(w, -1, 1).
      scaled_gradient: keep the factor alpha_f.

    Returns:
      codes of w's shape; scale of shape (1, ..., 1, features).  A filter of zeros has scale 0 and receives no gradient.

    >>> w = jnp.array([[-0.5], [1.5]])
    >>> jax.grad(lambda w: (lambda q: (q.codes * q.scale).sum())(magnitude_aware(w)))(w).ravel()
    Array([1., 0.], dtype=float32)

    Reference: Liu et al., Bi-Real Net, 2018, arXiv:1808.00278.
    """
    alpha = jax.lax.stop_gradient(mean_magnitude(w))
    codes = estimator(w)
    return Quantized(codes if scaled_gradient else without_scale(codes, alpha), alpha)


def binary_connect_weights(
    w: Float[Array, "..."],
    *,
    magnitude: float | Array = 1.0,
    stochastic: bool = False,
    train: bool = False,
    key: Key | None = None,
) -> Quantized:
    r"""Weights +-H whose gradient is passed on unchanged (BinaryConnect).

    Forward   deterministic:  W = H sign(w)
              stochastic, training:  W = +H with probability clip((w/H + 1)/2, 0, 1), else -H;  E[W] = w for |w| <= H
              stochastic, evaluation:  W = w: the *real* weights stand in for the codes, with scale 1
    Backward  (chosen)  dL/dw := dL/dW, without a clip: the weights are kept in [-H, H] by projection after each step

    Args:
      w: latent weights of any shape.
      magnitude: H, a positive scalar.
      stochastic: draw the signs while training.
      train: training (True) or evaluation; only the stochastic form differs.
      key: for the draw, needed in stochastic training.

    Raises:
      ValueError: if `magnitude` is not positive, or `key` is missing in stochastic training.
      TypeError: if `w` is not a floating-point array.

    >>> quantized = binary_connect_weights(jnp.array([-0.3, 0.0]), magnitude=0.5)
    >>> quantized.codes * quantized.scale
    Array([-0.5,  0.5], dtype=float32)

    Reference: Courbariaux, Bengio, David, BinaryConnect, 2015, arXiv:1511.00363.
    """
    require_positive("magnitude", magnitude, "1.0 is usual")
    require_floating("w", w)
    if stochastic and not train:
        return Quantized(w, jnp.ones((), w.dtype))
    scale = jnp.asarray(magnitude, w.dtype)
    codes = identity_sign(w)
    if stochastic:
        if key is None:
            raise ValueError("`key` (=None) must be a `jax.random.key` in stochastic training; evaluation needs none")
        probability = jnp.clip((w.astype(jnp.float32) / scale.astype(jnp.float32) + 1) / 2, 0, 1)
        drawn = keep_nan(w, jnp.where(jax.random.bernoulli(key, probability), 1, -1).astype(w.dtype))
        codes = drawn + (codes - jax.lax.stop_gradient(codes))
    return Quantized(without_scale(codes, scale), scale)


def binary_connect(*, stochastic: bool = False, magnitude: float = 1.0) -> Quantizer:
    """The quantizer of :func:`binary_connect_weights`; the stochastic one evaluates with real weights.

    Raises:
      ValueError: if `magnitude` is not positive.
    """
    require_positive("magnitude", magnitude, "1.0 is usual")
    return Quantizer(
        apply=lambda w, **given: binary_connect_weights(w, stochastic=stochastic, magnitude=magnitude, **given),
        wants=("train", "key") if stochastic else (),
        code_set=() if stochastic else (-1, 1),
    )


def post_training_weights(
    w: Float[Array, "*fan_in features"], *, train: bool = False, scaled: bool = False
) -> Quantized:
    r"""Binarize after training: real weights while training, their signs at evaluation.

    Forward   training:  W = w: the *real* weights stand in for the codes, with scale 1
              evaluation:  codes = sign(w),  scale 1, or ||w_f||_1 / n for each filter with `scaled`
    Backward  training:  dL/dw = dL/dW, exact;  evaluation: none

    The baseline of comparisons: what binarization costs a network that was not trained for it.

    Args:
      w: weights, the filter on the last axis.
      train: training (True) or evaluation.
      scaled: at evaluation use the least-squares scale of each filter.

    >>> post_training_weights(jnp.array([[-0.5], [1.5]]), scaled=True).scale
    Array([[1.]], dtype=float32)

    Reference: So, A Survey of Gradient Estimators for Binary Neural Networks for Image Classification, Stanford.
    """
    if train:
        return Quantized(w, jnp.ones((), w.dtype))
    return Quantized(sign(w), jax.lax.stop_gradient(mean_magnitude(w)) if scaled else jnp.ones((), w.dtype))


def post_training(*, scaled: bool = False) -> Quantizer:
    """The quantizer of :func:`post_training_weights`."""
    return Quantizer(apply=lambda w, *, train: post_training_weights(w, train=train, scaled=scaled), wants=("train",))


def full_latent(
    w: Float[Array, "*fan_in features"], *, train: bool = False, estimator: EstimatorFunction = ste_sign
) -> tuple[Quantized, Float[Array, "*fan_in features"] | None]:
    r"""One latent kernel for two branches: the binary network's, and a real-valued one that helps to train it (FULW).

    Forward   training:  (:func:`xnor` of w, w);  evaluation:  (:func:`xnor` of w, None)
    Backward  dL/dw is the sum of both branches' gradients

    A model runs its features through both kernels while it trains, supervises the real branch with the labels and the
    binary one with the labels and the real one's outputs, and drops the real branch afterwards.  The two outputs are
    wanted apart, so this is no quantizer for a layer, whose bases are summed.  The paper's exact form could not be
    confirmed; this is a reading.

    Args:
      w: latent weights, the filter on the last axis.
      train: training (True) or evaluation.
      estimator: of the binary branch.

    Returns:
      The binary kernel, and the real one in training.

    >>> full_latent(jnp.array([[-0.5], [1.5]]))[1] is None
    True

    Reference: Xu et al., Improving Binary Neural Networks through Fully Utilizing Latent Weights, 2021,
    arXiv:2110.05850.
    """
    return xnor(w, estimator=estimator), w if train else None

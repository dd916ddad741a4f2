r"""Binary quantizers: codes -1/+1."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.estimators import sign, ste_sign
from bnn_jax.quantizers.codes import Quantized
from bnn_jax.types import Estimator


def binary(x: Float[Array, "..."], *, estimator: Estimator = ste_sign) -> Quantized:
    r"""Plain sign: codes sign(x), scale 1; for activations and for weights without a scale.

    Forward   codes = sign(x)
    Backward  that of `estimator`

    >>> binary(jnp.array([-0.3, 0.0])).codes
    Array([-1.,  1.], dtype=float32)

    Reference: Hubara et al., Binarized Neural Networks, 2016, arXiv:1602.02830.
    """
    return Quantized(estimator(x), jnp.ones((), x.dtype))


def xnor(w: Float[Array, "*fan_in features"], *, estimator: Estimator = ste_sign) -> Quantized:
    r"""Sign with one scale a filter, the least-squares optimal one (BWN and XNOR-Net).

    Forward   codes = sign(w),  scale_f = alpha_f = ||w_f||_1 / n = argmin_a ||w_f - a sign(w_f)||^2
    Backward  exact under the estimator: with g the gradient of alpha_f sign(w_f),
              dL/dw_i = alpha_f g_i e'(w_i) + (sign(w_i) / n) sum_j g_j sign(w_j)

    Args:
      w: latent weights, the filter on the last axis: HWIO kernels or (inputs, features) matrices; n is the fan-in.
      estimator: gives e', by default 1{|w| <= 1}.

    Returns:
      codes of w's shape; scale of shape (1, ..., 1, features).

    >>> xnor(jnp.array([[-0.5, 1.0], [1.5, 0.0]]))
    Quantized(codes=Array([[-1.,  1.],
           [ 1.,  1.]], dtype=float32), scale=Array([[1. , 0.5]], dtype=float32))

    Reference: Rastegari et al., XNOR-Net, 2016, arXiv:1603.05279.
    """
    magnitude = w * jax.lax.stop_gradient(sign(w))
    return Quantized(estimator(w), magnitude.mean(axis=tuple(range(w.ndim - 1)), keepdims=True))

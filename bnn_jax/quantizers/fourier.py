r"""FDA-BNN: sign with the gradient of its Fourier series, and a noise that a small network learns."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bnn_jax.checks import require_floating
from bnn_jax.estimators import EstimatorLike, fda_sign
from bnn_jax.precision import widened
from bnn_jax.quantizers.binary import mean_magnitude
from bnn_jax.quantizers.codes import Quantized
from bnn_jax.quantizers.quantizer import Quantizer, with_estimator, with_input_estimator
from bnn_jax.types import EstimatorFunction

REDUCTION, LITTLE_REDUCTION = 64, 4
"""By which the noise module's hidden layer is narrower, and where that would leave nothing."""


def _noise(rows: Array, squeeze: Array, expand: Array) -> Array:
    """max(0, rows squeeze) expand + 0.1 sin(rows)."""
    return jax.nn.relu(rows @ squeeze) @ expand + 0.1 * jnp.sin(rows)


def _with_noise(
    codes: Array, rows: Array, back: Callable[[Array], Array], progress: float | Array, **learned: Array
) -> Array:
    """The codes and, of the `rows` that `back` brings into their shape, the noise in its strength at `progress`."""
    strength = 0.05 * (1 + jnp.cos(math.pi * jnp.asarray(progress, rows.dtype)))
    learned = {name: widened(matrix) for name, matrix in learned.items()}
    return codes + (strength * back(_noise(rows, **learned))).astype(codes.dtype)


def fda_weights(
    w: Float[Array, "*fan_in features"],
    squeeze: Float[Array, "size hidden"],
    expand: Float[Array, "hidden size"],
    *,
    train: bool = False,
    progress: float | Array = 1.0,
    estimator: EstimatorFunction = fda_sign,
) -> Quantized:
    r"""Sign with a Fourier series' gradient and, in training, a learned noise on top (FDA-BNN).

    With eta(z) = max(0, z squeeze) expand + 0.1 sin(z) of a whole filter z, its n weights in a row, and the strength
    epsilon = (1 + cos(pi progress)) / 20, from 0.1 to 0:

    Forward   training:  W_f = alpha_f (sign(w_f) + epsilon eta(w_f)), real;  evaluation:  codes = sign(w_f);
              scale_f = alpha_f = ||w_f||_1 / n, constant in the backward pass
    Backward  (chosen)  dsign(w)/dw := e'(w), that of :func:`bnn_jax.estimators.fda_sign`;  else exact, to `squeeze` and
              `expand` too

    Args:
      w: latent weights, the filter on the last axis.
      squeeze, expand: the two dense layers, without biases.
      train: training (True) or evaluation, which has no noise.
      progress: share of the training done, in [0, 1]; may be traced.
      estimator: gives e'.

    Returns:
      codes of w's shape, in training with the noise; scale of shape (1, ..., 1, features).

    Raises:
      TypeError: if `w` is not a floating-point array.

    >>> fda_weights(jnp.array([[-0.5], [1.5]]), jnp.ones((2, 1)), jnp.ones((1, 2))).codes.ravel()
    Array([-1.,  1.], dtype=float32)

    Reference: Xu et al., Learning Frequency Domain Approximation for Binary Neural Networks, NeurIPS 2021,
    arXiv:2103.00841; the authors' program.
    """
    require_floating("w", w)
    scale, codes = lax.stop_gradient(mean_magnitude(w)), estimator(w)
    if not train:
        return Quantized(codes, scale)
    rows = widened(w).reshape(-1, w.shape[-1]).T
    back = lambda noise: noise.T.reshape(w.shape)
    return Quantized(_with_noise(codes, rows, back, progress, squeeze=squeeze, expand=expand), scale)


def fda_inputs(
    x: Float[Array, "... channels"],
    squeeze: Float[Array, "channels hidden"],
    expand: Float[Array, "hidden channels"],
    *,
    train: bool = False,
    progress: float | Array = 1.0,
    estimator: EstimatorFunction = fda_sign,
) -> Quantized:
    r"""Sign with a Fourier series' gradient and, in training, a learned noise of each pixel (FDA-BNN); scale 1.

    With eta and epsilon of :func:`fda_weights`, eta of the channels of a pixel:

    Forward   training:  sign(x) + epsilon eta(x), real;  evaluation:  codes = sign(x)
    Backward  (chosen)  dsign(x)/dx := e'(x);  else exact

    Args:
      x: activations, the channels on the last axis.
      squeeze, expand, train, progress, estimator: as there.

    Raises:
      TypeError: if `x` is not a floating-point array.

    Reference: Xu et al., Learning Frequency Domain Approximation for Binary Neural Networks, NeurIPS 2021,
    arXiv:2103.00841; the authors' program.
    """
    require_floating("x", x)
    codes = estimator(x)
    if train:
        rows = widened(x).reshape(-1, x.shape[-1])
        back = lambda noise: noise.reshape(x.shape)
        codes = _with_noise(codes, rows, back, progress, squeeze=squeeze, expand=expand)
    return Quantized(codes, jnp.ones((), x.dtype))


def _dense_layers(key: jax.Array, size: int, dtype: jnp.dtype) -> dict[str, Array]:
    """`squeeze` and `expand`, each drawn from +-1 / sqrt(its inputs)."""
    hidden = size // REDUCTION or max(1, size // LITTLE_REDUCTION)
    first, second = jax.random.split(key)

    def drawn(key, *shape):
        return jax.random.uniform(key, shape, minval=-1, maxval=1).astype(dtype) / math.sqrt(shape[0])

    return {"squeeze": drawn(first, size, hidden), "expand": drawn(second, hidden, size)}


def fda(estimator: EstimatorLike = "fda_sign", **options) -> Quantizer:
    """The quantizer of :func:`fda_weights`; it owns `squeeze` and `expand`, n / 64 hidden units, or n / 4 where n < 64.

    Raises:
      ValueError: for an unknown estimator or option.
    """
    return with_estimator(
        fda_weights,
        estimator,
        init=lambda key, w: _dense_layers(key, math.prod(w.shape[:-1]), w.dtype),
        wants=("train", "progress"),
        **options,
    )


def fda_activations(estimator: EstimatorLike = "fda_sign", **options) -> Quantizer:
    """The quantizer of :func:`fda_inputs`; it owns `squeeze` and `expand`, as that of :func:`fda`.

    Raises:
      ValueError: for an unknown estimator or option.
    """
    return with_input_estimator(
        fda_inputs,
        estimator,
        init=lambda key, x: _dense_layers(key, x.shape[-1], x.dtype),
        wants=("train", "progress"),
        **options,
    )

r"""Batch normalization with a hand-written gradient."""

import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Num

from bnn_jax.bitops.bits import pack
from bnn_jax.bitops.thresholds import above
from bnn_jax.checks import check_arrays, require
from bnn_jax.errors import UsageError
from bnn_jax.layers.arguments import require_floats, require_of_layer
from bnn_jax.layers.frozen import PACKED, is_freezing
from bnn_jax.precision import widened

FAR = 64.0
"""Where mean^2 > FAR variance in a channel, E[x^2] - mean^2 has lost too many digits, and a second pass is made."""

ONE_VALUE, LARGER = "must hold at least two values of each channel to normalize in training", "train on larger batches"


@check_arrays
def batch_norm(
    x: Float[Array, "... channels"],
    scale: Float[Array, "channels"],
    bias: Float[Array, "channels"],
    epsilon: float = 1e-5,
) -> tuple[Float[Array, "... channels"], Float[Array, "channels"], Float[Array, "channels"]]:
    r"""Normalize by the statistics of the batch; return (y, mean, variance).

    Forward   mean = c + E[x - c],  var = E[(x - c)^2] - E[x - c]^2  (biased: the sum over n values divided by n),
              y = scale (x - mean) / sqrt(var + epsilon) + bias
    Backward  exact, as one pass dL/dx = k1 dL/dy + k2 (x - c) + k3 with per-channel k1, k2, k3.  Autodiff makes three
              passes, a third of the time of a ResNet-20 step on CPU.  No gradient flows through the statistics.

    In exact arithmetic any center c gives the same; in float32 one near the mean keeps the digits of a small variance.
    On CPU one pass with c = 0 serves unless mean^2 > 64 var in some channel; then c = E[x], and a second pass is made.
    On GPU and TPU, where XLA makes the subtraction a part of the sums (its cost there was not measured), c is always
    the mean over the first row of every image, or over all of dense inputs.

    Under jit with a batch sharded over devices the expectations are those of the global batch.

    Raises:
      ValueError: if a channel has one value only, which is its own mean: y would be `bias` whatever x is.

    Reference: Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167.  Chan, Golub, LeVeque, Algorithms for
    Computing the Sample Variance, 1983, for the shifted form.
    """
    require("x.shape", x.shape, not has_one_value(x), ONE_VALUE, LARGER)
    return _batch_norm(x, scale, bias, epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _batch_norm(x, scale, bias, epsilon):
    return _forward(x, scale, bias, epsilon)[0]


def has_one_value(x: Array) -> bool:
    """Whether x has a single value of each channel, or none."""
    return math.prod(x.shape[:-1]) <= 1


def _per_channel(x, *vectors):
    return (vector.reshape((1,) * (x.ndim - 1) + (-1,)) for vector in vectors)


def affine(
    x: Float[Array, "... #channels"], gain: Float[Array, "channels"], offset: Float[Array, "channels"]
) -> Float[Array, "... channels"]:
    """x gain + offset, in x's dtype."""
    gain, offset = _per_channel(x, gain, offset)
    return (widened(x) * gain + offset).astype(x.dtype)


class Statistics(NamedTuple):
    """Of each channel, mean = center + offset; and whether sums over x would lose digits that those over x - c keep."""

    center: Float[Array, "channels"]
    offset: Float[Array, "channels"]
    variance: Float[Array, "channels"]
    far: Bool[Array, ""]


def _moments(x, center=None):
    """(E[x - c], E[(x - c)^2] - E[x - c]^2) over all axes but the last, in float32 at least."""
    x = widened(x)
    x = x if center is None else x - next(_per_channel(x, center))
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return mean, jnp.maximum((x * x).mean(axes) - mean * mean, 0)


def by_passes(x: Float[Array, "... channels"]) -> Statistics:
    """The statistics by one pass, and a second about the mean where the first has lost digits."""
    mean, variance = _moments(x)
    far = (mean * mean > FAR * variance).any()
    once = lambda x, mean, variance: (jnp.zeros_like(mean), variance)
    return Statistics(mean, *lax.cond(far, lambda x, mean, _: _moments(x, mean), once, x, mean, variance), far)


def by_first_rows(x: Float[Array, "... channels"]) -> Statistics:
    """The statistics by one pass about the mean over a part of x: the variance errs by (height + 1) 2^-24 at most."""
    center, _ = _moments(x[:, :1] if x.ndim > 2 else x)
    return Statistics(center, *_moments(x, center), jnp.array(True))


def _forward(x, scale, bias, epsilon):
    center, offset, variance, far = lax.platform_dependent(x, cpu=by_passes, default=by_first_rows)
    inverse = lax.rsqrt(variance + epsilon)
    gain = widened(scale) * inverse
    shift, gain, constant = _per_channel(x, center, gain, widened(bias) - offset * gain)
    y = ((widened(x) - shift) * gain + constant).astype(x.dtype)
    return (y, center + offset, variance), (x, scale, bias, center, offset, far, inverse)


def _backward(epsilon, residuals, cotangents):
    x, scale, bias, center, offset, far, inverse = residuals
    g = cotangents[0]
    axes = tuple(range(x.ndim - 1))
    count = math.prod(x.shape[:-1])
    (shift,) = _per_channel(x, center)

    def sums(g, x, shift=None):
        g, x = widened(g), widened(x)
        return g.sum(axes), (g * (x if shift is None else x - shift)).sum(axes)

    def sums_near_0(g, x):
        dbias, products = sums(g, x)
        return dbias, products - center * dbias

    dbias, products = lax.cond(far, lambda g, x: sums(g, x, shift), sums_near_0, g, x)
    dscale = inverse * (products - offset * dbias)
    k1 = widened(scale) * inverse
    k2 = -k1 * inverse * dscale / count
    k3 = -k1 * dbias / count - k2 * offset
    k1, k2, k3 = _per_channel(x, k1, k2, k3)
    dx = (widened(g) * k1 + (widened(x) - shift) * k2 + k3).astype(x.dtype)
    return dx, dscale.astype(scale.dtype), dbias.astype(bias.dtype)


_batch_norm.defvjp(_forward, _backward)


class BatchNorm(nn.Module):
    r"""Batch normalization over all axes but the last.

    Training uses the batch's statistics and moves the running ones, running = momentum running + (1 - momentum) batch;
    otherwise the running ones are used.  Both variances are biased, sums over n values divided by n (PyTorch's running
    variance divides by n - 1).  Frozen (:func:`bnn_jax.packed.freeze`) it has them folded into a gain and an
    offset a channel; or, between packed layers, a threshold a channel, by which it turns integers into packed codes.

    Attributes:
      momentum: of the running statistics (PyTorch's momentum is one minus this).
      epsilon: added to the variance.
      use_scale, use_bias: learn gamma, beta; otherwise they are 1 and 0.
      scale_init: of gamma.
      param_dtype: of scale and bias; the statistics are float32.

    Raises:
      ValueError: in training, if x has one value of each channel, as a batch of one image in a dense layer.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    use_scale: bool = True
    use_bias: bool = True
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    @check_arrays
    def __call__(self, x: Num[Array, "... channels"], *, train: bool) -> Num[Array, "... channels_or_words"]:
        if self.has_variable(PACKED, "threshold"):
            return pack(above(x, self.get_variable(PACKED, "threshold")))
        require_floats(self, x)
        if self.has_variable(PACKED, "gain"):
            return affine(x, self.get_variable(PACKED, "gain"), self.get_variable(PACKED, "offset"))
        channels = (x.shape[-1],)
        scale, bias = jnp.ones(channels, self.param_dtype), jnp.zeros(channels, self.param_dtype)
        if self.use_scale:
            scale = self.param("scale", self.scale_init, channels, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_variance = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        alone = has_one_value(x)
        if not train or (alone and self.is_initializing()):
            gain = widened(scale) * lax.rsqrt(running_variance.value + self.epsilon)
            offset = widened(bias) - running_mean.value * gain
            if is_freezing(self, train):
                self.put_variable(PACKED, "gain", gain)
                self.put_variable(PACKED, "offset", offset)
            return affine(x, gain, offset)
        require_of_layer(self, "x.shape", x.shape, not alone, ONE_VALUE, LARGER, UsageError)
        y, mean, variance = batch_norm(x, scale, bias, self.epsilon)
        if not self.is_initializing():
            for running, batch in ((running_mean, mean), (running_variance, variance)):
                batch = lax.stop_gradient(batch).astype(running.value.dtype)
                running.value = self.momentum * running.value + (1 - self.momentum) * batch
        return y

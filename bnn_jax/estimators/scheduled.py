r"""Sign estimators that sharpen, cool or gain terms during training, each with its schedule.

A schedule maps the progress of training, 0 at its start and 1 at its end, to the parameters of the estimator; it may be
traced, and its values are arrays, so that a new one does not recompile.
"""

import math
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import require, require_positive
from bnn_jax.estimators.definition import make_sign
from bnn_jax.estimators.signs import sech_squared
from bnn_jax.precision import widened
from bnn_jax.types import Key

Progress: TypeAlias = float | Float[Array, ""]


# Fitted to sin on [-pi/2, pi/2] in odd powers up to the ninth, least in the largest relative error: 6e-9.
SINE_COEFFICIENTS = (0.9999999947, -0.1666665668, 0.008333025139, -1.980741873e-4, 2.601903068e-6)


def _split_pi(multiple: float | Float[Array, "..."], angle: Float[Array, "..."]) -> Float[Array, "..."]:
    # angle - multiple * pi in two steps, of which the first is exact.
    return (angle - multiple * 3.140625) - multiple * (math.pi - 3.140625)


def _short_sine(angle: Float[Array, "..."]) -> Float[Array, "..."]:
    # On [-pi/2, pi/2].
    *lower, series = SINE_COEFFICIENTS
    for coefficient in reversed(lower):
        series = series * angle**2 + coefficient
    return angle * series


def _sine(angle: Float[Array, "..."]) -> Float[Array, "..."]:
    # The library's sine reduces arguments of any size and is ten times slower than this one for a few periods.
    turns = jnp.round(angle / math.pi)
    odd = turns - 2 * jnp.floor(turns / 2)
    return _short_sine(_split_pi(turns, angle)) * (1 - 2 * odd)


def _fourier_slope(x, terms, frequency):
    # Even in x, and flat around zero to far below a float's resolution: the lower bound keeps 0 / 0 away.
    angle = jnp.maximum(frequency * jnp.minimum(jnp.abs(x), 1), 1e-6)
    mirrored = jnp.minimum(angle, -_split_pi(1, angle))
    kernel = _sine(2 * terms * angle) / (2 * _short_sine(mirrored))
    return jnp.where(jnp.abs(x) <= 1, 4 / math.pi * frequency * kernel, 0)


def _quantile(magnitude: Float[Array, "size"], eps: Float[Array, ""]) -> Float[Array, ""]:
    # Bits of floats that are not negative sort as integers: 31 counts find the element of a rank, where sorting ten
    # million of them takes ten times as long and more.
    bits = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
    last = magnitude.size - 1
    position = eps * last
    rank = jnp.minimum(jnp.floor(position).astype(jnp.int32), last)

    def up_to(limit):
        return jnp.sum(bits <= limit, dtype=jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        found = up_to(middle) > rank
        return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

    infinity = jax.lax.bitcast_convert_type(jnp.float32(jnp.inf), jnp.int32)
    at, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(infinity), infinity))
    lower = jax.lax.bitcast_convert_type(at, jnp.float32)
    larger = jnp.min(magnitude, initial=jnp.inf, where=bits > at)
    upper = jnp.where(up_to(at) > jnp.minimum(rank + 1, last), lower, larger)
    return lower + (position - rank.astype(position.dtype)) * (upper - lower)


_ede = make_sign(lambda x, t, k: k * t * sech_squared(t * x))
_rbnn = make_sign(lambda x, t, k: k * t * jnp.maximum(math.sqrt(2) - t * jnp.abs(x), 0))
_gumbel = make_sign(lambda x, temperature: sech_squared(x / temperature) / temperature)
_noisy_slope = make_sign(lambda x, noise, temperature: sech_squared((x + noise) / temperature) / temperature)
_fda = make_sign(_fourier_slope)


def _require_sharpness(t, k):
    require_positive("t", t, "its schedule runs from 0.1 to 10")
    require_positive("k", k, "max(1 / t, 1) is usual")


def _geometric(progress: Progress, start: float | Array, end: float | Array) -> Float[Array, ""]:
    require("progress", progress, lambda p: (p >= 0) & (p <= 1), "must be in [0, 1]", "give step / total_steps")
    progress, start, end = (jnp.asarray(value, jnp.float32) for value in (progress, start, end))
    return start * (end / start) ** progress


def ede_schedule(progress: Progress, *, t_min: float = 0.1, t_max: float = 10.0) -> dict[str, Float[Array, ""]]:
    r"""t = t_min (t_max / t_min)^progress, k = max(1 / t, 1): the slope k t at zero is 1 until t passes 1.

    The authors' program runs ResNet-20 from t_min = 1e-3.

    Args:
      progress: 0 at the start of training, 1 at its end; may be traced.
      t_min: first t, positive.
      t_max: last t, positive.

    Raises:
      ValueError: if `progress` is not in [0, 1], or a bound of t is not positive.

    >>> {name: round(float(value), 5) for name, value in ede_schedule(1.0).items()}
    {'t': 10.0, 'k': 1.0}

    Reference: Qin et al., Forward and Backward Information Retention for Accurate Binary Neural Networks, 2020,
    arXiv:1909.10788.
    """
    require_positive("t_min", t_min, "0.1 is usual")
    require_positive("t_max", t_max, "10.0 is usual")
    t = _geometric(progress, t_min, t_max)
    return {"t": t, "k": jnp.maximum(1 / t, 1)}


def ede_sign(x: Float[Array, "..."], *, t: float | Array = 1.0, k: float | Array = 1.0) -> Float[Array, "..."]:
    r"""Sign with the error decay estimator of IR-Net, the derivative of k tanh(t x).

    Forward   q(x) = -1 if x < 0 else +1
    Backward  (chosen)  dq/dx := k t (1 - tanh(t x)^2)

    Args:
      x: float array of any shape.
      t: sharpness, positive; may be traced; from :func:`ede_schedule`.
      k: scale, positive; may be traced.

    Raises:
      ValueError: if `t` or `k` is not positive.

    >>> jax.grad(lambda x: ede_sign(x, **ede_schedule(1.0)).sum())(jnp.array([0.0, 3.0])).round(3)
    Array([10.,  0.], dtype=float32)

    Reference: Qin et al., Forward and Backward Information Retention for Accurate Binary Neural Networks, 2020,
    arXiv:1909.10788.
    """
    _require_sharpness(t, k)
    return _ede(x, t=t, k=k)


def dir_sign(
    x: Float[Array, "..."], *, t: float | Array = 1.0, k: float | Array = 1.0, eps: float | Array = 0.1
) -> Float[Array, "..."]:
    r"""Sign with DIR-Net's distribution-sensitive estimator: EDE that keeps a share of the weights able to learn.

    With u = min(t, 1 / quantile_eps(|x|)) over the whole tensor, without gradient:

    Forward   q(x) = -1 if x < 0 else +1
    Backward  (chosen)  dq/dx := k u (1 - tanh(u x)^2)

    A share eps of the elements keeps |u x| <= 1, where the derivative is at least 0.42 of its peak.  The paper's exact
    form could not be confirmed; this is a reading.  The quantile reads the tensor 33 times: meant for weights.

    Args:
      x: float array of any shape; unlike for the other estimators, each element's derivative depends on all of them.
      t: sharpness, positive; may be traced; from :func:`ede_schedule`.
      k: scale, positive; may be traced.
      eps: share of the elements that keeps learning, in (0, 1].

    Raises:
      ValueError: if `t` or `k` is not positive, or `eps` is not in (0, 1].

    >>> w = jnp.array([-1.0, -0.5, 0.5, 1.0])
    >>> jax.grad(lambda w: dir_sign(w, t=10.0).sum())(w).round(2)
    Array([0.14, 0.84, 0.84, 0.14], dtype=float32)

    Reference: Qin et al., Distribution-sensitive Information Retention for Accurate Binary Neural Network, 2022,
    arXiv:2109.12338.
    """
    _require_sharpness(t, k)
    require("eps", eps, lambda e: (e > 0) & (e <= 1), "must be in (0, 1]", "0.1 is usual")
    magnitude = jnp.abs(jax.lax.stop_gradient(jnp.asarray(x))).ravel().astype(jnp.float32)
    quantile = jnp.vectorize(partial(_quantile, magnitude))(jax.lax.stop_gradient(jnp.asarray(eps, jnp.float32)))
    return _ede(x, t=jnp.minimum(t, 1 / quantile), k=k)


def rbnn_schedule(
    progress: Progress, *, t_min: float = 1e-2, t_max: float = 10.0, activations: bool = False
) -> dict[str, Float[Array, ""]]:
    r"""t and k of :func:`ede_schedule` from t_min 0.01; for activations k = 1 and t = max(t, 1).

    The form for activations is that of the authors' program; `rbnn_sign` follows it where it quantizes inputs.

    Args:
      progress: 0 at the start of training, 1 at its end; may be traced.
      t_min: first t, positive.
      t_max: last t, positive.
      activations: True for the estimator of activations.

    Raises:
      ValueError: if `progress` is not in [0, 1], or a bound of t is not positive.

    >>> {name: float(value) for name, value in rbnn_schedule(0.0, activations=True).items()}
    {'t': 1.0, 'k': 1.0}

    Reference: Lin et al., Rotated Binary Neural Network, 2020, arXiv:2009.13055.
    """
    weights = ede_schedule(progress, t_min=t_min, t_max=t_max)
    return {"t": jnp.maximum(weights["t"], 1), "k": jnp.ones_like(weights["k"])} if activations else weights


def rbnn_sign(x: Float[Array, "..."], *, t: float | Array = 1.0, k: float | Array = 1.0) -> Float[Array, "..."]:
    r"""Sign with RBNN's training-aware triangle.

    Forward   q(x) = -1 if x < 0 else +1
    Backward  (chosen)  dq/dx := k max(0, sqrt(2) t - t^2 |x|)

    Args:
      x: float array of any shape.
      t: sharpness, positive; may be traced; from :func:`rbnn_schedule`.
      k: scale, positive; may be traced.

    Raises:
      ValueError: if `t` or `k` is not positive.

    >>> jax.grad(lambda x: rbnn_sign(x).sum())(jnp.array([0.0, 1.0, 2.0])).round(2)
    Array([1.41, 0.41, 0.  ], dtype=float32)

    Reference: Lin et al., Rotated Binary Neural Network, 2020, arXiv:2009.13055.
    """
    _require_sharpness(t, k)
    return _rbnn(x, t=t, k=k)


def gumbel_schedule(progress: Progress, *, start: float = 1.0, end: float = 0.3) -> dict[str, Float[Array, ""]]:
    r"""temperature = start (end / start)^progress: exponential cooling.

    Args:
      progress: 0 at the start of training, 1 at its end; may be traced.
      start: first temperature, positive.
      end: last temperature, positive.

    Raises:
      ValueError: if `progress` is not in [0, 1], or a temperature is not positive.

    >>> print(f"{gumbel_schedule(1.0)['temperature']:.4f}")
    0.3000
    """
    require_positive("start", start, "1.0 is usual")
    require_positive("end", end, "0.1 to 0.5 are usual")
    return {"temperature": _geometric(progress, start, end)}


def gumbel_sign(
    x: Float[Array, "..."], *, key: Key | None = None, temperature: float | Array = 1.0, sampled: bool = True
) -> Float[Array, "..."]:
    r"""Random sign with the straight-through Gumbel-softmax of the two classes with logits x and -x.

    With one draw L of the logistic distribution an element, which is the difference of two Gumbel draws:

    Forward   q(x) = -1 if x + L/2 < 0 else +1, so that P(q = +1) = sigmoid(2x)
    Backward  (chosen)  dq/dx := (1 - b^2) / temperature,  b = tanh((x + L/2) / temperature)

    The survey names the method without a formula; this standard form is a reading.  In the survey's program all
    estimators share the forward sign(x) and differ in the backward factor alone: `sampled` = False does that.

    Args:
      x: float array of any shape.
      key: a `jax.random.key` for training; None sets L = 0, the deterministic sign of evaluation.
      temperature: positive; may be traced; from :func:`gumbel_schedule`.
      sampled: False leaves the noise out of the forward value, q(x) = -1 if x < 0 else +1, not of the backward factor.

    Raises:
      ValueError: if `temperature` is not positive.

    >>> gumbel_sign(jnp.array([-0.5, 0.0]))
    Array([-1.,  1.], dtype=float32)
    >>> draws = gumbel_sign(jnp.full(10_000, 0.5), key=jax.random.key(0))  # sigmoid(1) = 0.73
    >>> print(f"{(draws > 0).mean():.1f}")
    0.7

    Reference: Jang, Gu, Poole, Categorical Reparameterization with Gumbel-Softmax, 2017, arXiv:1611.01144; used for
    binary networks by So, A Survey of Gradient Estimators for Binary Neural Networks for Image Classification, poster.
    """
    require_positive("temperature", temperature, "1.0 at the start and 0.3 at the end are usual")
    if key is None:
        return _gumbel(x, temperature=temperature)
    x = jnp.asarray(x)
    # Drawn in float32 also for a narrower x, whose few bits would make a coarse draw; one logarithm where
    # jax.random.logistic takes two, which the compiler keeps in memory.
    u = jax.random.uniform(key, x.shape, jnp.float32, minval=jnp.finfo(jnp.float32).tiny)
    wide = widened(x)
    noise = (jnp.log(u / (1 - u)) / 2).astype(wide.dtype)
    if not sampled:
        return _noisy_slope(x, noise=noise, temperature=temperature)
    return _gumbel((wide + noise).astype(x.dtype), temperature=temperature)


def fda_schedule(
    progress: Progress, *, start: float | Array = 10.0, end: float | Array = 19.0
) -> dict[str, Float[Array, ""]]:
    r"""terms = start + (end - start) progress, rounded to whole terms.

    The paper grows its last index from 9 to 18; that it does so linearly is a reading.

    Args:
      progress: 0 at the start of training, 1 at its end; may be traced.
      start: first number of terms, positive.
      end: last number of terms, positive.

    Raises:
      ValueError: if `progress` is not in [0, 1], or a number of terms is not positive.

    >>> [float(fda_schedule(progress)["terms"]) for progress in (0.0, 0.5, 1.0)]
    [10.0, 14.0, 19.0]
    """
    require("progress", progress, lambda p: (p >= 0) & (p <= 1), "must be in [0, 1]", "give step / total_steps")
    require_positive("start", start, "10 is usual")
    require_positive("end", end, "19 is usual")
    progress, start, end = (jnp.asarray(value, jnp.float32) for value in (progress, start, end))
    return {"terms": jnp.round(start + (end - start) * progress)}


def fda_sign(
    x: Float[Array, "..."], *, terms: float | Array = 10.0, frequency: float | Array = 0.1
) -> Float[Array, "..."]:
    r"""Sign with the derivative of the first terms of its Fourier series (frequency domain approximation).

    With N = terms and w = frequency:

    Forward   q(x) = -1 if x < 0 else +1
    Backward  (chosen)  dq/dx := (4w / pi) sum_{i=0}^{N-1} cos((2i+1) w x) if |x| <= 1 else 0,
              computed as (4w / pi) sin(2N w x) / (2 sin(w x))

    The cost does not depend on N.  The paper's index n of the last term is N - 1.

    Args:
      x: float array of any shape.
      terms: number of cosines, positive; may be traced; from :func:`fda_schedule`.
      frequency: w, in (0, pi).

    Raises:
      ValueError: if `terms` is not positive or `frequency` is not in (0, pi).

    >>> jax.grad(lambda x: fda_sign(x).sum())(jnp.array([0.0, 2.0])).round(5)
    Array([1.27324, 0.     ], dtype=float32)

    Reference: Xu et al., Learning Frequency Domain Approximation for Binary Neural Networks, 2021, arXiv:2103.00841.
    """
    require_positive("terms", terms, "10 at the start and 19 at the end are usual")
    require("frequency", frequency, lambda w: (w > 0) & (w < math.pi), "must be in (0, pi)", "0.1 is usual")
    return _fda(x, terms=terms, frequency=frequency)

r"""Incremental network quantization: weights become powers of two, the largest first."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import require, require_floating
from bnn_jax.estimators import sign
from bnn_jax.precision import widened
from bnn_jax.quantizers.codes import Bases, Quantized
from bnn_jax.quantizers.quantizer import Quantizer, State

SHARES = (0.5, 0.75, 0.875, 1.0)
ALEXNET_SHARES = (0.3, 0.6, 0.8, 1.0)


def incremental(
    w: Float[Array, "..."],
    state: State,
    *,
    bits: int = 5,
    shares: tuple[float, ...] = SHARES,
    train: bool = False,
    progress: float | Array = 1.0,
) -> tuple[Bases, State]:
    r"""Powers of two for a growing share of the weights; the rest stays real and is trained on (INQ).

    With s = max|w| when the first weights are frozen, n1 = floor(log2(4s/3)), n2 = n1 + 1 - 2^(bits-2), the levels are
    0, +-2^n2, ..., +-2^n1:

    Forward   frozen weights: codes = 0 if |w| < 2^n2 / 2;  sign(w) 2^(n-n2), n <= n1 the largest with |w| >= 3/4 2^n,
              or n2 if there is none;  scale = 2^n2.  The others, in training: w
    Backward  frozen weights: 0.  The others (exact): dL/dw = g
    State     in part j of `shares`, equal parts of training, the largest |w| among those still real are frozen until
              shares[j] of all are; what is frozen keeps its codes, whatever becomes of w

    Args:
      w: latent weights of any shape.
      state: {"frozen", "codes", "exponent"}, as made by :func:`inq`; exponent is n2.
      bits: of a frozen weight, 2 to 6.
      shares: increasing, the last 1; ALEXNET_SHARES are those of the paper's AlexNet.
      train: freeze what progress asks for.
      progress: share of the training done, in [0, 1]; may be traced.

    Returns:
      In evaluation one quantized tensor, all weights frozen for the occasion.  In training two, whose sum is meant: the
      frozen weights, and the real ones with scale 1.  The second holds no integer codes; it is all zero in the last
      part of training.  And the new state.

    Raises:
      ValueError: if `bits` is not from 2 to 6, `shares` not increasing up to 1, or the state does not fit w.
      TypeError: if `w` is not a floating-point array.

    >>> state = inq().init_state(None, jnp.zeros(4))
    >>> quantized, _ = incremental(jnp.array([-0.9, 0.3, 0.01, 0.0]), state)
    >>> print(quantized.codes * quantized.scale)
    [-1.        0.25      0.0078125 0.       ]

    Reference: Zhou et al., Incremental Network Quantization, 2017, arXiv:1702.03044.
    """
    _check_steps(bits, shares)
    require_floating("w", w)
    real = jax.lax.stop_gradient(widened(w))
    frozen = state["frozen"]
    if frozen.shape != w.shape:
        raise ValueError(f"`state` (of shape {frozen.shape}) must have the shape of `w`, {w.shape}")
    exponent = jnp.where(frozen.any(), state["exponent"], _lowest_exponent(jnp.abs(real).max(), bits))
    scale = jnp.ldexp(jnp.ones((), real.dtype), exponent).astype(w.dtype)
    if not train:
        codes = jnp.where(frozen, state["codes"], _powers(real, exponent, bits))
        return Quantized(codes.astype(w.dtype), scale), state

    count = _frozen_count(progress, shares, w.size)
    grown = partial(_freeze, bits=bits)
    state = {"frozen": frozen, "codes": state["codes"], "exponent": exponent}
    state = jax.lax.cond(count > frozen.sum(), grown, lambda state, *_: state, state, real, count)
    still_real = Quantized(jnp.where(state["frozen"], 0, w), jnp.ones((), w.dtype))
    return (Quantized(state["codes"].astype(w.dtype), scale), still_real), state


def inq(*, bits: int = 5, shares: tuple[float, ...] = SHARES) -> Quantizer:
    """The quantizer of :func:`incremental`, with no weight frozen at the start; begin with trained weights.

    Raises:
      ValueError: if `bits` is not from 2 to 6, or `shares` not increasing up to 1.

    Reference: Zhou et al., Incremental Network Quantization, 2017, arXiv:1702.03044.
    """
    _check_steps(bits, shares)
    return Quantizer(
        apply=partial(incremental, bits=bits, shares=tuple(shares)),
        init_state=lambda key, w: {
            "frozen": jnp.zeros(w.shape, bool),
            "codes": jnp.zeros(w.shape, jnp.float32),
            "exponent": jnp.zeros((), jnp.int32),
        },
        wants=("train", "progress"),
        code_set=_code_set(bits),
    )


def _check_steps(bits: int, shares: tuple[float, ...]) -> None:
    """Raise a ValueError unless `bits` is from 2 to 6 and `shares` increase up to 1."""
    require("bits", bits, bits in range(2, 7), "must be a whole number from 2 to 6", "5 is usual")
    shares = tuple(shares)
    increasing = bool(shares) and shares[-1] == 1 and all(a < b for a, b in zip((0, *shares), shares))
    require("shares", shares, increasing, "must be positive, increasing and end with 1", f"{SHARES} is usual")


def _code_set(bits):
    magnitudes = [2**power for power in range(2 ** (bits - 2))]
    return (*(-m for m in reversed(magnitudes)), 0, *magnitudes)


def _frozen_count(progress, shares, size):
    part = jnp.floor(jnp.asarray(progress) * len(shares)).astype(jnp.int32)
    return jnp.asarray([round(share * size) for share in shares], jnp.int32)[jnp.clip(part, 0, len(shares) - 1)]


def _freeze(state, w, count, *, bits):
    # What is frozen ranks first whatever its latent weight has become, so the set only grows.
    rank = jnp.argsort(jnp.argsort(-jnp.where(state["frozen"], jnp.inf, jnp.abs(w)).ravel()))
    codes = jnp.where(state["frozen"], state["codes"], _powers(w, state["exponent"], bits))
    frozen = (rank < count).reshape(w.shape)
    return {"frozen": frozen, "codes": jnp.where(frozen, codes, 0).astype(jnp.float32), "exponent": state["exponent"]}


def _octave(magnitude):
    """floor(log2(4 magnitude / 3)), exact: the largest n with magnitude >= 3/4 2^n."""
    mantissa, exponent = jnp.frexp(magnitude)
    return exponent - (mantissa < 0.75).astype(exponent.dtype)


def _lowest_exponent(largest, bits):
    return _octave(largest) + 1 - 2 ** (bits - 2)


def _powers(w, exponent, bits):
    """The integer codes of the levels nearest to w, in units of 2^exponent."""
    magnitude = jnp.abs(w)
    power = jnp.clip(_octave(magnitude) - exponent, 0, 2 ** (bits - 2) - 1)
    codes = sign(w) * jnp.ldexp(jnp.ones((), w.dtype), power)
    return jnp.where(magnitude < jnp.ldexp(jnp.ones((), w.dtype), exponent - 1), 0, codes)

r"""Quantizers whose levels are learned from the data that they quantize: LQ-Nets."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnn_jax.checks import require, require_floating
from bnn_jax.precision import widened
from bnn_jax.quantizers.codes import Quantized
from bnn_jax.quantizers.multibit import straight_through
from bnn_jax.quantizers.quantizer import Quantizer, State

MOMENTUM = 0.9
RIDGE = 1e-4
MOST_BITS = 4
UPPER_QUARTILE = 0.6745


def lq_weights(
    w: Float[Array, "*fan_in features"], state: State, *, train: bool = False
) -> tuple[tuple[Quantized, ...], State]:
    r"""LQ-Net weights: the nearest of 2^K levels that K learned numbers a filter span.

    With the basis v of one filter, from the state, and the levels v.e of all codes e in {-1, +1}^K:

    Forward   sum_k v_k codes_k, the level nearest to w; halfway between two of them the upper one
    Backward  (chosen) with g the gradient of that sum:  dL/dw := g
    State     v <- 0.9 v + 0.1 v_new,  v_new = argmin_u sum_i (w_i - u.codes_i)^2 + 1e-4 |u - v|^2,  in training

    With K = 1 the basis settles at v = mean|w|, and this is BWN.

    Args:
      w: latent weights, the filter on the last axis.
      state: {"basis": (K, 1, ..., 1, features)}, as made by :func:`lq_net`.
      train: update the basis, after it has quantized w.

    Returns:
      K quantized tensors whose sum is meant, codes -1/+1 and scales v_k of shape (1, ..., 1, features); the new state.

    Raises:
      ValueError: if the basis does not fit w.
      TypeError: if `w` is not a floating-point array.

    >>> (base,), _ = lq_weights(jnp.array([[-0.5], [0.1]]), {"basis": jnp.full((1, 1, 1), 0.25)})
    >>> print((base.codes * base.scale).ravel())
    [-0.25  0.25]

    Reference: Zhang et al., LQ-Nets, 2018, arXiv:1807.10029.
    """
    require_floating("w", w)
    wide = widened(w)
    basis = state["basis"]
    if basis.shape[1:] != (1,) * (w.ndim - 1) + w.shape[-1:]:
        raise ValueError(f"`state` (basis {basis.shape}) must hold (K, 1, ..., 1, features) for `w` {w.shape}")
    codes, _ = _nearest_level(jax.lax.stop_gradient(wide), basis, low=-1)
    quantized = straight_through(wide, tuple(map(Quantized, codes, basis)), dtype=w.dtype)
    return quantized, _updated(state, wide, codes, axes=tuple(range(w.ndim - 1))) if train else state


def lq_activations(x: Float[Array, "..."], state: State, *, train: bool = False) -> tuple[tuple[Quantized, ...], State]:
    r"""LQ-Net activations: the nearest of 2^K levels that K learned numbers a layer span.

    With the basis v from the state and the levels v.e of all codes e in {0, 1}^K:

    Forward   sum_k v_k codes_k, the level nearest to x; halfway between two of them the upper one
    Backward  (chosen) with g the gradient of that sum:  dL/dx := g 1{x <= the highest level}
    State     v <- 0.9 v + 0.1 v_new,  v_new = argmin_u sum_i (x_i - u.codes_i)^2 + 1e-4 |u - v|^2,  in training

    There is no lower cut: a ReLU goes before.  The authors' release has no ridge here; it keeps v where a batch leaves
    a code unused.

    Args:
      x: non-negative activations of any shape.
      state: {"basis": (K,)}, as made by :func:`lq_net_activations`.
      train: update the basis, after it has quantized x.

    Returns:
      K quantized tensors whose sum is meant, codes 0/1 and scalar scales v_k; the new state.

    Raises:
      ValueError: if the basis is no vector.
      TypeError: if `x` is not a floating-point array.

    >>> (low, high), _ = lq_activations(jnp.array([0.1, 0.9, 7.0]), {"basis": jnp.array([0.5, 1.0])})
    >>> print(low.codes * low.scale + high.codes * high.scale)
    [0.  1.  1.5]

    Reference: Zhang et al., LQ-Nets, 2018, arXiv:1807.10029.
    """
    require_floating("x", x)
    wide = widened(x)
    basis = state["basis"]
    if basis.ndim != 1:
        raise ValueError(f"`state` (basis {basis.shape}) must hold one vector (K,) a layer")
    codes, highest = _nearest_level(jax.lax.stop_gradient(wide), basis, low=0)
    below = jnp.where(wide > highest, 0, wide)
    quantized = straight_through(below, tuple(map(Quantized, codes, basis)), dtype=x.dtype)
    return quantized, _updated(state, wide, codes, axes=tuple(range(x.ndim))) if train else state


def lq_net(*, bits: int = 2, fan: str = "in") -> Quantizer:
    r"""The quantizer of :func:`lq_weights`; its state is the basis, kept in float32.

    At the start v_k = 0.6745 sqrt(2/n) 2^(k-bits), k = 1 ... bits.

    Args:
      bits: K, 1 to 4.
      fan: n, "in" for the fan-in (kernel area times inputs) or, as the authors' release, "out" (area times features).

    Raises:
      ValueError: if `bits` is not from 1 to 4, or `fan` another word.

    Reference: Zhang et al., LQ-Nets, 2018, arXiv:1807.10029.
    """
    _check_bits(bits)
    require("fan", fan, fan in ("in", "out"), "must be 'in' or 'out'", "'in' is usual")

    def init_state(key, w):
        n = int(np.prod(w.shape[:-1])) if fan == "in" else int(np.prod(w.shape[:-2])) * w.shape[-1]
        v = UPPER_QUARTILE * (2 / n) ** 0.5 * 2.0 ** np.arange(1 - bits, 1)
        shape = (bits,) + (1,) * (w.ndim - 1) + w.shape[-1:]
        return {"basis": jnp.asarray(np.broadcast_to(v.reshape((bits,) + (1,) * w.ndim), shape), jnp.float32)}

    return Quantizer(apply=lq_weights, init_state=init_state, wants=("train",))


def lq_net_activations(*, bits: int = 2) -> Quantizer:
    r"""The quantizer of :func:`lq_activations`; its state is the basis, kept in float32.

    At the start v_k = 1.349 / (2^bits - 1) 2^(k-1), k = 1 ... bits: the highest level is 1.349, twice the upper
    quartile of a unit normal.

    Raises:
      ValueError: if `bits` is not from 1 to 4.

    Reference: Zhang et al., LQ-Nets, 2018, arXiv:1807.10029.
    """
    _check_bits(bits)
    v = 2 * UPPER_QUARTILE / (2**bits - 1) * 2.0 ** np.arange(bits)
    return Quantizer(
        apply=lq_activations,
        init_state=lambda key, x: {"basis": jnp.asarray(v, jnp.float32)},
        wants=("train",),
        code_set=(0, 1),
    )


def _nearest_level(x, basis, *, low):
    """K code arrays in {low, 1} of the level nearest to x, and the highest level."""
    table = np.array(list(product((low, 1), repeat=len(basis))), np.float32)
    levels = jnp.stack([sum(float(e) * v for e, v in zip(row, basis)) for row in table])
    order = jnp.argsort(levels, axis=0)
    levels = jnp.take_along_axis(levels, order, axis=0)
    # Level l has codes[l]; a code changes by steps[l] where x passes the threshold under level l + 1.
    codes = jnp.moveaxis(jnp.asarray(table)[order], -1, 0)
    above = [x >= threshold for threshold in (levels[1:] + levels[:-1]) / 2]
    nearest = [
        sum(
            (jnp.where(passed, step, 0) for passed, step in zip(above, code[1:] - code[:-1])),
            jnp.zeros_like(x) + code[0],
        )
        for code in codes
    ]
    return nearest, levels[-1]


def _updated(state, x, codes, *, axes):
    """The state after one step towards the least-squares basis of these codes."""
    basis, x = state["basis"], jax.lax.stop_gradient(x)
    error = x - sum(code * v for code, v in zip(codes, basis))
    mean = partial(jnp.mean, axis=axes)
    gram = jnp.stack([jnp.stack([mean(a * b) for b in codes], -1) for a in codes], -2)
    correlation = jnp.stack([mean(code * error) for code in codes], -1)[..., None]
    # Solved for v_new - v, so that what the codes do not determine stays.  Where codes coincide the Gram matrix is
    # singular, and the ridge on a sum over many elements is lost in float32: those directions are left out by rank.
    size = x.size // correlation[..., 0, 0].size
    spectrum, directions = jnp.linalg.eigh(gram)
    determined = spectrum > 1e-5 * spectrum.max(-1, keepdims=True)
    inverse = jnp.where(determined, 1 / (jnp.where(determined, spectrum, 1) + RIDGE / size), 0)
    product_of = partial(jnp.matmul, precision="highest")
    along = product_of(jnp.swapaxes(directions, -1, -2), correlation)
    change = product_of(directions, inverse[..., None] * along)[..., 0]
    change = jnp.moveaxis(change, -1, 0).reshape(basis.shape)
    return {"basis": basis + (1 - MOMENTUM) * change.astype(basis.dtype)}


def _check_bits(bits):
    known = bits in range(1, MOST_BITS + 1)
    require("bits", bits, known, f"must be a whole number from 1 to {MOST_BITS}", "2 is usual")

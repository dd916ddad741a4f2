r"""BitNet's quantizers: weights of one bit or three values, activations of 8 bits with one scale a token."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import require, require_floating, require_positive
from bnn_jax.estimators import sign
from bnn_jax.precision import widened
from bnn_jax.quantizers.codes import Quantized
from bnn_jax.quantizers.multibit import require_codes, straight_through

EPSILON = "1e-5 is the authors'"


def bitnet_weights(w: Float[Array, "..."]) -> Quantized:
    r"""BitNet weights: one bit each about their mean, one scale a tensor.

    Forward   codes = sign(w - mean(w)),  scale = mean|w|
    Backward  (chosen) with g the gradient of scale * codes:  dL/dw := g

    A weight equal to the mean has the code +1 here, by the package's sign(0) = +1, and -1 in the paper.

    Args:
      w: latent weights of any shape.

    Raises:
      TypeError: if `w` is not a floating-point array.

    >>> bitnet_weights(jnp.array([1.0, 2.0, 6.0]))
    Quantized(codes=Array([-1., -1.,  1.], dtype=float32), scale=Array(3., dtype=float32))

    Reference: Wang et al., BitNet: Scaling 1-bit Transformers for Large Language Models, 2023, arXiv:2310.11453.
    """
    require_floating("w", w)
    wide = widened(w)
    return straight_through(wide, Quantized(sign(wide - wide.mean()), jnp.abs(wide).mean()), dtype=w.dtype)


def bitnet_b158_weights(w: Float[Array, "..."], *, epsilon: float | Array = 1e-5) -> Quantized:
    r"""BitNet b1.58 weights: codes -1/0/+1, one scale a tensor.

    With s = mean|w| + epsilon:

    Forward   codes = RoundClip(w / s, -1, 1) = max(-1, min(1, round(w / s))),  scale = s
    Backward  (chosen) with g the gradient of scale * codes:  dL/dw := g

    Ties round to even.  The paper gives the codes; that what divides the weights multiplies the codes is the authors'
    program, in which s = max(mean|w|, epsilon).

    Args:
      w: latent weights of any shape.
      epsilon: positive, so that a tensor of zeros has a scale too.

    Raises:
      ValueError: if `epsilon` is not positive.
      TypeError: if `w` is not a floating-point array.

    >>> bitnet_b158_weights(jnp.array([-3.0, 0.5, 1.0, 0.0])).codes
    Array([-1.,  0.,  1.,  0.], dtype=float32)

    Reference: Ma et al., The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits, 2024, arXiv:2402.17764, and
    its Training Tips, Code and FAQ.
    """
    require_positive("epsilon", epsilon, EPSILON)
    require_floating("w", w)
    wide = widened(w)
    scale = jnp.abs(wide).mean() + epsilon
    return straight_through(wide, Quantized(jnp.clip(jnp.round(wide / scale), -1, 1), scale), dtype=w.dtype)


def bitnet_activations(x: Float[Array, "..."], *, bits: int = 8, epsilon: float | Array = 1e-5) -> Quantized:
    r"""BitNet activations: evenly spaced levels up to each example's largest magnitude, of tokens each token's.

    With n = 2^(bits-1) - 1 and m = max(max|x|, epsilon) over an example, which is an index of the first axis: a layer
    over (batch, tokens, features) gives each token as an example:

    Forward   codes = max(-n, min(n, round(x n / m))), the integers from -n to n,  scale = m / n
    Backward  (chosen) with g the gradient of scale * codes:  dL/dx := g

    Ties round to even.  A product with codes of three values is one of 8-bit integers.

    Args:
      x: activations, the examples on the first axis.
      bits: of a code, at least 2.
      epsilon: positive, so that an example of zeros has a scale too.

    Returns:
      codes of x's shape; scale of shape (examples, 1, ..., 1), of a single axis ().

    Raises:
      ValueError: if `bits` is no whole number of at least 2, x's dtype cannot hold the codes exactly, or `epsilon` is
        not positive.
      TypeError: if `x` is not a floating-point array.

    >>> bitnet_activations(jnp.array([[127.0, -2.4], [0.5, 1.0]])).codes
    Array([[127.,  -2.],
           [ 64., 127.]], dtype=float32)

    Reference: Ma et al., The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits, 2024, arXiv:2402.17764, and
    its Training Tips, Code and FAQ.
    """
    require_positive("epsilon", epsilon, EPSILON)
    require_codes("x", x, bits=bits)
    require("bits", bits, bits >= 2, "must be at least 2", "8 is the authors'")
    wide, n = widened(x), 2 ** (bits - 1) - 1
    largest = jnp.maximum(jnp.abs(wide).max(tuple(range(1, x.ndim)) or None, keepdims=x.ndim > 1), epsilon)
    codes = jnp.clip(jnp.round(wide * (n / largest)), -n, n)
    return straight_through(wide, Quantized(codes, largest / n), dtype=x.dtype)

r"""Self-attention whose projections are binary layers, and scores from one-bit queries and keys.

Arrays of heads are (batch, tokens, heads, size).
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from bnn_jax.bitops.matmul import xor_counts
from bnn_jax.bitops.paths import PATHS
from bnn_jax.bitops.planes import input_words
from bnn_jax.checks import Pair, check_arrays, is_sizes, is_whole, require_positive
from bnn_jax.estimators import ste_sign
from bnn_jax.layers.arguments import QUANTIZERS, WHOLE, make_quantizers, require_of_layer
from bnn_jax.layers.binary_dense import BinaryDenseGeneral
from bnn_jax.layers.frozen import is_frozen, record, record_path
from bnn_jax.layers.precision import dot
from bnn_jax.precision import widened
from bnn_jax.quantizers import QuantizerLike, mark
from bnn_jax.quantizers.elastic import elastic_binary
from bnn_jax.quantizers.learned_step import NORMAL_MAGNITUDE

SIGNS = (-1, 1)

CACHE = "cache"
"""The collection in which a decoder keeps the keys and values of the tokens before."""


class Normalized(nn.Module):
    r"""Normalization of each token: zero mean and unit variance, or unit mean square, over its features.

    Forward   y = gain (x - c) / sqrt(mean (x - c)^2 + epsilon) + offset, c = mean x;  without `center`: c = offset = 0
    Backward  exact

    Computed in float32; y keeps x's dtype.

    Attributes:
      center: take the mean off and learn an offset, the parameter `bias`; the gain is `scale`.
      epsilon: added to the mean square.
      param_dtype: of both.

    Reference: Ba, Kiros, Hinton, Layer Normalization, 2016, arXiv:1607.06450; Zhang, Sennrich, Root Mean Square Layer
    Normalization, 2019, arXiv:1910.07467.
    """

    center: bool = True
    epsilon: float = 1e-6
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    @check_arrays
    def __call__(self, x: Float[Array, "... features"]) -> Float[Array, "... features"]:
        dtype, x, shape = x.dtype, widened(x), (1,) * (x.ndim - 1) + x.shape[-1:]
        x = x - x.mean(-1, keepdims=True) if self.center else x
        gain = widened(self.param("scale", nn.initializers.ones, shape[-1:], self.param_dtype)).reshape(shape)
        y = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * gain
        if self.center:
            y = y + widened(self.param("bias", nn.initializers.zeros, shape[-1:], self.param_dtype)).reshape(shape)
        return y.astype(dtype)


@check_arrays
def rotary(
    x: Float[Array, "batch tokens heads size"], positions: Int[Array, "tokens"], *, base: float = 10000.0
) -> Float[Array, "batch tokens heads size"]:
    r"""Rotary positions: each pair of a head's numbers, turned by an angle in proportion to the token's position.

    With t the position, a_i = t base^(-2i/size) and i < size/2:

    Forward   y_i = x_i cos a_i - x_{i + size/2} sin a_i,  y_{i + size/2} = x_{i + size/2} cos a_i + x_i sin a_i
    Backward  exact

    Dot products of a query and a key depend on the difference of their positions alone.

    Raises:
      ValueError: if `size` is odd, or `base` not positive.

    >>> np.round(np.asarray(rotary(jnp.ones((1, 2, 1, 2)), jnp.arange(2)).ravel(), float), 3)
    array([ 1.   ,  1.   , -0.301,  1.382])

    Reference: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, arXiv:2104.09864.
    """
    require_positive("base", base, "10000 is usual")
    size = x.shape[-1]
    if size % 2:
        raise ValueError(
            f"`x` (of shape {x.shape}) must have heads of an even size, which rotary positions turn in pairs"
        )
    turns = jnp.asarray(base ** (-np.arange(0, size, 2) / size), jnp.float32)
    angles = jnp.outer(positions.astype(jnp.float32), turns)
    cos, sin = (f(angles)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(widened(x), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


@check_arrays
def sign_products(
    q: Float[Array, "batch heads queries size"], k: Float[Array, "batch heads keys size"], *, on_bits: bool = False
) -> Num[Array, "batch heads queries keys"]:
    r"""Dot products of codes -1/+1: sum_c q_ic k_jc = size - 2 popcount(q_i xor k_j).

    With `on_bits` from packed words, int32 and without a gradient; else float32, with the same integers.

    >>> q, k = jnp.array([[[[1.0, -1.0, 1.0]]]]), jnp.array([[[[1.0, 1.0, 1.0]]]])
    >>> sign_products(q, k).item(), sign_products(q, k, on_bits=True).item()
    (1.0, 1)
    """
    if not on_bits:
        return dot(q, k.mT)
    q_words, k_words = (input_words(codes, SIGNS)[0] for codes in (q, k))
    return q.shape[-1] - 2 * jax.vmap(jax.vmap(xor_counts))(q_words, k_words.mT)


def _relative_places(height: int, width: int) -> Int[np.ndarray, "tokens tokens"]:
    """The index of the difference of two tokens' places, in a table of (2 height - 1)(2 width - 1)."""
    rows, columns = np.divmod(np.arange(height * width), width)
    down, right = (places[:, None] - places[None, :] for places in (rows, columns))
    return (down + height - 1) * (2 * width - 1) + right + width - 1


class SelfAttention(nn.Module):
    r"""Multi-head self-attention; its four projections are binary layers.

    y = W_o norm(A v),  A = softmax(scores),  q = x W_q,  k = x W_k,  v = x W_v, each split among the heads

    Real scores  q_i k_j / sqrt(size)
    Binary ones  s_q s_k / sqrt(size) sum_c sign(q_ic) sign(k_jc) + b_{p(i) - p(j)},  s_x = mean|x| over the tokens and
                 numbers of a head;  (chosen) dsign(x)/dx := 1{|x| <= 1}, the rest of the backward pass is exact

    p is the place of a token on a grid, row by row.

    Binary values  A v becomes a b sum_j 1{A_ij > a/2} sign(v_jc), a and b learned: elastic binarization from zero of
                   the shares A and signed of the values, :func:`bnn_jax.quantizers.elastic.elastic_binary`

    The sums of signs are XNOR and popcount in a frozen network whose projections are packed, with the same integers,
    see :func:`sign_products`; with real projections they stay products of floats.

    Attributes:
      heads: how many.
      head_size: numbers of each in q, k and v; None divides the features of x among the heads.
      input_quantizer, kernel_quantizer, gradient_quantizer: of the projections, as :class:`bnn_jax.layers.BinaryDense`
        takes them.
      binary_scores: queries and keys of one bit, as in BinaryAttention.
      grid: (height, width) of the tokens, for the bias of binary scores: the parameter `bias_table`, a value for each
        of (2 height - 1)(2 width - 1) differences and each head.  None has no bias; real scores do not read it.
      binary_values: shares and values of one bit, as in BiT; a starts at 4 / tokens, the parameter `share_scale`, and b
        at the value for standard normal v, `value_scale`.
      causal: a token attends to none behind it.
      rotary_base: positive; turn queries and keys by their positions, see :func:`rotary`; None does not.
      center_norm: whether the normalization before W_o takes the mean off, see :class:`Normalized`.
      context: the most tokens that a cache holds.
      param_dtype: of the parameters.

    Called with ``decode=True`` and the collection "cache" mutable it takes x as the tokens that follow those it was
    called with before, whose keys and values it keeps; where they become more than `context` all is NaN.  Initializing
    keeps none.

    Raises:
      ValueError: for `heads`, a `head_size` or a `context` that are no positive whole numbers, a `rotary_base` that is
        not positive, more tokens to decode at once than the `context`, decoding without the collection "cache" mutable,
        or binary scores of a causal attention; if the features of x do not divide among the heads, or its tokens do not
        fill the `grid` of binary scores.

    Reference: Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762.  Binary scores: Xiao, Zhang, Zhang,
    BinaryAttention: One-Bit QK-Attention for Vision and Diffusion Transformers, 2026, arXiv:2603.09582, with the bias
    of its program, that of Liu et al., Swin Transformer, 2021, arXiv:2103.14030.  Binary values: Liu et al., BiT:
    Robustly Binarized Multi-distilled Transformer, 2022, arXiv:2205.13016, with one scale a layer.  The normalization
    before W_o is that of Wang et al., BitNet, 2023, arXiv:2310.11453.
    """

    heads: int
    head_size: int | None = None
    input_quantizer: QuantizerLike = None
    kernel_quantizer: QuantizerLike = None
    gradient_quantizer: QuantizerLike = None
    binary_scores: bool = False
    grid: Pair | None = None
    binary_values: bool = False
    causal: bool = False
    rotary_base: float | None = None
    center_norm: bool = True
    context: int = 256
    param_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        make_quantizers(self)
        super().__post_init__()
        for argument in ("heads", "context"):
            require_of_layer(self, argument, getattr(self, argument), is_whole(getattr(self, argument), 1), WHOLE)
        holds = self.head_size is None or is_whole(self.head_size, 1)
        require_of_layer(self, "head_size", self.head_size, holds, WHOLE)
        holds = self.rotary_base is None or self.rotary_base > 0
        require_of_layer(self, "rotary_base", self.rotary_base, holds, "must be positive", "None does not turn")
        rule = "cannot be with `causal`: their scales are means over all tokens"
        require_of_layer(self, "binary_scores", self.binary_scores, not (self.causal and self.binary_scores), rule)

    @nn.compact
    @check_arrays
    def __call__(
        self,
        x: Float[Array, "batch tokens features"],
        *,
        train: bool = False,
        progress: Array | float = 1.0,
        decode: bool = False,
    ) -> Float[Array, "batch tokens features"]:
        phase = {"train": train, "progress": progress}
        rule = f"must be a place at least for each of {x.shape[1]} tokens"
        require_of_layer(self, "context", self.context, not decode or x.shape[1] <= self.context, rule)
        rule = "must be True to decode, for the tokens that follow are not there yet"
        require_of_layer(self, "causal", self.causal, self.causal or not decode, rule)
        rule, advice = "needs its collection mutable", f"call `apply` with mutable=[{CACHE!r}]"
        mutable = not decode or self.is_mutable_collection(CACHE)
        require_of_layer(self, "decode", decode, mutable, rule, advice)
        size = self.head_size or x.shape[-1] // self.heads
        rule = f"must divide the {x.shape[-1]} features of x, where no `head_size` is given,"
        require_of_layer(self, "heads", self.heads, bool(self.head_size or x.shape[-1] % self.heads == 0), rule)
        quantizers = {kind: getattr(self, kind) for kind in QUANTIZERS} | {"param_dtype": self.param_dtype}
        into_heads = partial(BinaryDenseGeneral, (self.heads, size), **quantizers)
        q, k, v = (into_heads(name=name)(x, **phase) for name in ("query", "key", "value"))
        first = self._first_position(x.shape[1]) if decode else 0
        if self.rotary_base is not None:
            q, k = (rotary(a, first + jnp.arange(x.shape[1]), base=self.rotary_base) for a in (q, k))
        if decode:
            k, v = (self._with_those_before(name, a, first) for name, a in (("keys", k), ("values", v)))
        q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
        scores = self._binary_scores(q, k) if self.binary_scores else dot(q, k.mT) / math.sqrt(size)
        if self.causal:
            later = jnp.arange(k.shape[2])[None, :] > (first + jnp.arange(x.shape[1]))[:, None]
            scores = jnp.where(later[None, None], -jnp.inf, scores)
        shares = nn.softmax(scores).astype(v.dtype)
        y = (self._binary_values(shares, v) if self.binary_values else dot(shares, v)).swapaxes(1, 2).astype(x.dtype)
        y = Normalized(self.center_norm, name="out_norm")(y.reshape(*x.shape[:2], self.heads * size))
        y = BinaryDenseGeneral(x.shape[-1], name="out", **quantizers)(y, **phase)
        # Behind the last layer, for one-bit inputs of a packed one would make a number of NaN.
        return jnp.where(first + x.shape[1] <= self.context, y, jnp.asarray(jnp.nan, y.dtype)) if decode else y

    @nn.nowrap
    def _binary_scores(self, q: Array, k: Array) -> Float[Array, "batch heads queries keys"]:
        """The scores from the signs of q and k, (batch, heads, tokens, size)."""
        codes = [mark(ste_sign(x), "input_quantizer", values=2) for x in (q, k)]
        integers = sign_products(*codes, on_bits=is_frozen(self))
        record(self, jnp.concatenate(codes, axis=2), SIGNS, lambda: integers)
        if is_frozen(self):
            record_path(self, PATHS[0])
        s_q, s_k = (jnp.abs(widened(x)).mean((2, 3), keepdims=True) for x in (q, k))
        scores = integers.astype(jnp.float32) * (s_q * s_k * (1 / math.sqrt(q.shape[-1])))
        if self.grid is None:
            return scores
        rule, advice = (
            f"must be a pair (height, width) with {q.shape[2]} places, one for each token,",
            "None has no bias",
        )
        holds = is_sizes(self.grid, 2, 1) and math.prod(self.grid) == q.shape[2]
        require_of_layer(self, "grid", self.grid, holds, rule, advice)
        shape = (math.prod(2 * n - 1 for n in self.grid), self.heads)
        table = self.param("bias_table", nn.initializers.truncated_normal(0.02), shape, self.param_dtype)
        return scores + widened(table)[_relative_places(*self.grid)].transpose(2, 0, 1)[None]

    @nn.nowrap
    def _binary_values(self, shares: Array, v: Array) -> Float[Array, "batch heads queries size"]:
        """The sums over tokens of v by its `shares`, both of one bit."""
        starts = {"share_scale": 4 / shares.shape[-1], "value_scale": 2 * NORMAL_MAGNITUDE}
        a, b = (
            widened(self.param(name, nn.initializers.constant(start), (), self.param_dtype))
            for name, start in starts.items()
        )
        bits, signs = (
            elastic_binary(x, scale, signed=signed, gradient_scale=1 / math.sqrt(math.prod(x.shape[1:])))
            for x, scale, signed in ((shares, a, False), (v, b, True))
        )
        p, s = (mark(quantized.codes, "input_quantizer", values=2) for quantized in (bits, signs))
        if is_frozen(self):
            ones = s.sum(2, keepdims=True).astype(jnp.int32)
            integers = (sign_products(2 * p - 1, s.mT, on_bits=True) + ones) // 2
            record_path(self, PATHS[0])
        else:
            integers = dot(p, s)
        record(self, p, (0, 1), lambda: integers)
        return integers.astype(jnp.float32) * (widened(bits.scale) * widened(signs.scale))

    @nn.nowrap
    def _first_position(self, tokens: int) -> Int[Array, ""]:
        """Of so many tokens that follow those decoded before."""
        position = self.variable(CACHE, "position", lambda: jnp.zeros((), jnp.int32))
        first = position.value
        if not self.is_initializing():
            position.value = first + tokens
        return first

    @nn.nowrap
    def _with_those_before(self, name: str, new: Array, first: Array) -> Float[Array, "batch context heads size"]:
        """The cached keys or values, with new ones from `first` on."""
        kept = self.variable(CACHE, name, jnp.zeros, (new.shape[0], self.context, *new.shape[2:]), new.dtype)
        filled = lax.dynamic_update_slice_in_dim(kept.value, new, first, axis=1)
        if not self.is_initializing():
            kept.value = filled
        return filled

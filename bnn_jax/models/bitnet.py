r"""BitNet language models: decoders of 1-bit or 1.58-bit layers, and sampling from them token by token."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Num

from bnn_jax.checks import check_arrays, require
from bnn_jax.layers import BinaryDense, Normalized, SelfAttention
from bnn_jax.layers.arguments import QUANTIZERS, make_quantizers
from bnn_jax.layers.attention import CACHE
from bnn_jax.models.network import Network
from bnn_jax.outputs import logits_of
from bnn_jax.precision import widened
from bnn_jax.quantizers import QuantizerLike
from bnn_jax.types import Key


class GatedMLP(nn.Module):
    r"""The perceptron of a decoder's block (SwiGLU), its three matrices binary layers.

    y = W_down norm(silu(W_gate x) * (W_up x)), norm by the root mean square

    Attributes:
      hidden: units between the layers.
      input_quantizer, kernel_quantizer, gradient_quantizer: as :class:`bnn_jax.layers.BinaryDense` takes them.

    Reference: Shazeer, GLU Variants Improve Transformer, 2020, arXiv:2002.05202.
    """

    hidden: int
    input_quantizer: QuantizerLike = None
    kernel_quantizer: QuantizerLike = None
    gradient_quantizer: QuantizerLike = None

    def __post_init__(self):
        make_quantizers(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens features"], **phase: Any):
        dense = partial(BinaryDense, **{kind: getattr(self, kind) for kind in QUANTIZERS})
        gate, up = (dense(self.hidden, name=name)(x, **phase) for name in ("gate", "up"))
        return dense(x.shape[-1], name="down")(Normalized(center=False, name="norm")(nn.silu(gate) * up), **phase)


class BitNetLM(Network):
    r"""A decoder of binary layers that predicts, behind each token of a text, the next one.

    token -> embedding -> [x += attention(norm(x)) -> x += mlp(norm(x))] depth times -> norm -> dense;  the attention
    is causal with rotary positions, :class:`bnn_jax.layers.SelfAttention`; norms are by the root mean square, one in
    front of every binary layer, as in BitLinear; :class:`GatedMLP` has 8/3 w hidden units, rounded up to a multiple of
    32.  There are no biases but the head's.  Embedding, norms and head are in full precision.

    Called with tokens as whole numbers (batch, tokens) of any dtype, or, as training has them, as images
    (batch, tokens, 1, 1).  With ``decode=True`` and the collection "cache" mutable these are the tokens that follow
    those it was called with before.

    Attributes:
      num_classes: tokens of the vocabulary; 256 are bytes.
      width: numbers of a token, w.
      depth: blocks.
      heads: of an attention.
      rotary_base: see :func:`bnn_jax.layers.rotary`.
      context: the most tokens that a cache holds.
      others: see :class:`bnn_jax.models.network.Network`.

    Returns:
      (logits, intermediates): float32 (batch, tokens, num_classes), and a dict with the tokens `stage1`, `stage2`, ...
      behind each block and the `features` that the last layer sees.  A token that is not in the vocabulary, as 1.7
      or NaN, makes its text NaN.

    Raises:
      ValueError: for sizes that are not positive, heads that do not divide the width, or inputs of another shape.

    Reference: Wang et al., BitNet: Scaling 1-bit Transformers for Large Language Models, 2023, arXiv:2310.11453; Ma et
    al., The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits, 2024, arXiv:2402.17764.
    """

    width: int = 64
    depth: int = 2
    heads: int = 2
    rotary_base: float = 10000.0
    context: int = 256

    def __post_init__(self):
        super().__post_init__()
        for argument in ("depth", "heads", "context"):
            self.require_positive(argument)
        even = self.width % (2 * self.heads) == 0
        self.require("heads", even, f"must divide `width` (={self.width}) into even numbers", "2 is usual")

    @nn.compact
    @check_arrays
    def __call__(
        self,
        images: Num[Array, "batch tokens *ones"],
        *,
        train: bool,
        progress: Array | float = 1.0,
        decode: bool = False,
    ):
        rule = "must be (batch, tokens), or (batch, tokens, 1, 1)"
        require("images.shape", images.shape, images.shape[2:] in ((), (1, 1)), rule)
        dtype = images.dtype if jnp.issubdtype(images.dtype, jnp.floating) else jnp.float32
        rule, exact = f"does not hold all of {self.num_classes} tokens", 2 ** (jnp.finfo(dtype).nmant + 1)
        require("images.dtype", str(dtype), self.num_classes - 1 <= exact, rule, "give whole numbers")
        images = images.reshape(images.shape[:2])
        tokens = jnp.where(images == jnp.round(images), images.astype(jnp.int32), -1)
        table = self.param("embedding", nn.initializers.normal(1.0), (self.num_classes, self.width), jnp.float32)
        x = (
            jnp.asarray(table)
            .at[tokens]
            .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
            .astype(dtype)
        )
        phase = {"train": train, "progress": progress}
        norm = partial(Normalized, center=False)
        attend = {"causal": True, "rotary_base": self.rotary_base, "center_norm": False, "context": self.context}
        attention = partial(SelfAttention, self.heads, **self.quantizers, **attend)
        mlp = partial(GatedMLP, -(-8 * self.width // 96) * 32, **self.quantizers)
        intermediates = {}
        for block in range(1, self.depth + 1):
            own = norm(name=f"attention_norm{block}")(x)
            x = x + attention(name=f"attention{block}")(own, decode=decode, **phase)
            x = x + mlp(name=f"mlp{block}")(norm(name=f"mlp_norm{block}")(x), **phase)
            intermediates[f"stage{block}"] = x
        intermediates["features"] = x = norm(name="head_norm")(x)
        return BinaryDense(self.num_classes, use_bias=True, name="head")(widened(x)), intermediates


@check_arrays
def sample(
    model: nn.Module,
    variables: Any,
    prompt: Num[Array, "batch tokens"],
    count: int,
    *,
    temperature: float = 1.0,
    key: Key | None = None,
) -> Int32[Array, "batch count"]:
    r"""Tokens that follow a prompt, drawn one by one from softmax(logits / temperature), with a cache.

    Args:
      model: a :class:`BitNetLM`.
      variables: trained, or packed ones of :func:`bnn_jax.packed.freeze`: ``network.model, network.variables`` of a
        file that :func:`bnn_jax.packed.load` read.
      prompt: at least one token each; a floating dtype, which must hold all tokens, is the network's, as in training.
      count: tokens to draw.
      temperature: 0 takes the most likely token.
      key: of the random numbers; not needed at temperature 0.

    Raises:
      ValueError: for a prompt without tokens, or with others than the model knows, a `count` below 1, or a negative
        `temperature`; without a `key`.

    >>> model = BitNetLM(num_classes=5, width=8, depth=1)
    >>> prompt = jnp.array([[1, 2]])
    >>> variables = model.init(jax.random.key(0), prompt, train=False)
    >>> sample(model, variables, prompt, 3, temperature=0).shape
    (1, 3)
    """
    require("prompt.shape", prompt.shape, prompt.shape[1] >= 1, "must have a token at least", "begin with a space")
    known = lambda tokens: (tokens >= 0) & (tokens < model.num_classes) & (tokens == tokens.round())
    require("prompt", prompt, known, f"must hold tokens from 0 to {model.num_classes - 1}")
    require("count", count, count >= 1, "must be at least 1")
    require("temperature", temperature, temperature >= 0, "must not be negative", "0 takes the most likely token")
    needed = temperature == 0 or key is not None
    require("key", key, needed, "is needed to draw tokens", "give jax.random.key(0), or `temperature` 0")
    key = jax.random.key(0) if key is None else key
    model = model.clone(context=prompt.shape[1] + count)
    prompt = jnp.asarray(prompt)
    prompt = prompt if jnp.issubdtype(prompt.dtype, jnp.floating) else prompt.astype(jnp.int32)
    return _sample(model, count, temperature == 0, dict(variables), prompt, temperature or 1.0, key)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _sample(model, count, greedy, variables, prompt, temperature, key):
    def following(cache, tokens, key):
        options = {"train": False, "decode": True, "mutable": [CACHE]}
        returned, updated = model.apply({**variables, **cache}, tokens, **options)
        logits = logits_of(returned)[:, -1]
        token = logits.argmax(-1) if greedy else jax.random.categorical(key, logits / temperature)
        return dict(updated), token.astype(jnp.int32)

    def step(carry, key):
        cache, token = carry
        cache, token = following(cache, token[:, None].astype(prompt.dtype), key)
        return (cache, token), token

    keys = jax.random.split(key, count)
    cache, first = following({}, prompt, keys[0])
    _, others = lax.scan(step, (cache, first), keys[1:])
    return jnp.concatenate([first[:, None], others.T], axis=1)

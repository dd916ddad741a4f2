r"""Recurrent layers over (batch, tokens, features) whose products are binary: LSTM and GRU."""

from collections.abc import Callable, Iterator

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays
from bnn_jax.layers.arguments import QUANTIZERS, make_quantizers, require_features, require_of_layer
from bnn_jax.layers.binary_dense import BinaryDense
from bnn_jax.quantizers import QuantizerLike


class Recurrent(nn.Module):
    r"""What the recurrent layers have: two binary layers, `inputs` of all tokens at once and `hidden` token by token.

    The tokens follow each other in a loop of Python, so that a frozen network is compared and multiplied on bits as any
    other; a program grows with their number.

    Attributes:
      features: numbers of the hidden state, which is 0 before the first token.
      input_quantizer, kernel_quantizer, gradient_quantizer: of both layers, as :class:`bnn_jax.layers.BinaryDense`
        takes them; hidden states lie in (-1, 1), so that a sign quantizes them.
      param_dtype: of the parameters.

    Returns:
      The hidden states behind each token, (batch, tokens, features).

    Raises:
      ValueError: for `features` that are no positive whole number, a `kernel_quantizer` with a state or randomness, and
        no tokens to initialize from.
    """

    features: int
    input_quantizer: QuantizerLike = None
    kernel_quantizer: QuantizerLike = None
    gradient_quantizer: QuantizerLike = None
    param_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        make_quantizers(self)
        super().__post_init__()
        require_features(self)
        quantizer = self.kernel_quantizer
        holds = quantizer is None or (quantizer.init_state is None and "key" not in quantizer.wants)
        rule = "must be the same for every token; this one has a state or draws anew in each of them"
        require_of_layer(self, "kernel_quantizer", quantizer if holds else type(quantizer).__name__, holds, rule)

    @nn.nowrap
    def gates(self, x: Array, count: int, phase: dict) -> tuple[Iterator[Array], Callable[[Array], Array]]:
        """W_x x_t + b of each token t, and h -> W_h h, both with the numbers of `count` gates side by side."""
        rule = "must have a token at least to initialize from"
        require_of_layer(self, "x.shape", x.shape, x.shape[1] > 0 or not self.is_initializing(), rule)
        quantizers = {kind: getattr(self, kind) for kind in QUANTIZERS} | {"param_dtype": self.param_dtype}
        of_inputs = BinaryDense(count * self.features, use_bias=True, name="inputs", **quantizers)
        of_hidden = BinaryDense(count * self.features, name="hidden", **quantizers)
        return iter(of_inputs(x, **phase).swapaxes(0, 1)), lambda h: of_hidden(h, **phase)


class BinaryLSTM(Recurrent):
    r"""Long short-term memory.

    [i, f, g, o] = W_x x_t + b + W_h h_{t-1}
    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),  h_t = sigmoid(o) tanh(c_t)

    See :class:`Recurrent`.

    >>> import jax
    >>> layer = BinaryLSTM(8, input_quantizer="ste_sign", kernel_quantizer="xnor")
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 3, 4)))[0].shape
    (2, 3, 8)

    Reference: Hochreiter and Schmidhuber, Long Short-Term Memory, 1997; with binary products Rybalkin et al.,
    FINN-L: Library Extensions and Design Trade-off Analysis for Variable Precision LSTM Networks on FPGAs, 2018,
    arXiv:1807.04093.
    """

    @nn.compact
    @check_arrays
    def __call__(
        self, x: Float[Array, "batch tokens inputs"], *, train: bool = False, progress: Array | float = 1.0
    ) -> Float[Array, "batch tokens features"]:
        inputs, of_hidden = self.gates(x, 4, {"train": train, "progress": progress})
        h = c = jnp.zeros((x.shape[0], self.features), x.dtype)
        states = []
        for of_token in inputs:
            i, f, g, o = jnp.split(of_token + of_hidden(h), 4, axis=-1)
            c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(c)
            states.append(h)
        return jnp.stack(states, axis=1) if states else jnp.zeros((x.shape[0], 0, self.features), x.dtype)


class BinaryGRU(Recurrent):
    r"""Gated recurrent unit.

    [r, z, n] = W_x x_t + b,  [r', z', n'] = W_h h_{t-1};  u = sigmoid(z + z'),
    h_t = (1 - u) tanh(n + sigmoid(r + r') n') + u h_{t-1}

    See :class:`Recurrent`.

    >>> import jax
    >>> layer = BinaryGRU(8, input_quantizer="ste_sign", kernel_quantizer="xnor")
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 3, 4)))[0].shape
    (2, 3, 8)

    Reference: Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, 2014, arXiv:1406.1078.
    """

    @nn.compact
    @check_arrays
    def __call__(
        self, x: Float[Array, "batch tokens inputs"], *, train: bool = False, progress: Array | float = 1.0
    ) -> Float[Array, "batch tokens features"]:
        inputs, of_hidden = self.gates(x, 3, {"train": train, "progress": progress})
        h = jnp.zeros((x.shape[0], self.features), x.dtype)
        states = []
        for of_token in inputs:
            (r, z, n), (r_h, z_h, n_h) = (jnp.split(gates, 3, axis=-1) for gates in (of_token, of_hidden(h)))
            u = nn.sigmoid(z + z_h)
            h = (1 - u) * jnp.tanh(n + nn.sigmoid(r + r_h) * n_h) + u * h
            states.append(h)
        return jnp.stack(states, axis=1) if states else jnp.zeros((x.shape[0], 0, self.features), x.dtype)

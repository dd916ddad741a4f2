r"""Activations with learned slopes and shifts, one value a channel, that follow a binary layer in full precision."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays
from bnn_jax.precision import widened


def _per_channel(module: nn.Module, name: str, value: float, x: Array) -> Array:
    """The module's parameter `name`, (channels,), `value` at the start; in the shape that x broadcasts."""
    vector = module.param(name, nn.initializers.constant(value), x.shape[-1:], module.param_dtype)
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class PReLU(nn.Module):
    r"""ReLU with a learned slope a channel for negative inputs and, if wanted, one for positive inputs.

    Forward   y = a+ x for x > 0,  a- x for x <= 0;  a+ = 1, and learned from 1 on with `both_slopes`
    Backward  exact; at x = 0 the slope is a-

    Attributes:
      both_slopes: learn a+ too (parameter `positive_slope`).  That both start at 1 and 0.25 could not be confirmed for
        the second paper below; this is a reading.
      initial_slope: of a-, the parameter `slope`.
      param_dtype: of the slopes; outputs keep x's dtype.

    >>> import jax
    >>> PReLU().init_with_output(jax.random.key(0), jnp.array([[-2.0, 2.0]]))[0]
    Array([[-0.5,  2. ]], dtype=float32)

    Reference: He et al., Delving Deep into Rectifiers, 2015, arXiv:1502.01852; with both slopes Su et al., FTBNN:
    Rethinking Non-linearity for 1-bit CNNs and Going Beyond, 2020, arXiv:2010.09294.
    """

    both_slopes: bool = False
    initial_slope: float = 0.25
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    @check_arrays
    def __call__(self, x: Float[Array, "... channels"]) -> Float[Array, "... channels"]:
        dtype, x = x.dtype, widened(x)
        negative = _per_channel(self, "slope", self.initial_slope, x) * x
        positive = _per_channel(self, "positive_slope", 1.0, x) * x if self.both_slopes else x
        return jnp.where(x > 0, positive, negative).astype(dtype)


class RPReLU(nn.Module):
    r"""PReLU with its corner at (g, z), two learned shifts a channel (ReActNet).

    Forward   y = a (x - g) + z for x > g,  b (x - g) + z for x <= g;  a = 1, and learned with `both_slopes` (DPReLU)
    Backward  exact; at x = g the slope is b

    The parameters `input_shift` (g) and `output_shift` (z) start at 0, `slope` (b) at `initial_slope`, `positive_slope`
    (a) at 1.

    Attributes:
      initial_slope: of b.
      both_slopes: learn a too.
      param_dtype: of the parameters; outputs keep x's dtype.

    >>> import jax
    >>> RPReLU().init_with_output(jax.random.key(0), jnp.array([[-2.0, 2.0]]))[0]
    Array([[-0.5,  2. ]], dtype=float32)

    Reference: Liu et al., ReActNet, 2020, arXiv:2003.03488; with both slopes Zhang et al., PokeBNN, CVPR 2022,
    arXiv:2112.00133.
    """

    initial_slope: float = 0.25
    both_slopes: bool = False
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    @check_arrays
    def __call__(self, x: Float[Array, "... channels"]) -> Float[Array, "... channels"]:
        dtype, x = x.dtype, widened(x)
        x = x - _per_channel(self, "input_shift", 0.0, x)
        positive = _per_channel(self, "positive_slope", 1.0, x) * x if self.both_slopes else x
        y = jnp.where(x > 0, positive, _per_channel(self, "slope", self.initial_slope, x) * x)
        return (y + _per_channel(self, "output_shift", 0.0, x)).astype(dtype)

r"""Learned output scales: what XNOR-Net++ puts in the place of the analytic ones."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays, require
from bnn_jax.layers.arguments import require_of_layer
from bnn_jax.precision import widened


def output_scale_shapes(case: int, output_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    r"""The factors of case 1 to 4 for outputs of shape (height, width, features) or (features,): name -> shape.

    Each has the rank of an output and size 1 on the axes along which it is constant.

    Raises:
      ValueError: for another `case`, or one that needs a height and width where there are none.

    >>> output_scale_shapes(4, (8, 6, 32))
    {'scale': (1, 1, 32), 'row_scale': (8, 1, 1), 'column_scale': (1, 6, 1)}
    """
    require(
        "case", case, case in (1, 2, 3, 4), "must be 1, 2, 3 or 4", "4 was the best in the paper, 1 fits every size"
    )
    rule = f"needs outputs with height, width and features, not of shape {output_shape}"
    require("case", case, case == 1 or len(output_shape) == 3, rule, "use case 1")
    per_feature = {"scale": (1,) * (len(output_shape) - 1) + tuple(output_shape[-1:])}
    if case == 1:
        return per_feature
    height, width, _ = output_shape
    return {
        2: {"scale": tuple(output_shape)},
        3: per_feature | {"spatial_scale": (height, width, 1)},
        4: per_feature | {"row_scale": (height, 1, 1), "column_scale": (1, width, 1)},
    }[case]


class OutputScale(nn.Module):
    r"""Multiply a binary layer's outputs by a learned scale of four possible shapes (XNOR-Net++).

    Forward   y_out = Gamma y, with Gamma, all ones at the start, the product of the learned factors
              case 1: (features);  case 2: (height, width, features);  case 3: (features) x (height, width);
              case 4: (features) x (height) x (width)
    Backward  exact: the product rule

    A network whose scales vary over space runs at the resolution that it was initialized with and at no other.
    Case 1 also takes dense outputs, (batch, features), and a batch normalization that follows absorbs it.

    Attributes:
      case: 1, 2, 3 or 4.
      param_dtype: of the factors; outputs keep y's dtype.

    Raises:
      ValueError: for another `case`, or outputs of another size than at initialization.

    >>> import jax
    >>> scale = OutputScale(case=4)
    >>> variables = scale.init(jax.random.key(0), jnp.ones((2, 8, 6, 32)))
    >>> scale.apply(variables, jnp.ones((2, 8, 6, 32))).shape
    (2, 8, 6, 32)

    Reference: Bulat and Tzimiropoulos, XNOR-Net++, 2019, arXiv:1909.13863.
    """

    case: int = 4
    param_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        output_scale_shapes(self.case, (1, 1, 1))

    @nn.compact
    @check_arrays
    def __call__(self, y: Float[Array, "batch *output"]) -> Float[Array, "batch *output"]:
        dtype, y = y.dtype, widened(y)
        for name, shape in output_scale_shapes(self.case, y.shape[1:]).items():
            self._check_size(name, shape)
            factor = self.param(name, nn.initializers.ones, shape, self.param_dtype)
            y = y * factor.astype(y.dtype)[None]
        return y.astype(dtype)

    def _check_size(self, name, shape):
        if self.has_variable("params", name):
            initialized = jnp.shape(self.get_variable("params", name))
            rule = f"was initialized for other outputs: {name} has the shape {initialized}, and not {shape},"
            advice = "use case 1, which fits every size"
            require_of_layer(self, "case", self.case, initialized == shape, rule, advice)

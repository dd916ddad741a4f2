r"""What a binary layer's channels tell one another: a learned gate, and fixed corrections along edges."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from bnn_jax.checks import check_arrays, is_whole
from bnn_jax.layers.arguments import WHOLE, require_features, require_of_layer
from bnn_jax.layers.binary_dense import BinaryDense
from bnn_jax.precision import widened

Edge = tuple[int, int, int]
"""(source channel, target channel, level)."""


class ChannelGate(nn.Module):
    r"""The data-driven scale of a Real-to-Binary convolution: one factor in (0, 1) an example and output channel.

    Forward   G = sigmoid(relu(mean_{h,w}(z) W1) W2),  W1: (channels, channels // reduction),  W2: (.., features)
    Backward  exact

    It sees what the sign before the convolution sees, but real; the convolution's output is multiplied by G.  Both
    matrices are in full precision, He-initialized: channels // reduction (channels + features) weights.

    Attributes:
      features: output channels of the convolution.
      reduction: how many input channels become one in the gate.
      use_bias: add biases to both products, as squeeze-and-excitation does.
      squash: what stands in sigmoid's place.
      param_dtype: of W1, `squeeze`, and W2, `expand`; the gate has z's dtype, at most float32.

    Raises:
      ValueError: if `features` or `reduction` is not positive, or `reduction` leaves a gate with no channels.

    >>> import jax
    >>> z = jnp.ones((2, 4, 4, 16))
    >>> gate, variables = ChannelGate(features=32).init_with_output(jax.random.key(0), z)
    >>> gate.shape, variables["params"]["squeeze"]["kernel"].shape
    ((2, 1, 1, 32), (16, 2))

    Reference: Martinez et al., Training Binary Neural Networks with Real-to-Binary Convolutions, 2020,
    arXiv:2003.11535; after Hu et al., Squeeze-and-Excitation Networks, 2018, arXiv:1709.01507.
    """

    features: int
    reduction: int = 8
    use_bias: bool = False
    squash: Callable[[Array], Array] = nn.sigmoid
    param_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        require_features(self)
        require_of_layer(self, "reduction", self.reduction, is_whole(self.reduction, 1), WHOLE)

    @nn.compact
    @check_arrays
    def __call__(self, z: Float[Array, "batch height width channels"]) -> Float[Array, "batch 1 1 features"]:
        squeezed = z.shape[-1] // self.reduction
        rule = f"must be at most {z.shape[-1]}, the number of the gate's inputs,"
        require_of_layer(self, "reduction", self.reduction, squeezed >= 1, rule, "8 is the paper's")
        options = {"kernel_init": nn.initializers.he_normal(), "param_dtype": self.param_dtype}
        options["use_bias"] = self.use_bias
        hidden = nn.relu(BinaryDense(squeezed, name="squeeze", **options)(z.mean((1, 2))))
        return self.squash(BinaryDense(self.features, name="expand", **options)(hidden))[:, None, None, :]


class ChannelInteractions(nn.Module):
    r"""Fixed corrections of some channels of a binary convolution's output by others (CI-Net).

    Forward   y_t + step sum_{edges (s, t, l)} sum_{k < |l|} ( sgn(l) 1{y_s >= T_k} - 1{y_s <= -T_k} ),
              T_k = thresholds[k]
    Backward  (chosen, not derived)  the identity to y_t; nothing to y_s

    An edge of level 0 does nothing.  As in the authors' release, a negative level is not the opposite of a positive
    one: both push the target down where the source is low.  With `symmetric` the second indicator has the factor
    sgn(l) too; which of the two the paper means could not be confirmed.  Sources are read before any correction, so
    the order of the edges does not matter.

    Attributes:
      edges: (source, target, level) each, channels from 0 on, or an array of such rows; none is the identity.
      thresholds: positive; an edge of level l uses the first |l| of them.  In units of y: the integer sums of the
        convolution where both quantizers have scale 1, as with the method's plain sign.
      step: size of one correction, in the same units.
      symmetric: corrections odd in the level and in the source.

    Raises:
      ValueError: if an edge is no such triple, its channels lie outside y's or its level beyond the thresholds, or if
        a threshold is not positive.

    >>> interactions = ChannelInteractions(edges=((0, 1, 1), (0, 2, -1)), thresholds=(4,), step=2)
    >>> interactions.apply({}, jnp.array([[5.0, 0.0, 0.0], [-5.0, 0.0, 0.0]]))
    Array([[ 5.,  2., -2.],
           [-5., -2., -2.]], dtype=float32)

    Reference: Wang et al., Learning Channel-wise Interactions for Binary Convolutional Neural Networks, CVPR 2019.
    """

    edges: tuple[Edge, ...] = ()
    thresholds: tuple[float, ...] = (200,)
    step: float = 100
    symmetric: bool = False

    def __post_init__(self):
        edges = self.edges.tolist() if hasattr(self.edges, "tolist") else self.edges
        self.edges = tuple(tuple(edge) if hasattr(edge, "__iter__") else edge for edge in edges)
        super().__post_init__()
        several = isinstance(self.thresholds, tuple | list) and len(self.thresholds) > 0
        positive = several and all(isinstance(number, int | float) and number > 0 for number in self.thresholds)
        rule, advice = "must be one or more positive numbers", "(200,) is the authors'"
        require_of_layer(self, "thresholds", self.thresholds, positive, rule, advice)
        most = len(self.thresholds)
        for edge in self.edges:
            whole = (
                isinstance(edge, tuple) and len(edge) == 3 and all(isinstance(part, int | np.integer) for part in edge)
            )
            require_of_layer(self, "edges", edge, whole, "must be (source, target, level)")
            rule, advice = f"must have levels from -{most} to {most}", "give more `thresholds` for more levels"
            require_of_layer(self, "edges", edge, abs(edge[2]) <= most, rule, advice)

    @nn.compact
    @check_arrays
    def __call__(self, y: Float[Array, "... channels"]) -> Float[Array, "... channels"]:
        for edge in self.edges:
            inside = 0 <= min(edge[:2]) <= max(edge[:2]) < y.shape[-1]
            require_of_layer(self, "edges", edge, inside, f"must join channels from 0 to {y.shape[-1] - 1}")
        return (widened(y) + lax.stop_gradient(self._correction(widened(y)))).astype(y.dtype) if self.edges else y

    def _correction(self, y):
        sources, targets, levels = np.asarray(self.edges).T
        source = y[..., sources]
        pushes = jnp.zeros_like(source)
        for k, threshold in enumerate(self.thresholds):
            up = np.where(np.abs(levels) > k, np.sign(levels), 0)
            down = up if self.symmetric else np.abs(up)
            up, down = (jnp.asarray(w, y.dtype).reshape((1,) * (y.ndim - 1) + (-1,)) for w in (up, down))
            pushes = pushes + up * (source >= threshold).astype(y.dtype) - down * (source <= -threshold).astype(y.dtype)
        # A product with a matrix of zeros and ones: a scatter would take one scalar loop an element on CPU.
        return self.step * (pushes @ jnp.eye(y.shape[-1], dtype=y.dtype)[targets])

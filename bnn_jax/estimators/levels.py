r"""Estimators of activations whose codes are not -1/+1: {0, 1}, {0, 1, 2} and {-1, 0, 1}."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from bnn_jax.checks import require, require_positive
from bnn_jax.estimators.definition import is_negative, make_estimator


def _on_ramp(x, width, threshold, rho):
    distance = x - threshold
    return (-rho * width < distance) & (distance < width)


ramped_step = make_estimator(
    lambda x, width, threshold, rho: is_negative(threshold - x),
    lambda x, width, threshold, rho: jnp.where(_on_ramp(x, width, threshold, rho), 1 / width, 0),
    parameter_derivatives={
        "width": lambda x, width, threshold, rho: jnp.where(
            _on_ramp(x, width, threshold, rho), -(x - threshold) / width**2, 0
        ),
        "threshold": lambda x, width, threshold, rho: jnp.where(_on_ramp(x, width, threshold, rho), -1 / width, 0),
    },
)
_coupled = make_estimator(
    lambda x: jnp.where(x >= 0.75, 2, jnp.where(x >= 0.25, 1, 0)),
    lambda x: jnp.where((x >= 0) & (x <= 1), 2, 0),
)


def _ternary_codes(x, delta):
    return jnp.where(x >= delta, 1, jnp.where(x <= -delta, -1, 0))


def _triangles(x, delta):
    # A tensor of zeros has delta = mean|x| = 0.
    delta = jnp.maximum(delta, jnp.finfo(x.dtype).tiny)
    return jnp.maximum(1 - jnp.abs(jnp.abs(x) / delta - 1), 0) / delta


_ternary = make_estimator(_ternary_codes, _triangles)
_ternary_straight_through = make_estimator(_ternary_codes, lambda x, delta: jnp.abs(x) <= 1)


def heaviside(
    x: Float[Array, "..."],
    *,
    width: float | Array = 1.0,
    threshold: float | Array = 0.0,
    rho: float | Array = 0.3,
) -> Float[Array, "..."]:
    r"""Step of Si-BNN with codes 0/1 and a trained ramp.

    With D = width, y = (x - threshold) / D:

    Forward   H(x) = 1 if x > threshold else 0; strictly: an x at the threshold, where y = 0, gives 0
    Backward  (chosen)  on -rho < y < 1, both ends exclusive, and 0 elsewhere:
              dH/dx := 1 / D,  dH/dD := -(x - threshold) / D^2,  dH/dthreshold := -1 / D

    Args:
      x: float array of any shape.
      width: D, positive; a scalar, or an array that broadcasts to x (one value a channel); may be traced and trained.
      threshold: likewise, of any sign.
      rho: the ramp below the threshold as a fraction of D, not negative.

    Raises:
      ValueError: if `width` is not positive, `rho` is negative, or one does not broadcast to x.

    >>> heaviside(jnp.array([-1.0, 0.0, 0.5]))
    Array([0., 0., 1.], dtype=float32)
    >>> import jax
    >>> jax.grad(lambda x: heaviside(x, width=2.0).sum())(jnp.array([-1.0, 0.0, 1.5, 2.0]))
    Array([0. , 0.5, 0.5, 0. ], dtype=float32)

    Reference: Wang et al., Sparsity-Inducing Binarized Neural Networks, AAAI 2020.
    """
    require_positive("width", width, "1.0 is usual")
    require("rho", rho, lambda r: r >= 0, "must be at least 0", "0.3 is usual")
    return ramped_step(x, width=width, threshold=threshold, rho=rho)


def coupled_ternary(x: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Two coupled binary neurons (BinaryDuo): codes 0/1/2, which a scale of 1/2 turns into 0, 1/2 and 1.

    Forward   q(x) = round(2 clip(x, 0, 1)), halves up: 1 from x = 0.25 on, 2 from x = 0.75 on, else 0
    Backward  (chosen)  dq/dx := 2 if 0 <= x <= 1 else 0

    >>> coupled_ternary(jnp.array([-1.0, 0.25, 0.5, 0.75, 3.0]))
    Array([0., 1., 1., 2., 2.], dtype=float32)
    >>> import jax
    >>> jax.grad(lambda x: coupled_ternary(x).sum())(jnp.array([-1.0, 0.0, 1.0, 3.0]))
    Array([0., 2., 2., 0.], dtype=float32)

    Reference: Kim et al., BinaryDuo: Reducing Gradient Mismatch in Binary Activation Network by Coupling Binary
    Activations, 2020, arXiv:2002.06517.
    """
    return _coupled(x)


def ternary(
    x: Float[Array, "..."], *, delta: float | Array = 0.4, straight_through: bool = False
) -> Float[Array, "..."]:
    r"""Ternary activation (TBN): codes -1/0/+1.

    Forward   T(x) = +1 if x >= delta;  -1 if x <= -delta;  else 0
    Backward  (chosen)  dT/dx := max(0, 1 - ||x| / delta - 1|) / delta: triangles of height 1 / delta at +-delta, by
              which 2 delta T(x) has the derivative 2 |fmod(x / delta + 3, 2) - 1| on |x| <= 2 delta (TBNv2);
              with straight_through 1 if |x| <= 1 else 0 (TBN)

    Args:
      x: float array of any shape.
      delta: half the width of the dead zone, not negative, usually 0.5 mean|x|, which is 0.4 for standard normal x;
        may be traced.  It receives no gradient.  At 0 the triangles vanish.
      straight_through: True for the derivative of TBN.

    Raises:
      ValueError: if `delta` is negative, or does not broadcast to x.

    >>> ternary(jnp.array([-0.5, -0.1, 0.0, 0.5]), delta=0.5)
    Array([-1.,  0.,  0.,  1.], dtype=float32)
    >>> import jax
    >>> jax.grad(lambda x: ternary(x, delta=0.5).sum())(jnp.array([-0.5, 0.0, 0.25, 1.5]))
    Array([2., 0., 1., 0.], dtype=float32)

    Reference: Wan et al., TBN: Convolutional Neural Network with Ternary Inputs and Binary Weights, ECCV 2018; the
    triangles are of its authors' second program.
    """
    require("delta", delta, lambda d: d >= 0, "must be at least 0", "0.5 mean|x| is usual")
    return (_ternary_straight_through if straight_through else _ternary)(x, delta=delta)

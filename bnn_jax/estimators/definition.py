r"""The two-valued sign, the record of an estimator, and how one is made from its forward and its backward formula."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial, reduce, wraps
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bnn_jax.checks import require_floating
from bnn_jax.finite import keep_nan
from bnn_jax.precision import sum_dtype, widened
from bnn_jax.types import EstimatorFunction

Elementwise: TypeAlias = Callable[..., Float[Array, "..."]]
"""(x, **parameters) -> an array that broadcasts to x."""


class Estimator(NamedTuple):
    """A step function with a chosen derivative, and what training has to know about it.

    It is called as its function is.

    Attributes:
      apply: (x, **parameters) -> codes of x's shape and dtype.
      code_set: the values that a code can have, in increasing order.
      schedule: progress in [0, 1] -> the parameters at that point of training; None where they stay as they are.
      trainable: the parameters that receive a gradient; all others receive zero.
      stochastic: whether `apply` takes a random `key`.
      input_schedule: what stands in the schedule's place where activations follow another one; None where they do not.

    >>> Estimator(lambda x: (x > 0).astype(x.dtype), code_set=(0, 1))(jnp.array([-1.0, 2.0]))
    Array([0., 1.], dtype=float32)
    """

    apply: EstimatorFunction
    code_set: tuple[int, ...] = (-1, 1)
    schedule: Callable[..., dict[str, Array]] | None = None
    trainable: tuple[str, ...] = ()
    stochastic: bool = False
    input_schedule: Callable[..., dict[str, Array]] | None = None

    def __call__(self, x: Float[Array, "..."], **parameters: Any) -> Float[Array, "..."]:
        return self.apply(x, **parameters)


EstimatorLike: TypeAlias = str | Estimator | EstimatorFunction
"""What stands for an estimator: a name in ESTIMATORS, a record, or a function with the codes -1/+1."""


def is_negative(x: Float[Array, "..."]) -> Bool[Array, "..."]:
    r"""x < 0, where a denormal number, -tiny < x < tiny, is zero:  x <= -tiny,  tiny = 2^-126 (2^-1022 in float64).

    Compiled code takes denormal numbers for zeros on some machines, not on others and not for constants; NumPy never
    does.  This gives the same answer everywhere, that which x < 0 has in code compiled for a CPU.

    >>> is_negative(jnp.array([-1.0, -1e-42, -0.0, 1.0])).tolist()
    [True, False, False, False]
    """
    x = widened(x)
    return x <= -float(jnp.finfo(x.dtype).tiny)


def sign(x: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""Two-valued sign of x's shape and dtype; sign(0) = sign(-0.0) = +1, sign(NaN) = NaN.

    Forward   q(x) = -1 if x < 0 else +1, a denormal number being zero, see :func:`is_negative`
    Backward  zero; the estimators choose another derivative

    Raises:
      TypeError: if `x` is not a floating-point array.

    >>> sign(jnp.array([-2.0, -0.0, 0.0, 3.0]))
    Array([-1.,  1.,  1.,  1.], dtype=float32)
    """
    require_floating("x", x)
    return keep_nan(x, jnp.where(is_negative(x), -1, 1).astype(jnp.result_type(x)))


def _aligned(name: str, value: Any, x: Array, dtype: jnp.dtype) -> Array:
    value = jnp.asarray(value, dtype)
    shape = (1,) * (x.ndim - value.ndim) + value.shape
    if len(shape) != x.ndim or any(own not in (1, whole) for own, whole in zip(shape, x.shape)):
        raise ValueError(
            f"`{name}` (of shape {value.shape}) must broadcast to x, of shape {x.shape}; "
            "give a scalar or one value a channel"
        )
    return value.reshape(shape)


def _summed_to(cotangent: Array, shape: tuple[int, ...]) -> Array:
    axes = tuple(axis for axis, (own, whole) in enumerate(zip(shape, cotangent.shape)) if own != whole)
    return cotangent.sum(axes, keepdims=True)


def _keep_nans(*causes_and_values: Array) -> Array:
    *causes, values = causes_and_values
    return reduce(lambda kept, cause: keep_nan(cause, kept), causes, values)


def _check_of_names(derivative: Elementwise) -> Callable[[Mapping[str, Any]], None]:
    """What refuses parameters that a derivative does not take, and the lack of those that it needs."""
    try:
        _, *others = inspect.signature(derivative).parameters.values()
    except ValueError:  # Some of Python's own say nothing of their arguments.
        return lambda parameters: None
    named = [p for p in others if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes, needs = [p.name for p in named], [p.name for p in named if p.default is p.empty]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in others)

    def check(parameters: Mapping[str, Any]) -> None:
        for name in parameters:
            if name not in takes and not takes_any:
                raise TypeError(f"`{name}` is not a parameter of this estimator; it takes {', '.join(takes) or 'none'}")
        for name in needs:
            if name not in parameters:
                raise TypeError(f"`{name}` must be given to this estimator, whose derivative needs it; as {name}=1.0")

    return check


def make_estimator(
    codes: Elementwise,
    derivative: Elementwise,
    *,
    parameter_derivatives: Mapping[str, Elementwise] | None = None,
) -> EstimatorFunction:
    r"""An estimator from its codes and its derivative.

    Forward   q(x) = codes(x, **parameters)
    Backward  (chosen)  dL/dx := dL/dq * derivative(x, **parameters),
              dL/dp := sum dL/dq * parameter_derivatives[p](x, **parameters), over the axes that p was broadcast along

    All three are computed in float32 at least, so that bfloat16 inputs lose nothing between the operations.  Only x
    and the parameters are kept for the backward pass.  NaN stays NaN, whatever the formulas compare it with: q where x
    or a parameter that `codes` names is NaN, dL/dx where x, a parameter or dL/dq is.

    Args:
      codes: elementwise forward value.
      derivative: elementwise factor; it reads the parameters by name.  The parameters are arrays to jit: a new value
        does not recompile.  They may have any shape that broadcasts to x and arrive with x's rank.
      parameter_derivatives: name of a parameter -> its elementwise factor.  A parameter that is not named receives a
        zero cotangent.

    Returns:
      The estimator, called as ``estimator(x, **parameters)``; its output has x's shape and dtype.  It raises
      ``TypeError`` for an x that is not floating point and for parameters that are not those of the derivative,
      ``ValueError`` for one that does not broadcast to x.

    >>> step = make_estimator(lambda x, width: x > 0, lambda x, width: jnp.abs(x) < width)
    >>> jax.value_and_grad(lambda x: step(x, width=2.0))(1.0)
    (Array(1., dtype=float32), Array(1., dtype=float32))
    """
    factors = dict(parameter_derivatives or {})
    compared = inspect.signature(codes).parameters
    check_names = _check_of_names(derivative)

    @jax.custom_vjp
    def quantize(x, parameters):
        found = jnp.asarray(codes(widened(x), **parameters), x.dtype)
        return _keep_nans(x, *(value for name, value in parameters.items() if name in compared), found)

    def forward(x, parameters):
        return quantize(x, parameters), (x, parameters)

    def backward(residuals, cotangent):
        x, parameters = residuals
        wide, cotangent = widened(x), widened(cotangent)
        keep_nans = partial(_keep_nans, wide, *parameters.values())

        def pulled_back(factor):
            slope = jnp.asarray(factor(wide, **parameters))
            if slope.dtype == bool:
                return jnp.where(slope, cotangent, keep_nans(0 * cotangent))
            return cotangent * keep_nans(slope.astype(cotangent.dtype))

        dparameters = {
            name: _summed_to(pulled_back(factors[name]), value.shape) if name in factors else jnp.zeros_like(value)
            for name, value in parameters.items()
        }
        return pulled_back(derivative).astype(x.dtype), dparameters

    quantize.defvjp(forward, backward)

    @wraps(derivative)
    def estimator(x, **parameters):
        require_floating("x", x)
        check_names(parameters)
        x = jnp.asarray(x)
        return quantize(x, {name: _aligned(name, value, x, sum_dtype(x)) for name, value in parameters.items()})

    return estimator


def make_sign(
    derivative: Elementwise, *, parameter_derivatives: Mapping[str, Elementwise] | None = None
) -> EstimatorFunction:
    r"""A sign estimator from its derivative.

    Forward   q(x) = sign(x)
    Backward  (chosen)  dL/dx := dL/dq * derivative(x, **parameters)

    Args:
      derivative: elementwise factor, called with x and the keyword parameters of the estimator.  The parameters are
        arrays to jit: a new value does not recompile.
      parameter_derivatives: for a parameter that is trained, its name -> the derivative by it, called alike.  The
        others receive a zero cotangent.

    Returns:
      The estimator, called as ``estimator(x, **parameters)``; its output has x's shape and dtype.  Wherever the name
      of an estimator is taken it is taken too; with a schedule or a trained parameter, as an :class:`Estimator`.

    >>> triangle_sign = make_sign(lambda x, width: jnp.maximum(0.0, 1.0 - jnp.abs(x) / width))
    >>> jax.grad(lambda x: triangle_sign(x, width=2.0))(1.0)
    Array(0.5, dtype=float32)
    """
    estimator = make_estimator(lambda x, **_: sign(x), derivative, parameter_derivatives=parameter_derivatives)
    return wraps(derivative)(estimator)

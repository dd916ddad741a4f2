r"""Arithmetic of mixed precision: products in the narrower dtype, sums, scales and parameters in float32.

Activations may be bfloat16; parameters, statistics and sums stay in float32.  Codes, small integers, are exact in both,
and so are their sums in float32 up to 2^24.  With float32 throughout nothing here changes or adds an operation.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from bnn_jax.precision import promoted, sum_dtype


def narrower(x: Float[Array, "..."], kernel: Float[Array, "..."]) -> jnp.dtype:
    """The dtype of the two in which they are multiplied.

    >>> narrower(jnp.ones(2, jnp.bfloat16), jnp.ones(2)).name
    'bfloat16'
    """
    return x.dtype if promoted(x.dtype, kernel.dtype) == kernel.dtype else kernel.dtype


def activation_dtype(x: Array, dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which a layer that sums in `dtype` returns what it makes of x: x's own, if that is narrower.

    >>> [activation_dtype(jnp.zeros(2, kind), jnp.float32).name for kind in ("bfloat16", "float32", "uint8")]
    ['bfloat16', 'float32', 'float32']
    """
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and promoted(x.dtype, dtype) == dtype
    return x.dtype if narrow else jnp.dtype(dtype)


def holds(dtype: jnp.dtype, values: tuple[int, ...]) -> bool:
    """Whether all `values` are exact in `dtype`.

    >>> holds(jnp.bfloat16, (0, 255)), holds(jnp.bfloat16, (0, 257))
    (True, False)
    """
    return bool((np.asarray(values, dtype).astype(np.float64) == np.asarray(values, np.float64)).all())


def dot(
    x: Float[Array, "*stack rows inputs"], kernel: Float[Array, "*stack inputs features"]
) -> Float[Array, "*stack rows features"]:
    r"""x @ kernel, multiplied in the narrower of their dtypes and summed in float32 at least.

    Forward   y = x @ kernel, exact for integers up to 2^24
    Backward  exact: dL/dx in x's dtype, dL/dkernel in the kernel's, summed in float32 too; dL/dy is rounded to the
              narrower dtype before

    >>> dot(jnp.ones((1, 1000), jnp.bfloat16), jnp.ones((1000, 1)))
    Array([[1000.]], dtype=float32)
    """
    return x @ kernel if x.dtype == sum_dtype(x, kernel) == kernel.dtype else _mixed_dot(x, kernel, None)


def byte_dot(
    x: Float[Array, "batch inputs"], kernel: Float[Array, "inputs features"]
) -> Float[Array, "batch features"]:
    """x @ kernel of integers from -128 to 127 with sums up to 2^24: as int8 with int32 sums, on CPU as float32.

    Both are exact.  There is no gradient but on CPU: it is for frozen layers.

    >>> byte_dot(jnp.array([[127.0, -3.0]]), jnp.array([[1.0], [-1.0]]))
    Array([[130.]], dtype=float32)
    """

    dtype = sum_dtype(x, kernel)

    def of_bytes(x, kernel):
        x, kernel = (operand.astype(jnp.int8) for operand in (x, kernel))
        return jnp.matmul(x, kernel, preferred_element_type=jnp.int32).astype(dtype)

    return lax.platform_dependent(x, kernel, cpu=dot, default=of_bytes)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _mixed_dot(x, kernel, dtype):
    dtype = sum_dtype(x, kernel) if dtype is None else dtype
    operands = (operand.astype(narrower(x, kernel)) for operand in (x, kernel))
    return jnp.matmul(*operands, preferred_element_type=dtype)


def _mixed_dot_backward(dtype, residuals, g):
    x, kernel = residuals
    g = g.astype(narrower(x, kernel))
    return _mixed_dot(g, kernel.mT, x.dtype), _mixed_dot(x.mT, g, kernel.dtype)


_mixed_dot.defvjp(lambda x, kernel, dtype: (_mixed_dot(x, kernel, dtype), (x, kernel)), _mixed_dot_backward)

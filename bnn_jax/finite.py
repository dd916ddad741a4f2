"""Numbers that are not finite: codes that keep them, where the first of them is, the refusal of a tree that has one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Num


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every number of a tree is finite; may be traced.  Leaves that are not floating point always are.

    >>> all_finite({"kernel": jnp.ones(3), "steps": jnp.arange(2)}), all_finite(jnp.array([jnp.nan]))
    (Array(True, dtype=bool), Array(False, dtype=bool))
    """
    inexact = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return jnp.array([jnp.isfinite(leaf).all() for leaf in inexact] or [True]).all()


def keep_nan(x: Num[Array, "..."], values: Num[Array, "..."]) -> Num[Array, "..."]:
    """Return `values`, but NaN where `x` is: a comparison answers False for NaN, and would give it some code.

    Args:
      x: broadcasts to the values.
      values: floating point.

    >>> x = jnp.array([-2.0, jnp.nan])
    >>> keep_nan(x, jnp.where(x < 0, -1.0, 1.0))
    Array([-1., nan], dtype=float32)
    """
    return jnp.where(jnp.isnan(x), jnp.asarray(jnp.nan, values.dtype), values)


def leaf_name(path: tuple[Any, ...]) -> str:
    """Name a leaf by its path, as "stage1_block1/conv1/latent_kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def first_non_finite(tree: Any) -> str | None:
    """Path, kind and count of the numbers of the first leaf that has some that are not finite; None if all are.

    Traced leaves and those without numbers have nothing to check.

    >>> first_non_finite({"dense": {"bias": jnp.zeros(2), "kernel": jnp.array([1.0, jnp.nan, jnp.inf])}})
    'dense/kernel (1 NaN and 1 infinite of 3)'
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.core.Tracer) or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            continue
        values = np.asarray(leaf)
        counts = {"NaN": int(np.isnan(values).sum()), "infinite": int(np.isinf(values).sum())}
        if any(counts.values()):
            told = f"{' and '.join(f'{n} {kind}' for kind, n in counts.items() if n)} of {values.size}"
            return f"{leaf_name(path)} ({told})" if path else told
    return None


def require_finite(argument: str, tree: Any, advice: str, *, error: type[Exception] = ValueError) -> None:
    """Refuse a tree that holds a number that is not finite.

    Args:
      argument: its name, as the user typed it.
      tree: any pytree of arrays.
      advice: the way out.
      error: what is raised; it names argument, leaf, kind, count and the way out.

    >>> require_finite("variables", {"params": {"dense": {"bias": jnp.array([jnp.nan])}}}, "train again")
    Traceback (most recent call last):
    ValueError: `variables` must be finite; got params/dense/bias (1 NaN of 1); train again
    """
    found = first_non_finite(tree)
    if found is not None:
        raise error(f"`{argument}` must be finite; got {found}; {advice}")

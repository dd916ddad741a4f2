r"""Training a part of the parameters: the rest is no part of the optimizer's problem."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
import optax

from bnn_jax.types import Params


def path_name(path: tuple) -> str:
    """The keys of a leaf's path with slashes between them, as stage1_block1/norm1/scale."""
    return "/".join(str(getattr(key, "key", key)) for key in path)


def is_trained(params: Params, patterns: Sequence[str], *, argument: str = "train_only") -> Params:
    """A tree of booleans: True where the path matches one of the shell-style `patterns`.

    Raises:
      ValueError: if a pattern matches no parameter.

    >>> is_trained({"norm": {"scale": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}, ["norm/*"])
    {'head': {'kernel': False}, 'norm': {'scale': True}}
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"`{argument}` (={pattern!r}) matches none of the {len(names)} parameters; their names are as "
                f"{', '.join(names[:4])}, and * stands for any part of one"
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(fnmatchcase(path_name(path), pattern) for pattern in patterns), params
    )


def train_only(
    optimizer: optax.GradientTransformation, patterns: Sequence[str]
) -> optax.GradientTransformationExtraArgs:
    r"""`optimizer` on the parameters whose path matches a pattern; the others get updates of exactly zero.

    The optimizer does not see the frozen parameters: they have no share in norms, dual searches or decays, and no
    state.  Its state is its own, not wrapped, and an `oracle` of :func:`bnn_jax.optim.deep_frank_wolfe` is asked about
    displacements that are zero at the frozen parameters, so the step size is that of the problem in the trained ones.
    Running statistics of batch normalization are no parameters: those of frozen layers go on moving.

    Args:
      optimizer: any; called with the extra arguments of the update.
      patterns: shell-style, of paths as `stage1_block1/norm1/scale`; `*` also stands for slashes.

    Raises:
      ValueError: on init or update, if a pattern matches no parameter.

    >>> params = {"norm": {"scale": jnp.ones(1)}, "head": {"kernel": jnp.ones(1)}}
    >>> optimizer = train_only(optax.sgd(0.5), ["norm/*"])
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> print(updates["norm"]["scale"], updates["head"]["kernel"])
    [-0.5] [0.]
    """
    inner = optax.with_extra_args_support(optimizer)

    def only(tree: Params, trained: Params) -> Params:
        return jax.tree.map(lambda keep, leaf: leaf if keep else optax.MaskedNode(), trained, tree)

    def with_zeros(partial: Params, trained: Params, like: Params) -> Params:
        return jax.tree.map(lambda keep, leaf, x: leaf if keep else jnp.zeros_like(x), trained, partial, like)

    def init_fn(params):
        return inner.init(only(params, is_trained(params, patterns)))

    def update_fn(updates, state, params=None, **extra):
        trained = is_trained(updates, patterns)
        if extra.get("oracle") is not None:
            whole = extra["oracle"]

            def oracle(displacement):
                gradient, offset = whole(with_zeros(displacement, trained, updates))
                return only(gradient, trained), offset

            extra["oracle"] = oracle
        of_trained = None if params is None else only(params, trained)
        moved, state = inner.update(only(updates, trained), state, of_trained, **extra)
        return with_zeros(moved, trained, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)

r"""Step functions with a chosen derivative, and the tables that name them.

The true derivative of a step is zero almost everywhere, so each function here has two formulas: the forward value, its
integer codes, and the backward factor that stands in for the derivative.  Most are the two-valued :func:`sign`.
A new one is its derivative: ``my_sign = make_sign(lambda x: ...)``.
"""

from collections.abc import Callable

from jaxtyping import Array

from bnn_jax.errors import unknown_name
from bnn_jax.estimators.definition import make_estimator, make_sign, sign
from bnn_jax.estimators.levels import coupled_ternary, heaviside, ternary
from bnn_jax.estimators.scheduled import (
    dir_sign,
    ede_schedule,
    ede_sign,
    fda_schedule,
    fda_sign,
    gumbel_schedule,
    gumbel_sign,
    rbnn_schedule,
    rbnn_sign,
)
from bnn_jax.estimators.signs import (
    approx_sign,
    cosh_sign,
    identity_sign,
    long_tailed_sign,
    state_aware_sign,
    ste_sign,
    swish_sign,
    tanh_sign,
)
from bnn_jax.types import Estimator

ESTIMATORS: dict[str, Estimator] = {
    "identity_sign": identity_sign,
    "ste_sign": ste_sign,
    "approx_sign": approx_sign,
    "tanh_sign": tanh_sign,
    "cosh_sign": cosh_sign,
    "swish_sign": swish_sign,
    "ede_sign": ede_sign,
    "rbnn_sign": rbnn_sign,
    "gumbel_sign": gumbel_sign,
    "dir_sign": dir_sign,
    "long_tailed_sign": long_tailed_sign,
    "fda_sign": fda_sign,
    "state_aware_sign": state_aware_sign,
    "heaviside": heaviside,
    "coupled_ternary": coupled_ternary,
    "ternary": ternary,
}

CODE_SETS: dict[str, tuple[int, ...]] = {
    **{name: (-1, 1) for name in ESTIMATORS if name.endswith("_sign")},
    "heaviside": (0, 1),
    "coupled_ternary": (0, 1, 2),
    "ternary": (-1, 0, 1),
}
"""The values that the estimator's output can have."""

ESTIMATOR_SCHEDULES: dict[str, Callable[..., dict[str, Array]]] = {
    "ede_sign": ede_schedule,
    "rbnn_sign": rbnn_schedule,
    "gumbel_sign": gumbel_schedule,
    "dir_sign": ede_schedule,
    "fda_sign": fda_schedule,
}
"""progress in [0, 1] -> the parameters of the estimator at that point of training; the others have no schedule."""

STOCHASTIC: frozenset[str] = frozenset({"gumbel_sign"})
"""The estimators that take a random `key`."""

TRAINABLE: dict[str, tuple[str, ...]] = {
    "swish_sign": ("beta",),
    "heaviside": ("width", "threshold"),
}
"""The parameters of an estimator that receive a gradient; all others receive zero."""


def estimator_named(name: str) -> Estimator:
    """The entry of ESTIMATORS.

    Raises:
      ValueError: for an unknown `name`, with the nearest known one.

    >>> estimator_named("ste_sign") is ste_sign
    True
    """
    if name not in ESTIMATORS:
        raise unknown_name("estimator", name, ESTIMATORS)
    return ESTIMATORS[name]


__all__ = [
    "CODE_SETS",
    "ESTIMATORS",
    "ESTIMATOR_SCHEDULES",
    "STOCHASTIC",
    "TRAINABLE",
    "approx_sign",
    "cosh_sign",
    "coupled_ternary",
    "dir_sign",
    "ede_schedule",
    "ede_sign",
    "estimator_named",
    "fda_schedule",
    "fda_sign",
    "gumbel_schedule",
    "gumbel_sign",
    "heaviside",
    "identity_sign",
    "long_tailed_sign",
    "make_estimator",
    "make_sign",
    "rbnn_schedule",
    "rbnn_sign",
    "sign",
    "state_aware_sign",
    "ste_sign",
    "swish_sign",
    "tanh_sign",
    "ternary",
]

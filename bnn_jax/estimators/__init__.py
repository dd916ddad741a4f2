r"""Step functions with a chosen derivative, and the table that names them.

The true derivative of a step is zero almost everywhere, so each function here has two formulas: the forward value, its
integer codes, and the backward factor that stands in for the derivative.  Most are the two-valued :func:`sign`.
A new one is its derivative: ``my_sign = make_sign(lambda x: ...)``.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from bnn_jax.checks import look_up, require
from bnn_jax.estimators.definition import Estimator, EstimatorLike, is_negative, make_estimator, make_sign, sign
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

ESTIMATORS: dict[str, Estimator] = {
    "identity_sign": Estimator(identity_sign),
    "ste_sign": Estimator(ste_sign),
    "approx_sign": Estimator(approx_sign),
    "tanh_sign": Estimator(tanh_sign),
    "cosh_sign": Estimator(cosh_sign),
    "swish_sign": Estimator(swish_sign, trainable=("beta",)),
    "ede_sign": Estimator(ede_sign, schedule=ede_schedule),
    "rbnn_sign": Estimator(rbnn_sign, schedule=rbnn_schedule, input_schedule=partial(rbnn_schedule, activations=True)),
    "gumbel_sign": Estimator(gumbel_sign, schedule=gumbel_schedule, stochastic=True),
    "dir_sign": Estimator(dir_sign, schedule=ede_schedule),
    "long_tailed_sign": Estimator(long_tailed_sign),
    "fda_sign": Estimator(fda_sign, schedule=fda_schedule),
    "state_aware_sign": Estimator(state_aware_sign),
    "heaviside": Estimator(heaviside, code_set=(0, 1), trainable=("width", "threshold")),
    "coupled_ternary": Estimator(coupled_ternary, code_set=(0, 1, 2)),
    "ternary": Estimator(ternary, code_set=(-1, 0, 1)),
}


def as_estimator(estimator: EstimatorLike) -> Estimator:
    """Return the record of an estimator.

    Args:
      estimator: a name in ESTIMATORS, a record, or a function x -> codes.  A function of the table has the table's
        record, and so has a functools.partial of one or of a record, with the partial as its function; any other has
        the codes -1/+1, no schedule and nothing to train: give an :class:`Estimator` for more.

    Raises:
      ValueError: for an unknown name (the nearest is named), what is none of the three, or a partial that fixes what
        training sets.

    >>> as_estimator("ede_sign") is as_estimator(ede_sign) is ESTIMATORS["ede_sign"]
    True
    >>> as_estimator(make_sign(lambda x: 1.0)).code_set, as_estimator(partial(heaviside, width=2.0)).code_set
    ((-1, 1), (0, 1))
    """
    estimator = look_up("estimator", estimator, ESTIMATORS)
    if isinstance(estimator, Estimator):
        return estimator
    require("estimator", estimator, callable(estimator), "must be a name, an Estimator or a function x -> codes")
    function, fixed = estimator, {}
    while (record := _known_record(function)) is None and isinstance(function, partial):
        function, fixed = function.func, {**function.keywords, **fixed}
    if record is None:
        return Estimator(estimator)
    _check_fixed(record, fixed)
    if function is estimator:
        return record
    # A record's own signature hides the names of its function's parameters.
    return record._replace(apply=partial(record.apply, **fixed) if isinstance(function, Estimator) else estimator)


def _known_record(function: Callable) -> Estimator | None:
    """The record of a function of the table; a record's own is itself."""
    records = (record for record in ESTIMATORS.values() if getattr(record, "apply", None) is function)
    return function if isinstance(function, Estimator) else next(records, None)


def _check_fixed(record: Estimator, fixed: Mapping[str, Any]) -> None:
    """Refuse a partial of an estimator that fixes what training sets.

    Raises:
      ValueError: naming it.
    """
    schedules = (record.schedule, record.input_schedule) if fixed else ()
    of_training = {name for schedule in schedules if schedule for name in schedule(0.0)}
    of_training |= {"key"} if record.stochastic else set()
    for name in fixed:
        rule = "of an estimator must not be fixed by a partial, for training sets it"
        advice = "`Estimator` of the partial has no schedule and no randomness"
        require(name, fixed[name], name not in of_training, rule, advice)


def of_inputs(estimator: EstimatorLike) -> Estimator:
    """The record of an estimator as activations use it: its schedule is that of activations, where they have one.

    >>> float(of_inputs("rbnn_sign").schedule(0.0)["t"]), round(float(as_estimator("rbnn_sign").schedule(0.0)["t"]), 2)
    (1.0, 0.01)
    """
    record = as_estimator(estimator)
    return record if record.input_schedule is None else record._replace(schedule=record.input_schedule)


__all__ = [
    "ESTIMATORS",
    "Estimator",
    "EstimatorLike",
    "approx_sign",
    "as_estimator",
    "cosh_sign",
    "coupled_ternary",
    "dir_sign",
    "ede_schedule",
    "ede_sign",
    "fda_schedule",
    "fda_sign",
    "gumbel_schedule",
    "gumbel_sign",
    "heaviside",
    "identity_sign",
    "is_negative",
    "long_tailed_sign",
    "make_estimator",
    "make_sign",
    "of_inputs",
    "rbnn_schedule",
    "rbnn_sign",
    "sign",
    "state_aware_sign",
    "ste_sign",
    "swish_sign",
    "tanh_sign",
    "ternary",
]

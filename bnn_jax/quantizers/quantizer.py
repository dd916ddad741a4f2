r"""The form in which layers take quantizers: functions, and what they want to be called with."""

import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array

from bnn_jax.checks import require
from bnn_jax.errors import unknown_name
from bnn_jax.estimators import Estimator, EstimatorLike, as_estimator, of_inputs
from bnn_jax.quantizers.codes import Bases
from bnn_jax.types import Key

State: TypeAlias = dict[str, Array]

CodeSet: TypeAlias = Sequence[int] | tuple[Sequence[int], ...]
"""The values of the codes of each base in evaluation; where the bases differ, a tuple with one set for each."""


class Quantizer(NamedTuple):
    """A quantizer as a layer uses it.

    Attributes:
      apply: (x, **parameters, **wanted) -> Bases; with a state, (x, state, **parameters, **wanted) -> (Bases, state).
      init: (key, x) -> dict of the quantizer's own learned parameters; None where it has none.
      init_state: (key, x) -> dict of arrays that training carries along but does not differentiate, as running
        averages; None where it has none.  Evaluation discards the new state.
      wants: which of these `apply` takes by keyword: "train" (bool), "progress" (share of the training done, a scalar
        in [0, 1], for schedules) and "key" (fresh in every training step; None in evaluation, which is deterministic).
      code_set: the values that the codes of each base may take in evaluation, in increasing order; a tuple of such
        sets, one a base, where they differ.  Sizes and operations are counted by it.  () where evaluation has real
        numbers in the place of codes.
    """

    apply: Callable[..., Any]
    init: Callable[[Key, Array], dict[str, Array]] | None = None
    init_state: Callable[[Key, Array], State] | None = None
    wants: tuple[str, ...] = ()
    code_set: CodeSet = (-1, 1)


def full_precision() -> None:
    """No quantizer: the values stay real."""


def stateless(function: Callable[..., Bases], *, code_set: CodeSet = (-1, 1), **options) -> Quantizer:
    """The quantizer of a plain function x -> :class:`Quantized` that has no parameters of its own.

    Args:
      function: takes `options` by keyword.
      code_set: the values of its codes, see :class:`Quantizer`.
      **options: of `function`.

    Raises:
      ValueError: for an option that the function does not take; the nearest is named.
    """
    check_option_names(function, options)
    return Quantizer(apply=partial(function, **options), code_set=code_set)


def of_bits(
    function: Callable[..., Bases], code_set: Callable[[int], CodeSet], *, bits: int = 2, **options
) -> Quantizer:
    """:func:`stateless` for a function of `bits`, which decide the codes.

    Args:
      function: takes `bits` and `options` by keyword.
      code_set: bits -> the values of the codes.
      bits: of a code.
      **options: of `function`.

    Raises:
      ValueError: for an option that the function does not take (the nearest is named), or if `bits` is no whole number
        of at least 1.
    """
    check_option_names(function, options)
    return stateless(function, code_set=code_set(bits), bits=bits, **options)


def with_estimator(
    function: Callable[..., Any],
    estimator: EstimatorLike = "ste_sign",
    *,
    trainable: bool = False,
    init: Callable[[Key, Array], dict[str, Array]] | None = None,
    init_state: Callable[[Key, Array], State] | None = None,
    wants: tuple[str, ...] = (),
    code_set: CodeSet | None = None,
    factory_options: tuple[str, ...] = (),
    **options,
) -> Quantizer:
    """The quantizer of a function (x[, state], *, estimator, ...) -> Bases[, state], with an estimator of any kind.

    An estimator with a schedule follows the progress of training, a stochastic one gets a fresh key in every step.

    Args:
      function: takes the estimator by keyword, and so its learned parameters and what it wants.
      estimator: name in ESTIMATORS, record, or function x -> codes.
      trainable: learn the estimator's trainable parameter, from the given value on.
      init: (key, x) -> the learned parameters of `function`; the estimator's are added.
      init_state: (key, x) -> the state of `function`.
      wants: what `function` itself takes of "train", "progress" and "key".
      code_set: the values of the codes, see :class:`Quantizer`; by default those of the estimator.
      factory_options: names of options that the caller takes itself, for the error that names the nearest.
      **options: keyword-only ones of `function`; of the estimator, whose schedule they go before; and of its schedule.

    Raises:
      ValueError: for an unknown estimator or option (the nearest is named), one that has nothing to train, or an option
        that the schedule refuses.
    """
    record, parameters = as_estimator(estimator), inspect.signature(function).parameters
    own = _keyword_only(function) - {"estimator", *wants}
    of_schedule = _keyword_only(record.schedule) - _keyword_only(record.apply) - own if record.schedule else set()
    bounds = {name: value for name, value in options.items() if name in of_schedule}
    fixed = {name: value for name, value in options.items() if name not in own | of_schedule}
    check_option_names(record, fixed, also=own | of_schedule | {"trainable", *factory_options})
    options = {name: value for name, value in options.items() if name in own}
    if bounds:
        record.schedule(0.0, **bounds)
    learned = record.trainable if trainable else ()
    require("trainable", trainable, learned or not trainable, "needs an estimator with a trainable parameter")

    def all_parameters(key, x):
        defaults = inspect.signature(record.apply).parameters
        trained = {name: jnp.asarray(fixed.get(name, defaults[name].default), x.dtype) for name in learned}
        return (init(key, x) if init else {}) | trained

    def apply(x, *state, **given):
        progress = given.get("progress")
        scheduled = {} if record.schedule is None or progress is None else record.schedule(progress, **bounds)
        trained = {name: given[name] for name in learned if name in given}
        drawn = {"key": given.get("key")} if record.stochastic else {}
        own_arguments = {name: value for name, value in given.items() if name in parameters}
        estimate = partial(_codes_of, record.apply, **(scheduled | fixed | trained | drawn))
        return function(x, *state, estimator=estimate, **options, **own_arguments)

    of_estimator = ("progress",) * (record.schedule is not None) + ("key",) * record.stochastic
    return Quantizer(
        apply=apply,
        init=all_parameters if init or learned else None,
        init_state=init_state,
        wants=tuple(dict.fromkeys((*wants, *of_estimator))),
        code_set=record.code_set if code_set is None else code_set,
    )


def require_signs(estimator: EstimatorLike) -> None:
    """Refuse an estimator whose codes are others than -1 and +1, for a quantizer that makes these itself.

    Raises:
      ValueError: naming its codes.
    """
    codes = as_estimator(estimator).code_set
    require("estimator", codes, codes == (-1, 1), "must have the codes (-1, 1) here", "ste_sign has them")


def with_input_estimator(
    function: Callable[..., Any], estimator: EstimatorLike = "ste_sign", **options: Any
) -> Quantizer:
    """:func:`with_estimator` for activations: an estimator with a schedule of their own follows that one."""
    return with_estimator(function, of_inputs(estimator), **options)


def _codes_of(estimator: Callable, x: Array, **parameters: Any) -> Array:
    """The codes of an estimator, which a quantizer is not."""
    codes = estimator(x, **parameters)
    if isinstance(codes, tuple):
        name = getattr(estimator, "__name__", estimator)
        raise ValueError(
            f"`{name}` is given as an estimator, which returns codes, but returns {type(codes).__name__}; if it is a "
            f"quantizer say which codes it has: stateless({name}, code_set=(-1, 1))"
        )
    return codes


def check_option_names(function: Callable, options: Mapping[str, Any], *, also: Set[str] = frozenset()) -> None:
    """Raise a ValueError that names the nearest option, if `function` does not take one of `options`."""
    parameters = _parameters(function)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = ({p.name for p in parameters[takes_array(function) :]} | also) - {"key"}
    for option in options:
        require("option", option, bool(known), "is given to what takes no options", "leave it out")
        if option not in known:
            raise unknown_name("option", option, known)


def takes_array(function: Callable) -> bool:
    """Whether a function has an array for its first argument, as estimators have, and factories of quantizers have not.

    >>> takes_array(lambda x, *, width=1.0: x), takes_array(lambda *, bits=2: None)
    (True, False)
    """
    first = next(iter(_parameters(function)), None)
    return first is not None and first.kind is first.POSITIONAL_OR_KEYWORD and first.default is first.empty


def _keyword_only(function: Callable) -> set[str]:
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def _parameters(function: Callable) -> list[inspect.Parameter]:
    return list(inspect.signature(function.apply if isinstance(function, Estimator) else function).parameters.values())

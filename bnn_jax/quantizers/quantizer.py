r"""The form in which layers take quantizers: functions, and what they want to be called with."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array

from bnn_jax.errors import unknown_name
from bnn_jax.estimators import CODE_SETS, ESTIMATOR_SCHEDULES, STOCHASTIC, TRAINABLE, estimator_named
from bnn_jax.quantizers.codes import Bases
from bnn_jax.types import Estimator, Key

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


def stateless(function: Callable[..., Bases], *, code_set: CodeSet = (-1, 1), **options) -> Quantizer:
    """The quantizer of a plain function x -> :class:`Quantized` that has no parameters of its own.

    Args:
      function: takes `options` by keyword.
      code_set: the values of its codes, see :class:`Quantizer`.
      **options: of `function`.

    Raises:
      ValueError: for an option that the function does not take; the nearest is named.
    """
    check_options(function, options)
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
    check_options(function, options)
    return stateless(function, code_set=code_set(bits), bits=bits, **options)


def with_estimator(
    function: Callable[..., Bases],
    estimator: str | Estimator = "ste_sign",
    *,
    trainable: bool = False,
    code_set: CodeSet | None = None,
    **options,
) -> Quantizer:
    """The quantizer of a function (x, *, estimator, ...) -> Quantized, with an estimator of the table or one's own.

    An estimator with a schedule follows the progress of training, a stochastic one gets a fresh key in every step.

    Args:
      function: takes the estimator by keyword.
      estimator: name in ESTIMATORS, or a function x -> codes.
      trainable: learn the estimator's trainable parameter, from the given value on.
      code_set: the values of the codes, see :class:`Quantizer`; by default those of the estimator in CODE_SETS, and
        -1/+1 for an estimator of one's own.
      **options: of `function` and of the estimator; an estimator's parameter that is given has no schedule.

    Raises:
      ValueError: for an unknown estimator or option (the nearest is named), or one that has nothing to train.

    Reference: the schedules are those of the estimators.
    """
    name = estimator if isinstance(estimator, str) else getattr(estimator, "__name__", "")
    estimate = estimator_named(estimator) if isinstance(estimator, str) else estimator
    own = set(inspect.signature(function).parameters)
    fixed = {option: value for option, value in options.items() if option not in own}
    check_options(estimate, fixed, also=own)
    options = {option: value for option, value in options.items() if option in own}
    schedule = ESTIMATOR_SCHEDULES.get(name)
    learned = TRAINABLE.get(name, ()) if trainable else ()
    if trainable and not learned:
        raise ValueError(f"`trainable` (=True) needs an estimator with a trainable parameter; {name} has none")
    wants = ("progress",) * (schedule is not None) + ("key",) * (name in STOCHASTIC)

    def init(key, x):
        defaults = inspect.signature(estimate).parameters
        return {p: jnp.asarray(fixed.get(p, defaults[p].default), x.dtype) for p in learned}

    def apply(x, *, progress=None, key=None, **parameters):
        scheduled = {} if schedule is None or progress is None else schedule(progress)
        drawn = {"key": key} if name in STOCHASTIC else {}
        given = scheduled | fixed | parameters | drawn
        return function(x, estimator=partial(estimate, **given), **options)

    code_set = CODE_SETS.get(name, (-1, 1)) if code_set is None else code_set
    return Quantizer(apply=apply, init=init if learned else None, wants=wants, code_set=code_set)


def with_parameters(
    function: Callable[..., Any],
    init: Callable[[Key, Array], dict[str, Array]] | None,
    estimator: str | Estimator,
    estimator_options: dict[str, Any],
    *,
    init_state: Callable[[Key, Array], State] | None = None,
    wants: tuple[str, ...] = (),
    own_options: tuple[str, ...] = (),
    code_set: CodeSet | None = None,
) -> Quantizer:
    """The quantizer of a function (w[, state], *, estimator, ...) with learned parameters or a state of its own.

    As :func:`with_estimator`, which serves functions without any.

    Args:
      function: takes the estimator, its learned parameters and what it wants by keyword.
      init: (key, w) -> the learned parameters of `function`; the estimator's are added.
      estimator: name in ESTIMATORS, or a function x -> codes.
      estimator_options: options of the estimator, and `trainable`.
      init_state: (key, w) -> the state of `function`.
      wants: what `function` itself takes of "train", "progress" and "key".
      own_options: names of the method's other options, for the error that names the nearest.
      code_set: the values of the codes, by default the estimator's.

    Raises:
      ValueError: for an unknown estimator or option; the nearest is named.
    """
    estimate = estimator_named(estimator) if isinstance(estimator, str) else estimator
    check_options(estimate, estimator_options, also={"trainable", *own_options})
    codes = with_estimator(lambda x, *, estimator: estimator(x), estimator, **estimator_options)
    own = inspect.signature(function).parameters

    def all_parameters(key, w):
        return (init(key, w) if init else {}) | (codes.init(key, w) if codes.init else {})

    def apply(w, *state, **given):
        to_function = {name: value for name, value in given.items() if name in own}
        to_estimator = {name: value for name, value in given.items() if name not in own or name in codes.wants}
        return function(w, *state, estimator=lambda x: codes.apply(x, **to_estimator), **to_function)

    return Quantizer(
        apply=apply,
        init=all_parameters if init or codes.init else None,
        init_state=init_state,
        wants=tuple(dict.fromkeys((*wants, *codes.wants))),
        code_set=codes.code_set if code_set is None else code_set,
    )


def check_options(function: Callable, options: dict[str, Any], *, also: set[str] = frozenset()) -> None:
    """Raise a ValueError that names the nearest option, if `function` does not take one of `options`."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY} | also
    for option in options:
        if option not in known:
            raise unknown_name("option", option, (known | also) - {"x", "w", "key"})

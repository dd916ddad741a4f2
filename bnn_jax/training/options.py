"""Options of what a config names, an optimizer or a network, and their form on the command line."""

from collections.abc import Sequence
from typing import Annotated, TypeAlias

from tyro.constructors import PrimitiveConstructorSpec

Option: TypeAlias = int | float | bool | str | tuple[int, ...] | tuple[float, ...]


def options_from_words(words: Sequence[str]) -> dict[str, Option]:
    """Options as a command line gives them: a name, then its value; several numbers are a tuple.

    >>> options_from_words("stages 3 factor 0.2 order after sizes 1 2 flag True".split())
    {'stages': 3, 'factor': 0.2, 'order': 'after', 'sizes': (1, 2), 'flag': True}

    Raises:
      ValueError: for a name without a value, or a value without a name.
    """
    options, left = {}, [_literal(word) for word in words]
    while left:
        name = left.pop(0)
        if not isinstance(name, str):
            raise ValueError(f"{name} needs the name of an option before it")
        if not left:
            raise ValueError(f"the option {name} needs a value after it")
        values = [left.pop(0)]
        while left and all(type(value) in (int, float) for value in (values[0], left[0])):
            values.append(left.pop(0))
        if float in map(type, values):
            values = [float(value) for value in values]
        options[name] = values[0] if len(values) == 1 else tuple(values)
    return options


def _literal(word: str) -> int | float | bool | str:
    for kind in (int, float, {"True": True, "False": False}.__getitem__):
        try:
            return kind(word)
        except (ValueError, KeyError):
            pass
    return word


def _words_of(options: dict[str, Option]) -> list[str]:
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in options.items()}
    return [str(word) for name, several in values.items() for word in (name, *several)]


Options: TypeAlias = Annotated[
    dict[str, Option],
    PrimitiveConstructorSpec("*", "[OPTION VALUE ...]", options_from_words, lambda x: isinstance(x, dict), _words_of),
]
"""Keyword arguments of what another setting names."""

"""Options of what a config names, an optimizer or a network, and their form on the command line."""

from collections.abc import Callable, Sequence
from typing import Annotated, TypeAlias

from tyro.constructors import PrimitiveConstructorSpec

Option: TypeAlias = int | float | bool | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...] | Callable


def options_from_words(words: Sequence[str]) -> dict[str, Option]:
    """Options as a command line gives them: a name, then its value; several numbers are a tuple, words with commas too.

    >>> options_from_words("stages 3 factor 0.2 order after sizes 1 2 flag True".split())
    {'stages': 3, 'factor': 0.2, 'order': 'after', 'sizes': (1, 2), 'flag': True}
    >>> options_from_words("learning_rate 0.1 1 schedule constant,cosine".split())
    {'learning_rate': (0.1, 1.0), 'schedule': ('constant', 'cosine')}

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


def _literal(word: str) -> Option:
    if "," in word:
        return tuple(_literal(part) for part in word.split(","))
    for kind in (int, float, {"True": True, "False": False}.__getitem__):
        try:
            return kind(word)
        except (ValueError, KeyError):
            pass
    return word


def _words_of(options: dict[str, Option]) -> list[str]:
    words = []
    for name, value in options.items():
        several = value if isinstance(value, tuple) else (value,)
        numbers = all(type(one) in (int, float) for one in several)
        words += [name, *(map(str, several) if numbers else [",".join(map(str, several))])]
    return words


Options: TypeAlias = Annotated[
    dict[str, Option],
    PrimitiveConstructorSpec("*", "[OPTION VALUE ...]", options_from_words, lambda x: isinstance(x, dict), _words_of),
]
"""Keyword arguments of what another setting names."""

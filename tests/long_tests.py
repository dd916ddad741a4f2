"""Which parameters of a slow test are left to make test-full."""

from collections.abc import Iterable
from typing import Any

import pytest


def every_other(parameters: Iterable[Any], ids: Iterable[str] | None = None) -> list[Any]:
    """Parameters of which make test takes every other one, make test-full the rest."""
    parameters = [parameter if isinstance(parameter, tuple) else (parameter,) for parameter in parameters]
    names = [None] * len(parameters) if ids is None else list(ids)
    marks = [pytest.mark.full if number % 2 else () for number in range(len(parameters))]
    return [pytest.param(*p, id=name, marks=mark) for p, name, mark in zip(parameters, names, marks, strict=True)]

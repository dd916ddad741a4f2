"""A command line as a dataclass: tyro, with values shown as one types them."""

import dataclasses
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

import docstring_parser
import tyro
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
    UnsupportedTypeAnnotationError,
)

from bnn_jax.errors import leave_output

Arguments = TypeVar("Arguments")


def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | UnsupportedTypeAnnotationError | None:
    """`X | None` is shown and read as X, and the word None as None."""
    members = [member for member in typing.get_args(info.type) if member is not types.NoneType]
    if info.type_origin not in (typing.Union, types.UnionType) or info.type != members[0] | None:
        return None
    found = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(members[0], info.markers))
    if isinstance(found, UnsupportedTypeAnnotationError):
        return found
    return PrimitiveConstructorSpec(
        nargs=found.nargs if found.nargs in (1, "*") else (1, found.nargs),
        metavar=found.metavar,
        instance_from_str=lambda words: None if words == ["None"] else found.instance_from_str(words),
        is_instance=lambda value: value is None or found.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else found.str_from_instance(value),
        choices=found.choices and (*found.choices, "None"),
    )


def _several(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | UnsupportedTypeAnnotationError | None:
    """`tuple[X, ...]` of values of one word each is shown as [X ...]."""
    members = typing.get_args(info.type)
    if info.type_origin is not tuple or members[1:] != (...,):
        return None
    found = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(members[0], info.markers))
    if isinstance(found, UnsupportedTypeAnnotationError) or found.nargs != 1:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{found.metavar} ...]",
        instance_from_str=lambda words: tuple(found.instance_from_str([word]) for word in words),
        is_instance=lambda values: isinstance(values, tuple) and all(map(found.is_instance, values)),
        str_from_instance=lambda values: [word for value in values for word in found.str_from_instance(value)],
        choices=found.choices,
    )


def _explained(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A dataclass whose fields are explained by :func:`helps_of`."""
    if not dataclasses.is_dataclass(info.type):
        return None
    types, given = typing.get_type_hints(info.type, include_extras=True), isinstance(info.default, info.type)
    fields = [
        StructFieldSpec(
            field.name,
            types[field.name],
            getattr(info.default, field.name) if given else _default_of(field),
            lambda name=field.name: helps_of(info.type).get(name),
        )
        for field in dataclasses.fields(info.type)
    ]
    return StructConstructorSpec(info.type, tuple(fields))


def _default_of(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING_NONPROP if field.default is dataclasses.MISSING else field.default


@cache
def helps_of(owner: type) -> dict[str, str]:
    """The docstrings below the fields of a dataclass and its parents, each as one paragraph."""
    parents = [parent for parent in reversed(owner.__mro__) if dataclasses.is_dataclass(parent)]
    documented = [field for parent in parents for field in docstring_parser.parse_from_object(parent).params]
    return {field.arg_name: " ".join(field.description.split()) for field in documented if field.description}


REGISTRY = ConstructorRegistry()
REGISTRY.primitive_rule(_optional)
REGISTRY.primitive_rule(_several)
REGISTRY.struct_rule(_explained)


def read_command_line(
    arguments_type: type[Arguments],
    description: str | None,
    *,
    argv: Sequence[str] | None = None,
    default: Arguments | None = None,
) -> Arguments:
    """Read the options of a command; a malformed one ends the program with exit code 2, `--help` with 0.

    Args:
      arguments_type: dataclass with an option in each field.
      description: of the command, for `--help`, filled to the width of the terminal; lines that begin with "--" or two
        spaces stay lines.
      argv: what follows the command's name; None takes it from `sys.argv`.
      default: what the options change; None takes the defaults of the fields.
    """
    given = {} if default is None else {"default": default}
    shown = description and _filled(description)
    try:
        return tyro.cli(arguments_type, description=shown, args=argv, registry=REGISTRY, **given)
    except BrokenPipeError:  # Who reads the help has seen enough; nothing is left to be written.
        leave_output()
        sys.exit(141)


def _filled(text: str) -> str:
    width = min(shutil.get_terminal_size().columns, 120)
    # tyro joins a line that begins with a letter to the one before it.
    fill = textwrap.TextWrapper(width, subsequent_indent="  ", break_on_hyphens=False).fill
    return re.sub(r"((?:.|\n)+?)(\n\n|\n(?=--|  )|$)", lambda part: fill(part[1]) + part[2], text.strip())
